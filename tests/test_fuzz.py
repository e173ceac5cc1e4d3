"""The fuzzer sees what it is there to see, and repeats itself from a seed."""

import dataclasses
import os
import sys
import time

import fuzz
import numpy as np
import pytest
from helpers import take_memory
from safetensors.numpy import save

from mlx_mla import cli
from mlx_mla.errors import UserError


def said(line: str):
    def main(argv):
        print(line, file=sys.stderr)
        return 2

    return main


def raises(error: BaseException):
    def main(argv):
        raise error

    return main


def refuses(argv):
    raise UserError("x.json: damaged")


def writes_below_python(argv):
    os.write(2, b"thread panicked\n")
    return said("error: x")(argv)


@pytest.mark.parametrize(
    ("main", "problem"),
    [
        (lambda argv: 0, None),
        (lambda argv: cli.run(refuses, argv), None),
        (lambda argv: 1, "exit code 1"),
        (raises(ValueError("x")), "a traceback"),
        (raises(SystemExit("x")), "exit code 1"),
        (raises(fuzz.Hang("x")), "a hang"),
        (said("wrong"), "exit code 2 with 1 lines"),
        (said("error: a\nb"), "exit code 2 with 2 lines"),
        (said("error: " + "x" * 2000), "an error line of 2007 characters"),
        (writes_below_python, "exit code 2 with 2 lines"),
    ],
)
def test_broken_promises(main, problem, tmp_path):
    if problem is None:
        assert sum(fuzz.fuzz(main, lambda random, folder: [], 2, 0, tmp_path).values()) == 2
        assert not list(tmp_path.iterdir())
    else:
        with pytest.raises(AssertionError, match=f"seed 5, case 0: {problem}"):
            fuzz.fuzz(main, lambda random, folder: [], 1, 5, tmp_path)


def test_memory_is_measured_and_bounded():
    small = fuzz.run(lambda argv: 0, [])
    large = fuzz.run(lambda argv: take_memory(240_000_000), [])
    assert large.peak_bytes > small.peak_bytes + 200_000_000
    assert fuzz.broken_promise(large) is None
    assert fuzz.broken_promise(dataclasses.replace(large, peak_bytes=3 * 2**30)) == "3.0 GiB"


def test_a_hang_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz, "SECONDS", 1)

    def hangs(argv):
        while True:
            pass

    with pytest.raises(AssertionError, match=r"a hang(.|\n)*still running after 1 s"):
        fuzz.fuzz(hangs, lambda random, folder: [], 1, 0, tmp_path)


def test_waiting_for_ever_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr(fuzz, "LONGEST_WAIT", 1)
    with pytest.raises(AssertionError, match="a hang"):
        fuzz.fuzz(lambda argv: time.sleep(60), lambda random, folder: [], 1, 0, tmp_path)


def test_output_of_a_case_is_its_own(capfd):
    outcome = fuzz.run(lambda argv: print("out", *argv) or 0, ["a"])
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, "out a\n", "")
    assert capfd.readouterr() == ("", "")


def test_mutations_come_from_the_seed_alone_and_differ():
    tensors = save({"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)})
    value = {"a": [1, 2.5, {"b": None}], "c": "text", "d": True}
    for mutate, whole in (
        (fuzz.mutate_bytes, b"some bytes " * 9),
        (fuzz.mutate_text, "two\nlines of text\n"),
        (fuzz.mutate_json, value),
        (fuzz.mutate_safetensors, tensors),
    ):
        made = [mutate(fuzz.Random(f"1-{i}"), whole) for i in range(100)]
        assert made == [mutate(fuzz.Random(f"1-{i}"), whole) for i in range(100)]
        assert len(set(made)) > 50
    assert value == {"a": [1, 2.5, {"b": None}], "c": "text", "d": True}
