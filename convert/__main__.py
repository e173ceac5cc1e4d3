"""Convert checkpoints: `python -m convert SRC --out DIR`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Optional

from rich.console import Console
from tyro.conf import Positional

from mlx_mla import checkpoint, cli, files
from mlx_mla.errors import UserError, flag
from mlx_mla.locks import locked
from mlx_mla.model.config import InferenceDType, ModelConfig
from mlx_mla.model.weights import num_parameters

from .pickles import require_torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from .to_mla import Calibration

NO_END_OF_TEXT = (
    "vocabulary: has no end-of-text token, so generation ends at its length, needs a prompt, and "
    "evaluation is refused"
)

TOKENS = ("calibration_tokens", "held_out_tokens")

PROG = f"python -m {__package__}"


@dataclasses.dataclass(kw_only=True)
class ConvertCommand:
    """Convert a GPT-2-like or Llama-like checkpoint into a model folder of this project, with its
    attention converted to MLA if asked, or back into Hugging Face's format.

    The source is recognized by its content; nothing in it is executed.
    """

    src: Positional[str]
    """Hugging Face hub id or folder of a GPT-2, Llama, Mistral or Qwen2; .pt of MLA-Transformer,
    nanoGPT, build-nanogpt or minGPT; model .bin of llm.c; or a run or model folder of this
    project."""
    out: Path
    """Folder to write; it must be new or empty. It is written completely or not at all."""
    to: Optional[Literal["mla", "hf", "deepseek"]] = None
    """"mla" replaces multi-head attention with latent attention; "hf" writes a plain folder of
    GPT2LMHeadModel, LlamaForCausalLM or Qwen2ForCausalLM, whichever the model is; "deepseek" writes
    a model with latent attention, RoPE, RMSNorm and SwiGLU as a plain folder of
    DeepseekV3ForCausalLM. None: a model folder with the source's own attention."""
    rank: Optional[int] = None
    """--to mla: width of the latent. For GPT-2's attention, n_embd is exact and halves the cache,
    and n_embd / 2 quarters it. With RoPE a shared key, head_dim wide, is cached beside it."""
    rank_budget: Optional[int] = None
    """--to mla: average width instead, shared out among the layers by what each loses."""
    calibration: Optional[str] = None
    """--to mla: UTF-8 text file that resembles the model's use, or "builtin". Perplexity is
    measured on its last tenth. Without a text, only GPT-2's attention can be converted, with the
    latents that change its weights least."""
    calibration_tokens: Optional[int] = None
    """About how many tokens to calibrate on, from the text's beginning. None: 65,536. 0: all."""
    held_out_tokens: Optional[int] = None
    """About how many tokens of the text's last tenth to measure perplexity on. None: 32,768. 0:
    all."""
    dtype: Optional[InferenceDType] = None
    """Type of the stored weights, which other tools also compute in by default. None: the source's;
    float32 with --to mla."""
    device: Literal["auto", "cpu", "mps", "cuda"] = "auto"
    """Where PyTorch runs the model on the calibration text. "auto" takes a GPU where there is
    one."""
    revision: Optional[str] = None
    """Branch, tag or commit, for a hub id."""
    tokenizer: Optional[str] = None
    """"gpt2", "bytes", a folder with tokenizer.json, or nanoGPT's meta.pkl. None: the source's own,
    else GPT-2's."""
    bpe_dir: Optional[Path] = None
    """Folder with GPT-2's encoder.json and vocab.bpe, used if GPT-2's tokenizer is needed. None:
    tiktoken downloads them once."""
    n_head: Optional[int] = None
    """Number of heads, for a bare state dict, which does not record it. None: n_embd / 64 for
    MLA-Transformer; minGPT needs it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv, needs_reader=False)


def _main(argv: Sequence[str]) -> int:
    command = cli.parse(ConvertCommand, argv, PROG)
    _check_out(command.out)
    _check_flags(command)

    # These import transformers, which --help and mistakes need not wait for.
    from mlx_mla.card import converted_card

    from . import deepseek, hf, llama
    from .recognise import open_source
    from .to_mla import check_calibration, check_rank, convert_to_mla
    from .vocabulary import find_tokenizer

    source = open_source(command.src, command.revision, command.n_head)
    tokenizer = find_tokenizer(source, command.tokenizer, command.bpe_dir)
    config = source.config
    print(
        f"{source.name}: {source.kind}, {config.attention}, {num_parameters(config):,} parameters"
    )
    assert config.vocab_size
    if padding := config.vocab_size - len(tokenizer):
        fate = "left out" if command.to == "deepseek" else "kept, and never sampled"
        print(f"vocabulary: {len(tokenizer)} tokens; {padding} rows of padding are {fate}")
    if tokenizer.eos_token_id is None:
        print(NO_END_OF_TEXT)
    rank = None
    if command.to == "mla":
        rank = check_rank(config, command.rank, command.rank_budget)
        check_calibration(config, command.calibration)
    kept = "float32" if command.to == "mla" else source.dtype
    dtype = command.dtype or kept
    if command.to == "deepseek":
        deepseek.check_deepseek(config, dtype)
        if deepseek.is_biased(config):
            print(deepseek.BIASED)
    with locked(command.out), files.atomic_folder(command.out) as folder:
        weights, steps = source.weights(), list(source.changes)
        if command.to == "deepseek":
            deepseek.write_deepseek(folder, config, weights, tokenizer, dtype)
        elif command.to == "hf":
            if config.family == "Llama":
                llama.write_llama(folder, config, weights, tokenizer, dtype)
            else:
                hf.write_gpt2(folder, config, weights, tokenizer, dtype)
        else:
            if rank is not None:
                calibration = _calibration(command, tokenizer, config)
                config, weights, report = convert_to_mla(
                    source.name, config, weights, rank, calibration, Console()
                )
                sentences = report.sentences()
                print("\n".join(sentences))
                steps += sentences
                report.write(folder)
            if dtype not in ("float32", kept):
                steps.append(f"The weights are rounded to {dtype}.")
            has_end = tokenizer.eos_token_id is not None
            card = converted_card(config, source.name, source.kind, len(tokenizer), has_end, steps)
            checkpoint.write_model(folder, config, weights, tokenizer, card, dtype)
    print(f"wrote {command.out}")
    return 0


def _calibration(
    command: ConvertCommand, tokenizer: "PreTrainedTokenizerFast", config: ModelConfig
) -> "Calibration | None":
    if command.calibration is None:
        return None
    require_torch("--calibration")
    from mlx_mla.backends.torch.backend import TorchBackend

    from .calibration import Text
    from .to_mla import CALIBRATION_TOKENS, CALIBRATION_WINDOW, HELD_OUT_TOKENS, Calibration

    text = Text(command.calibration, tokenizer, min(CALIBRATION_WINDOW, config.n_positions))
    device = TorchBackend(command.device).device
    tokens, held_out = command.calibration_tokens, command.held_out_tokens
    return Calibration(
        text,
        CALIBRATION_TOKENS if tokens is None else tokens,
        HELD_OUT_TOKENS if held_out is None else held_out,
        device,
    )


def _check_flags(command: ConvertCommand) -> None:
    for needed, is_there, names in (
        ("--to mla", command.to == "mla", ("rank", "rank_budget", "calibration")),
        ("--calibration", command.calibration is not None, TOKENS),
    ):
        for name in names:
            if not is_there and getattr(command, name) is not None:
                raise UserError(f"{flag(name)} requires {needed}; leave it out")
    for name in TOKENS:
        if (getattr(command, name) or 0) < 0:
            raise UserError(f"{flag(name)} must not be negative; 0 takes all")


def _check_out(out: Path) -> None:
    if out.resolve() == Path.cwd():
        raise UserError(
            f"--out {out}: is the folder you are in, and a finished one would take its place; name "
            "a new one"
        )
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: exists and is not empty; give another folder, or remove it")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")


if __name__ == "__main__":
    sys.exit(main())
