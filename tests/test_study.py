"""The study: its file, tuning, pairing and verdicts, and that no finished run is ever repeated."""

import contextlib
import copy
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tomli_w
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st

from bench import study as command
from bench.studying import pictures
from bench.studying.pictures import far_arms
from bench.studying.plan import settings
from bench.studying.pool import agenda, make_room, run_toml
from bench.studying.reading import read_study
from bench.studying.results import RESULTS, Results, thinned
from bench.studying.search import search
from bench.studying.summary import Interval, holm, interval, pooled, summarize, verdict
from mlx_mla import checkpoint
from mlx_mla.errors import UserError
from mlx_mla.files import parse_toml
from mlx_mla.machine import cores
from mlx_mla.model.presets import overlay, preset
from mlx_mla.training.run_folder import create_run

stats = pytest.importorskip("scipy.stats")

ROOT = Path(__file__).parent.parent
STUDIES = sorted((ROOT / "bench" / "studies").glob("*.toml"))
QUICK = ROOT / "bench" / "studies" / "quick.toml"
PUBLISHED = [p.stem for p in STUDIES if (ROOT / "bench" / "results" / p.stem).is_dir()]

SMALL = """
baseline = "mha"
primary = ["mla", "mha"]
[base]
backend = "torch"
device = "cpu"
batch_size = 4
warmup_steps = 2
[base.model]
attention = "mha"
n_layer = 1
n_head = 2
n_embd = 16
n_positions = 32
[sizes.tiny]
tokens = 1280
tuning_seed = 0
learning_rates = [1e-3, 2e-3, 4e-3, 8e-3]
seeds = [1, 2, 3]
[arms.mha]
[arms.mla]
model = { attention = "mla", kv_lora_rank = 8 }
"""
TINY = ("tiny", 1280)
STDS = SMALL.replace("seeds = [1", "initializer_ranges = [0.02, 0.03, 0.045]\nseeds = [1")
UNTUNED = SMALL.replace("tuning_seed = 0\n", "")
OLD = UNTUNED.replace('primary = ["mla", "mha"]\n', "")
"""As files were before there was a tuning seed."""


def written(tmp_path: Path, text: str = SMALL, name: str = "small.toml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def opened(tmp_path: Path, text: str = SMALL):
    """A study and its results on the data named d."""
    study, results = read_study(written(tmp_path, text)), Results(tmp_path)
    results.use_data("d")
    return study, results


def pretend(study, results: Results, loss) -> list:
    """Finish every run that the study asks for, with the loss that a function of it gives; the run
    diverges where that is infinite."""
    done = []
    while ready := agenda(study, results).ready:
        run = ready[0]
        assert run.key not in {r.key for r in done}
        done.append(run)
        value = loss(run)
        curve = [(run.tokens // 2, value + 0.5), (run.tokens, value)]
        found = {"loss": value, "curve": curve, "seconds": 1.0, "tokens_per_second": 1.0}
        if math.isinf(value):
            found = {"loss": None, "diverged": "training diverged at step 7", "curve": []}
        results.add(run, found, {"system": "none"})
    return done


def noisy(best: dict[str, float], offset: dict[str, float]):
    """Losses with a minimum at a rate an arm, an offset an arm, and noise that seeds share."""

    def loss(run) -> float:
        shared = random.Random(run.seed).gauss(0, 0.05)
        own = random.Random(f"{run.arm} {run.seed}").gauss(0, 0.002)
        return 2 + offset[run.arm] + 0.1 * math.log(run.rate / best[run.arm]) ** 2 + shared + own

    return loss


LEVEL = noisy({"mha": 3e-3, "mla": 2.1e-3}, {"mha": 0, "mla": 0})


def report_of(study, results) -> str:
    out = results.path.parent
    command._report(study, results, out, "a test")
    for name in ("difference.png", "loss-cache.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    return (out / "report.md").read_text()


# --- intervals and verdicts ---


def test_the_pooled_deviation_is_that_of_one_way_analysis_of_variance():
    samples = [[1.0, 2.0, 4.0], [3.0, 3.5], [7.0]]
    sd, degrees = pooled(samples)
    squares = sum((v - sum(s) / len(s)) ** 2 for s in samples for v in s)
    assert (sd, degrees) == (pytest.approx((squares / 3) ** 0.5), 3)
    found = interval(samples[1], 0.95, (sd, degrees))
    assert found.high - found.mean == pytest.approx(stats.t.ppf(0.975, 3) * sd / 2**0.5)
    assert pooled([[1.0], [2.0]]) is None


def test_p_values_are_adjusted_by_holms_method():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.6, 0.7]) == [1, 1]


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.02, -0.001, "better"),
        (-0.02, 0.004, "not worse"),
        (0.001, 0.004, "not worse"),
        (-0.01, 0.006, "not shown"),
        (0.001, 0.006, "worse"),
        (-math.inf, math.inf, "not shown"),
    ],
)
def test_the_verdict_follows_the_rule(low, high, said):
    assert verdict(Interval(0.0, low, high, 3), 0.005) == said


def test_without_scipy_a_study_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    err = refused(capsys, written(tmp_path), "--dry-run", command=command.main)
    assert "needs scipy; install it with: pip install" in err


# --- tuning ---


@given(st.floats(1e-4, 1e-1), st.floats(0.01, 10), st.integers(4, 6))
def test_the_rate_of_a_parabola_is_found(best, curvature, count):
    grid = [1e-3 * 2**i for i in range(count)]
    losses: dict[float, float] = {}
    for _ in range(40):
        found = search(grid, losses, extensions=8)
        losses |= {r: 2 + curvature * math.log(r / best) ** 2 for r in found.wanted}
        if not found.wanted:
            break
    assert found.best == pytest.approx(best, rel=0.05)
    assert (found.note, found.loss) == ("fitted", pytest.approx(2, abs=1e-6))
    assert set(grid) <= set(found.tried) == set(losses)


