"""Several processes that train one model are one process that trains it; what happens when one of
them fails."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, python, words
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mlx_mla import checkpoint, train
from mlx_mla.backends.contract import dropout_seed
from mlx_mla.checks.commands import free_ports
from mlx_mla.data import corpus
from mlx_mla.data.windows import TokenWindows
from mlx_mla.errors import UserError
from mlx_mla.model.presets import preset
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.training import loop
from mlx_mla.training.metrics import read_metrics
from mlx_mla.world import AgreedError, World, same_everywhere, share_of

SCRIPTS = Path(sys.executable).parent
# 12 sequences a step: one process takes them in 3 passes of 4, each of two in 2 passes of 3.
COMMON = words(
    *TINY, "--grad-accum-steps 3 --log-every 1 --eval-every 7 --save-every 4", "--keep 0"
)
COMMON += ["--warmup-steps", "4"]


@contextlib.contextmanager
def ring(tmp_path, *argv, size=2, preexec=None):
    """Ranks on an MLX ring as mlx.launch starts them, without it: it hides their exit codes.

    Args:
        preexec: What rank 0 runs before it starts.
    """
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    ranks = []
    try:
        for rank in range(size):
            ranks.append(
                subprocess.Popen(
                    python("-m", "mlx_mla.train", *map(str, argv)),
                    env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    preexec_fn=preexec if rank == 0 else None,
                )
            )
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def outcomes(ranks, timeout=120) -> tuple[list[int], list[str]]:
    """Exit codes, and stderr without what the engine itself says there."""
    said = [process.communicate(timeout=timeout)[1] for process in ranks]
    kept = [
        "".join(line + "\n" for line in text.splitlines() if not line.startswith("[ring]"))
        for text in said
    ]
    return [process.returncode for process in ranks], kept


def curve(run) -> dict:
    return {(row["step"], row["split"]): row["loss"] for row in read_metrics(run / "metrics.jsonl")}


def wait_for_step(run, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in read_metrics(run / "metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text_file) -> Path:
    """The run of one process that the others are held against, checkpoints every 4 of its 16
    steps."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert train.main([*COMMON, "--data", str(text_file), "--out", str(out), "--steps", "16"]) == 0
    return out


@pytest.mark.slow
def test_two_processes_by_mlx_launch_have_the_loss_curve_of_one(alone, tmp_path, text_file):
    out = tmp_path / "run"
    argv = words(*COMMON, "--data", text_file, "--out", out, "--steps 16 --save-every 0")
    port = next(p for p in free_ports(20) if p < 65535)  # the launcher takes this one and the next
    command = [
        str(SCRIPTS / "mlx.launch"), "-n", "2", "-p", str(port), "--",
        *python("-m", "mlx_mla.train", *argv),
    ]  # fmt: skip
    stdin, open_end = os.pipe()  # mlx.launch spins on an input that has ended
    done = subprocess.run(
        command, stdin=stdin, capture_output=True, text=True, timeout=120, check=False
    )
    os.close(stdin)
    os.close(open_end)
    assert curve(out) == pytest.approx(curve(alone), abs=1e-5), done.stderr
    assert done.stdout.count("run folder") == 1
    assert checkpoint.integrity_error(checkpoint.latest(out)) is None


