"""Tokenizers of training data: bytes, GPT-2's byte-pair encoding, or any folder's tokenizer.json.

The end-of-text token stands before every document; it is never produced from text that merely
spells it. The first two are byte-level: any text encodes, and decoding gives it back exactly.
"""

import contextlib
import copy
import hashlib
import itertools
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tiktoken
import tokenizers
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mlx_mla.errors import UserError, first_line
from mlx_mla.files import sha256
from mlx_mla.model.config import TOKENIZER_IDS

END_OF_TEXT = "<|endoftext|>"
BYTES_EOT, GPT2_EOT = (TOKENIZER_IDS[name] - 1 for name in ("bytes", "gpt2"))

# As published with GPT-2 (tiktoken checks the same values).
GPT2_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}

_GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)

# White space as tiktoken's regular expressions have it, which do not count four control characters
# that Python's do.
_LONG_SPACE = re.compile(r"[^\S\x1c-\x1f]{1000,}")


# Tells GPT-2's tokenizer, and ours of bytes, from others of their size.
PROBE, PROBE_GPT2 = "Hello World  it's 1e9", [15496, 2159, 220, 340, 338, 352, 68, 24]
# Cuneiform, for which few tokenizers have a token.
RARE = "\U00010380"

_ENDS = "additional_eos_token_ids"

# What a regular expression of a tokenizer may run into: long runs of one character.
_RUNS = " ".join(chr(c) * 40 for c in range(0x21, 0x7F))


