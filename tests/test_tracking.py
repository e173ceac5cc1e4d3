"""--track: what TensorBoard, wandb and Trackio are given, over resumes too."""

import importlib.util
import json
import sys
import types

import pytest
from helpers import TINY, refused, tiny_train, words
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from mlx_mla import train
from mlx_mla.errors import UserError
from mlx_mla.training.metrics import read_metrics
from mlx_mla.training.tracking import Tracking, scalars, tracker_names

STEPS = words("--steps 12 --save-every 4 --log-every 2 --eval-every 3 --keep 0")


def expected(run) -> dict[str, list[tuple[int, float]]]:
    """Every scalar that metrics.jsonl holds: name to (step, value) in order."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in read_metrics(run / "metrics.jsonl"):
        for key, value in scalars(row).items():
            series.setdefault(key, []).append((row["step"], value))
    assert {"train/loss", "train/mfu", "val/loss", "val/seconds"} <= set(series)
    return series


@pytest.mark.slow
def test_tensorboard_reads_what_metrics_jsonl_holds_also_after_a_step_back(tmp_path, text_file):
    run = tmp_path / "run"
    tiny_train(run, *STEPS, "--data", text_file, "--track", "tensorboard")
    for resume in (None, ("--from-step", "4"), ("--steps", "16")):
        if resume:
            assert train.main(["--resume", "--out", str(run), *resume]) == 0
        events = EventAccumulator(str(run / "tensorboard"), {"tensors": 0})
        events.Reload()
        assert {
            events.SummaryMetadata(tag).plugin_data.plugin_name for tag in events.Tags()["tensors"]
        } == {"scalars"}
        read = {
            tag: [(e.step, make_ndarray(e.tensor_proto).item()) for e in events.Tensors(tag)]
            for tag in events.Tags()["tensors"]
        }
        want = expected(run)
        assert read.keys() == want.keys()
        for tag, points in want.items():
            assert [step for step, _ in read[tag]] == [step for step, _ in points]
            assert [value for _, value in read[tag]] == pytest.approx(
                [value for _, value in points], rel=1e-6
            )
        # Wall times are apart by the training time, whatever process wrote them.
        times = [
            (e.wall_time, seconds)
            for e, (_, seconds) in zip(events.Tensors("val/loss"), want["val/seconds"])
        ]
        assert [t - times[0][0] for t, _ in times] == pytest.approx(
            [s - times[0][1] for _, s in times], abs=0.01
        )


class FakeWandbRun:
    """wandb's Run.log by its documentation: steps below the highest, and those of the run that was
    resumed, are dropped; others are merged by number."""

    def __init__(self, history: dict[int, dict]):
        self.history, self.ended, self.dropped = history, None, []
        self.first = 1 + max(history, default=-1)

    def log(self, data, step=None, commit=None):
        if step < max(self.history, default=0) or step < self.first:
            self.dropped.append(step)
            return
        assert not set(data) & set(self.history.get(step, {})), "a value given twice"
        self.history.setdefault(step, {}).update(data)

    def finish(self, exit_code=None):
        self.ended = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """A module with the part of wandb's API that is used, keeping runs by id as its server does."""
    module = types.ModuleType("wandb")
    module.histories, module.runs, module.calls = {}, [], []

    def init(*, project, id, name, dir, config, resume, allow_val_change):
        assert resume == "allow"
        assert allow_val_change
        json.dumps(config)
        module.calls.append(
            {"project": project, "id": id, "name": name, "dir": dir, "steps": config["steps"]}
        )
        module.runs.append(FakeWandbRun(module.histories.setdefault(id, {})))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def trackio(monkeypatch):
    """A module with the part of Trackio's API that is used: runs are resumed by name, and keep
    every row."""
    module = types.ModuleType("trackio")
    module.rows = {}

    class Run:
        def __init__(self, rows):
            self.rows = rows

        def log(self, metrics, step=None):
            self.rows.append((step, dict(metrics)))

        def finish(self):
            pass

    module.init = lambda project, name, config, resume: Run(
        module.rows.setdefault((project, name, resume), [])
    )
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


