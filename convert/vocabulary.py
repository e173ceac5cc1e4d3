"""The tokenizer of a converted model."""

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from mlx_mla.data.tokenizer import (
    END_OF_TEXT,
    as_user_error,
    check_tokenizer,
    get_tokenizer,
    read_tokenizer,
    set_end_ids,
)
from mlx_mla.errors import UserError
from mlx_mla.files import read_json

from . import llama
from .foreign import ForeignCheckpoint
from .pickles import plain_values

CHARACTERS = "meta.pkl"
"""nanoGPT's file for a vocabulary of characters, with `stoi` and `itos`
(data/shakespeare_char/prepare.py)."""


def find_tokenizer(
    source: ForeignCheckpoint, choice: str | None, bpe_dir: Path | None
) -> PreTrainedTokenizerFast:
    """Find a tokenizer that has no more ids than the model has rows.

    Args:
        source: The checkpoint.
        choice: "bytes", "gpt2", or a folder or file with a tokenizer. None: the source's own
            tokenizer, or else GPT-2's.
        bpe_dir: Folder with GPT-2's encoder.json and vocab.bpe. None: tiktoken downloads them once
            if they are needed.

    Raises:
        UserError: If the files are missing or damaged, or the tokenizer has more ids than the
            model.
    """
    if choice is None and (own := _own(source)) is not None:
        return own
    if choice is None and source.config.family == "Llama":
        raise UserError(
            f"{source.name}: has no tokenizer.json; give --tokenizer a folder with the model's "
            "tokenizer"
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
            f"--tokenizer {choice}: neither a folder with tokenizer.json nor a {CHARACTERS}; give "
            "one, or gpt2, or bytes"
        )
    return _fitting(given, source, f"the tokenizer of {choice}")


def _own(source: ForeignCheckpoint) -> PreTrainedTokenizerFast | None:
    """Read the source's own tokenizer, which is inside or beside it; None if it has none."""
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
                f"{path}: has {len(tokenizer)} characters, but the model beside it has "
                f"{source.config.vocab_size} rows, so it belongs to another model; give "
                "--tokenizer gpt2"
            )
        return tokenizer
    own = _read(folder)
    return None if own is None else _fitting(own, source, f"the tokenizer of {folder}")


def _read(folder: Path) -> PreTrainedTokenizerFast | None:
    """Read a folder's tokenizer with all its special tokens; None if the folder has none."""
    is_whole = (folder / "tokenizer.json").is_file()
    config = folder / "config.json"
    model_type = read_json(config).get("model_type") if config.is_file() else None
    if is_whole and llama.is_llama(model_type):
        with as_user_error(f"{folder}: its tokenizer cannot be read"):
            # In transformers, model_type determines which special tokens are added to a text.
            read = AutoTokenizer.from_pretrained(str(folder))
        check_tokenizer(read, folder)
        return _rewrapped(read)
    if not is_whole and not all((folder / n).is_file() for n in ("vocab.json", "merges.txt")):
        return None
    is_gpt2 = model_type == "gpt2"
    if is_whole and not is_gpt2:
        return read_tokenizer(folder)
    with as_user_error(f"{folder}: its tokenizer cannot be read"):
        # transformers supplies what a GPT-2's files leave out, and OpenAI's leave out nearly all.
        read = (AutoTokenizer if is_gpt2 else GPT2TokenizerFast).from_pretrained(str(folder))
    check_tokenizer(read, folder)
    if is_whole:
        as_it_is = read_tokenizer(folder)
        if END_OF_TEXT not in as_it_is.get_vocab():  # transformers added it; no model has its row
            return as_it_is
    with as_user_error(f"{folder}: its tokenizer cannot be read"):
        return _rewrapped(read)


def _rewrapped(read: Any) -> PreTrainedTokenizerFast:
    """Convert a tokenizer to the class without defaults, which every tool reads the same way."""
    return PreTrainedTokenizerFast(
        tokenizer_object=read.backend_tokenizer,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=read.extra_special_tokens,
        chat_template=read.chat_template,
        **read.special_tokens_map,
    )


def characters(path: Path) -> PreTrainedTokenizerFast:
    """Read nanoGPT's `meta.pkl` as a tokenizer with one token per character. No code in it runs.

    Raises:
        UserError: If the file holds anything else.
    """
    values = plain_values(path)
    itos = values.get("itos") if isinstance(values, dict) else None
    if not isinstance(itos, dict) or not itos or set(itos) != set(range(len(itos))):
        raise UserError(
            f"{path}: has no itos with a character for every id; it is not a {CHARACTERS}"
        )
    tokens = [itos[i] for i in range(len(itos))]
    if not all(isinstance(t, str) and len(t) == 1 for t in tokens) or len(set(tokens)) < len(itos):
        raise UserError(f"{path}: itos is not a list of distinct characters; it is damaged")
    with as_user_error(f"{path}: its characters cannot make a tokenizer"):
        # Without an unknown token, a text with any other character is refused, as in nanoGPT.
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
            f"{source.name}: {which} has {len(tokenizer)} ids, but the model has {rows} rows; give "
            "--tokenizer bytes, gpt2, or a folder with the model's own tokenizer"
        )
    ends = [i for i in source.ends if i < len(tokenizer)]
    if tokenizer.eos_token_id is None and ends:
        token = tokenizer.convert_ids_to_tokens(ends[0])
        if token is not None:
            tokenizer.eos_token = token
    if tokenizer.eos_token_id in ends:  # otherwise they belong to another tokenizer
        set_end_ids(tokenizer, ends)
    return tokenizer
