"""What is said of the machine and of this process's memory."""

import pytest
from helpers import ran, take_memory

TAKE = """
from mlx_mla.machine import peak_memory
before = peak_memory()
large = b"x" * 200_000_000
del large
print(before, peak_memory())
"""


def test_the_peak_is_of_this_process_and_not_of_the_one_that_started_it():
    take_memory(400_000_000)
    done = ran("-c", TAKE)
    before, after = map(int, done.stdout.split())
    assert before < 100_000_000
    assert after - before == pytest.approx(200_000_000, rel=0.1)  # the kernel rounds
