"""The typed reader: what a record's annotations allow is read, anything else names its field."""

import dataclasses
import datetime
import json
from typing import Any, Literal, NotRequired, Optional, TypedDict

import pytest

from mlx_mla.errors import UserError
from mlx_mla.fields import Count, FileName, read, typed, value_of
from mlx_mla.files import REMEDY, json_lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    file: FileName
    tokens: Count
    loss: Optional[float] = None
    split: Literal["train", "val"] = "train"

    def __post_init__(self):
        if self.split == "val" and self.loss is None:
            raise ValueError("has no loss, which a part of val has")


class Row(TypedDict):
    step: Count
    parts: NotRequired[list[Part]]
    ends: NotRequired[tuple[int, float]]
    either: NotRequired[int | str | None]


def read_lines(path):
    return [value_of(Row, value, where, REMEDY) for where, value in json_lines(path)]


PART = {"file": "a.npy", "tokens": 1}
DEEP: list = []
for _ in range(5000):
    DEEP = [DEEP]


def test_json_becomes_the_types_that_a_record_names():
    row = {"step": 1, "parts": [PART | {"loss": 2, "more": 1}], "ends": [1, 2], "x": {"y": [None]}}
    found = value_of(Row, row, "f")
    assert found == {**row, "parts": [Part(file="a.npy", tokens=1, loss=2.0)], "ends": (1, 2.0)}
    assert type(found["parts"][0].loss) is type(found["ends"][1]) is float


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (Part, PART | {"file": "../a"}, "file must be the name of a file in the same folder"),
        (Part, PART | {"file": "\0"}, "file must be the name of a file"),
        (Part, PART | {"file": ".."}, "file must be the name of a file"),
        (Part, PART | {"file": "\ud800"}, "file = '\\ud800' holds half a character"),
        (Part, PART | {"tokens": 10**400}, "tokens must be a number of at most 64 bits, not 1000"),
        (Part, PART | {"tokens": -1}, "tokens must not be negative, not -1"),
        (Part, PART | {"tokens": True}, "tokens = True is not a value of type int"),
        (Part, PART | {"tokens": 1.0}, "tokens = 1.0 is not a value of type int"),
        (Part, PART | {"loss": True}, "loss = True is not a value of type float"),
        (Part, PART | {"loss": float("nan")}, "loss must be a finite number, not nan"),
        (Part, PART | {"loss": 10**400}, "loss must be a number of at most 64 bits"),
        (Part, PART | {"split": "test"}, "split = 'test' is not one of 'train', 'val'"),
        (Part, PART | {"split": "val"}, "has no loss"),
        (Part, {"file": "a"}, "tokens is missing"),
        (Part, [PART], "[{'file': 'a.npy', 'tokens': 1}] is not a table"),
        (Row, {"step": 1, "parts": [PART, {}]}, "parts[1].file is missing"),
        (Row, {"step": 1, "parts": {}}, "parts = {} is not a value of type list"),
        (Row, {"step": 1, "ends": [1]}, "ends = [1] must have 2 items"),
        (Row, {"step": 1, "either": 1.5}, "either = 1.5 is not a value of type int or str"),
        (Row, {"step": 1, "x": [{"y": float("inf")}]}, "x[0].y must be a finite number"),
        (Row, {"step": 1, "a b": 10**400}, "'a b' must be a number of at most 64 bits"),
        (Any, datetime.date(2026, 1, 1), "datetime.date(2026, 1, 1) is not a value that JSON has"),
        (Any, DEEP, "is nested too deeply"),
        (dict[str, list[int]], {"a": [1], "b": ["x"]}, "b[0] = 'x' is not a value of type int"),
    ],
)
def test_another_type_or_range_names_its_field(kind, value, message):
    with pytest.raises(UserError) as raised:
        value_of(kind, value, "f.json", "restore it")
    said = str(raised.value)
    assert said.startswith(f"f.json: {message}")
    assert said.endswith("; restore it")
    assert len(said) < 250


def test_unknown_keys_are_dropped_or_refused():
    assert value_of(Part, PART | {"los": 1}, "f") == Part(**PART)
    with pytest.raises(UserError, match="f: los is an unknown key; did you mean 'loss'"):
        value_of(Part, PART | {"los": 1}, "f", known_only=True)


def test_files_are_read_by_their_suffix_and_lines_by_number(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(PART))
    (tmp_path / "a.toml").write_text('file = "a.npy"\ntokens = 1\n')
    assert read(Part, tmp_path / "a.json") == read(Part, tmp_path / "a.toml") == Part(**PART)
    lines = tmp_path / "rows.jsonl"
    assert read_lines(lines) == []
    lines.write_text('{"step": 1}\n{"step": 2}\n{"step": 3')
    assert read_lines(lines) == [{"step": 1}, {"step": 2}]
    for line, problem in (
        ("{", "not valid JSON"),
        ("[]", "[] is not a table"),
        ("{}", "step is m"),
    ):
        lines.write_text('{"step": 1}\n' + line + "\n")
        with pytest.raises(UserError) as raised:
            read_lines(lines)
        assert str(raised.value).startswith(f"{lines}, line 2: {problem}")
        assert str(raised.value).endswith("; remove the line")


def test_settings_hold_no_nul():
    with pytest.raises(UserError, match=r"c.toml: file = '.x00' must hold no NUL"):
        typed(Part, {"file": "\0"}, "c.toml")
