"""The public files that tests read: downloaded once, checked, and whole or absent."""

import dataclasses
import hashlib
import zipfile

import fetch_data
import pytest
from conftest import SHARED
from fetch_data import DOWNLOADS, fetch
from helpers import refused


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Every download from a local folder, with made-up content."""
    web, local = tmp_path / "web", []
    web.mkdir()
    for i, download in enumerate(DOWNLOADS):
        path = web / f"{i}-{download.url.rpartition('/')[2]}"
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                for name in download.files:
                    archive.writestr(f"inside/{name.rpartition('/')[2]}", name)
        else:
            path.write_text(download.files[0])
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        local.append(dataclasses.replace(download, url=path.as_uri(), sha256=sha256))
    monkeypatch.setattr(fetch_data, "DOWNLOADS", local)
    monkeypatch.setattr(fetch_data, "FOLDER", tmp_path / "data")
    return web


def test_files_are_fetched_once_and_go_where_tests_look(served, tmp_path, capsys):
    assert fetch_data.main([]) == 0
    names = [name for download in DOWNLOADS for name in download.files]
    for name in names:
        assert (tmp_path / "data" / name).read_text() == name
    for path in served.iterdir():
        path.unlink()
    assert fetch_data.main([]) == 0  # nothing is asked for again


def test_what_is_not_the_published_file_is_not_kept(served, tmp_path, capsys):
    for path in served.glob("*lambada*"):
        path.write_text("another")
    line = refused(capsys, command=fetch_data.main)
    assert "lambada_test.jsonl: its sha256 is " in line and "run this again later" in line
    assert not (tmp_path / "data" / "lambada").exists()
    for path in served.glob("*lambada*"):
        path.unlink()
    line = refused(capsys, command=fetch_data.main)
    assert "cannot be downloaded" in line and "check the network and run this again" in line


@pytest.mark.parametrize("download", DOWNLOADS, ids=lambda d: d.files[0])
def test_checksums_are_those_of_the_files_in_use(download, tmp_path):
    """Where ../shared/data has the published bytes: WikiText-2 comes in an archive, HellaSwag there
    is rebuilt, and Tiny Shakespeare lacks its last line break."""
    name = download.files[0]
    if not (SHARED / name).is_file() or name.startswith(("wikitext2", "hellaswag")):
        pytest.skip("has no local file with the published bytes")
    data = (SHARED / name).read_bytes() + b"\n" * ("shakespeare" in name)
    (tmp_path / "served").write_bytes(data)
    fetch(dataclasses.replace(download, url=(tmp_path / "served").as_uri()), tmp_path)
    assert (tmp_path / name).read_bytes() == data
