"""The tokenizer that goes with a converted model."""

from pathlib import Path

from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

from mlx_mla import checkpoint
from mlx_mla.data.tokenizer import get_encoder
from mlx_mla.errors import UserError

from .foreign import ForeignCheckpoint


def find_tokenizer(
    source: ForeignCheckpoint, choice: str | None, bpe_dir: Path | None
) -> PreTrainedTokenizerFast:
    """A tokenizer with no more ids than the model has rows.

    Args:
        choice: "bytes", "gpt2" or a folder with tokenizer files. None: the source's own, else
            GPT-2's.
        bpe_dir: Folder with GPT-2's encoder.json and vocab.bpe. None: tiktoken downloads them once.

    Raises:
        UserError: If the files are missing or damaged, or the vocabulary is larger than the
            model's.
    """
    if choice is None and source.folder is not None:
        tokenizer = _read(source.folder)
        if tokenizer is not None and bpe_dir is None:
            return _fitting(tokenizer, source, f"the tokenizer of {source.folder}")
    if choice in (None, "gpt2", "bytes"):
        tokenizer = get_encoder("bytes" if choice == "bytes" else "gpt2", bpe_dir).fast_tokenizer()
        return _fitting(tokenizer, source, f"the {choice or 'gpt2'} tokenizer")
    tokenizer = _read(Path(choice)) if Path(choice).is_dir() else None
    if tokenizer is None:
        raise UserError(
            f"--tokenizer {choice}: no folder with tokenizer.json; give one, or gpt2, or bytes"
        )
    return _fitting(tokenizer, source, f"the tokenizer of {choice}")


def _read(folder: Path) -> PreTrainedTokenizerFast | None:
    if (folder / "tokenizer.json").is_file():
        return checkpoint.read_tokenizer(folder)
    if not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        return None
    try:
        slow = GPT2TokenizerFast.from_pretrained(str(folder))
    except Exception as e:  # tokenizers raises bare Exceptions
        raise UserError(
            f"{folder}: its tokenizer cannot be read ({str(e).splitlines()[0]})"
        ) from None
    eos = slow.eos_token
    return PreTrainedTokenizerFast(
        tokenizer_object=slow.backend_tokenizer, bos_token=eos, eos_token=eos, unk_token=None
    )


def _fitting(
    tokenizer: PreTrainedTokenizerFast, source: ForeignCheckpoint, which: str
) -> PreTrainedTokenizerFast:
    rows = source.config.vocab_size
    assert rows
    if len(tokenizer) > rows:
        raise UserError(
            f"{source.name}: {which} has {len(tokenizer)} ids, the model {rows} rows; "
            "give --tokenizer bytes, gpt2, or a folder with the model's own"
        )
    return tokenizer
