"""Tasks on the real files, and their statistics against numpy and textbook formulas."""

import dataclasses
import json
import math

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from mlx_mla.data.tokenizer import GPT2Tokenizer
from mlx_mla.errors import UserError
from mlx_mla.evaluation.report import compare_models
from mlx_mla.evaluation.tasks import TASKS, Measured, TaskSetup
from mlx_mla.evaluation.tasks.base import compare
from mlx_mla.evaluation.tasks.wikitext2 import pages


@pytest.fixture(scope="module")
def setup(shared_data):
    tokenizer = GPT2Tokenizer(shared_data / "gpt2_bpe").fast_tokenizer()
    return TaskSetup(tokenizer, 1024, 1024)


def read(shared_data, name, protocol="standard"):
    task = TASKS[name]
    return task.documents_from_file(shared_data / task.files[protocol], protocol)


def test_wikitext_windows_score_every_token_but_the_first(shared_data, setup):
    documents = read(shared_data, "wikitext2")
    assert [kind for kind, _ in documents] == ["text"] + [
        "page"
    ] * 62  # the harness counts 62 pages
    ids = setup.encode(documents[0][1])
    assert len(ids) == 287_644
    windows = TASKS["wikitext2"].requests(documents[:1], "standard", setup)[0]
    plain = math.ceil(len(ids) / 1024)
    assert sum(len(r.targets[0]) for r in windows[:plain]) == len(ids) - plain
    assert [t for r in windows[plain:] for t in r.targets[0]] == ids[1:]
    assert {len(r.context) + len(r.targets[0]) for r in windows[:-1]} <= {
        1024,
        len(ids) % 1024,
        len(ids) % 512 + 512,
    }


def test_a_sample_of_windows_is_spread_over_the_text(shared_data, setup):
    documents, task = read(shared_data, "wikitext2")[:1], TASKS["wikitext2"]
    sampled = dataclasses.replace(setup, limit=9, seed=3)
    every, some = (task.requests(documents, "standard", c)[0] for c in (setup, sampled))
    assert len(some) == 18
    assert set(some) < set(every)
    assert every.index(some[8]) > 100
    assert task.requests(documents, "standard", sampled)[0] == some


def test_the_originals_wikitext_scores_the_published_number_of_tokens(shared_data, setup):
    documents = read(shared_data, "wikitext2", "original")
    requests = TASKS["wikitext2"].requests(documents, "original", setup)
    assert sum(len(r.targets[0]) for own in requests for r in own) == 242_367


def test_documents_are_all_read(shared_data, setup):
    assert len(read(shared_data, "lambada")) == 5153
    assert len(read(shared_data, "hellaswag")) == 10042


def test_hub_and_folder_give_the_same_documents(shared_data, monkeypatch):
    lines = (shared_data / "wikitext2/wiki.test.raw").read_text(encoding="utf-8").split("\n")[:-1]
    published = {
        "wikitext": Dataset.from_dict(
            {"text": [line + "\n" if line.strip() else "" for line in lines]}
        ),
        "EleutherAI/lambada_openai": Dataset.from_json(
            str(shared_data / "lambada/lambada_test.jsonl")
        ),
        "Rowan/hellaswag": Dataset.from_json(str(shared_data / "hellaswag/hellaswag_val.jsonl")),
    }
    published["Rowan/hellaswag"] = published["Rowan/hellaswag"].map(
        lambda r: {"label": str(r["label"])}
    )
    asked = []
    monkeypatch.setattr(
        "datasets.load_dataset", lambda name, config, split: asked.append(split) or published[name]
    )
    for name, task in TASKS.items():
        assert task.documents_from_hub("standard") == read(shared_data, name)
    assert asked == ["test", "test", "validation"]


def test_without_network_the_message_says_what_to_put_where():
    with pytest.raises(
        UserError, match=r"put lambada/lambada_test.jsonl into a folder and give it as --data-dir"
    ):
        TASKS["lambada"].documents_from_hub("standard")


def test_pages_begin_at_first_level_headings():
    rows = [" \n", " = One = \n", " = = Part = = \n", " text \n", "", " = Two = \n", " more \n"]
    assert pages(rows) == [" = One = \n = = Part = = \n text \n ", " = Two = \n more "]


