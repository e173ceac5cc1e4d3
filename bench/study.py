"""Compare arms of a training study, tuned alike and repeated over seeds: `python -m bench.study`.

    python -m bench.study bench/studies/quick.toml --out runs/quick [--jobs N] [--quick] [--dry-run]

docs/study.md explains the protocol. A study can be stopped at any time and resumed with the same
command; finished runs are in results.json and are never repeated.
"""

import contextlib
import dataclasses
import itertools
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Optional

import tyro

from bench.harness import machine
from bench.studying.pictures import draw
from bench.studying.plan import Study
from bench.studying.pool import Pool, Trainer, agenda, flops, holds
from bench.studying.reading import QUICK_STEPS, read_study
from bench.studying.report import markdown
from bench.studying.results import RESULTS, Outcome, Results
from bench.studying.summary import Summary, student, summarize
from mlx_mla import cli
from mlx_mla.data.dataset import TrainingData
from mlx_mla.data.tokenizer import get_tokenizer
from mlx_mla.display import plain_console
from mlx_mla.errors import UserError
from mlx_mla.files import write_text
from mlx_mla.locks import locked
from mlx_mla.machine import cores
from mlx_mla.model.estimate import cache_bytes_per_token
from mlx_mla.model.weights import num_parameters

PROG = "python -m bench.study"
REPORT = "report.md"


