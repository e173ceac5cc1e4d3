"""The measured peak rate of matrix products, and the fraction of it that training reaches."""

import time
from collections.abc import Callable

SMALLEST, LARGEST = 512, 8192
# Seconds: longer than a time slice of a busy CPU, and than starting a kernel on a GPU.
LONG_ENOUGH = 0.05


def measure_peak(product: Callable[[int], Callable[[], object]], seconds: float = 0.1) -> float:
    """Measure the FLOP/s of the fastest square matrix product.

    The size doubles until a product takes 50 ms or the size is 8192. That size is then repeated.

    Args:
        product: Creates two N x N matrices for a given N, and returns a function that multiplies
            them and returns when the device has finished.
        seconds: Time for which to repeat the last size.
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
    """Model FLOPs utilization: the FLOP/s of the model's own computation as a fraction of the peak.

    As in PaLM's definition (arXiv:2204.02311, appendix B), neither recomputation nor a teacher
    counts. There are two differences. The peak is measured on this device with `measure_peak`
    instead of read from a data sheet. Attention is counted over the causal half of the keys
    (`estimate`) instead of over all of them.
    """
    return train_flops_per_token * tokens_per_sec / peak_flops
