"""Intervals of shares and of their differences: those of scipy, never empty, and right as often as
they say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mla.display import TrainDisplay, plain_console
from mlx_mla.evaluation import report
from mlx_mla.evaluation.runner import metrics
from mlx_mla.evaluation.tasks.base import Measured, accuracy, compare, wilson


@given(n=st.integers(1, 3000), share=st.floats(0, 1))
def test_wilsons_interval_is_scipys(n, share):
    stats = pytest.importorskip("scipy.stats", reason="needs scipy, in the extra named referees")
    successes = round(share * n)
    expected = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-7)


@pytest.mark.parametrize("right", [0, 20])
def test_none_or_all_right_is_not_certain(right, capsys):
    row = metrics([accuracy("acc", [i < right for i in range(20)])])
    assert row["acc_stderr"] == 0  # lm_eval's, which says nothing here
    assert row["acc_high"] - row["acc_low"] == pytest.approx(0.1611, abs=1e-4)
    model = {"model": "m", "tasks": {"lambada": row}}
    document = {"protocol": "standard", "notes": [], "models": [model], "comparisons": []}
    cell = "0.0 % (0.0 - 16.1)" if right == 0 else "100.0 % (83.9 - 100.0)"
    assert cell in report.tables(document)
    TrainDisplay(plain_console(), 0, 1).task(1, "lambada", row)
    assert ("acc 0 (0 - 0.161)" if right == 0 else "acc 1 (0.839 - 1)") in capsys.readouterr().out


def test_perplexities_of_models_that_learned_nothing_are_short():
    row = metrics([Measured("ppl", np.array([20.1, 19.5]), np.ones(2), perplexity=True)])
    model = {"model": "m", "tasks": {"lambada": row}}
    document = {"protocol": "standard", "notes": [], "models": [model], "comparisons": []}
    assert "| 4e+08 |" in report.tables(document)


def test_differences_of_shares_are_never_certain_and_mostly_right():
    rng = np.random.default_rng(0)
    same = compare(accuracy("a", [False] * 20), accuracy("a", [False] * 20))
    assert same.difference == 0 and same.low < -0.05 and same.high > 0.05 and not same.shown
    for n, p, q in ((30, 0.3, 0.4), (200, 0.3, 0.32), (30, 0.02, 0.05)):
        inside = 0
        for _ in range(600):
            u = rng.random((2, n))  # answers of two models that agree on half of the items
            first = u[0] < p
            second = np.where(rng.random(n) < 0.5, u[0], u[1]) < q
            found = compare(accuracy("a", first), accuracy("a", second))
            inside += found.low <= q - p <= found.high
        assert 0.92 <= inside / 600 <= 1


def test_a_large_sample_has_the_usual_paired_interval():
    rng = np.random.default_rng(1)
    first, second = rng.random((2, 10_000)) < [[0.30], [0.33]]
    found = compare(accuracy("a", first), accuracy("a", second))
    delta = second.astype(float) - first
    reach = 1.959964 * delta.std(ddof=1) / 100
    assert found.difference == delta.mean()
    assert (found.low, found.high) == pytest.approx(
        (delta.mean() - reach, delta.mean() + reach), abs=2e-4
    )
