"""The measured matmul peak and the MFU."""

import numpy as np
import pytest

from mlx_mla.backends import get_backend, peak


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what is added to it."""
    now = [0.0]
    monkeypatch.setattr(peak.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(("rate", "largest"), [(1e9, 512), (1e11, 2048), (1e15, 8192)])
def test_the_fastest_product_counts_and_start_up_does_not(clock, rate, largest):
    made, runs = [], []

    def product(n):
        made.append(n)

        def multiply():
            runs.append(n)
            first = runs.count(n) == 1
            slow = 1 + len(runs) % 2  # every second one is disturbed
            clock[0] += 2 * n**3 / rate * slow + (10.0 if first else 0.0)

        return multiply

    assert peak.measure_peak(product, seconds=1.0) == pytest.approx(rate)
    assert made == [512 * 2**i for i in range(len(made))]
    assert made[-1] == largest


def test_mfu_is_palms():
    """Of its 540B model on 6144 chips of 275 TFLOP/s (arXiv:2204.02311, table 3)."""
    flops = 6 * 540.35e9 + 12 * 118 * 48 * 256 * 2048  # appendix B: 6 N + 12 L H Q T
    assert peak.mfu(int(flops), 238.3e3, 6144 * 275e12) == pytest.approx(0.462, abs=5e-4)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_measuring_leaves_the_random_state(backend):
    draw = {"mlx": _draw_mlx, "torch": _draw_torch}[backend]
    expected = draw()
    speed = []
    again = draw(lambda: speed.append(get_backend(backend, "cpu").peak_flops("float32", 0.01)))
    np.testing.assert_array_equal(again, expected)
    assert 1e6 < speed[0] < 1e16


def _draw_mlx(between=lambda: None):
    import mlx.core as mx

    mx.random.seed(3)
    between()
    return np.array(mx.random.normal((8,)))


def _draw_torch(between=lambda: None):
    import torch

    torch.manual_seed(3)
    between()
    return torch.randn(8).numpy()