def test_an_edge_extends_the_range_so_many_times():
    losses: dict[float, float] = {}
    while wanted := search([1.0, 2.0, 4.0, 8.0], losses, extensions=2).wanted:
        losses |= {r: -r for r in wanted}
    found = search([1.0, 2.0, 4.0, 8.0], losses, extensions=2)
    assert found.tried == (1, 2, 4, 8, 16, 32)
    assert (found.best, found.note) == (32, "at the edge of those tried")


def test_rates_that_diverge_are_never_chosen():
    losses = {1.0: 3.0, 2.0: 2.0, 4.0: math.inf, 8.0: math.inf}
    found = search(list(losses), losses, extensions=3)
    assert (found.best, found.note) == (2.0, "the next one diverged")
    dead = search([1.0, 2.0, 4.0, 8.0], dict.fromkeys([1.0, 2.0, 4.0, 8.0], math.inf), 0)
    assert (dead.best, dead.wanted) == (None, ())


def tuned(best: dict[str, float]):
    """Losses with a minimum at an std an arm, and at a rate that falls as the std rises."""

    def loss(run) -> float:
        std = run.config.initializer_range
        rate = run.rate / (2.8e-3 * (0.02 / std) ** 0.5)
        return 2 + run.seed / 100 + math.log(rate) ** 2 + math.log(std / best[run.arm]) ** 2

    return loss


def test_rates_then_stds_then_rates_again_are_tuned_with_a_seed_of_their_own(tmp_path, capsys):
    study, results = opened(tmp_path, STDS)
    # mla's std is beyond the grid, and beyond what one edge adds.
    done = pretend(study, results, tuned({"mha": 0.028, "mla": 0.08}))
    assert len({run.name for run in done}) == len(done)
    tuning, finals = done[: -2 * 3], done[-2 * 3 :]
    assert {run.seed for run in tuning} == {0} and [r.seed for r in finals] == [1, 1, 2, 2, 3, 3]
    tried = {arm: [] for arm in study.arms}
    for run in tuning:
        tried[run.arm].append((run.rate, run.config.initializer_range))
    grid = [(r, 0.02) for r in (1e-3, 2e-3, 4e-3, 8e-3)]
    # The loss at a fixed rate is least where both terms balance, between 0.02 and the arm's std.
    for arm, stds, std, rate in (
        ("mha", [0.02, 0.03, 0.045], 0.026, 2.5e-3),
        ("mla", [0.02, 0.03, 0.045, 0.0675, 0.101], 0.061, 1.6e-3),
    ):
        again = [(r, std) for r in (1e-3, 2e-3, 4e-3)]
        assert tried[arm] == [*grid, *((2.8e-3, s) for s in stds), *again]
        for run in finals:
            if run.arm == arm:
                assert (run.rate, run.config.initializer_range) == (rate, std)
                assert parse_toml(run_toml(run), "")["initializer_range"] == std
    assert not results.others(study)
    text = report_of(study, results)
    assert "| mha | 0.0025 | 0.026 | 1, 2, 3 |" in text and "| rate again |" in text
    assert command.main([str(written(tmp_path, STDS)), "--dry-run"]) == 0
    assert "26 runs at least" in capsys.readouterr().out  # 2 x (4 rates + 3 stds + 3 + 3 seeds)


def test_an_arm_whose_every_std_diverges_has_diverged(tmp_path):
    study, results = opened(tmp_path, STDS)
    finite, grid = tuned({"mha": 0.03, "mla": 0.03}), study.cells[1].rates
    dead = lambda run: run.arm == "mla" and run.rate not in grid  # noqa: E731
    pretend(study, results, lambda run: math.inf if dead(run) else finite(run))
    mha, mla = summarize(study, results).rows
    assert (mla.verdict, mla.tuning.std, dict(mla.finals)) == ("diverged", None, {})
    assert len(mha.finals) == 3
    assert "(diverged), 0.045 (diverged)" in command.markdown(
        study, results, summarize(study, results), {}, "command"
    )


def test_a_study_without_a_tuning_seed_says_which_results_were_tuned_on(tmp_path):
    study, results = opened(tmp_path, OLD)
    # Fitted where the grid has a value: the tuning run of seed 1 is the final run, too.
    done = pretend(study, results, noisy({"mha": 2e-3, "mla": 3e-3}, {"mha": 0, "mla": 0}))
    assert len(done) == 2 * 4 + 2 + 3
    mha, mla = summarize(study, results).rows
    assert (mha.tuned_on, mla.tuned_on) == ([1], [])
    text = report_of(study, results)
    assert "| mha | 0.002 | 1t, 2, 3 |" in text
    assert "tuning used the first seed of the results" in text


