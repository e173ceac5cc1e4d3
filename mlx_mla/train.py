"""Train a model: `python -m mlx_mla.train`."""

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from rich.console import Console

from mlx_mla import cli
from mlx_mla.backends import get_engine
from mlx_mla.display import plain_console
from mlx_mla.errors import UserError, flag
from mlx_mla.files import read_toml
from mlx_mla.model import estimate
from mlx_mla.model.attention import meaningless_fields
from mlx_mla.model.config import ModelConfig, TrainConfig
from mlx_mla.model.presets import overlay, preset
from mlx_mla.training.metrics import perplexity_text
from mlx_mla.world import EngineName, World, join, launched_by, same_everywhere

if TYPE_CHECKING:
    from mlx_mla.training.loop import RunResult

PROG = "python -m mlx_mla.train"


@dataclasses.dataclass(kw_only=True)
class TrainCommand(TrainConfig):
    """Train a GPT-2-scale model with Multi-head Latent Attention.

    Settings come from the preset, then from --config, then from flags. Without arguments: trains
    the nano preset on Python's own documentation, in minutes on a laptop.
    """

    config: Optional[Path] = None
    """TOML file with any of these settings (the model's under [model]), as config.toml of a run."""
    out: Optional[Path] = None
    """Run folder. None: runs/PRESET, or with a number added if that is taken."""
    resume: bool = False
    """Go on with the run in --out, from its newest checkpoint."""
    from_step: Optional[int] = None
    """With --resume: go on from the checkpoint of this step instead."""
    auto_resume: bool = False
    """For launchers: --resume if --out holds a run, from its newest whole checkpoint, else start;
    ends if it has finished."""
    distributed_backend: EngineName = "auto"
    """Engine between the processes that mlx.launch (ring, jaccl, mpi, nccl) or torchrun (gloo,
    nccl) has started. "auto" takes the one that the launcher has set up."""
    lr_find: bool = False
    """Raise the learning rate from 1e-6 to 1 within 100 steps, say which suits, and train nothing
    more. With --out, that new folder gets a plot."""
    dry_run: bool = False
    """Print parameters, FLOPs, memory and cache bytes of these settings, and train nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv, needs_reader=False)


def _main(argv: Sequence[str]) -> int:
    with join(argv, get_engine) as world:
        same_everywhere(world, json.dumps(list(argv)), "other arguments")
        if world.rank:
            return _follow(world)
        return _run(argv, world)


def _follow(world: World) -> int:
    """Train as rank 0 says, without a word and without touching the run folder."""
    if world.first(None) is None:
        return 0
    from mlx_mla.training.loop import train

    quiet = Console(quiet=True)
    return _exit_code(train(TrainConfig(), Path(), console=quiet, world=world))


def _run(argv: Sequence[str], world: World) -> int:
    command = parse(argv)
    config = TrainConfig(
        **{f.name: getattr(command, f.name) for f in dataclasses.fields(TrainConfig)}
    )
    if command.dry_run:
        world.first(None)
        print(estimate.report(config))
        return 0
    if world.engine is None and command.distributed_backend != "auto":
        raise UserError(
            "--distributed-backend goes with a launcher, mlx.launch or torchrun; see "
            "docs/distributed.md"
        )
    if world.engine is not None and config.backend != launched_by():
        raise UserError(
            f"--backend {config.backend}: this launcher starts --backend {launched_by()}; "
            "mlx.launch goes with mlx (give its own options, then --), torchrun with torch"
        )

    # Imports the framework, which --help and mistakes need not wait for.
    from mlx_mla.training.loop import (
        train,
    )

    console = plain_console()
    if command.lr_find:
        if world.engine is not None:
            raise UserError("--lr-find takes one process; start it without a launcher")
        return _find_rate(config, command.out)
    out = command.out if command.out is not None else _free_folder(config.preset)
    from_step = command.from_step
    if command.auto_resume and command.resume:
        from mlx_mla.training.recovery import find_restart

        restart = find_restart(out)
        for note in restart.notes:
            print(note)
        from_step = restart.from_step
        if from_step is not None and from_step >= config.steps:
            world.first(None)
            print(f"{out}: has finished its {from_step} steps")
            return 0
    world.first("train")
    result = train(
        config, out, resume=command.resume, from_step=from_step, console=console, world=world
    )
    if result.signal is not None:
        print(f"stopped after step {result.step} and saved {result.checkpoint}; go on with:")
        print(f"  {PROG} --resume --out {shlex.quote(str(out))}")
        return _exit_code(result)
    if result.sample is not None:
        print(f"\n--- sample ---\n{result.sample}\n--------------")
    assert result.val_loss is not None
    print(
        f"\nvalidation loss {result.val_loss:.4f} nats per token, perplexity "
        f"{perplexity_text(result.val_loss)}"
    )
    print(f"run folder      {out}  (loss.png, metrics.jsonl, config.toml, checkpoints/)")
    print("generate with:")
    model, prompt = shlex.quote(str(out)), shlex.quote(config.sample_prompt)
    print(f"  python -m mlx_mla.generate --model {model} --prompt {prompt}")
    return 0


def _find_rate(config: TrainConfig, out: Path | None) -> int:
    from mlx_mla.training import lr_find
    from mlx_mla.training.loop import find_learning_rate

    if out is not None:
        try:
            out.mkdir(parents=True)
        except OSError as e:
            raise UserError(
                f"{out}: cannot be made: {e.strerror}; --lr-find needs a new folder as --out"
            ) from e
    points = find_learning_rate(config)
    print(lr_find.table(points))
    rate = lr_find.suggestion(points)
    if out is not None:
        lr_find.plot(points, rate, out / "lr-find.png")
        print(f"plot: {out / 'lr-find.png'}")
    print(f"suggested: --learning-rate {rate:.1e}")
    return 0


def _exit_code(result: "RunResult") -> int:
    """0, or 128 and the number of the signal that stopped the run: 130 for Ctrl-C, 143 for SIGTERM,
    129 for SIGHUP."""
    return 0 if result.signal is None else 128 + result.signal


def parse(argv: Sequence[str]) -> TrainCommand:
    """Flags over --config over the preset (or over the run to resume); raises UserError."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset")
    early.add_argument("--config", type=Path)
    early.add_argument("--out", type=Path)
    early.add_argument("--resume", action="store_true")
    early.add_argument("--auto-resume", action="store_true")
    try:
        known, _ = early.parse_known_args(list(argv))
    except argparse.ArgumentError as e:
        raise UserError(f"{e}; see {PROG} --help") from None
    file = read_toml(known.config) if known.config else {}
    asked_preset = known.preset or file.get("preset")
    if known.auto_resume:
        from mlx_mla.training.run_folder import CONFIG

        if known.out is None:
            raise UserError(
                "--auto-resume needs --out RUN, the folder to start a run in or to go on with"
            )
        if known.resume:
            raise UserError("--auto-resume decides on --resume by itself; leave that out")
        known.resume = (known.out / CONFIG).is_file()
    if known.resume:
        from mlx_mla.training.run_folder import run_config

        if known.out is None:
            raise UserError("--resume needs --out RUN, the folder of the run to go on with")
        base = run_config(known.out)
        if asked_preset is not None and asked_preset != base.preset:
            # Its shape then differs in some field, and the trainer says which.
            base = dataclasses.replace(preset(asked_preset), preset=asked_preset)
    else:
        base = preset(asked_preset or "nano")
    base = overlay(base, file, str(known.config))
    default = TrainCommand(
        **{f.name: getattr(base, f.name) for f in dataclasses.fields(TrainConfig)}
    )
    command = cli.parse(TrainCommand, argv, PROG, default)
    command.resume = known.resume
    if command.model.attention != base.model.attention and not command.resume:
        # Every comparison is one flag apart: what the preset says of its own kind of attention
        # goes, what a flag says stays.
        defaults, others = ModelConfig(), meaningless_fields(command.model.attention)
        same = [n for n in others if getattr(command.model, n) == getattr(base.model, n)]
        command.model = dataclasses.replace(
            command.model, **{n: getattr(defaults, n) for n in same}
        )
    passes_given = command.grad_accum_steps != base.grad_accum_steps
    if command.tokens_per_step == base.tokens_per_step and (passes_given or command.resume):
        command.tokens_per_step = (
            None  # the number of passes decides, as it did in the run to resume
        )
    elif command.tokens_per_step is not None and not passes_given:
        command.grad_accum_steps = None  # the tokens decide, whatever --batch-size is
    if command.from_step is not None and (not command.resume or command.auto_resume):
        raise UserError("--from-step goes with --resume")
    if command.init is not None and not command.resume:
        for field in dataclasses.fields(ModelConfig):
            if field.name != "dropout" and getattr(command.model, field.name) != getattr(
                base.model, field.name
            ):
                raise UserError(
                    f"{flag(field.name)}: with --init the model's shape comes from its folder; "
                    "leave it out"
                )
    command.make_paths_absolute()
    return command


def _free_folder(name: str) -> Path:
    """runs/NAME, or the first of runs/NAME-2, -3, ... that is not taken."""
    folder, n = Path("runs") / name, 1
    while folder.exists():
        n += 1
        folder = Path("runs") / f"{name}-{n}"
    return folder


if __name__ == "__main__":
    sys.exit(main())
