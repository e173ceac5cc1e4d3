"""The one reader of JSON: whatever a file holds, an object or one line that names the file."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_mla.errors import UserError
from mlx_mla.files import LARGEST_TEXT, read_json, read_toml


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1}}', "not valid JSON"),
        (b"[]", "not a JSON object, but list"),
        (b"null", "not a JSON object, but NoneType"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"a": "\xff"}', "not UTF-8 text .byte 0xff at offset 7"),
        (b"\x00" * 8, "not valid JSON"),
        (b"1" * (LARGEST_TEXT + 1), "is larger than 67,108,864 bytes"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of thousands of digits"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_json_object_is_told_in_one_line(content, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as told:
        read_json(path)
    assert str(told.value).startswith(f"{path}: ")
    assert len(str(told.value)) < len(str(path)) + 120


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_json(tmp_path)


def test_a_byte_order_mark_is_no_part_of_json_or_toml(tmp_path):
    for name, text, read in (("a.json", '{"a": 1}', read_json), ("a.toml", "a = 1", read_toml)):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert read(tmp_path / name) == {"a": 1}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(expected=st.dictionaries(st.text(), values), ascii_only=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_json_writes_is_read(expected, ascii_only, tmp_path):
    text = json.dumps(expected, ensure_ascii=ascii_only)
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert read_json(tmp_path / "x.json") == expected
