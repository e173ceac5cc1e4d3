"""Stored scores: what was finished is found again, and nothing else is taken for it."""

import json

import pytest

from mlx_mla.errors import UserError
from mlx_mla.evaluation.item_store import ItemStore
from mlx_mla.evaluation.scoring import Request, Scores

REQUESTS = [Request((1, 2), ((3,), (4, 5))), Request((6,), ((7,),))]
STORED = Scores((-1.5, -2.25), (True, False))


def written(folder) -> ItemStore:
    store = ItemStore(folder, ["model", "mlx", "float32", "task", "standard"])
    assert store.read(REQUESTS) == {}
    store.add(0, STORED)
    return store


def test_scores_are_found_again_beside_a_line_that_a_kill_cut(tmp_path):
    store = written(tmp_path)
    with store.path.open("a") as file:
        file.write('\n{"i": 1, "logp')
    assert store.read(REQUESTS) == {0: STORED}
    store.add(1, Scores((-0.5,), (True,)))
    assert store.read(REQUESTS) == {0: STORED, 1: Scores((-0.5,), (True,))}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"i": 2, "logprob": [-1.0], "greedy": [True]}, "does not match the request of item 2"),
        ({"i": 10**400, "logprob": [-1.0], "greedy": [True]}, "i must be a number of at most 64"),
        ({"i": "1", "logprob": [-1.0], "greedy": [True]}, "i = '1' is not a value of type int"),
        (
            {"i": 1, "logprob": [-1.0, -2.0], "greedy": [True, True]},
            "does not match the request of",
        ),
        ({"i": 1, "logprob": -1.0, "greedy": [True]}, "logprob = -1.0 is not a value of type"),
        ({"i": 1, "logprob": [None], "greedy": [True]}, "logprob[0] = None is not a value"),
        ({"i": 1, "logprob": [float("nan")], "greedy": [True]}, "logprob[0] must be a finite"),
        ({"i": 1, "logprob": [float("-inf")], "greedy": [True]}, "logprob[0] must be a finite"),
        ({"i": 1, "logprob": [5.0], "greedy": [True]}, "logprob[0] must be at most 0.01, not 5.0"),
        ({"i": 1, "logprob": [True], "greedy": [True]}, "logprob[0] = True is not a value"),
        ({"i": 1, "logprob": [-(10**400)], "greedy": [True]}, "logprob[0] must be a number of"),
        ({"i": 1, "logprob": [-1.0], "greedy": ["yes"]}, "greedy[0] = 'yes' is not a value"),
        ({"i": 1}, "logprob is missing"),
        ([1], "[1] is not a table"),
    ],
)
def test_lines_that_hold_no_scores_are_named(tmp_path, row, problem):
    store = written(tmp_path)
    with store.path.open("a") as file:
        file.write("\n" + json.dumps(row))
    with pytest.raises(UserError) as raised:
        store.read(REQUESTS)
    assert f"line 3: {problem}" in str(raised.value)
    assert str(raised.value).endswith("; remove the line")
