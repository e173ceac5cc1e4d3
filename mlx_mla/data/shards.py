"""Token shards on disk: build-nanogpt's `.npy`, llm.c's `.bin` and nanoGPT's headerless `.bin`.

Ids are uint16, or uint32 if the tokenizer has more than 65,536 tokens (not in nanoGPT's files).

As in build-nanogpt, `val` or `train` in a shard's name assigns it to a split. In a folder that
`mlx_mla.prepare` wrote, the manifest assigns it.
"""

import dataclasses
import hashlib
import io
import re
import resource
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np

from mlx_mla.data.manifest import MANIFEST, read_manifest
from mlx_mla.data.tokenizer import Tokenizer
from mlx_mla.errors import UserError
from mlx_mla.files import atomic_file

Format = Literal["npy", "llmc"]
Split = Literal["train", "val"]

SUFFIXES = {"npy": ".npy", "llmc": ".bin"}

LLMC_MAGIC, LLMC_HEADER = 20240520, 1024
LLMC_VERSIONS: dict[tuple[int, int], np.dtype[Any]] = {
    (LLMC_MAGIC, 1): np.dtype("<u2"),
    (20240801, 7): np.dtype("<u4"),
}
"""Types by (magic number, version). The header of llm.c's token files is 256 int32: magic number,
version, number of tokens, zeros (llm.c, dev/data/data_common.py)."""

_SAMPLES, _SAMPLE = 16, 2048
"""Number of samples checked in each shard, and tokens in each sample. Reading all tokens would take
minutes."""