def test_a_resumed_run_continues_in_wandb_and_trackio(tmp_path, text_file, wandb, trackio):
    run = tmp_path / "my-run"
    tiny_train(run, *STEPS, "--data", text_file, "--track", "wandb,trackio")
    first = expected(run)
    # As after a kill past the checkpoint of step 8: the steps up to 12 are trained again.
    assert train.main(["--resume", "--out", str(run), "--from-step", "8", "--steps", "16"]) == 0
    assert len(wandb.calls) == 2
    assert {(c["project"], c["id"], c["name"], c["dir"]) for c in wandb.calls} == {
        ("mlx_mla", wandb.calls[0]["id"], "my-run", str(run))
    }
    assert [c["steps"] for c in wandb.calls] == [12, 16]
    assert [(r.ended, set(r.dropped)) for r in wandb.runs] == [(0, set()), (0, {9, 10, 12})]

    (((_, name, resume), rows),) = trackio.rows.items()
    assert (name, resume) == (f"my-run-{wandb.calls[0]['id']}", "allow")
    now = expected(run)
    kept = wandb.histories[wandb.calls[0]["id"]]
    for key, points in now.items():
        given = [(step, values[key]) for step, values in rows if key in values]
        assert given == first[key] + [point for point in points if point[0] > 8], key
        in_wandb = [(step, kept[step][key]) for step in sorted(kept) if key in kept[step]]
        assert in_wandb == first[key] + [point for point in points if point[0] > 12], key


def test_a_tracker_added_later_gets_the_rows_before(tmp_path, text_file, trackio):
    run = tmp_path / "run"
    tiny_train(run, *STEPS, "--data", text_file)
    assert train.main(["--resume", "--out", str(run), "--steps", "14", "--track", "trackio"]) == 0
    (rows,) = trackio.rows.values()
    assert rows == [(row["step"], scalars(row)) for row in read_metrics(run / "metrics.jsonl")]


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, text_file, wandb, monkeypatch, capfd):
    run = tmp_path / "run"

    def fail(self, data, step=None, commit=None):
        raise ConnectionError("the server has gone")

    monkeypatch.setattr(FakeWandbRun, "log", fail)
    tiny_train(run, *STEPS, "--data", text_file, "--track", "wandb")
    warning = "warning: --track wandb failed and is left out from here: the server has gone"
    assert capfd.readouterr().out.count(warning) == 1
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 12


def test_what_cannot_track_is_said_before_training(tmp_path, text_file, wandb, monkeypatch, capsys):
    run = tmp_path / "run"
    flags = (*TINY, *STEPS, "--data", text_file, "--out", run, "--track")
    assert "unknown name 'tensorbord'; did you mean 'tensorboard'?" in refused(
        capsys, *flags, "tensorbord"
    )
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not installed
    assert "--track trackio: trackio is not installed; pip install trackio" in refused(
        capsys, *flags, "trackio"
    )
    (tmp_path / "trackio").mkdir()  # as Trackio itself leaves one
    with monkeypatch.context() as path:
        path.delitem(sys.modules, "trackio")
        path.setattr(sys, "path", [str(tmp_path)])
        assert "trackio is not installed" in refused(capsys, *flags, "trackio")
    sys.modules.pop("trackio", None)
    assert not run.exists()

    def no_login(**_):
        raise RuntimeError("No API key configured.")

    monkeypatch.setattr(wandb, "init", no_login)
    said = refused(capsys, *flags, "wandb")
    assert "--track wandb: could not start: No API key configured.; set it right" in said
    assert train.main(["--resume", "--out", str(run), "--track", ""]) == 0


def test_the_real_wandb_offline(tmp_path, text_file, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    tiny_train(run, *STEPS, "--data", text_file, "--track", "wandb")
    assert train.main(["--resume", "--out", str(run), "--from-step", "8", "--steps", "16"]) == 0
    identity = json.loads((run / "tracking.json").read_text())["id"]
    assert len(list((run / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))) == 2


def test_the_real_trackio(tmp_path, text_file, monkeypatch):
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    run = tmp_path / "run"
    tiny_train(run, *STEPS, "--data", text_file, "--track", "trackio")
    assert train.main(["--resume", "--out", str(run), "--from-step", "8", "--steps", "16"]) == 0
    name = f"run-{json.loads((run / 'tracking.json').read_text())['id']}"
    logs = SQLiteStorage.get_logs("mlx_mla", name)
    steps = [entry["step"] for entry in logs if "train/loss" in entry]
    assert sorted(steps) == [1, 2, 4, 6, 8, 10, 10, 12, 12, 14, 16]


def test_a_folder_of_a_trackers_name_is_not_its_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    if importlib.util.find_spec("wandb").origin is not None:
        pytest.skip("wandb itself is installed, and found before the folder")
    with pytest.raises(UserError, match="--track wandb: wandb is not installed"):
        tracker_names("wandb")
    sys.modules.pop("wandb", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"id": 3}', "id = 3 is not a value of type str; remove the file"),
        ('{"id": "../../x"}', "id must be the id of a run, not"),
        ('{"id": "a", "trackers": "wandb"}', "trackers = 'wandb' is not a value of type list"),
    ],
)
def test_a_damaged_tracking_json_is_named(tmp_path, text, message):
    (tmp_path / "tracking.json").write_text(text)
    with pytest.raises(UserError, match=message) as told:
        Tracking(tmp_path, Console(quiet=True))
    assert str(told.value).startswith(str(tmp_path / "tracking.json"))