# --- the file ---


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("primary = ", "primry = ", "primry is an unknown key; did you mean 'primary'"),
        ('"mla", "mha"]', '"mla"]', "primary = ['mla'] must have 2 items"),
        ('"mla", "mha"]', '"ml", "mha"]', "primary: 'ml' is not an arm; did you mean 'mla'"),
        ('"mla", "mha"]', '"mla", "mla"]', "primary names an arm twice"),
        ('["mla", "mha"]', '[["mla", 3], "mha"]', "primary[0] = ['mla', 3] is not a value of type"),
        ("tokens = 1280", "tokens = [1280, 2560]", "it needs a study of one size and budget"),
        ("primary = ", 'rivals = [["mha"]]\nprimary = ', "rivals[0] = ['mha'] must have 2 items"),
        ("primary = ", 'rivals = [["ml", "mla"]]\nprimary = ', "rivals: 'ml' is not an arm; did"),
        ("tokens = 1280", 'tokens = 1280\narms = ["mha"]', "mla is not among the size's arms"),
        ("[arms.mla]", "[arms.mla]\nat.tiny.seeds = [4]", "mla has no seed in common with mha"),
        ("tuning_seed = 0", "tuning_seed = 2", "tuning_seed 2 is one of mha's seeds"),
        ("batch_size = 4", "batchsize = 4", "did you mean 'batch_size'"),
        ("batch_size = 4", "steps = 4", "steps comes from tokens of a size"),
        ('baseline = "mha"', 'baseline = "mh"', "did you mean 'mha'"),
        ('baseline = "mha"', "", "baseline is missing"),
        ("[arms.mla]", "[arms.mha]", "not valid TOML"),
        ("[arms.mla]", "[arms.MHA]", "which differ in more than capitals"),
        ('model = { attention = "mla", kv_lora_rank = 8 }', "warmup_steps = 2", "changes nothing"),
        ("[arms.mla]", "[arms.a]\ngrad_clip = 3\n[arms.b]\ngrad_clip = 3\n[arms.mla]", "twin"),
        ("[arms.mla]", "[arms.mla]\nbatch_size = 8", "must be the same for all arms"),
        ("[arms.mla]", "[arms.mla]\nlearning_rate = 1e-3", "comes from learning_rates"),
        ("[arms.mla]", "[arms.mla]\nat.tny.seeds = [1]", "did you mean 'tiny'"),
        ("[arms.mla]", "[arms.mla]\nat.tiny.tokens = 640", "mla trains on 640 tokens, which the"),
        ("2e-3, 4e-3, 8e-3]", "2e-3]", "at least 4 values"),
        ("[1e-3, ", "[1e-4, ", "a factor of 1.4 to 2 apart"),
        ("seeds = [", "initializer_ranges = [0.02, 0.04]\nseeds = [", "at least 3 values a factor"),
        ("seeds = [", "initializer_ranges = [0.02]\nseeds = [", "initializer_range sets one"),
        ("[1, 2, 3]", "[1, 1]", "different whole numbers"),
        ("tokens = 1280", "tokens = 12", "at least a step's 128"),
        ("2e-3, 4e-3, 8e-3]", "]", "tuning_seed is for tuning, and no arm has several"),
        (
            "[1e-3, 2e-3, 4e-3, 8e-3]",
            "2e-3",
            "learning_rates = 0.002 is not a value of type list of float",
        ),
        (
            "[arms.mla]",
            "[arms.mla]\nseeds = [1]",
            "seeds belongs under [sizes.SIZE], or under [arms.ARM] as at.SIZE.seeds",
        ),
        ("sizes.tiny", 'sizes."very tiny"', "names a folder; use letters, digits and -"),
        (
            "tuning_seed = 0\nlearning_rates = [1e-3, 2e-3, 4e-3, 8e-3]",
            'tune_dtype = "bfloat16"\nlearning_rates = [1e-3]',
            "tune_dtype is for tuning",
        ),
        ("[base]", "[verdict]\nmargin = 5\n[base]", "a share such as 0.005, not 5"),
        ("warmup_steps = 2", "eval_batches = 2\nfinal_eval_batches = 3", "must be equal"),
        ("n_embd = 16", "n_embd = 15", "not divisible"),
    ],
)
def test_what_a_study_must_not_say_is_one_error(tmp_path, capsys, old, new, said):
    assert SMALL.count(old) >= 1
    path = written(tmp_path, SMALL.replace(old, new, 1))
    assert command.main([str(path), "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert err.startswith(f"error: {path}")
    assert err.count("\n") == 1
    assert not out


def places(table: dict, path: tuple = ()) -> list[tuple]:
    """Where every table and value of a nested table is."""
    found = []
    for name, value in table.items():
        found.append((*path, name))
        if isinstance(value, dict):
            found += places(value, (*path, name))
    return found


FULL = SMALL.replace(
    "[arms.mha]", "[arms.mha]\nat.tiny = { seeds = [1], initializer_ranges = [0.01, 0.02, 0.04] }"
).replace(
    "[base]",
    """title = "t"
extensions = 1
keep = "all"
rivals = [["mha", "mla"]]
[verdict]
margin = 0.01
[machines.m]
tokens_per_second = { tiny = 1 }
source = "s"
[base]""",
    1,
)


@pytest.mark.parametrize(
    "wrong", [-1, 2, 1.5, 1e308, True, "x", "", [], [[1]], ["x"], {}, {"a": {}}], ids=str
)
def test_a_value_of_any_type_in_any_place_is_taken_or_refused(tmp_path, wrong):
    for path in places(parse_toml(FULL, "")):
        values = parse_toml(FULL, "")
        table = values
        for name in path[:-1]:
            table = table[name]
        table[path[-1]] = wrong
        try:
            study = read_study(written(tmp_path, tomli_w.dumps(values)))
            summarize(study, Results(tmp_path))
            command._costs(study)
        except UserError as e:
            assert "small.toml" in str(e) or path == ("base", "preset")


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_shipped_studies_are_read_and_every_run_is_read_back_as_it_was_meant(path):
    study = read_study(path)
    for cell in study.cells:
        run = cell.final(cell.rates[0], cell.stds[0], cell.seeds[0])
        text = run_toml(run)
        assert overlay(preset(run.config.preset), parse_toml(text, ""), "") == run.config
    for row in summarize(study, Results(Path("none"))).rows:
        baseline = row.cell.arm == study.baseline
        assert row.verdict == "baseline" if baseline else row.verdict.startswith("unfinished")


def test_places_that_are_given_are_found_from_any_folder(tmp_path, monkeypatch, capsys):
    study = ROOT / "bench" / "studies" / "gpt2-tokens.toml"
    meant = [settings(cell.config) for cell in read_study(study).cells]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "bpe").mkdir()
    read = read_study(study, data="text.txt", bpe_dir="bpe")
    for cell in read.cells:
        assert Path(cell.config.data) == tmp_path / "text.txt"
        assert Path(cell.config.bpe_dir) == tmp_path / "bpe"
    assert [settings(cell.config) for cell in read.cells] == meant
    err = refused(capsys, written(tmp_path), "--bpe-dir", "bpe", "--dry-run", command=command.main)
    assert "--bpe-dir requires --tokenizer gpt2" in err


def test_the_file_that_the_guide_shows_is_one(tmp_path):
    text = (ROOT / "docs" / "study.md").read_text().split("```toml\n")[1].split("```")[0]
    study = read_study(written(tmp_path, text))
    assert [c.seeds for c in study.cells] == [(1, 2, 3), (1, 2, 3, 4, 5)]
    assert study.cells[0].tune_steps * 4 == study.cells[0].config.steps


def test_the_dry_run_says_what_it_takes(tmp_path, capsys):
    text = SMALL + '[machines.m]\ntokens_per_second = { tiny = 0.1 }\nsource = "a test"\n'
    assert command.main([str(written(tmp_path, text)), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "14 runs at least" in out  # 2 arms x (4 rates + 3 seeds)
    assert f"m: tiny {14 * 1280 / 0.1 / 3600:,.1f} h (a test)" in out


def test_every_difference_from_the_base_is_listed_also_what_defaults_bring(tmp_path):
    study = read_study(written(tmp_path))
    changes = study.differences(study.cell("mla", TINY))
    assert changes["model.attention"] == ("mha", "mla")
    assert changes["model.attention_bias"] == (True, False)
    assert changes["model.kv_lora_rank"] == (None, 8)
    assert "learning_rate" not in changes and "seed" not in changes
    assert study.differences(study.cell("mha", TINY)) == {}


# --- what is run, and what it shows ---


def test_an_arm_may_have_fewer_budgets_than_the_baseline(tmp_path):
    text = OLD.replace("tokens = 1280", "tokens = [1280, 2560]\ntune_tokens = 640")
    study, results = opened(
        tmp_path, text.replace("[arms.mla]", "[arms.mla]\nat.tiny.tokens = 2560")
    )
    done = pretend(study, results, LEVEL)
    # Rates are tried once an arm, whatever budgets follow.
    assert Counter((r.arm, r.tokens) for r in done) == {
        ("mha", 640): 4, ("mla", 640): 4, ("mha", 1280): 3, ("mha", 2560): 3, ("mla", 2560): 3
    }  # fmt: skip
    rows = {(r.cell.arm, r.cell.tokens): r for r in summarize(study, results).rows}
    assert rows.keys() == {("mha", 1280), ("mha", 2560), ("mla", 2560)}
    assert rows["mla", 2560].difference.count == 3


def test_tuning_may_have_a_data_type_of_its_own(tmp_path):
    study, results = opened(
        tmp_path, SMALL.replace("tuning_seed", 'tune_dtype = "bfloat16"\ntuning_seed')
    )
    done = pretend(study, results, LEVEL)
    assert {(r.seed == 0, r.config.dtype) for r in done} == {(True, "bfloat16"), (False, "float32")}
    summary = summarize(study, results)
    assert all(len(row.finals) == 3 for row in summary.rows)
    assert "fitted, in bfloat16;" in command.markdown(study, results, summary, {}, "")


def test_differences_are_paired_by_seed_and_agree_with_scipy(tmp_path):
    study, results = opened(
        tmp_path, SMALL.replace("[base]", 'rivals = [["mha", "mla"]]\n[base]', 1)
    )
    pretend(study, results, noisy({"mha": 3e-3, "mla": 3e-3}, {"mha": 0, "mla": 0.03}))
    summary = summarize(study, results)
    base, mla = summary.rows
    a, b = ([row.finals[seed].loss for seed in (1, 2, 3)] for row in (mla, base))
    test = stats.ttest_rel(a, b)
    ends = test.confidence_interval(0.95)
    assert (mla.difference.low, mla.difference.high) == pytest.approx((ends.low, ends.high))
    assert mla.comparison.p == pytest.approx(test.pvalue)
    assert mla.verdict == "worse"  # seeds move both arms by far more than the difference
    assert mla.loss - base.loss == pytest.approx(mla.difference.mean)
    assert mla.tokens_to_baseline == math.inf
    # What the file declares primary is not one of many; here no other comparison is left.
    assert summary.primary.primary and summary.primary.verdict == "worse"
    assert [c.holm for c in (mla.comparison, summary.pairs[0], summary.primary)] == [None] * 3
    # From half the tokens to the end the curve falls by 0.5, too coarse to say.
    (tmp_path / "better").mkdir()
    study, better = opened(tmp_path / "better")
    pretend(study, better, noisy({"mha": 3e-3, "mla": 3e-3}, {"mha": 0, "mla": -0.25}))
    assert summarize(study, better).rows[1].tokens_to_baseline is None
    for r in better.records:
        r.curve[:] = [(128 * i, r.loss + 0.1 * (10 - i)) for i in range(1, 11)]
    row = summarize(study, better).rows[1]
    assert row.tokens_to_baseline == pytest.approx(0.75 * 1280, rel=0.02)


THREE = SMALL + '[arms.narrow]\nmodel = { attention = "mla", kv_lora_rank = 4 }\n'


def test_of_several_arms_the_one_that_tuning_prefers_is_primary_and_holm_adjusts_the_rest(tmp_path):
    text = THREE.replace('primary = ["mla", ', 'primary = [["mla", "narrow"], ')
    study, results = opened(tmp_path, text)
    assert summarize(study, results).primary is None
    rates = dict.fromkeys(study.arms, 3e-3)
    tuning = noisy(rates, {"mha": 0, "mla": 0.02, "narrow": 0.01})
    final = noisy(rates, {"mha": 0, "mla": -0.02, "narrow": 0.01})
    pretend(study, results, lambda run: (final if run.seed else tuning)(run))
    summary = summarize(study, results)
    # Going by the results it would be mla.
    assert (summary.primary.arm.arm, summary.primary.verdict) == ("narrow", "worse")
    _, mla, narrow = summary.rows
    assert (mla.comparison.holm, narrow.comparison.holm) == (mla.comparison.p, None)
    text = report_of(study, results)
    assert "the arm of mla, narrow with the best tuning loss, against mha" in text
    assert "| tiny, 1,280 | mha | narrow | 3 |" in text and "| primary | worse |" in text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tuning_seed = 0\n", ""),
        ("[arms.mla]\n", "[arms.mla]\nat.tiny.learning_rates = [2e-3]\n"),
    ],
)
def test_an_arm_that_tuning_is_to_choose_must_be_tuned_apart_from_the_results(tmp_path, old, new):
    text = THREE.replace('primary = ["mla", ', 'primary = [["mla", "narrow"], ')
    with pytest.raises(UserError, match="mla is chosen by its loss in tuning, which needs"):
        read_study(written(tmp_path, text.replace(old, new)))


def test_a_comparison_counts_once_however_often_it_is_named(tmp_path):
    """In either direction, and beside the primary one not at all."""
    pairs = 'rivals = [["mha", "narrow"], ["narrow", "mha"], ["mla", "mha"], ["mla", "narrow"]]\n'
    study, results = opened(tmp_path, THREE.replace("[base]", pairs + "[base]", 1))
    rates = dict.fromkeys(study.arms, 3e-3)
    pretend(study, results, noisy(rates, {"mha": 0, "mla": -0.02, "narrow": 0.01}))
    summary = summarize(study, results)
    assert summary.exploratory == 2  # of narrow with both
    p = [summary.pairs[0].p, summary.pairs[3].p]
    expected = holm(p)
    adjusted = [c.holm for c in (summary.rows[2].comparison, *summary.pairs)]
    assert adjusted == [expected[0], expected[0], expected[0], None, expected[1]]


def test_without_a_primary_comparison_holm_counts_all_and_the_pooled_deviation_is_beside(tmp_path):
    study, results = opened(tmp_path, THREE.replace('primary = ["mla", "mha"]\n', ""))
    noise = {"mha": 0, "mla": 0.001, "narrow": 0.05}
    mean = {"mha": 0, "mla": 0.02, "narrow": 0.02}
    best = noisy(dict.fromkeys(study.arms, 3e-3), dict.fromkeys(study.arms, 0))
    pretend(study, results, lambda run: best(run) if run.seed == 0 else (
        2 + mean[run.arm] + noise[run.arm] * (run.seed - 2)))  # fmt: skip
    _, mla, narrow = summarize(study, results).rows
    assert mla.verdict == "worse" and not mla.comparison.confirmed
    assert mla.comparison.with_pooled_sd.low < 0 < mla.difference.low
    assert "| worse* |" in report_of(study, results)
    p = [mla.comparison.p, narrow.comparison.p]
    assert [mla.comparison.holm, narrow.comparison.holm] == holm(p) != p


def test_what_the_baseline_lacks_is_in_the_verdict(tmp_path):
    study, results = opened(tmp_path)
    finite = LEVEL
    lost = lambda run: run.arm == "mha" and run.seed == 3  # noqa: E731
    pretend(study, results, lambda run: math.inf if lost(run) else finite(run))
    (tmp_path / "less").mkdir()
    _, less = opened(tmp_path / "less")
    less.records = [r for r in results.records if r.loss is not None]
    less._index()
    for found, said in ((results, "unfinished: mha diverged"), (less, "unfinished: 2 of 3 seeds")):
        summary = summarize(study, found)
        assert (summary.rows[1].verdict, summary.primary.verdict) == (said, said)
        assert summary.rows[1].difference.count == 2
    assert "**mha at tiny, 1,280 tokens, seed 3**: training diverged" in report_of(study, results)


def test_a_diverged_seed_is_reported_and_not_averaged_away(tmp_path):
    study, results = opened(tmp_path)
    finite = noisy({"mha": 3e-3, "mla": 3e-3}, {"mha": 0, "mla": -1})
    dead = lambda run: run.arm == "mla" and run.seed == 3  # noqa: E731
    pretend(study, results, lambda run: math.inf if dead(run) else finite(run))
    mla = summarize(study, results).rows[1]
    assert (mla.verdict, mla.diverged) == ("diverged", [3])
    text = report_of(study, results)
    assert "**mla at tiny, 1,280 tokens, seed 3**: training diverged at step 7" in text
    assert "1, 2, 3 (1 diverged) |" in text


def test_eight_seeds_asked_and_five_done_are_named(tmp_path):
    study, results = opened(tmp_path, SMALL.replace("[1, 2, 3]", "[1, 2, 3, 4, 5]"))
    pretend(study, results, LEVEL)
    more = read_study(written(tmp_path, SMALL.replace("[1, 2, 3]", "[1, 2, 3, 4, 5, 6, 7, 8]")))
    assert summarize(more, results).primary.verdict == "unfinished: 5 of 8 seeds"
    assert "| 1, 2, 3, 4, 5 of 8 seeds |" in report_of(more, results)
    assert [(r.seed, r.arm) for r in agenda(more, results).ready] == [
        (seed, arm) for seed in (6, 7, 8) for arm in ("mha", "mla")
    ]


def test_the_seeds_of_the_primary_comparison_run_before_those_of_other_arms(tmp_path):
    two = SMALL.replace('["mla", "mha"]', '[["mla", "wide"], "mqa"]')
    arms = """
[arms.mqa]
model = { num_key_value_heads = 1 }
[arms.wide]
model = { attention = "mla", kv_lora_rank = 12 }
"""
    study, results = opened(tmp_path, two + arms)
    names = ("mha", "mla", "mqa", "wide")
    loss = noisy(dict.fromkeys(names, 3e-3), dict.fromkeys(names, 0) | {"wide": -1})
    runs = [(run.arm, run.seed) for run in pretend(study, results, loss) if run.seed]
    assert runs == [(arm, s) for s in (1, 2, 3) for arm in ("mha", "mqa", "wide")] + [
        ("mla", s) for s in (1, 2, 3)
    ]


# --- results.json ---


def test_finished_runs_count_whatever_became_of_names_and_paths(tmp_path):
    study, results = opened(tmp_path)
    done = pretend(study, results, LEVEL)
    again = Results(tmp_path)
    again.use_data("d")
    assert again.records == results.records and len(again.records) == len(done)
    renamed = SMALL.replace('"mla", "mha"]', '"latent", "mha"]').replace("arms.mla", "arms.latent")
    elsewhere = renamed.replace("[base]", '[base]\ndata = "other/path"\nlog_every = 3')
    assert not agenda(read_study(written(tmp_path, elsewhere)), again).ready


def test_a_changed_study_keeps_what_still_fits_and_names_the_rest(tmp_path):
    study, results = opened(tmp_path)
    pretend(study, results, LEVEL)
    changed = read_study(written(tmp_path, SMALL.replace("rank = 8", "rank = 4")))
    assert {r.arm for r in agenda(changed, results).ready} == {"mla"}
    assert [r.arm for r in results.others(changed)] == ["mla"] * 7
    pretend(changed, results, LEVEL)
    assert "## Finished runs that the study does not ask for" in report_of(changed, results)
    # Changed back, the old ones count again.
    assert not agenda(study, results).ready


def test_seeds_at_a_rate_that_is_no_longer_the_one_found_are_named(tmp_path):
    study, results = opened(tmp_path)
    pretend(study, results, LEVEL)
    finals = [r for r in results.records if r.seed and r.arm == "mla"]
    more, results = opened(tmp_path, SMALL.replace("8e-3]", "8e-3, 1.6e-2]"))
    pretend(more, results, noisy({"mha": 3e-3, "mla": 1.6e-2}, {"mha": 0, "mla": 0}))
    assert [r.name for r in results.others(more)] == [r.name for r in finals]
    assert f"- {finals[0].name}, std 0.02: loss" in report_of(more, results)


def test_runs_on_other_data_do_not_count_and_are_never_mixed(tmp_path, capsys):
    (tmp_path / "text").write_text("some text to train on " * 400)
    study, results = opened(tmp_path)
    pretend(study, results, LEVEL)
    path, out = written(tmp_path), ["--out", tmp_path, "--report-only"]
    # A complete folder with data that are not those of its runs: the report is about the data.
    assert command.main([str(path), "--data", str(tmp_path / "text"), *map(str, out)]) == 0
    assert "mla, tiny, 1,280 tokens: unfinished: 0 of 3 seeds" in capsys.readouterr().out
    err = refused(capsys, path, "--data", tmp_path / "none", *out, command=command.main)
    assert "none" in err
    results.use_data("e")
    assert len(agenda(study, results).ready) == 8
    assert len(results.others(study)) == 14
    results.add(study.cells[0].final(3e-3, 0.02, 2), {"loss": 1.0, "curve": [(1280, 1.0)]}, {})
    before = (tmp_path / "report.md").read_text()
    err = refused(capsys, path, *out, command=command.main)
    assert f"{RESULTS}: data_sha256 names 2 sets of data: d (m" in err
    assert "choose one with --data" in err
    assert (tmp_path / "report.md").read_text() == before


@pytest.mark.parametrize(
    "fields", [["model.rope_theta"], ["model.position_embedding_type", "initializer"], []]
)
def test_results_from_before_a_setting_existed_still_count(tmp_path, fields):
    study, results = opened(tmp_path)
    pretend(study, results, LEVEL)
    document = json.loads(results.path.read_text())
    for field in fields:
        tables = [document["settings"], *(r["settings"] for r in document["runs"])]
        assert sum(table.pop(field, "absent") != "absent" for table in tables) >= 1
    results.path.write_text(json.dumps(document))
    assert not agenda(study, Results(tmp_path)).ready


def test_results_with_a_setting_that_is_gone_are_kept_apart(tmp_path):
    study, results = opened(tmp_path)
    pretend(study, results, LEVEL)
    document = json.loads(results.path.read_text())
    document["settings"]["model.gated"] = True
    results.path.write_text(json.dumps(document))
    later = Results(tmp_path)
    assert len(later.others(study)) == len(later.records) == 14
    assert len(agenda(study, later).ready) == 8


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 2, "runs": []}', "\xff"])
def test_a_results_file_that_is_none_is_one_error(tmp_path, text):
    (tmp_path / RESULTS).write_text(text)
    with pytest.raises(UserError, match=r"results\.json"):
        Results(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("loss", True, "loss = True is not"),
        ("loss", math.nan, "runs[4].loss must be a finite number"),
        ("loss", 1e308, "loss must be at most 100"),
        ("loss", None, "loss and diverged"),
        ("diverged", "at step 3", "loss and diverged"),
        ("curve", [[1, 2], [1, 2]], "curve: tokens must rise"),
        ("loss", 0.5, "curve: must end with tokens and loss"),
        ("machine", "another", "machine = 'another' is not in"),
        ("color", 1, "color is an unknown key"),
    ],
)
def test_a_mutated_record_is_refused_before_a_report_is_written(
    tmp_path, capsys, field, value, said
):
    study, results = opened(tmp_path)
    pretend(study, results, LEVEL)
    document = json.loads(results.path.read_text())
    document["runs"][4][field] = value
    results.path.write_text(json.dumps(document))
    out = ["--out", tmp_path, "--report-only"]
    err = refused(capsys, tmp_path / "small.toml", *out, command=command.main)
    assert f"{results.path}: run" in err and f": {said}" in err
    assert not (tmp_path / "report.md").exists()


