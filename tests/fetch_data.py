"""Download the public files that some tests read: `python tests/fetch_data.py`.

They go to tests/data, which git ignores; a checkout with ../shared/data needs none of this. Each
download is checked against its published sha256, and a file that is already there is kept.
"""

import dataclasses
import hashlib
import io
import sys
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path

from mlx_mla import cli
from mlx_mla.data.tokenizer import GPT2_SHA256
from mlx_mla.errors import UserError
from mlx_mla.files import atomic_file

FOLDER = Path(__file__).with_name("data")
SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Download:
    """One file on the web, and what it is for."""

    url: str
    sha256: str
    files: tuple[str, ...]
    """Paths in the data folder: the download itself, or members of a zip file by name."""


OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2"
GITHUB = "https://raw.githubusercontent.com"
DOWNLOADS = (
    *(
        Download(f"{OPENAI}/encodings/main/{name}", sha256, (f"gpt2_bpe/{name}",))
        for name, sha256 in GPT2_SHA256.items()
    ),
    Download(
        f"{OPENAI}/data/lambada_test.jsonl",
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
        ("lambada/lambada_test.jsonl",),
    ),
    Download(  # the archive by its authors, who no longer serve it
        "https://huggingface.co/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip",
        "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
        ("wikitext2/wiki.test.raw", "wikitext2/wiki.valid.raw"),
    ),
    Download(
        f"{GITHUB}/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
        "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
        ("hellaswag/hellaswag_val.jsonl",),
    ),
    Download(
        f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        ("corpus/tinyshakespeare/input.txt",),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    if argv:
        raise UserError("takes no arguments; run python tests/fetch_data.py")
    for download in DOWNLOADS:
        fetch(download, FOLDER)
    print(f"all files are in {FOLDER}")
    return 0


def fetch(download: Download, folder: Path) -> None:
    """Write the files of a download that are missing.

    Raises:
        UserError: If it cannot be reached, or its sha256 is not the published one.
    """
    missing = [name for name in download.files if not (folder / name).is_file()]
    if not missing:
        return
    print(download.url, flush=True)
    try:
        with urllib.request.urlopen(download.url, timeout=SECONDS) as response:
            data = response.read()
    except OSError as e:  # urllib's errors, too
        raise UserError(
            f"{download.url}: cannot be downloaded ({e}); check the network and run this again"
        ) from None
    if (found := hashlib.sha256(data).hexdigest()) != download.sha256:
        raise UserError(
            f"{download.url}: its sha256 is {found}, not the published {download.sha256}; run this "
            "again later"
        )
    for name in missing:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(_member(data, path.name) if download.url.endswith(".zip") else data)


def _member(archive: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        (found,) = (m for m in members.namelist() if Path(m).name == name)
        return members.read(found)


if __name__ == "__main__":
    sys.exit(main())
