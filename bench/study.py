"""Train arms alike, tuned alike, over seeds, and say which is better: `python -m bench.study`.

    python -m bench.study bench/studies/quick.toml --out runs/quick [--jobs N] [--quick] [--dry-run]

docs/study.md explains the protocol. A study can be stopped at any moment and started again; runs
that have finished are in results.json, and are never repeated.
"""

import dataclasses
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Optional

import tyro
from rich.console import Console

from bench.harness import machine
from bench.studying import measured
from bench.studying.agenda import agenda, flops
from bench.studying.pictures import draw
from bench.studying.plan import Cell, Run, Study
from bench.studying.pool import Pool, cores, only_one, stopped_by
from bench.studying.reading import read_study
from bench.studying.report import markdown
from bench.studying.results import Record, Results
from bench.studying.summary import Row, chain, summarise
from bench.studying.trainer import Trainer
from mlx_mla import cli
from mlx_mla.data.dataset import TrainingData
from mlx_mla.data.tokenizer import get_tokenizer
from mlx_mla.errors import UserError
from mlx_mla.files import write_text
from mlx_mla.model.config import TrainConfig
from mlx_mla.model.estimate import cache_bytes_per_token
from mlx_mla.model.weights import num_parameters

PROG = "python -m bench.study"
REPORT = "report.md"


