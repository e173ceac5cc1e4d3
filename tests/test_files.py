"""Files are parsed or refused in one line that names them, and written on any file system."""

import errno
import json
import os
import stat

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_mla.errors import UserError
from mlx_mla.files import LARGEST_TEXT, atomic_folder, read_json, read_toml, write_text


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
def test_anything_but_a_json_object_is_refused_in_one_line(content, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read_json(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert len(str(raised.value)) < len(str(path)) + 120


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


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_folders_that_cannot_be_synced_are_written_all_the_same(tmp_path, monkeypatch, code):
    """As on some network and FUSE mounts."""
    real = os.fsync

    def fsync(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(code, os.strerror(code))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("a")
    write_text(tmp_path / "b", "b")
    assert (tmp_path / "folder" / "a").read_text() + (tmp_path / "b").read_text() == "ab"


def test_a_folder_that_cannot_be_replaced_keeps_its_name(tmp_path, monkeypatch):
    target, rename = tmp_path / "m", os.rename
    target.mkdir()
    (target / "a").write_text("old")

    def fails(source, to):
        if ".tmp-" in str(source):
            raise KeyboardInterrupt
        rename(source, to)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as folder:
        (folder / "a").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert (target / "a").read_text() == "old"


def test_a_link_to_a_file_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_a_file_or_folder_that_does_not_reach_the_disk_is_not_written(tmp_path, monkeypatch):
    def fsync_of(is_refused):
        def fsync(fd):
            if is_refused(os.fstat(fd).st_mode):
                raise OSError(*problem)

        return fsync

    for is_refused, problem in (
        (stat.S_ISREG, (errno.EINVAL, "Invalid argument")),
        (stat.S_ISDIR, (errno.EIO, "Input/output error")),
    ):
        monkeypatch.setattr(os, "fsync", fsync_of(is_refused))
        message = f"could not be written: {problem[1]}"
        with pytest.raises(UserError, match=message), atomic_folder(tmp_path / "f") as folder:
            (folder / "a").write_text("a")
        assert not list(tmp_path.iterdir())