def test_quick_takes_seeds_that_arms_share(tmp_path):
    text = SMALL.replace("[1, 2, 3]", "[1, 2, 3, 4, 5]") + "at.tiny.seeds = [3, 4, 5]\n"
    study = read_study(written(tmp_path, text), quick=True)
    assert {cell.arm: cell.seeds for cell in study.cells} == {"mha": (1, 2), "mla": (3, 4)}


def test_quick_never_replaces_the_report_of_a_whole_study(tmp_path, capsys):
    study, results = opened(tmp_path, SMALL.replace("tokens = 1280", "tokens = 12_800"))
    pretend(study, results, LEVEL)
    argv = [tmp_path / "small.toml", "--out", tmp_path]
    assert command.main([*map(str, argv), "--report-only"]) == 0
    before = (tmp_path / "report.md").read_text()
    capsys.readouterr()
    err = refused(capsys, *argv, "--quick", command=command.main)
    assert "--quick would replace; give --out a new folder" in err
    assert (tmp_path / "report.md").read_text() == before


def test_two_records_of_one_run_must_agree(tmp_path):
    study, results = opened(tmp_path)
    pretend(study, results, LEVEL)
    document = json.loads(results.path.read_text())
    document["runs"].append(copy.deepcopy(document["runs"][2]))
    results.path.write_text(json.dumps(document))
    assert len(Results(tmp_path).records) == 15
    document["runs"][-1]["loss"] += 0.1
    document["runs"][-1]["curve"][-1][1] += 0.1
    results.path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"results\.json: runs 3 and 15 .* are one, with loss"):
        Results(tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_results_still_give_their_report(tmp_path, name):
    source = ROOT / "bench" / "results" / name
    (tmp_path / RESULTS).write_bytes((source / RESULTS).read_bytes())
    study = ROOT / "bench" / "studies" / f"{name}.toml"
    assert command.main([str(study), "--out", str(tmp_path), "--report-only"]) == 0
    strip = lambda text: text.split("\n- rule", 1)[1]  # noqa: E731  (the command names the folder)
    assert strip((tmp_path / "report.md").read_text()) == strip((source / "report.md").read_text())


@given(st.lists(st.integers(), min_size=1, max_size=300), st.integers(2, 64))
def test_a_thinned_curve_keeps_its_end(points, count):
    few = thinned(points, count)
    assert few[-1] == points[-1]
    assert len(few) == min(count, len(points))


# --- pictures ---


@pytest.mark.parametrize(
    ("percent", "far"),
    [
        ({}, set()),
        ({"a": 58}, set()),
        ({"a": 0.4, "b": 1.6, "c": 58}, {"c"}),
        ({"a": -0.9, "b": 0.05, "c": 28, "d": 60}, {"c", "d"}),
        ({"a": 0.0, "b": 7.9}, set()),
        ({"a": -40, "b": 3}, {"a"}),
    ],
)
def test_arms_that_would_squeeze_the_others_are_far(percent, far):
    assert far_arms(percent) == far


def test_pictures_show_seeds_intervals_and_what_is_unfinished_with_one_color_an_arm(
    tmp_path, monkeypatch
):
    from matplotlib.figure import Figure

    figures = {}

    def paint(out, painter, **settings):
        figures[out.name] = Figure(**settings)
        painter(figures[out.name])

    monkeypatch.setattr(pictures, "draw_picture", paint)
    arms = "".join(f'[arms.r{n}]\nmodel = {{ attention = "mla", kv_lora_rank = {n} }}\n'
                   for n in range(1, 8))  # fmt: skip
    study, results = opened(tmp_path, SMALL + arms)
    offset = {arm: 0.01 * i for i, arm in enumerate(study.arms)}
    pretend(study, results, noisy(dict.fromkeys(study.arms, 3e-3), offset))
    results.records = [r for r in results.records if (r.arm, r.seed) != ("r1", 3)]
    results._index()
    assert len(pictures.draw(study, summarize(study, results).rows, tmp_path)) == len(figures) == 3
    (forest,) = figures["difference.png"].axes
    texts = [t.get_text().strip() for t in forest.texts]
    assert texts.count("n = 3") == 7 and texts.count("n = 2 of 3") == 1
    (cache,) = figures["loss-cache.png"].axes
    labels = {line.get_label(): line for line in cache.lines}
    assert "mla (n = 3)" in labels and labels["r1 (n = 2 of 3)"].get_markerfacecolor() == "white"
    bars = [
        line for line in cache.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-"
    ]
    assert len(bars) == 8
    (gap,) = figures["difference-tokens-tiny-1280.png"].axes
    curves = {line.get_label(): line for line in gap.lines if "(n" in line.get_label()}
    assert len(curves) == 6 and "mla (n = 3)" in curves  # the primary one, and the nearest
    for label, line in curves.items():
        assert labels[label].get_color() == line.get_color()
    assert len({line.get_color() for line in labels.values()}) >= 9


# --- real runs ---


def test_a_folder_resumes_its_own_run_alone(tmp_path):
    study = read_study(written(tmp_path))
    mha, mla = (study.cell(arm, TINY).final(4e-3, 0.02, 1) for arm in ("mha", "mla"))
    folder = tmp_path / "runs" / "4e-3"
    create_run(folder, mha.config, contextlib.ExitStack())
    make_room(folder, mha, None)
    assert (folder / "config.toml").is_file()
    for aside in ("4e-3.other-1", "4e-3.other-2"):
        make_room(folder, mla, None)
        assert not folder.exists()
        assert (folder.with_name(aside) / "config.toml").is_file()
        create_run(folder, mha.config, contextlib.ExitStack())
    (folder / "config.toml").rename(folder / ".config.toml.tmp-7")  # killed while it was written
    make_room(folder, mha, "d")
    create_run(folder, mha.config, contextlib.ExitStack())


def test_a_folder_of_a_run_on_other_data_is_moved_aside(tmp_path):
    mha = read_study(written(tmp_path)).cell("mha", TINY).final(4e-3, 0.02, 1)
    folder = tmp_path / "runs" / "4e-3"
    create_run(folder, mha.config, contextlib.ExitStack())
    make_room(folder, mha, "other")  # it has no checkpoint yet, and begins anew
    saved = checkpoint.checkpoint_path(folder, 10)
    saved.mkdir()
    checkpoint.write_train_state(
        saved, {}, {"format": 1, "step": 10, "val_loss": 5.0, "data_sha256": "d"}
    )
    make_room(folder, mha, "d")
    assert saved.is_dir()
    state = saved / "train_state.json"
    whole = state.read_bytes()
    state.write_bytes(whole[:-9])  # damaged: the trainer passes over it
    make_room(folder, mha, "other")
    assert saved.is_dir()
    state.write_bytes(whole)
    make_room(folder, mha, "other")
    assert not folder.exists()


def start(*args: object, **more) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "bench.study", *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, **more,
    )  # fmt: skip


