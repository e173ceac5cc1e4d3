"""Generate text: `python -m mlx_mla.generate`."""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Optional

from mlx_mla import cli
from mlx_mla.backends import get_backend
from mlx_mla.backends.contract import Decoder, Piece
from mlx_mla.data import tokenizer
from mlx_mla.decoding.request import GenerationOptions
from mlx_mla.errors import UserError
from mlx_mla.files import decoded, read_text
from mlx_mla.model.config import BackendName, DeviceName, InferenceDType

PROG = "python -m mlx_mla.generate"


@dataclasses.dataclass(kw_only=True)
class GenerateCommand(GenerationOptions):
    """Continue a prompt with a trained or converted model.

    The text goes to stdout as it is generated, then a line of speeds and sizes to stderr.
    """

    model: str
    """Run folder, model folder, or Hugging Face hub id."""
    prompt: Optional[str] = None
    """Text to continue; "-" reads it from stdin. An empty prompt starts a new document."""
    prompts_file: Optional[Path] = None
    """File with one prompt per line. They are continued as one batch."""
    json: bool = False
    """Print one JSON object per prompt instead, with the text, speeds and sizes."""
    backend: BackendName = "mlx"
    """Framework that runs the model."""
    device: DeviceName = "auto"
    """Device of the backend: cpu or gpu for mlx; cpu, mps or cuda for torch. "auto" uses a GPU if
    there is one."""
    dtype: Optional[InferenceDType] = None
    """Type of weights, computation and cache. None: float32 on a CPU; bfloat16 on a GPU, where it
    halves the bytes that are read per token."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    command = cli.parse(GenerateCommand, argv, PROG)
    prompts = read_prompts(command)

    from mlx_mla.hub import find_model

    folder = find_model(command.model)
    backend = get_backend(command.backend, command.device)
    decoder = backend.decoder(folder, command.cache, command.dtype)
    if command.prompt_cache:  # the context that the prompt is appended to has begun already
        encoded = [tokenizer.encode(decoder.tokenizer, p) for p in prompts]
    else:
        encoded = [encode(decoder, p) for p in prompts]
    alone, began = command.prompts_file is None, time.perf_counter()
    steps: Iterator[tuple[int, Piece]]
    if alone:
        steps = ((0, piece) for piece in decoder.stream(encoded[0], command))
    else:
        steps = decoder.batch(encoded, command)
    pieces: list[list[Piece]] = [[] for _ in prompts]
    for i, piece in steps:
        pieces[i].append(piece)
        if alone and not command.json:
            print(piece.text, end="", flush=True)
    for prompt, own in zip(prompts, pieces):
        if command.json:
            named = {} if alone else {"prompt": prompt}
            print(json.dumps({**named, **_result(command, decoder, own)}))
        else:
            print("" if alone else f"=== {prompt}\n{''.join(p.text for p in own)}")
    if not command.json:
        print(_figures(command, decoder, pieces, time.perf_counter() - began), file=sys.stderr)
    return 0


def read_prompts(command: GenerateCommand) -> list[str]:
    """The prompts of --prompt or --prompts-file. UserError unless exactly one is given."""
    if (command.prompt is None) == (command.prompts_file is None):
        raise UserError("give either --prompt TEXT or --prompts-file FILE")
    if command.prompt == "-":
        return [decoded(sys.stdin.buffer.read(), "--prompt -, standard input")]
    if command.prompt is not None:
        return [command.prompt]
    if command.prompt_cache or command.save_prompt_cache:
        raise UserError(
            "--prompt-cache and --save-prompt-cache take one --prompt, not --prompts-file"
        )
    path = command.prompts_file
    assert path is not None
    text = read_text(path)
    # Not splitlines, which also splits at form feeds and U+2028.
    prompts = [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"{path}: has no prompts; put one on each line")
    return prompts


def encode(decoder: Decoder, prompt: str) -> list[int]:
    """Token ids of a prompt; an empty one becomes the end-of-text token, which starts documents."""
    ids = tokenizer.encode(decoder.tokenizer, prompt, special=True)
    if not ids and decoder.tokenizer.eos_token_id is None:
        raise UserError("this model has no end-of-text token to start from; give a --prompt")
    return ids or [decoder.tokenizer.eos_token_id]


def _result(command: GenerateCommand, decoder: Decoder, pieces: list[Piece]) -> dict[str, object]:
    token_ids = [t for p in pieces for t in p.token_ids]
    return {
        "text": "".join(p.text for p in pieces),
        "tokens": len(token_ids),
        "token_ids": token_ids,
        "finish_reason": pieces[-1].finish_reason,
        **pieces[-1].figures,
        "backend": command.backend,
        "cache": decoder.cache,
        "dtype": decoder.dtype,
    }


def _figures(
    command: GenerateCommand, decoder: Decoder, pieces: list[list[Piece]], seconds: float
) -> str:
    last = [own[-1].figures for own in pieces]
    prompt_tokens = sum(f["prompt_tokens"] for f in last)
    tokens = sum(len(p.token_ids) for own in pieces for p in own)
    if command.prompts_file is None:
        speeds = (
            f"{prompt_tokens} prompt tokens, {last[0]['prompt_tps']:,.0f} tok/s | {tokens} tokens, "
            f"{last[0]['generation_tps']:,.1f} tok/s"
        )
    else:
        speeds = f"{prompt_tokens} prompt tokens | {tokens} tokens, {tokens / seconds:,.1f} tok/s"
    return (
        f"[{speeds} | first token {max(f['ttft_ms'] for f in last):,.0f} ms | cache "
        f"{max(f['kv_cache_bytes'] for f in last):,} bytes | peak "
        f"{max(f['peak_memory_bytes'] for f in last) / 2**20:,.1f} MiB | {command.backend}, "
        f"{decoder.dtype}, {decoder.cache} cache]"
    )


if __name__ == "__main__":
    sys.exit(main())