def test_a_sample_is_seeded_and_not_the_first_rows(shared_data):
    task, documents = TASKS["hellaswag"], read(shared_data, "hellaswag")
    chosen = [task.sample(documents, 300, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == 300
    assert max(documents.index(d) for d in chosen[0]) > 9000  # beyond the ActivityNet rows


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("lambada", {"txt": "a b"}, "line 2: text is missing"),
        ("lambada", {"text": "word"}, "line 2: text must be several words"),
        ("hellaswag", {"label": 4}, "line 2: label must be 0, 1, 2 or 3, not 4"),
        ("hellaswag", {"endings": ["a"]}, "line 2: endings must be four texts"),
        ("hellaswag", {"ctx": 3}, "line 2: ctx = 3 is not a value of type str"),
    ],
)
def test_bad_rows_are_named(tmp_path, name, row, message):
    good = {
        "lambada": {"text": "one two"},
        "hellaswag": {
            "activity_label": "A", "ctx_a": "b", "ctx_b": "c", "ctx": "b c",
            "endings": list("defg"), "label": 0,
        },
    }[name]  # fmt: skip
    bad = row if name == "lambada" else {**good, **row}
    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(UserError, match=r"file\.jsonl, ") as error:
        TASKS[name].documents_from_file(path, "standard")
    assert message in str(error.value)
    path.write_text(json.dumps(good) + "\n{")
    with pytest.raises(UserError, match="line 2: not valid JSON"):
        TASKS[name].documents_from_file(path, "standard")


@given(st.lists(st.booleans(), min_size=2, max_size=50))
def test_accuracy_error_is_the_sample_standard_error(correct):
    values = np.array(correct, float)
    found = Measured("acc", values, np.ones(len(values))).figures()
    assert found["acc"] == pytest.approx(values.mean())
    assert found["acc_stderr"] == pytest.approx(values.std(ddof=1) / math.sqrt(len(values)))


def test_perplexity_error_and_interval_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    inside = paired = 0
    for _ in range(400):
        tokens = rng.integers(50, 200, 60).astype(float)
        shared = rng.normal(0, 0.3, 60)
        first = Measured("ppl", (3 + shared) * tokens + rng.normal(0, 9, 60), tokens, True)
        second = Measured("ppl", (3.01 + shared) * tokens + rng.normal(0, 9, 60), tokens, True)
        found = first.figures()
        error = found["ppl_stderr"] / found["ppl"]
        inside += abs(math.log(found["ppl"]) - 3) < 1.96 * error
        interval = compare(first, second)
        paired += interval.low <= math.exp(0.01) - 1 <= interval.high
        # Pairing takes out what items share.
        assert interval.high - interval.low < 3.92 * error
    assert 0.9 < inside / 400 < 0.98
    assert 0.9 < paired / 400 < 0.98


def test_models_that_count_other_tokens_are_not_compared():
    first = Measured("ppl", np.ones(3), np.array([1.0, 2, 3]), True)
    assert compare(first, Measured("ppl", np.ones(3), np.array([1.0, 2, 4]), True)) is None
    assert not compare(first, first).shown


class JoinsWords:
    """A tokenizer that makes any text one token."""

    eos_token_id = bos_token_id = 0

    def encode(self, text, add_special_tokens, verbose):
        return [len(text)]


def test_an_ending_without_a_token_of_its_own_is_refused():
    setup = TaskSetup(JoinsWords(), 64, 64)
    with pytest.raises(UserError, match=r"has no token of its own \(' word'\)"):
        setup.choices("a long", [" word"])


def test_figures_by_token_of_two_vocabularies_are_not_compared():
    rng = np.random.default_rng(0)
    first, second = (
        [Measured(unit, rng.normal(size=50), np.ones(50), True, unit) for unit in ("token", "word")]
        for _ in range(2)
    )
    for same in (True, False):
        by_token, by_word = compare_models("a", "b", "t", first, second, same_tokens=same)
        assert ("difference" in by_token, "difference" in by_word) == (same, True)