_OTHER_FILES = 100
"""Maximum number of files that a process has open besides its shards."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A range of token ids in a file, memory-mapped.

    Attributes:
        tokens: Token ids, uint16 or uint32 of shape (n,).
        first: Index of `tokens[0]` among the file's tokens.
        size: Size of the file in bytes when it was opened.
    """

    path: Path
    tokens: np.ndarray
    first: int
    size: int

    def check(self) -> None:
        """Raise a UserError if the file's size has changed since it was mapped.

        Reading a file that was truncated would end the process with SIGBUS.
        """
        try:
            now = self.path.stat().st_size
        except OSError as e:
            raise UserError(f"{self.path}: the data can no longer be read ({e.strerror})") from None
        if now != self.size:
            raise UserError(
                f"{self.path}: the data changed while it was read ({self.size:,} bytes became "
                f"{now:,})"
            )

    def cut(self, start: int, stop: int) -> "Shard":
        """The shard's tokens from `start` up to, but not including, `stop`."""
        return dataclasses.replace(self, tokens=self.tokens[start:stop], first=self.first + start)

    def samples(self) -> list[tuple[int, np.ndarray]]:
        """Evenly spaced samples, including both ends of the shard, as (index, token ids)."""
        last = max(0, len(self.tokens) - _SAMPLE)
        starts = sorted({last * i // (_SAMPLES - 1) for i in range(_SAMPLES)})
        return [(s, self.tokens[s : s + _SAMPLE]) for s in starts]


def training_part(count: int, val_fraction: float) -> int:
    """Number of training tokens; the rest of the `count` tokens is held out."""
    return int(count * (1 - val_fraction))


@dataclasses.dataclass(frozen=True)
class ShardFolder:
    """The shards of a folder, with checked sizes and headers."""

    path: Path
    train: list[Shard]
    val: list[Shard]
    fingerprint: str
    """Identifies the data: a resumed run that sees the same data has the same fingerprint."""
    samples: str
    """sha256 of samples of every shard, which changes if a shard is overwritten in place."""
    tokenizer: Optional[Mapping[str, Any]]
    """The manifest's entry for the tokenizer; None without a manifest."""

    def held_out(self, fraction: float) -> tuple[list[Shard], list[Shard]]:
        """Split the shards into training and validation shards.

        Args:
            fraction: Fraction of all tokens to hold out at the end, if the folder has no validation
                shards.
        """
        if self.val:
            return self.train, self.val
        train, val = list(self.train), list[Shard]()
        total = sum(len(shard.tokens) for shard in train)
        left = total - training_part(total, fraction)
        while left > 0:
            last = train.pop()
            cut = max(0, len(last.tokens) - left)
            left -= len(last.tokens) - cut
            val.insert(0, last.cut(cut, len(last.tokens)))
            if cut:
                train.append(last.cut(0, cut))
        return train, val

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise a UserError if the manifest names another tokenizer."""
        if self.tokenizer is None:
            return
        name = self.tokenizer["name"]
        if self.tokenizer.get("identity", name) != tokenizer.identity:
            raise UserError(
                f"{self.path}: was prepared with --tokenizer {name}, but training has "
                f"--tokenizer {tokenizer.name}; give --tokenizer {name}, or prepare the data again"
            )


def open_shard(path: Path) -> Shard:
    """Memory-map a shard in any of the three formats.

    Raises:
        UserError: If the file has none of the formats, does not hold uint16 or uint32, or has
            another size than its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if path.suffix == ".npy":
                offset, count, dtype = _npy_header(path, file)
            else:
                offset, count, dtype = _bin_header(path, file, size)
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None
    needed = offset + dtype.itemsize * count
    if size != needed:
        state = "truncated" if size < needed else "longer than its header says"
        raise UserError(
            f"{path}: {state}: {count:,} tokens need {needed:,} bytes, it has {size:,}; write it "
            "again"
        )
    if not count:
        raise UserError(f"{path}: holds no tokens; remove it")
    shard = Shard(path, np.memmap(path, dtype, "r", offset, (count,)).view(np.ndarray), 0, size)
    if not offset and _is_wider(shard):
        raise UserError(
            f"{path}: every second 16-bit word is zero, so the token ids have 32 or 64 bits; write "
            "them as numpy.uint16, or prepare the text again"
        )
    return shard


def _is_wider(shard: Shard) -> bool:
    """True if a file without a header holds wider integers, whose upper halves are zero."""
    odd = even = False
    for start, tokens in shard.samples():
        odd |= bool(tokens[1 - start % 2 :: 2].any())
        even |= bool(tokens[start % 2 :: 2].any())
    return len(shard.tokens) >= 16 and odd != even


def write_shard(
    path: Path,
    layout: Format,
    pieces: Iterable[np.ndarray],
    count: int,
    dtype: type[np.unsignedinteger[Any]] = np.uint16,
) -> str:
    """Write a shard atomically: its name appears only once the file is complete and on disk.

    Args:
        layout: "npy" or "llmc".
        count: Number of tokens, which the header records.
        dtype: Type to store the ids in, uint16 or uint32.

    Returns:
        The file's sha256.

    Raises:
        UserError: If the file cannot be written, for example because the disk is full.
    """
    little = np.dtype(dtype).newbyteorder("<")
    digest, header = hashlib.sha256(), _header(layout, count, little)
    try:
        with atomic_file(path) as file:
            for block in (header, *pieces):
                data = (
                    block if isinstance(block, bytes) else np.ascontiguousarray(block, little).data
                )
                digest.update(data)
                file.write(data)
            assert file.tell() == len(header) + little.itemsize * count
    except UserError as e:
        raise UserError(f"{e}; run the command again to resume") from e
    return digest.hexdigest()


def open_folder(folder: Path) -> ShardFolder:
    """Open the shards of a folder. Their split comes from the manifest, or else from their names.

    Raises:
        UserError: If there are no shards, or one of them cannot be used.
    """
    if (folder / MANIFEST).is_file():
        return _prepared(folder, read_manifest(folder))
    try:
        paths = sorted(
            p
            for p in folder.iterdir()
            if p.suffix in SUFFIXES.values() and not p.name.startswith(".")
        )
    except OSError as e:
        raise UserError(f"{folder}: cannot be read: {e.strerror}") from None
    if not paths:
        raise UserError(
            f"{folder}: holds no token shards (.npy, .bin); make some with python -m "
            "mlx_mla.prepare"
        )
    parts: dict[Split, list[Shard]] = {"train": [], "val": []}
    _allow_open_files(folder, len(paths))
    for path in paths:
        parts[_split(path)].append(open_shard(path))
    if not parts["train"]:
        raise UserError(f"{folder}: holds no training shards; a name must have 'train' in it")
    samples = _sampled(sorted(parts["train"] + parts["val"], key=lambda shard: shard.path))
    return ShardFolder(folder, parts["train"], parts["val"], samples, samples, None)


def _allow_open_files(folder: Path, shards: int) -> None:
    """Raise the limit on open files if the shards need more. A mapped shard stays open.

    Raises:
        UserError: If the hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = shards + _OTHER_FILES
    # macOS does not accept infinity.
    most = max(needed, 10_240) if hard == resource.RLIM_INFINITY else hard
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    try:
        if most < needed:
            raise ValueError
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError):
        raise UserError(
            f"{folder}: has {shards} shards, but this process may open only {soft} files; raise "
            f"the limit with ulimit -n {needed}, or prepare the data with larger --shard-tokens"
        ) from None


def _sampled(shards: Iterable[Shard]) -> str:
    """sha256 of the names, the sizes and samples of the shards."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.path.name} {shard.size}\n".encode())
        for _, tokens in shard.samples():
            digest.update(tokens.tobytes())
    return digest.hexdigest()


def open_listed(folder: Path, row: Mapping[str, Any]) -> Shard:
    """Open a shard that the manifest lists; UserError if its number of tokens differs."""
    shard = open_shard(folder / row["file"])
    if len(shard.tokens) != row["tokens"]:
        raise UserError(
            f"{shard.path}: has {len(shard.tokens):,} tokens, but {MANIFEST} says "
            f"{row['tokens']:,}; prepare the data again"
        )
    return shard


def _prepared(folder: Path, manifest: dict[str, Any]) -> ShardFolder:
    if not manifest["complete"]:
        raise UserError(
            f"{folder}: the preparation is not finished; run mlx_mla.prepare again to resume it"
        )
    parts: dict[Split, list[Shard]] = {"train": [], "val": []}
    digest = hashlib.sha256()
    _allow_open_files(folder, len(manifest["shards"]))
    for row in manifest["shards"]:
        shard = open_listed(folder, row)
        parts[row["split"]].append(shard)
        digest.update(f"{row['split']} {row['sha256']}\n".encode())
    return ShardFolder(
        folder,
        parts["train"],
        parts["val"],
        digest.hexdigest(),
        _sampled(parts["train"] + parts["val"]),
        manifest["tokenizer"],
    )


def _split(path: Path) -> Split:
    words = re.split(r"[^a-z]+", path.name.lower())
    splits: tuple[Split, ...] = ("val", "train")
    for found in ([s for s in splits if s in words], [s for s in splits if s in path.name.lower()]):
        if len(found) == 1:
            return found[0]
    raise UserError(
        f"{path}: the name must contain 'train' or 'val'; rename the file, or move it out of the "
        "folder"
    )


def _header(layout: Format, count: int, dtype: np.dtype) -> bytes:
    if layout == "llmc":
        (of_type,) = (key for key, stored in LLMC_VERSIONS.items() if stored == dtype)
        return struct.pack("<256i", *of_type, count, *[0] * 253)
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    )
    return buffer.getvalue()


