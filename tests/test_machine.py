"""What is said of the machine and of this process's memory."""

import subprocess

import pytest
from helpers import python, take_memory

TAKE = """
from mlx_mla.machine import peak_memory
before = peak_memory()
large = b"x" * 200_000_000
del large
print(before, peak_memory())
"""


def test_the_peak_is_of_this_process_and_not_of_the_one_that_started_it():
    take_memory(400_000_000)
    done = subprocess.run(python("-c", TAKE), capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 100_000_000
    assert after - before == pytest.approx(200_000_000, rel=0.1)  # the kernel rounds
