"""Train a model: `python -m mlx_mla.train`."""

import ast
import dataclasses
import inspect
import itertools
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import tyro
from rich.console import Console

from mlx_mla import cli
from mlx_mla.backends import get_engine
from mlx_mla.display import plain_console
from mlx_mla.errors import UserError, flag
from mlx_mla.files import read_toml
from mlx_mla.model import estimate
from mlx_mla.model.attention import meaningless_fields
from mlx_mla.model.config import TOKENIZER_IDS, ModelConfig
from mlx_mla.model.presets import overlay, preset
from mlx_mla.model.train_config import ONLY_WITH, TrainConfig
from mlx_mla.training.metrics import perplexity_text
from mlx_mla.world import EngineName, World, join, launched_by, same_everywhere

if TYPE_CHECKING:
    from mlx_mla.training.loop import RunResult

PROG = "python -m mlx_mla.train"

ABOUT = """Train a GPT-2-scale model with Multi-head Latent Attention.

Settings come from the preset, then from --config, then from flags.

Without arguments: the nano preset on Python's own documentation, in minutes on a laptop."""

COMMON = (
    *("preset", "config", "data", "out", "steps", "batch_size", "learning_rate", "resume"),
    *("backend", "dry_run"),
)
"""The settings that --help shows; --help-all shows all."""


@dataclasses.dataclass(kw_only=True)
class TrainCommand(TrainConfig):
    """Run and machine."""

    config: Optional[Path] = None
    """TOML file with any of these settings, the model's under [model], such as a run's
    config.toml."""
    out: Optional[Path] = None
    """Run folder. None: runs/PRESET, with a number added if that is taken."""
    resume: bool = False
    """Resume the run in --out from its newest checkpoint."""
    from_step: Optional[int] = None
    """With --resume, resume from the checkpoint of this step instead."""
    auto_resume: bool = False
    """For launchers: resume from the newest whole checkpoint if --out holds a run, else start one.
    Exits at once if the run has finished."""
    distributed_backend: EngineName = "auto"
    """Communication between the processes that mlx.launch (ring, jaccl, mpi, nccl) or torchrun
    (gloo, nccl) started. "auto" uses what the launcher has set up."""
    dry_run: bool = False
    """Print the parameters, FLOPs, memory and cache bytes of these settings; train nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv, needs_reader=False)


def _main(argv: Sequence[str]) -> int:
    given: dict[str, Any] = {}
    mistake = None
    try:
        given = given_flags(argv)
    except UserError as e:
        mistake = e  # raised once all ranks have joined, so that rank 0 reports it for all
    with join(given.get("distributed_backend", "auto"), get_engine) as world:
        same_everywhere(world, json.dumps(list(argv)), "other arguments")
        if world.rank:
            return _follow(world)
        if mistake is not None:
            raise mistake
        return _run(configure(given), world)


def _follow(world: World) -> int:
    """Train with rank 0's settings, silently and without touching the run folder."""
    if world.first(None) is None:
        return 0
    from mlx_mla.training.loop import train

    quiet = Console(quiet=True)
    return _exit_code(train(TrainConfig(), Path(), console=quiet, world=world))


def _run(command: TrainCommand, world: World) -> int:
    config = TrainConfig(
        **{f.name: getattr(command, f.name) for f in dataclasses.fields(TrainConfig)}
    )
    if command.dry_run:
        world.first(None)
        if config.init is not None and not command.resume:
            from mlx_mla.data.tokenizer import get_tokenizer
            from mlx_mla.training.starting_models import with_shape_of_init

            tokenizer = get_tokenizer(config.tokenizer, config.bpe_dir)
            config = with_shape_of_init(config, tokenizer)
        print(estimate.report(config))
        return 0
    if world.engine is None and command.distributed_backend != "auto":
        raise UserError(
            "--distributed-backend requires a launcher, mlx.launch or torchrun; see "
            "docs/distributed.md"
        )
    if world.engine is not None and config.backend != launched_by():
        raise UserError(
            f"--backend {config.backend}: this launcher starts --backend {launched_by()}; "
            "use mlx.launch for mlx (give its own options, then --), and torchrun for torch"
        )

    from mlx_mla.training.loop import train  # imports the framework, which --help does not need

    out = command.out if command.out is not None else _free_folder(config.name)
    from_step = command.from_step
    if command.auto_resume and command.resume:
        from mlx_mla.training.recovery import find_restart
        from mlx_mla.training.run_folder import finish

        from_step, notes = find_restart(out)
        for note in notes:
            print(note)
        if from_step is not None and from_step >= config.steps:
            finish(config, out, from_step)
            world.first(None)
            print(f"{out}: has finished its {from_step} steps")
            return 0
    world.first("train")
    result = train(
        config,
        out,
        resume=command.resume,
        from_step=from_step,
        console=plain_console(),
        world=world,
    )
    if result.signal is not None:
        saved = f"saved {result.checkpoint}" if result.step else "saved nothing yet"
        print(f"stopped after step {result.step} and {saved}; resume with:")
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