@dataclasses.dataclass(kw_only=True)
class StudyCommand:
    """Run a study: tune every arm, train it with every seed, write the report.

    Goes on where it was stopped; runs that stand in the results.json of --out are never repeated.
    """

    study: Annotated[Path, tyro.conf.Positional]
    """The study's TOML file, such as bench/studies/quick.toml."""
    out: Optional[Path] = None
    """Folder for results.json, report.md, pictures, and the runs."""
    jobs: int = 1
    """Runs at a time; each gets its share of the cores."""
    data: Optional[str] = None
    """What to train on, in place of the file's: as --data of mlx_mla.train."""
    bpe_dir: Optional[str] = None
    """Folder with GPT-2's encoder.json and vocab.bpe, where its tokens are studied without a
    network."""
    quick: bool = False
    """Some steps a run, three rates, two seeds: a check that everything runs."""
    evaluate: bool = False
    """Afterwards, run the evaluation tasks on the first seed's run of every arm."""
    decode: bool = False
    """Afterwards, time decoding at 1000 tokens; needs an idle machine."""
    report_only: bool = False
    """Train nothing: write the report of the runs that have finished."""
    dry_run: bool = False
    """Print the runs, their costs and the hours on the machines that the file names; train
    nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    command = cli.parse(StudyCommand, argv, PROG)
    if command.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {command.jobs}")
    study = read_study(command.study, command.data, command.bpe_dir, command.quick)
    console = Console()
    if command.dry_run:
        console.print(_costs(study), markup=False, highlight=False, soft_wrap=True)
        return 0
    if command.out is None:
        raise UserError("--out DIR is needed, the folder for results, report and runs")
    with only_one(command.out):
        results = Results(command.out)
        made_by = f"{PROG} {shlex.join(argv)}"
        if not command.report_only:
            stopped = _train(study, results, command, console)
            if stopped is not None:
                _report(study, results, command.out, made_by)
                console.print(
                    f"stopped by {stopped_by(stopped)}; all runs are saved, go on with:\n"
                    f"  {made_by}",
                    highlight=False,
                    soft_wrap=True,
                )
                return 128 + stopped
        if command.evaluate:
            measured.evaluate(study, results, command.out / "runs", console)
        if command.decode:
            measured.decode(study, results, console)
        for row in _report(study, results, command.out, made_by):
            print(f"{row.cell.arm}, {row.cell.size}, {row.cell.tokens:,} tokens: {row.verdict}")
        print(f"report: {command.out / REPORT}")
    return 0


def _train(study: Study, results: Results, command: StudyCommand, console: Console) -> int | None:
    assert command.out is not None
    plan = agenda(study, results)
    if plan.ready:  # else the data need not be here
        results.use_data(_fingerprint(plan.ready[0].config))
        plan = agenda(study, results)
    if others := len(results.others(study)):
        print(f"kept apart, the study does not ask for them: {others} runs, which the report names")
    if command.jobs > cores():
        console.print(
            f"--jobs {command.jobs} on {cores()} cores: each run has one", highlight=False
        )
    config = study.cells[0].config
    facts = machine({} if config.device == "cpu" else {config.backend: config.device})
    facts["threads"] = str(max(1, cores() // command.jobs))

    runs = command.out / "runs"

    def finished(trainer: Trainer, record: Record) -> None:
        results.add(trainer.run, record, facts)
        trainer.tidy()
        _remove_weights(study, results, runs)

    stopped = Pool(runs, command.jobs, console).work(lambda: agenda(study, results), finished)
    _remove_weights(study, results, runs)
    return stopped


def _remove_weights(study: Study, results: Results, runs: Path) -> None:
    """Remove the folders of finished runs that nothing needs any more."""
    if study.keep == "all":
        return
    found = [results.tuning(cell, study.extensions) for cell in study.cells]
    best = {tuning.finals[0].key for tuning in found if tuning.finals}
    for tuning in found:
        if tuning.wanted and study.keep == "best":
            continue  # any of them may be the best
        for run in [*tuning.tried, *tuning.finals]:
            needed = study.keep == "best" and run.key in best
            if not needed and results.get(run) is not None:
                shutil.rmtree(runs / run.name, ignore_errors=True)


def _report(study: Study, results: Results, out: Path, made_by: str) -> list[Row]:
    rows = summarise(study, results)
    steps = {
        "The stair, a step at a time": chain(study, results, study.stair),
        "Rivals, the second against the first": [
            step for pair in study.rivals for step in chain(study, results, pair)
        ],
    }
    results.summary = {
        "study": study.name,
        "title": study.title,
        "quick": study.quick,
        "baseline": study.baseline,
        "margin_nats": study.margin,
        "confidence": study.confidence,
        "rows": [row.plain() for row in rows],
    }
    results.save()
    text = markdown(study, results, rows, steps, draw(study, rows, out), made_by)
    write_text(out / REPORT, text)
    return rows


def _fingerprint(config: TrainConfig) -> str:
    return TrainingData(config, get_tokenizer(config.tokenizer, config.bpe_dir)).fingerprint


def _costs(study: Study) -> str:
    """What the study takes, for people."""
    lines = [study.title, ""]
    lines.append(
        f"{'arm':<24}{'size':<10}{'tokens':>14}{'runs':>6}{'parameters':>13}{'cache B':>9}"
    )
    tokens: dict[str, float] = {}
    work = 0.0
    for cell in study.cells:
        runs = _runs(cell)
        tokens[cell.size] = tokens.get(cell.size, 0) + sum(run.tokens for run in runs)
        work += sum(map(flops, runs))
        model = cell.config.model
        lines.append(
            f"{cell.arm:<24}{cell.size:<10}{cell.tokens:>14,}{len(runs):>6}"
            f"{num_parameters(model):>13,}{cache_bytes_per_token(model, 2):>9,}"
        )
    total = sum(len(_runs(cell)) for cell in study.cells)
    lines += ["", f"{total} runs at least, {work:.3g} FLOPs; an edge adds up to {study.extensions}"]
    lines += [f"  {size}: {count:,.0f} tokens in all" for size, count in tokens.items()]
    for m in study.machines:
        hours = {s: tokens[s] / rate / 3600 for s, rate in m.tokens_per_second.items()}
        said = ", ".join(f"{size} {h:,.0f} h" for size, h in hours.items())
        lines.append(f"{m.name}: {said} ({m.source})")
    return "\n".join([*lines, "dry run: nothing was trained"])


def _runs(cell: Cell) -> list[Run]:
    rate, scale = cell.rates[0], cell.scales[0]
    tuning = [cell.tuning(r) for r in cell.rates] if len(cell.rates) > 1 else []
    tuning += [cell.tuning(rate, s) for s in cell.scales] if cell.tunes_scale else []
    return [*tuning, *(cell.final(rate, scale, seed) for seed in cell.seeds)]


if __name__ == "__main__":
    sys.exit(main())