def _npy_header(path: Path, file: Any) -> tuple[int, int, np.dtype]:
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = read(file)
    except Exception:  # NumPy evaluates the header as Python, which raises many types
        raise UserError(
            f"{path}: not a NumPy array file (its header is damaged); write it again"
        ) from None
    known = next((t for t in LLMC_VERSIONS.values() if t == dtype), None)
    if known is None:
        raise UserError(
            f"{path}: holds {dtype}, but token shards hold uint16 or uint32; convert it with "
            ".astype(numpy.uint16)"
        )
    if len(shape) != 1:
        raise UserError(
            f"{path}: has {len(shape)} dimensions, but token shards have one; flatten it"
        )
    return file.tell(), shape[0], known


def _bin_header(path: Path, file: Any, size: int) -> tuple[int, int, np.dtype]:
    head = file.read(LLMC_HEADER)
    magic, version, count = struct.unpack("<3i", head[:12]) if len(head) >= 12 else (0, 0, 0)
    if magic in (known for known, _ in LLMC_VERSIONS):
        if (magic, version) not in LLMC_VERSIONS or count < 0:
            raise UserError(
                f"{path}: the header says llm.c version {version} and {count} tokens, but only "
                "versions 1 (uint16) and 7 (uint32) can be read; write it again"
            )
        return LLMC_HEADER, count, LLMC_VERSIONS[magic, version]
    if re.split(r"[^a-z]+", path.stem.lower())[-1] not in ("train", "val"):
        raise UserError(
            f"{path}: does not begin with llm.c's magic number {LLMC_MAGIC}, and only nanoGPT's "
            "train.bin and val.bin have no header; write it again"
        )
    if size % 2:
        raise UserError(
            f"{path}: truncated: {size:,} bytes are not a whole number of uint16 tokens; write it "
            "again"
        )
    return 0, size // 2, np.dtype("<u2")