def _exit_code(result: "RunResult") -> int:
    """0, or 128 and the number of the signal that stopped the run: 130 for Ctrl-C, 143 for SIGTERM,
    129 for SIGHUP."""
    return 0 if result.signal is None else 128 + result.signal


def given_flags(argv: Sequence[str]) -> dict[str, Any]:
    """The settings that the command line gives, by name; raises UserError.

    --help and --help-all are answered here, with the defaults of the preset, file or run that the
    other flags name.
    """
    asked = {"-h", "--help", "--help-all"} & set(argv)
    if not asked:
        return cli.given(_flags(TrainCommand()), argv, PROG, ABOUT)
    try:
        rest = [argument for argument in argv if argument not in asked]
        groups = _flags(configure(cli.given(_flags(TrainCommand()), rest, PROG, ABOUT)))
    except UserError:
        groups = _flags(configure({}))
    about = ABOUT
    if "--help-all" not in asked:
        total = sum(map(len, groups.values()))
        groups = dict([next(iter(groups.items()))])
        about += f"\n\nThese are the most common settings; --help-all shows all {total}."
    return cli.given(groups, ["--help"], PROG, about)


def _flags(defaults: TrainCommand) -> dict[str, dict[str, Any]]:
    """Every flag, in the groups of --help-all: the common ones, then by the class that a setting
    belongs to."""
    groups: dict[str, dict[str, Any]] = {"common": {}, "model": {}}
    for settings in (defaults.model, defaults):
        types = {f.name: f.type for f in dataclasses.fields(settings)}
        for owner, texts in _documentation(type(settings)):
            title = "model" if owner is ModelConfig else str(owner.__doc__).rstrip(".").lower()
            for name, text in texts.items():
                group = groups.setdefault("common" if name in COMMON else title, {})
                default = f"(default: {getattr(settings, name)})"
                arg = tyro.conf.arg(help=text, help_behavior_hint=default)
                group[name] = Annotated[types[name], arg]
    groups["common"] = {name: groups["common"][name] for name in COMMON}
    return groups


