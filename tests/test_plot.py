"""`python -m mlx_mla.plot`: the table, the picture's content, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
from helpers import WITHOUT_TORCH, ran, refused

from mlx_mla import plot
from mlx_mla.pictures import draw
from mlx_mla.plot import read_runs, smoothed
from mlx_mla.training.metrics import read_metrics


@pytest.fixture
def figure(monkeypatch):
    """The figures that were saved."""
    saved = []
    draw = plot.draw

    def keep(out, paint, **options):
        draw(out, lambda fig: (paint(fig), saved.append(fig)), **options)

    monkeypatch.setattr(plot, "draw", keep)
    return saved


@pytest.fixture
def copies(tiny_run, tmp_path):
    """Copies of a run: two of one name that differ in the seed, and one with another attention."""

    def copy(name: str, setting: str, value: str):
        run = tmp_path / name
        shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("checkpoints"))
        lines = (run / "config.toml").read_text().splitlines()
        changed = [
            f"{setting} = {value}" if line.startswith(f"{setting} =") else line for line in lines
        ]
        assert changed != lines
        (run / "config.toml").write_text("\n".join(changed))
        return run

    return copy("a/mla", "seed", "1"), copy("b/mla", "seed", "2"), copy("mha", "attention", '"mha"')


def test_the_table_says_what_metrics_jsonl_says(tiny_run, tmp_path, capsys):
    assert plot.main([str(tiny_run), "--out", str(tmp_path / "p.png")]) == 0
    header, rule, line = capsys.readouterr().out.splitlines()[:3]
    assert set(rule) == {"|", "-"}
    assert header.replace("|", " ").split()[:3] == ["run", "steps", "tokens"]
    rows = read_metrics(tiny_run / "metrics.jsonl")
    speeds = [r["tokens_per_sec"] for r in rows if r["split"] == "train"][1:]
    last = rows[-1]
    assert line.replace("|", " ").split() == [
        "tiny", "40", "7,680", f"{last['loss']:.4f}", f"{last['loss']:.4f}", "(40)",
        f"{np.median(speeds):,.0f}", f"{np.median([r['mfu'] for r in rows if 'mfu' in r]):.1%}",
        f"{last['peak_memory_bytes'] / 2**20:,.0f}", "MiB", f"{last['seconds']:,.0f}", "s",
    ]  # fmt: skip
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_every_run_in_every_panel(copies, tmp_path, figure):
    assert plot.main([*map(str, copies), "--out", str(tmp_path / "p.svg"), "--smooth", "0"]) == 0
    assert b"<svg" in (tmp_path / "p.svg").read_bytes()
    by_tokens, by_time, speed, memory = figure[0].axes
    rows = read_metrics(copies[0] / "metrics.jsonl")
    train, val = ([r for r in rows if r["split"] == split] for split in ("train", "val"))
    for axes, key in ((by_tokens, "tokens"), (by_time, "seconds")):
        assert len(axes.lines) == 6
        for line, want in zip(axes.lines[:2], (train, val)):
            np.testing.assert_allclose(line.get_xdata(), [r[key] for r in want])
            np.testing.assert_allclose(line.get_ydata(), [r["loss"] for r in want])
    np.testing.assert_allclose(speed.lines[0].get_ydata(), [r["tokens_per_sec"] for r in train[1:]])
    assert [bar.get_width() for bar in memory.patches] == [
        max(r["peak_memory_bytes"] for r in rows) / 2**20
    ] * 3
    # Names are unique; repetitions share a color and differ in dashes.
    (legend,) = figure[0].legends
    assert [text.get_text() for text in legend.get_texts()][:3] == ["a/mla", "b/mla", "mha"]
    lines = by_tokens.lines[::2]
    assert lines[0].get_color() == lines[1].get_color() != lines[2].get_color()
    assert lines[0].get_linestyle() != lines[1].get_linestyle()


def test_smoothing_is_a_weighted_mean_of_what_was_seen():
    values = [4.0, 2.0, 3.0, 1.0]
    assert smoothed(values, 0.0) == values
    weights = np.array([0.9**3, 0.9**2, 0.9, 1])
    assert smoothed(values, 0.9)[-1] == pytest.approx((weights * values).sum() / weights.sum())


def test_metrics_of_an_older_version_have_no_times(copies, tmp_path, figure):
    path = copies[0] / "metrics.jsonl"
    rows = [{k: v for k, v in r.items() if k not in ("seconds", "mfu")} for r in read_metrics(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plot.main([str(copies[0]), "--out", str(tmp_path / "p.png")]) == 0
    assert "no times logged for" in figure[0].axes[1].texts[0].get_text()


def test_bad_input_is_one_line(copies, tmp_path, capsys):
    good, other, _ = copies
    out = ("--out", tmp_path / "p.png")

    def said(*argv) -> str:
        return refused(capsys, *argv, command=plot.main)

    assert "no such folder" in said(tmp_path / "nothing", *out)
    (tmp_path / "empty").mkdir()
    assert "holds no run" in said(good, tmp_path / "empty", *out)
    assert f"{good}/../mla: is given twice" in said(good, f"{good}/../mla", *out)
    assert "--smooth must be" in said(good, "--smooth", "1", *out)
    assert "file ending in .png" in said(good, "--out", tmp_path / "p.xyz")
    assert "there is no folder" in said(good, "--out", tmp_path / "none" / "p.png")
    assert "did you mean --smooth" in said(good, "--smoth", "1")
    said(*out)

    metrics = other / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    for damage, why in (
        (b"\x00\xff\n", "not UTF-8 text"),
        (b'["step"]\n', "is not a table of names"),
        (lines[2].replace(b'"tokens"', b'"tokenz"'), "tokens is missing"),
    ):
        metrics.write_bytes(b"".join([*lines[:2], damage, *lines[3:]]))
        text = said(good, other, *out)
        assert f"{metrics}, line 3: " in text
        assert why in text
    metrics.write_bytes(b"")
    assert "is empty; the run has logged nothing yet" in said(other, *out)
    metrics.unlink()
    assert "no such file; the run has logged nothing yet" in said(other, *out)
    assert not (tmp_path / "p.png").exists()


def test_an_unfinished_last_line_is_left_out(copies):
    before = read_runs(copies[:1])[0]
    with (copies[0] / "metrics.jsonl").open("a") as f:
        f.write('{"step": 41, "spl')
    assert read_runs(copies[:1])[0] == before


@pytest.mark.parametrize(
    "setting",
    [
        {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        {"MPLBACKEND": "no-such-backend"},
        {"rc": "text.usetex: True\nfont.family: No Such Font\naxes.titlesize: 400\n"},
    ],
)
def test_the_users_matplotlib_settings_spoil_no_picture(setting, tiny_run, tmp_path):
    """Which matplotlib reads as it is imported."""
    env = {**WITHOUT_TORCH, **setting}
    if text := env.pop("rc", None):
        (tmp_path / "matplotlibrc").write_text(text)
    done = ran("-m", "mlx_mla.plot", tiny_run, "--out p.png", cwd=tmp_path, env=env)
    assert not done.stderr
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_drawing_leaves_a_notebooks_plots_and_settings_alone(tmp_path):
    import matplotlib

    def paint(fig):
        assert fig.subplots().plot([1, 2])[0].get_linewidth() == 1.5

    with matplotlib.rc_context({"lines.linewidth": 7.5}):
        draw(tmp_path / "a.png", paint)
        assert matplotlib.rcParams["lines.linewidth"] == 7.5
    with pytest.raises(ZeroDivisionError):
        draw(tmp_path / "b.png", lambda fig: 1 / 0)
    draw(tmp_path / "b.png", lambda fig: 1 / 0, optional=True)
    assert not (tmp_path / "b.png").exists()
