"""The device's peak rate of matrix products, as measured, and the share of it that training
uses."""

import time
from collections.abc import Callable

SMALLEST, LARGEST = 512, 8192
LONG_ENOUGH = (
    0.05  # seconds: more than a time slice of a busy CPU, more than starting a kernel on a GPU
)


def measure_peak(product: Callable[[int], Callable[[], object]], seconds: float = 0.1) -> float:
    """FLOP/s of the fastest square matrix product seen.

    The size doubles until one product takes 50 ms, or is 8192, and that size is then repeated.

    Args:
        product: Makes two N x N matrices for a given N, and returns a function that multiplies them
            and comes back when the device has finished.
        seconds: How long to repeat the last size.
    """

    def timed(multiply: Callable[[], object]) -> float:
        began = time.perf_counter()
        multiply()
        return time.perf_counter() - began

    n, best = SMALLEST, 0.0
    while True:
        multiply = product(n)
        multiply()
        took = timed(multiply)
        best = max(best, 2 * n**3 / took)
        if took >= LONG_ENOUGH or n >= LARGEST:
            break
        n *= 2
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = max(best, 2 * n**3 / timed(multiply))
    return best


def mfu(train_flops_per_token: int, tokens_per_sec: float, peak_flops: float) -> float:
    """Model FLOPs utilisation: FLOP/s that the model's own mathematics needs at this rate, as a
    share of the peak.

    PaLM's definition (arXiv:2204.02311, appendix B): what is computed again or beside the model (a
    teacher) does not count. It differs in two points: the peak is the one measured on this device
    with `measure_peak`, not the data sheet's, and attention is counted over the causal half of the
    keys (`estimate`), not over all of them.
    """
    return train_flops_per_token * tokens_per_sec / peak_flops