def _documentation(cls: type) -> list[tuple[type, dict[str, str]]]:
    """Every class that a dataclass takes fields from, in their order, with the docstrings of its
    own fields by name."""
    found = []
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        (definition,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(definition, ast.ClassDef)
        texts = {
            field.target.id: " ".join(str(after.value.value).split())
            for field, after in itertools.pairwise(definition.body)
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        }
        found.append((base, texts))
    return found


def configure(given: Mapping[str, Any]) -> TrainCommand:
    """Flags over --config over the preset, or over the run to resume.

    Args:
        given: Values of flags by name, as `given_flags` returns them.

    Raises:
        UserError: For settings that do not go together.
    """
    command = TrainCommand(**{n: v for n, v in given.items() if n in _OWN})
    file = {} if command.config is None else read_toml(command.config)
    in_file = overlay(TrainConfig(), file, str(command.config))
    name = given.get("preset") or (in_file.preset if "preset" in file else None)
    if command.auto_resume:
        from mlx_mla.training.run_folder import CONFIG

        if command.out is None:
            raise UserError("--auto-resume needs --out RUN, the folder to start or resume a run in")
        if command.resume:
            raise UserError("--auto-resume decides on --resume by itself; leave that out")
        command.resume = (command.out / CONFIG).is_file()
    if command.from_step is not None and command.auto_resume:
        raise UserError(
            "--from-step: --auto-resume takes the newest checkpoint; give --resume instead of it"
        )
    if command.from_step is not None and not command.resume:
        raise UserError("--from-step requires --resume; add it, or leave out --from-step")
    if command.resume:
        from mlx_mla.training.run_folder import run_config

        if command.out is None:
            raise UserError("--resume needs --out RUN, the folder of the run to resume")
        base = run_config(command.out)
        base.tokens_per_step = None  # the number of passes decides, as it did in that run
        if name not in (None, base.preset):
            # Its shape then differs in some field, and the trainer names it.
            base = preset(name)
    else:
        base = preset(name or "nano")
    of_a_run = file.keys() >= _ALWAYS and not command.resume
    if of_a_run:  # its config.toml, which holds what followed from its settings, too
        base = in_file.without_derived()
    else:
        base = _exclusive(overlay(base, file, str(command.config)), base, file)
    of_model = {n: v for n, v in given.items() if n in ModelConfig.__dataclass_fields__}
    others = {n: v for n, v in given.items() if n not in _OWN and n not in of_model}
    model = dataclasses.replace(base.model, **of_model)
    config = dataclasses.replace(base, model=model, **others)
    config = _exclusive(config, base, {**others, "model": of_model})
    if config.init is not None and not command.resume:
        own = others if of_a_run else {**file, **others}
        _check_init(config, own, {**file.get("model", {}), **of_model})
    if not command.resume:
        in_model = {**file.get("model", {}), **of_model}
        rows_given = "vocab_size" in in_model and config.model.vocab_size is not None
        _take_tokenizer(config, "tokenizer" in {**file, **given}, rows_given)
    config.make_paths_absolute()
    return dataclasses.replace(
        command, **{f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)}
    )


_OWN = TrainCommand.__dataclass_fields__.keys() - TrainConfig.__dataclass_fields__.keys()


_ALWAYS = {
    field.name
    for field in dataclasses.fields(TrainConfig)
    if field.default not in (None, dataclasses.MISSING)
}
"""Settings that the config.toml of every run holds."""


def _exclusive(config: TrainConfig, base: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """The config that `values` made of `base`, without the settings of `base` that they exclude."""
    if config.model.attention != base.model.attention:
        # Every comparison is one flag apart: the base's settings of its own kind of attention go.
        others = meaningless_fields(config.model.attention)
        default = {n: getattr(ModelConfig(), n) for n in others if n not in values["model"]}
        config.model = dataclasses.replace(config.model, **default)
    for name, (option, *_) in ONLY_WITH.items():
        if getattr(config, option) != getattr(base, option) and name not in values:
            setattr(config, name, None)
    for one, other in itertools.permutations(("tokens_per_step", "grad_accum_steps")):
        if one in values and other not in values:
            setattr(config, other, None)
    return config


def _check_init(config: TrainConfig, values: Mapping[str, Any], shape: Mapping[str, Any]) -> None:
    """UserError for a value, given by a flag or in a file, that the model of --init decides."""
    from mlx_mla.training.starting_models import shape_of_init

    own, default = shape_of_init(config), preset(config.preset)
    for name, value in shape.items():
        if name != "dropout" and value != getattr(own, name):
            raise UserError(
                f"{flag(name)}: is {value}, but the model of --init has {getattr(own, name)}; "
                "leave it out"
            )
    for name in ("initializer", "initializer_range"):
        if name in values and values[name] != getattr(default, name):
            raise UserError(f"{flag(name)}: --init starts from no random weights; leave it out")


def _take_tokenizer(config: TrainConfig, given: bool, rows_given: bool) -> None:
    """Default to the tokenizer of --init or --teacher, and to its size in place of the preset's."""
    if not given and (config.init is not None or config.teacher is not None):
        from mlx_mla.training.starting_models import own_tokenizer

        config.tokenizer = own_tokenizer(config)
    if config.tokenizer not in TOKENIZER_IDS and config.init is None and not rows_given:
        from mlx_mla.data.tokenizer import get_tokenizer

        config.model.vocab_size = get_tokenizer(config.tokenizer).size


def _free_folder(name: str) -> Path:
    """runs/NAME, or the first of runs/NAME-2, -3, ... that is not taken."""
    folder, n = Path("runs") / name, 1
    while folder.exists():
        n += 1
        folder = Path("runs") / f"{name}-{n}"
    return folder


if __name__ == "__main__":
    sys.exit(main())