ONE_RATE = UNTUNED.replace("[1e-3, 2e-3, 4e-3, 8e-3]", "[4e-3]").replace("[1, 2, 3]", "[1, 2]")
ONE_SEED = ONE_RATE.replace("[1, 2]", "[1]")


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_and_another_machine_needs_results_json_alone(tmp_path):
    pytest.importorskip("torch")
    study = written(tmp_path, ONE_RATE.replace("tokens = 1280", "tokens = 128_000"))  # 1,000 steps
    out = tmp_path / "out"
    asked = [study, "--out", out, "--jobs", "2"]
    first = start(*asked)
    metrics = out / "runs" / "mha" / "tiny" / "128000" / "0.004-1" / "metrics.jsonl"
    until((out / "runs").is_dir, first)
    second = start(*asked)
    assert second.wait(60) == 2
    assert "is writing to it; wait until it ends" in second.stderr.read()
    until(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) > 5, first)
    first.kill()  # SIGKILL: its trainers live on
    first.wait(60)
    third = start(*asked)
    said, error = third.communicate(timeout=300)
    assert third.returncode == 0, error
    assert "waits for a trainer that was left behind" in said
    records = json.loads((out / RESULTS).read_text())["runs"]
    assert sorted((r["arm"], r["seed"]) for r in records) == [
        ("mha", 1), ("mha", 2), ("mla", 1), ("mla", 2)
    ]  # fmt: skip
    for record in records:
        assert record["curve"][-1] == [128_000, pytest.approx(record["loss"], abs=1e-5)]
    # The weights of the first seed stay.
    kept = [p.parent.parent.name for p in out.glob("runs/*/tiny/128000/*/latest")]
    assert kept == ["128000", "128000"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / RESULTS).write_bytes((out / RESULTS).read_bytes())
    away = start(study, "--out", elsewhere)
    said, error = away.communicate(timeout=60)
    assert away.returncode == 0, error
    assert "started" not in said
    assert not (elsewhere / "runs").exists()
    strip = lambda path: path.read_text().split("\n", 3)[3]  # noqa: E731
    assert strip(elsewhere / "report.md") == strip(out / "report.md")