@dataclasses.dataclass(kw_only=True)
class StudyCommand:
    """Run a study: tune every arm, train it with every seed, write the report.

    Resumes where it was stopped: runs in the results.json of --out are never repeated.
    """

    study: Annotated[Path, tyro.conf.Positional]
    """The study's TOML file, such as bench/studies/quick.toml."""
    out: Optional[Path] = None
    """Folder for results.json, report.md, pictures, and the runs."""
    jobs: int = 1
    """Runs at a time; each gets its share of the cores."""
    data: Optional[str] = None
    """Training data to use instead of the study file's, as for --data of mlx_mla.train. Only runs
    on these data count."""
    bpe_dir: Optional[str] = None
    """Folder with GPT-2's encoder.json and vocab.bpe, for --tokenizer gpt2 without a network."""
    quick: bool = False
    """A check that everything runs: 20 steps a run, three rates, two seeds."""
    report_only: bool = False
    """Write the report of the runs that have finished, without training."""
    dry_run: bool = False
    """Print the runs, their costs and the hours on the machines that the file names, without
    training."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    command = cli.parse(StudyCommand, argv, PROG)
    if command.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {command.jobs}")
    study = read_study(command.study, command.data, command.bpe_dir, command.quick)
    student()
    if command.dry_run:
        print(_costs(study))
        return 0
    if command.out is None:
        raise UserError("--out DIR is needed, the folder for results, report and runs")
    if command.report_only and not (command.out / RESULTS).is_file():
        raise UserError(f"{command.out}: holds no {RESULTS}; give --out the folder of a study")
    # A report can be made while the study runs.
    alone = contextlib.nullcontext() if command.report_only else locked(command.out, inside=True)
    with alone:
        results = Results(command.out)
        if command.quick and any(r.settings.get("steps", 0) > QUICK_STEPS for r in results.records):
            raise UserError(
                f"{command.out}: holds the results of a whole study, whose report --quick would "
                "replace; give --out a new folder"
            )
        made_by = f"{PROG} {shlex.join(argv)}"
        ready = [] if command.report_only else agenda(study, results).ready
        if ready or command.data is not None:  # otherwise the data need not be on this machine
            config = study.cells[0].config
            tokenizer = get_tokenizer(config.tokenizer, config.bpe_dir)
            results.use_data(TrainingData(config, tokenizer).fingerprint)
        results.check_data(study)
        stopped = None
        if not command.report_only:
            stopped = _train(study, results, command.out, command.jobs)
            results.save()
        summary = _report(study, results, command.out, made_by)
    if stopped is not None:
        name = signal.Signals(stopped).name
        print(f"stopped by {name}; all runs are saved, resume with:\n  {made_by}")
        return 128 + stopped
    for row in summary.rows:
        print(f"{row.cell.arm}, {row.cell.size}, {row.cell.tokens:,} tokens: {row.verdict}")
    if (c := summary.primary) is not None:
        print(f"primary, {c.arm.arm} against {c.rival.arm}: {c.verdict}")
    print(f"report: {command.out / REPORT}")
    return 0


def _train(study: Study, results: Results, out: Path, jobs: int) -> int | None:
    """Train what is left; the signal that stopped it, or None."""
    if others := len(results.others(study)):
        print(f"{others} runs in results.json are not the study's; the report lists them")
    if jobs > cores():
        print(f"--jobs {jobs} on {cores()} cores: each run has one")
    config, runs = study.cells[0].config, out / "runs"
    facts = machine({} if config.device == "cpu" else {config.backend: config.device})
    facts["threads"] = str(max(1, cores() // jobs))

    def finished(trainer: Trainer, found: Outcome) -> None:
        results.add(trainer.run, found, facts)
        trainer.tidy()
        _remove_weights(study, results, runs)

    pool = Pool(runs, jobs, results.data, plain_console())
    stopped = pool.work(lambda: agenda(study, results), finished)
    _remove_weights(study, results, runs)
    return stopped


def _remove_weights(study: Study, results: Results, runs: Path) -> None:
    """Remove the folders of finished runs that nothing needs any more."""
    if study.keep == "all":
        return
    found = [results.tuning(cell) for cell in study.cells]
    best = {tuning.finals[0].key for tuning in found if tuning.finals}
    for tuning in found:
        if tuning.wanted and study.keep == "best":
            continue  # the first final run may be one of them
        for run in [*tuning.tried, *tuning.finals]:
            needed = study.keep == "best" and run.key in best
            folder = runs / run.name
            if not needed and results.get(run) and holds(folder, run, results.data):
                shutil.rmtree(folder, ignore_errors=True)


def _report(study: Study, results: Results, out: Path, made_by: str) -> Summary:
    summary = summarize(study, results)
    text = markdown(study, results, summary, draw(study, summary.rows, out), made_by)
    write_text(out / REPORT, text)
    return summary


def _costs(study: Study) -> str:
    """What the study costs, as text."""
    head = f"{'arm':<24}{'size':<10}{'tokens':>14}{'runs':>6}{'parameters':>13}{'cache B':>9}"
    lines = [study.title, "", head]
    tokens: dict[str, float] = {}
    work, total = 0.0, 0
    for cell in study.cells:
        runs = list(itertools.chain(*cell.least.values()))
        tokens[cell.size] = tokens.get(cell.size, 0) + sum(run.tokens for run in runs)
        work += sum(map(flops, runs))
        total += len(runs)
        model = cell.config.model
        lines.append(
            f"{cell.arm:<24}{cell.size:<10}{cell.tokens:>14,}{len(runs):>6}"
            f"{num_parameters(model):>13,}{cache_bytes_per_token(model, 2):>9,}"
        )
    lines += ["", f"{total} runs at least, {work:.3g} FLOPs"]
    if any(cell.is_tuned for cell in study.cells):
        lines[-1] += f"; an edge adds up to {study.cells[0].extensions}"
    if any(cell.tunes_on_a_result for cell in study.cells):
        lines.append("no tuning_seed: tuning uses the first seed, which is also one of the results")
    lines += [f"  {size}: {count:,.0f} tokens in all" for size, count in tokens.items()]
    for name, m in study.machines.items():
        hours = {s: tokens[s] / rate / 3600 for s, rate in m.tokens_per_second.items()}
        said = ", ".join(f"{size} {h:,.1f} h" for size, h in hours.items())
        lines.append(f"{name}: {said} ({m.source})")
    return "\n".join([*lines, "dry run: nothing was trained"])


if __name__ == "__main__":
    sys.exit(main())