class Tokenizer(Protocol):
    """Text to token ids, fast, for training data."""

    name: str
    """As --tokenizer names it."""
    identity: str
    """Equal for tokenizers that give the same ids."""
    size: int
    end_of_text: int

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, `id_type(size)` of shape (tokens,), without special tokens."""
        ...

    def fast_tokenizer(self) -> PreTrainedTokenizerFast:
        """The same tokenizer for transformers and mlx-lm; `save_pretrained` writes its files."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8 as ids 0-255, and `<|endoftext|>` as 256."""

    name = identity = "bytes"
    size = TOKENIZER_IDS["bytes"]
    end_of_text = BYTES_EOT

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16)

    def fast_tokenizer(self) -> PreTrainedTokenizerFast:
        return _fast_tokenizer([bytes([b]) for b in range(256)], [], use_regex=False)


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, through tiktoken.

    Args:
        bpe_dir: Folder with the published `encoder.json` and `vocab.bpe`. None: tiktoken downloads
            them once, to its own cache (`TIKTOKEN_CACHE_DIR`).

    Raises:
        UserError: If the files are missing, changed, or cannot be downloaded.
    """

    name = identity = "gpt2"
    size = TOKENIZER_IDS["gpt2"]
    end_of_text = GPT2_EOT

    def __init__(self, bpe_dir: str | Path | None = None):
        self._encoding = _gpt2_encoding(None if bpe_dir is None else str(bpe_dir))

    def encode(self, text: str) -> np.ndarray:
        # Surrogates cannot be encoded; tiktoken replaces them as UTF-16 decoding does.
        try:
            return np.asarray(
                self._encoding.encode_to_numpy(text, disallowed_special=()), np.uint16
            )
        except ValueError:
            # tiktoken's pattern backtracks over white space, and gives up after some 100,000
            # characters of it. It leaves the last one to what follows, so a cut before that one
            # changes nothing.
            cuts = [
                0,
                *(m.end() - 1 for m in _LONG_SPACE.finditer(text) if m.end() < len(text)),
                len(text),
            ]
            if len(cuts) == 2:
                raise
            return np.concatenate([self.encode(text[a:b]) for a, b in itertools.pairwise(cuts)])

    def fast_tokenizer(self) -> PreTrainedTokenizerFast:
        ranks = self._encoding._mergeable_ranks
        tokens = sorted(ranks, key=ranks.__getitem__)
        merges = [_merged_pair(token, ranks) for token in tokens if len(token) > 1]
        return _fast_tokenizer(tokens, merges, use_regex=True)


class FolderTokenizer:
    """The tokenizer of a folder with tokenizer.json, such as any model's.

    Its own end of text (`eos_token`) stands before every document.

    Args:
        folder: The folder, as --tokenizer names it.

    Raises:
        UserError: If there is no tokenizer, or it is damaged or has no end of text.
    """

    def __init__(self, folder: str):
        path = Path(folder)
        if not (path / "tokenizer.json").is_file():
            raise UserError(
                f"--tokenizer {folder}: no folder with tokenizer.json; give one, or bytes, or gpt2"
            )
        self._fast = read_tokenizer(path)
        if self._fast.eos_token_id is None:
            raise UserError(
                f"--tokenizer {folder}: has no end-of-text token to stand between documents; set "
                "eos_token in its tokenizer_config.json"
            )
        self.name, self.size = folder, len(self._fast)
        self.end_of_text = int(self._fast.eos_token_id)
        own = self._fast.backend_tokenizer
        self._encoder = type(own).from_str(own.to_str())
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self._encoder.encode_special_tokens = True  # as the text that spells them
        self.identity = self._identity()
        if self._drops(RARE):
            raise UserError(
                f"--tokenizer {folder}: drops characters that it has no token for; give its model "
                "an unk_token or byte_fallback, or make it byte-level"
            )

    def encode(self, text: str) -> np.ndarray:
        with as_user_error(f"--tokenizer {self.name}: the text cannot be encoded"):
            ids = self._encoder.encode(text, add_special_tokens=False).ids
        return np.asarray(ids, id_type(self.size))

    def fast_tokenizer(self) -> PreTrainedTokenizerFast:
        return self._fast

    def _drops(self, character: str) -> bool:
        try:
            return not self.encode(character).size
        except UserError:
            return False  # so is every text that has it

    def _identity(self) -> str:
        last = self.size - 1
        for known, ids in ((ByteTokenizer, [*PROBE.encode()]), (GPT2Tokenizer, PROBE_GPT2)):
            if (self.size, self.end_of_text) == (known.size, last):
                with contextlib.suppress(UserError):
                    if self.encode(PROBE).tolist() == ids:
                        return known.identity
        parts = json.loads(self._encoder.to_str())
        deciding = ("model", "normalizer", "pre_tokenizer", "added_tokens")
        text = json.dumps([self.end_of_text, *(parts.get(name) for name in deciding)])
        return hashlib.sha256(text.encode()).hexdigest()


def get_tokenizer(name: str, bpe_dir: str | Path | None = None) -> Tokenizer:
    """The tokenizer that --tokenizer names: "bytes", "gpt2", or a folder."""
    if name == "bytes":
        return ByteTokenizer()
    return GPT2Tokenizer(bpe_dir) if name == "gpt2" else FolderTokenizer(name)


def id_type(size: int) -> type[np.unsignedinteger[Any]]:
    """The narrower of uint16 and uint32 that holds the ids of so many tokens."""
    return np.uint16 if size <= 2**16 else np.uint32


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder.

    Where its files name no end of text, that is GPT-2's `<|endoftext|>` if the vocabulary has it,
    as transformers reads the files that OpenAI published.

    Raises:
        UserError: If there is none, or none that can be used.
    """
    with as_user_error(f"{folder}: its tokenizer cannot be read"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    check_tokenizer(tokenizer, folder)
    if tokenizer.eos_token_id is None and END_OF_TEXT in tokenizer.get_vocab():
        tokenizer.eos_token = END_OF_TEXT
    return tokenizer


def encode(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """Token ids of a text by a transformers tokenizer.

    Args:
        special: Add the special tokens that the tokenizer adds by default, such as Llama's
            beginning of text.

    Raises:
        UserError: If the tokenizer has no token for a character of it, or gives up on it.
    """
    with as_user_error("the text cannot be encoded by this model's tokenizer"):
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special, verbose=False)
    return ids


@contextlib.contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Context that turns any failure in transformers or tokenizers into one UserError.

    tokenizers raises bare Exceptions. If its Rust code panics, it writes to standard error and
    raises an object that is not an Exception.

    Args:
        what: The beginning of the message. The first line of the reason follows in parentheses.
    """
    try:
        with _stderr.quiet():
            yield
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise UserError(f"{what} ({first_line(e):.150})") from None


def end_ids(tokenizer: Any) -> list[int]:
    """Ids that end a text, the tokenizer's own end of text first; empty if it has none.

    A chat model may have several. Only a model's generation_config.json names them all, so the
    converter keeps them among the tokenizer's settings, where they travel with it.
    """
    own = tokenizer.eos_token_id
    others = getattr(tokenizer, "init_kwargs", {}).get(_ENDS)
    ids = [own, *(others if isinstance(others, list) else [])]
    return [i for i in dict.fromkeys(ids) if type(i) is int]


def set_end_ids(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    """Keep further ids that end a text; what `end_ids` returns from then on."""
    others = [i for i in ids if i != tokenizer.eos_token_id]
    if others:
        tokenizer.init_kwargs[_ENDS] = others


def without_ends(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy by which no id ends a text, to measure a number of tokens that is known."""
    own = copy.deepcopy(tokenizer)
    own.eos_token = None
    own.init_kwargs.pop(_ENDS, None)
    return own


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, where: object) -> None:
    """Refuse a tokenizer whose ids have gaps, or whose pattern takes for ever on long runs.

    Ids index arrays, here and in other tools: one of 2^31 asks for gigabytes.

    Raises:
        UserError: Saying `where` it is from.
    """
    ids = tokenizer.get_vocab().values()
    if ids and (min(ids) < 0 or max(ids) >= len(tokenizer)):
        raise UserError(
            f"{where}: its tokenizer has {len(tokenizer)} tokens and ids up to {max(ids)}; ids "
            "must go from 0 without gaps"
        )
    with as_user_error(f"{where}: its tokenizer's regular expression fails on ordinary text"):
        try:
            tokenizer.decode(tokenizer.encode(_RUNS, add_special_tokens=False, verbose=False))
        except Exception:
            return  # no token for some character: said where a text has that character