@pytest.mark.slow
@pytest.mark.torch
def test_torchrun_goes_on_with_a_run_of_one_process(alone, tmp_path, text_file):
    """PyTorch's averaging, and resuming with more ranks than before (and in the other backend)."""
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    for step in (12, 16):
        shutil.rmtree(checkpoint.checkpoint_path(out, step))
    torchrun = words(SCRIPTS / "torchrun", "--nproc-per-node 2 --master-port", free_ports(1)[0])
    argv = words("-m", "mlx_mla.train", *COMMON, "--data", text_file, "--out", out, "--steps 16")
    command = [*torchrun, *argv, "--auto-resume", "--backend", "torch", "--save-every", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "after step 8" in done.stdout
    assert curve(out) == pytest.approx(curve(alone), abs=1e-5)


@pytest.mark.slow
def test_a_killed_rank_ends_the_other_and_the_run_goes_on_with_one_process(
    alone, tmp_path, text_file, capfd
):
    out = tmp_path / "run"
    argv = [*COMMON, "--data", text_file, "--out", out]
    with ring(tmp_path, *argv, "--steps", "16") as ranks:
        wait_for_step(out, 5)
        ranks[1].kill()
        codes, said = outcomes(ranks, timeout=30)
    assert codes == [1, -signal.SIGKILL], said
    assert said[0].startswith("error: rank 0 has lost another rank ([ring]")
    assert "the newest good checkpoint is" in said[0]
    assert "Traceback" not in said[0]
    assert train.main([*map(str, argv), "--auto-resume", "--steps", "16"]) == 0
    assert curve(out) == pytest.approx(curve(alone), abs=1e-5)


@pytest.mark.slow
def test_sigterm_at_one_rank_stops_all_after_the_same_step(tmp_path, text_file):
    out = tmp_path / "run"
    with ring(tmp_path, *COMMON, "--data", text_file, "--out", out, "--steps", "100000") as ranks:
        wait_for_step(out, 2)
        ranks[1].send_signal(signal.SIGTERM)
        codes, said = outcomes(ranks)
    assert codes == [143, 143], said
    last = max(row["step"] for row in read_metrics(out / "metrics.jsonl"))
    assert checkpoint.latest(out) == checkpoint.checkpoint_path(out, last)


@pytest.mark.slow
def test_a_full_disk_at_rank_0_ends_all_with_one_line(tmp_path, text_file):
    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    argv = [*COMMON, "--data", text_file, "--out", tmp_path / "run", "--steps", "16"]
    with ring(tmp_path, *argv, preexec=small_disk) as ranks:
        codes, said = outcomes(ranks)
    assert codes == [2, 2], said
    assert said[1] == ""
    assert said[0].count("\n") == 1
    assert "could not be written" in said[0]


# --- without processes: ranks in threads ---


class Threads:
    """An engine whose ranks are threads."""

    def __init__(self, size: int):
        self.size, self.rank = size, 0
        self._barrier, self._blocks = threading.Barrier(size, timeout=20), [None] * size

    def at(self, rank: int) -> "Threads":
        other = object.__new__(Threads)
        other.__dict__ = {**self.__dict__, "rank": rank}
        return other

    def all_gather(self, block: np.ndarray) -> np.ndarray:
        self._blocks[self.rank] = block
        self._barrier.wait()
        blocks = np.stack(self._blocks)
        self._barrier.wait()
        return blocks

    def broadcast(self, tensor: np.ndarray) -> np.ndarray:
        return self.all_gather(tensor)[0]

    def is_loss(self, error: BaseException) -> bool:
        return isinstance(error, threading.BrokenBarrierError)

    def close(self) -> None: ...


def on_each(size: int, function) -> list:
    """What `function(world)` returns or raises on every rank."""
    engine, results = Threads(size), [None] * size

    def work(rank: int) -> None:
        try:
            results[rank] = function(World(engine.at(rank)))
        except BaseException as e:
            results[rank] = e

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return results


@given(st.lists(st.text(max_size=1000), min_size=2, max_size=4))
def test_gather_gives_all_facts_to_all(texts):
    assert on_each(len(texts), lambda world: world.gather(texts[world.rank])) == [texts] * len(
        texts
    )


def test_broadcast_gives_the_tensors_of_rank_0(rng):
    tensors = {"a": rng.normal(size=(3, 2)).astype(np.float32), "b": np.arange(4, dtype=np.float32)}
    for got in on_each(3, lambda world: world.broadcast(tensors if world.rank == 0 else None)):
        assert got.keys() == tensors.keys()
        assert all((got[name] == tensors[name]).all() for name in tensors)


def test_an_error_at_one_rank_is_raised_on_all():
    raised = on_each(3, lambda world: world.gather(error="no disk" if world.rank == 1 else None))
    assert [type(e) for e in raised] == [AgreedError] * 3
    assert {str(e) for e in raised} == {"rank 1: no disk"}


def test_a_launcher_that_has_gone_is_noticed_and_its_pipes_are_let_go(monkeypatch):
    redirected = []
    monkeypatch.setattr(os, "dup2", lambda source, to: redirected.append(to))
    worlds = World(), World(Threads(2))
    assert [world.launcher_has_gone() for world in worlds] == [False, False]
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert [world.launcher_has_gone() for world in worlds] == [False, True]
    assert redirected == [1, 2]


def test_ranks_with_other_facts_are_named():
    raised = on_each(
        4,
        lambda world: same_everywhere(world, "x" if world.rank in (0, 2) else "y", "other tokens"),
    )
    assert {str(e) for e in raised} == {
        "ranks 1, 3 have other tokens than rank 0; all ranks need the same"
    }


def in_threads(config: TrainConfig, out: Path, monkeypatch, texts: list[str]) -> list:
    """Begin to train on as many ranks as there are texts; each reads its own."""
    rank = threading.local()
    monkeypatch.setattr(corpus, "read_documents", lambda source: [texts[rank.is_]])

    def start(world: World) -> None:
        rank.is_ = world.rank
        loop.train(config, out, console=Console(quiet=True), world=world)

    return on_each(len(texts), start)


def test_shards_that_differ_between_ranks_are_refused(tmp_path, monkeypatch):
    raised = in_threads(
        preset("nano"), tmp_path / "run", monkeypatch, ["one text " * 500, "another text " * 500]
    )
    expected = "rank 1 has other tokens in --data builtin than rank 0; all ranks need the same"
    assert [str(e) for e in raised] == [expected] * 2
    assert not (tmp_path / "run").exists()


def test_a_world_size_that_does_not_divide_the_step_is_refused(tmp_path, monkeypatch):
    raised = in_threads(preset("nano"), tmp_path / "run", monkeypatch, ["one text " * 500] * 3)
    assert all(isinstance(e, UserError) for e in raised)
    assert len({str(e) for e in raised}) == 1
    assert str(raised[0]).startswith("3 ranks cannot share the 4 sequences of a step")
    assert "start 1, 2, 4 ranks" in str(raised[0])
    assert not (tmp_path / "run").exists()


@given(st.integers(1, 8), st.integers(1, 16), st.integers(1, 8))
def test_passes_cover_a_step_in_as_few_equal_parts_as_fit(world_size, batch_size, accumulation):
    total = batch_size * accumulation
    if total % world_size:
        with pytest.raises(UserError):
            share_of(world_size, batch_size, accumulation)
        return
    count, size = share_of(world_size, batch_size, accumulation)
    assert count * size * world_size == total
    assert size <= batch_size
    assert not any(
        total // world_size % n == 0 and total // world_size // n <= batch_size
        for n in range(1, count)
    )
    assert world_size > 1 or (count, size) == (accumulation, batch_size)


def test_dropout_differs_between_ranks_and_rank_0_keeps_its_own():
    assert dropout_seed(7, 3) == int(np.random.SeedSequence([7, 3]).generate_state(1)[0])
    assert len({dropout_seed(7, 3, rank) for rank in range(4)}) == 4


def test_data_that_vanishes_ends_the_run_with_the_newest_checkpoint(
    tmp_path, text_file, monkeypatch, capsys
):
    whole = TokenWindows.rows

    def rows(self, first: int, count: int):
        if first >= 6 * 12:
            raise FileNotFoundError(
                2, "No such file or directory", "/Volumes/Shards/train_000001.npy"
            )
        return whole(self, first, count)

    monkeypatch.setattr(TokenWindows, "rows", rows)
    out = tmp_path / "run"
    assert train.main([*COMMON, "--data", str(text_file), "--out", str(out), "--steps", "16"]) == 2
    said = capsys.readouterr().err
    assert (
        "the batches of step 7 cannot be read: [Errno 2] No such file or directory: "
        "'/Volumes/Shards" in said
    )
    assert f"the newest good checkpoint is {checkpoint.checkpoint_path(out, 4)}" in said


# --- --auto-resume ---


@pytest.fixture
def broken(alone, tmp_path) -> Path:
    """A run that ended at step 12 of 16, with checkpoints of 4, 8 and 12."""
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    shutil.rmtree(checkpoint.checkpoint_path(run, 16))
    return run


def _damage(run: Path, step: int) -> None:
    path = checkpoint.checkpoint_path(run, step) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.slow
def test_auto_resume_passes_over_damaged_checkpoints(alone, broken, capfd):
    _damage(broken, 12)
    (checkpoint.checkpoint_path(broken, 8) / "train_state.json").unlink()
    assert train.main(["--auto-resume", "--out", str(broken)]) == 0
    out = capfd.readouterr().out
    assert "step-000012: damaged, model.safetensors is truncated or changed" in out
    assert "step-000008: damaged, train_state.json is missing" in out
    assert "after step 4" in out
    assert curve(broken) == curve(alone)
    assert checkpoint.integrity_error(checkpoint.checkpoint_path(broken, 12)) is None


def test_auto_resume_of_a_finished_run_is_no_error(alone, capfd):
    assert train.main(["--auto-resume", "--out", str(alone)]) == 0
    assert "has finished its 16 steps" in capfd.readouterr().out


def test_auto_resume_refuses_when_nothing_is_whole(broken, capsys):
    for step in (4, 8, 12):
        _damage(broken, step)
    assert train.main(["--auto-resume", "--out", str(broken)]) == 2
    assert "none of its 3 checkpoints is intact" in capsys.readouterr().err
    assert train.main(["--auto-resume"]) == 2
    assert "--auto-resume needs --out" in capsys.readouterr().err


def test_an_engine_without_a_launcher_is_refused(capsys):
    assert train.main(["--distributed-backend", "ring"]) == 2
    assert "requires a launcher" in capsys.readouterr().err