@pytest.mark.slow
def test_a_run_that_diverges_and_a_stop_by_ctrl_c(tmp_path):
    pytest.importorskip("torch")
    study = written(tmp_path, ONE_SEED + 'at.tiny.learning_rates = [1e30]\nabout = "too fast"\n')
    out = tmp_path / "out"
    process = start(study, "--out", out)
    until(lambda: list(out.glob("runs/*/tiny/1280/*.log")), process)
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "resume with" in said
    assert not [*out.glob("runs/**/*.tmp-*"), *out.glob("runs/**/*.other-*")]
    process = start(study, "--out", out)
    said, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert "mla, tiny, 1,280 tokens: diverged" in said
    records = json.loads((out / RESULTS).read_text())["runs"]
    assert all((r["loss"] is None) == (r["arm"] == "mla") for r in records)
    assert "training diverged at step" in (out / "report.md").read_text()


@pytest.mark.slow
def test_no_space_is_one_line_and_nothing_is_lost(tmp_path):
    pytest.importorskip("torch")
    out = tmp_path / "out"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    asked = [written(tmp_path, ONE_SEED), "--out", out]
    full = start(*asked, preexec_fn=limit)
    _, error = full.communicate(timeout=120)
    assert full.returncode == 2
    assert error.startswith("error: mha/tiny/1280/0.004-1: ")
    assert "could not be written" in error
    assert error.count("\n") == 1
    again = start(*asked)
    assert again.wait(300) == 0


@pytest.mark.slow
def test_the_quick_study_runs_whole(tmp_path):
    pytest.importorskip("torch")
    out = tmp_path / "out"
    process = start(QUICK, "--quick", "--jobs", cores(), "--out", out)
    said, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    assert "ETA" in said
    text = (out / "report.md").read_text()
    for part in ("## The primary", "## tiny", "| mla-rope |", "## Pairs", "rate again", "--quick"):
        assert part in text
    for picture in ("difference", "loss-cache"):
        assert (out / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def until(true, process: subprocess.Popen) -> None:
    """Wait until something is true, while the process that makes it so runs."""
    for _ in range(1200):
        if true():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    raise AssertionError("it never came to be")