class _StandardError:
    """The process's standard error, which threads may silence at the same time."""

    def __init__(self) -> None:
        self._lock, self._threads, self._saved = threading.Lock(), 0, -1

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Drop what is written, until the last thread leaves."""
        with self._lock:
            if not self._threads:
                sys.stderr.flush()
                self._saved = os.dup(2)
                with open(os.devnull, "wb") as nothing:
                    os.dup2(nothing.fileno(), 2)
            self._threads += 1
        try:
            yield
        finally:
            with self._lock:
                self._threads -= 1
                if not self._threads:
                    os.dup2(self._saved, 2)
                    os.close(self._saved)


_stderr = _StandardError()


@lru_cache(maxsize=2)
def _gpt2_encoding(bpe_dir: str | None) -> tiktoken.Encoding:
    if bpe_dir is None:
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as e:  # requests and its callers raise many kinds
            raise UserError(
                f"the GPT-2 vocabulary could not be downloaded ({type(e).__name__}); give "
                "--bpe-dir a folder with encoder.json and vocab.bpe, or use --tokenizer bytes"
            ) from None
    for file, expected in GPT2_SHA256.items():
        path = Path(bpe_dir) / file
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; --bpe-dir needs encoder.json and vocab.bpe of GPT-2"
            )
        if sha256(path) != expected:
            raise UserError(f"{path}: not GPT-2's file (its sha256 differs); download it again")
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(Path(bpe_dir) / "vocab.bpe"),
        encoder_json_file=str(Path(bpe_dir) / "encoder.json"),
    )
    return tiktoken.Encoding(
        "gpt2", pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: GPT2_EOT}
    )


def _merged_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts whose merge makes `token`: BPE run with only the merges that come before it."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 1 << 30))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def _fast_tokenizer(
    tokens: list[bytes], merges: list[tuple[bytes, bytes]], use_regex: bool
) -> PreTrainedTokenizerFast:
    alphabet = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(alphabet[b] for b in token)

    vocab = {spell(t): i for i, t in enumerate(tokens)}
    bpe = models.BPE(vocab=vocab, merges=[(spell(a), spell(b)) for a, b in merges])
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=None,
        clean_up_tokenization_spaces=False,
    )
