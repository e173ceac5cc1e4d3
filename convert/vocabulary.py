"""The tokenizer that goes with a converted model."""

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from mlx_mla.data.tokenizer import (
    END_OF_TEXT,
    check_tokenizer,
    get_tokenizer,
    read_tokenizer,
    set_end_ids,
    told,
)
from mlx_mla.errors import UserError
from mlx_mla.files import read_json

from . import llama
from .foreign import ForeignCheckpoint
from .pickles import plain_values

CHARACTERS = "meta.pkl"
"""nanoGPT's file of a vocabulary of characters (data/shakespeare_char/prepare.py): `stoi` and
`itos`."""


def find_tokenizer(
    source: ForeignCheckpoint, choice: str | None, bpe_dir: Path | None
) -> PreTrainedTokenizerFast:
    """A tokenizer with no more ids than the model has rows.

    Args:
        choice: "bytes", "gpt2", or a folder or file with a tokenizer. None: the source's own, else
            GPT-2's.
        bpe_dir: Folder with GPT-2's encoder.json and vocab.bpe, should they be needed. None:
            tiktoken downloads them once.

    Raises:
        UserError: If the files are missing or damaged, or the vocabulary is larger than the
            model's.
    """
    if choice is None and (own := _own(source)) is not None:
        return own
    if choice is None and source.config.family == "Llama":
        raise UserError(
            f"{source.name}: has no tokenizer.json; give --tokenizer a folder that has the model's"
        )
    if choice in (None, "gpt2", "bytes"):
        tokenizer = get_tokenizer(
            "bytes" if choice == "bytes" else "gpt2", bpe_dir
        ).fast_tokenizer()
        return _fitting(tokenizer, source, f"the {choice or 'gpt2'} tokenizer")
    path = Path(choice)
    given = _read(path) if path.is_dir() else characters(path) if path.is_file() else None
    if given is None:
        raise UserError(
            f"--tokenizer {choice}: no folder with tokenizer.json and no {CHARACTERS}; give one, "
            "or gpt2, or bytes"
        )
    return _fitting(given, source, f"the tokenizer of {choice}")


def _own(source: ForeignCheckpoint) -> PreTrainedTokenizerFast | None:
    """The tokenizer that lies in or beside the source."""
    folder = source.folder
    if folder is None:
        return None
    if source.kind == "nanoGPT":
        path = folder / CHARACTERS
        if not path.is_file():
            return None
        tokenizer = characters(path)
        if len(tokenizer) != source.config.vocab_size:
            raise UserError(
                f"{path}: has {len(tokenizer)} characters and the model beside it "
                f"{source.config.vocab_size} rows, so it is another model's; give --tokenizer gpt2"
            )
        return tokenizer
    own = _read(folder)
    return None if own is None else _fitting(own, source, f"the tokenizer of {folder}")


def _read(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a folder, with all its special tokens; None if it has none."""
    is_whole = (folder / "tokenizer.json").is_file()
    config = folder / "config.json"
    model_type = read_json(config).get("model_type") if config.is_file() else None
    if is_whole and model_type in llama.CONFIGS:
        with told(f"{folder}: its tokenizer cannot be read"):
            # transformers decides by model_type which special tokens are added to a text.
            read = AutoTokenizer.from_pretrained(str(folder))
        check_tokenizer(read, folder)
        return _rewrapped(read)
    if not is_whole and not all((folder / n).is_file() for n in ("vocab.json", "merges.txt")):
        return None
    is_gpt2 = model_type == "gpt2"
    if is_whole and not is_gpt2:
        return read_tokenizer(folder)
    with told(f"{folder}: its tokenizer cannot be read"):
        # transformers completes what a GPT-2's files leave out, and OpenAI's leave out nearly all.
        read = (AutoTokenizer if is_gpt2 else GPT2TokenizerFast).from_pretrained(str(folder))
    check_tokenizer(read, folder)
    if is_whole:
        as_it_is = read_tokenizer(folder)
        if END_OF_TEXT not in as_it_is.get_vocab():  # it was made up, and no model has its row
            return as_it_is
    with told(f"{folder}: its tokenizer cannot be read"):
        return _rewrapped(read)


def _rewrapped(read: Any) -> PreTrainedTokenizerFast:
    """The same tokenizer as the class that needs no defaults, so that every tool reads it alike."""
    return PreTrainedTokenizerFast(
        tokenizer_object=read.backend_tokenizer,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=read.extra_special_tokens,
        chat_template=read.chat_template,
        **read.special_tokens_map,
    )


def characters(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of nanoGPT's `meta.pkl`: a token for every character that its data had.

    Raises:
        UserError: If the file holds anything else; nothing in it is executed.
    """
    values = plain_values(path)
    itos = values.get("itos") if isinstance(values, dict) else None
    if not isinstance(itos, dict) or not itos or set(itos) != set(range(len(itos))):
        raise UserError(f"{path}: has no itos with a character for every id; it is no {CHARACTERS}")
    tokens = [itos[i] for i in range(len(itos))]
    if not all(isinstance(t, str) and len(t) == 1 for t in tokens) or len(set(tokens)) < len(itos):
        raise UserError(f"{path}: its itos is no list of different characters")
    with told(f"{path}: its characters cannot make a tokenizer"):
        # Without an unknown token, a text with another character is refused, as in nanoGPT.
        tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?m:.)"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, clean_up_tokenization_spaces=False
        )


def _fitting(
    tokenizer: PreTrainedTokenizerFast, source: ForeignCheckpoint, which: str
) -> PreTrainedTokenizerFast:
    rows = source.config.vocab_size
    assert rows
    if len(tokenizer) > rows:
        raise UserError(
            f"{source.name}: {which} has {len(tokenizer)} ids, the model {rows} rows; give "
            "--tokenizer bytes, gpt2, or a folder with the model's own"
        )
    ends = [i for i in source.ends if i < len(tokenizer)]
    if tokenizer.eos_token_id is None and ends:
        token = tokenizer.convert_ids_to_tokens(ends[0])
        if token is not None:
            tokenizer.eos_token = token
    if tokenizer.eos_token_id in ends:  # else they are another tokenizer's
        set_end_ids(tokenizer, ends)
    return tokenizer
