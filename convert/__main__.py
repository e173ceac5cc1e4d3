"""Convert checkpoints: `python -m convert SRC --out DIR`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Optional

from mlx_mla import checkpoint, cli
from mlx_mla.errors import UserError
from mlx_mla.weights import num_parameters

from tyro.conf import Positional

PROG = "python -m convert"


@dataclasses.dataclass(kw_only=True)
class ConvertCommand:
    """Turn a GPT-2 checkpoint into a model folder of this project, or back into Hugging Face's GPT-2.

    The source is recognised by its content; nothing in it is executed.
    """

    src: Positional[str]
    """Hugging Face hub id or folder of a GPT-2; .pt of MLA-Transformer, nanoGPT or build-nanogpt; model .bin of
    llm.c; or a run or model folder of this project."""
    out: Path
    """Folder to write; it must not exist yet, or be empty. It appears complete or not at all."""
    to: Optional[Literal["hf"]] = None
    """"hf" writes a plain GPT2LMHeadModel folder. None: a model folder with the source's own attention."""
    revision: Optional[str] = None
    """Branch, tag or commit, for a hub id."""
    tokenizer: Optional[str] = None
    """"gpt2", "bytes", or a folder with tokenizer.json. None: the source's own, else GPT-2's."""
    bpe_dir: Optional[Path] = None
    """Folder with GPT-2's encoder.json and vocab.bpe. None: tiktoken downloads them once."""
    n_head: Optional[int] = None
    """Heads, for a bare state dict of MLA-Transformer, which does not say. None: n_embd / 64."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    command = cli.parse(ConvertCommand, argv, PROG)
    _check_out(command.out)

    # These import torch and transformers, which --help and mistakes need not wait for.
    from convert import hf
    from convert.card import converted_card
    from convert.recognise import open_source
    from convert.vocabulary import find_tokenizer

    source = open_source(command.src, command.revision, command.n_head)
    tokenizer = find_tokenizer(source, command.tokenizer, command.bpe_dir)
    config = source.config
    print(f"{source.name}: {source.kind}, {config.attention}, {num_parameters(config):,} parameters")
    assert config.vocab_size
    if padding := config.vocab_size - len(tokenizer):
        print(f"vocabulary: {len(tokenizer)} tokens; {padding} rows of padding are kept, and never sampled")
    with checkpoint.atomic_folder(command.out) as folder:
        if command.to == "hf":
            hf.write_gpt2(folder, config, source.weights(), tokenizer)
        else:
            card = converted_card(config, source.name, source.kind, len(tokenizer), [])
            checkpoint.write_model(folder, config, source.weights(), tokenizer, card)
    print(f"wrote {command.out}")
    return 0


def _check_out(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: exists and is not empty; give another folder, or remove it")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")


if __name__ == "__main__":
    sys.exit(main())
