"""Requests for text: numbers within bounds, text that is text, and random numbers of their own."""

import io
import json

import numpy as np
import pytest
from helpers import TINY, objects, refused
from hypothesis import given
from hypothesis import strategies as st

from mlx_mla import checkpoint, generate, train
from mlx_mla.backends import get_backend
from mlx_mla.data.tokenizer import ByteTokenizer
from mlx_mla.decoding.request import GenerationOptions, check_request
from mlx_mla.decoding.text import LONGEST_WINDOW, TextWriter
from mlx_mla.errors import UserError


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("temp", [-1.0, 101.0, 1e308]),
        ("top_p", [0.0, 1e-320, 1.5]),
        ("min_p", [-0.1, 1.1]),
        ("repetition_penalty", [0.0, -1.0, 1e-40, 1e40]),
        ("repetition_context_size", [0, -1, 10**30]),
        ("num_draft_tokens", [0, 10**30]),
        ("seed", [-1, 2**63, 2**64]),
        ("top_k", [-1, 257, 10**30]),
        ("max_tokens", [0, -1, 10**30]),
    ],
)
def test_numbers_out_of_bounds_are_refused_by_name(name, bad):
    flag = "--" + name.replace("_", "-")
    values = [*bad, float("nan"), float("inf"), float("-inf")] if name[0] in "tmr" else bad
    if name in ("max_tokens", "top_k", "repetition_context_size"):
        values = bad
    for value in values:
        options = GenerationOptions(**{"max_tokens": 5, name: value})
        with pytest.raises(UserError, match=flag):
            check_request([1, 2], options, 257, 48)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_temperature_near_zero_is_greedy(folder, backend):
    decoder = get_backend(backend).decoder(checkpoint.ModelFolder(folder))

    def tokens(temp):
        options = GenerationOptions(temp=temp, max_tokens=30, seed=3)
        return [t for p in decoder.stream(list(b"The st"), options) for t in p.token_ids]

    greedy = tokens(0.0)
    for temp in (1e-320, 1e-40, 1e-29, 1e-9):
        assert tokens(temp) == greedy
    assert tokens(1.5) != greedy


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize("more", [(), ("--top-k", 20, "--top-p", 0.9, "--min-p", 0.001)])
def test_a_seed_gives_a_prompt_the_same_text_alone_and_in_a_batch(
    folder, tmp_path, capfd, backend, more
):
    file = tmp_path / "prompts.txt"
    prompts = ["The st", "def f(self, x", "1", "The st"]
    argv = ("--model", folder, "--temp", 1, "--seed", 5, "--max-tokens", 20, "--backend", backend)
    file.write_text("\n".join(prompts))
    together = objects(capfd, *argv, *more, "--prompts-file", file)
    alone = [objects(capfd, *argv, *more, "--prompt", p)[0] for p in prompts]
    assert [a["text"] for a in together] == [a["text"] for a in alone]
    assert together[0]["text"] == together[3]["text"]  # equal requests have equal answers
    assert len({a["text"] for a in together}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_sampled_tokens_have_the_models_probabilities(folder, backend):
    """The first token of 4,000 seeds against the softmax of the model's logits (chi-squared)."""
    stats = pytest.importorskip("scipy.stats", reason="needs scipy, in the extra named referees")

    decoder = get_backend(backend).decoder(checkpoint.ModelFolder(folder))
    prompt, n, temp = list(b"The st"), 4000, 1.3
    counts = np.zeros(257)
    for seed in range(0, n, 500):
        batch = [prompt] * 1
        for s in range(seed, seed + 500):
            options = GenerationOptions(temp=temp, max_tokens=1, seed=s)
            counts[next(decoder.batch(batch, options))[1].token_ids[0]] += 1
    logits = np.array(logits_of(decoder, backend, prompt), np.float64)[:257] / temp
    expected = np.exp(logits - logits.max())
    expected *= n / expected.sum()
    likely = expected >= 5
    pooled = [np.append(a[likely], a[~likely].sum()) for a in (counts, expected)]
    assert stats.chisquare(*pooled).pvalue > 1e-4


def logits_of(decoder, backend, prompt):
    if backend == "mlx":
        import mlx.core as mx

        return decoder.model(mx.array([prompt]))[0, -1].tolist()
    import torch

    with torch.inference_mode():
        return decoder.model(torch.tensor([prompt])).logits[0, -1].tolist()


def test_prompt_files_are_lines_of_utf8(folder, tmp_path, capfd):
    file = tmp_path / "prompts.txt"
    prompts = ["first\u2028second", "form\x0cfeed", "next\x85line", "last"]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(prompts).encode())
    argv = ("--model", folder, "--max-tokens", 2, "--temp", 0)
    assert [a["prompt"] for a in objects(capfd, *argv, "--prompts-file", file)] == prompts


def test_bytes_that_are_no_text_are_refused(folder, tmp_path, capsys, monkeypatch, text_file):
    def no(*argv, command=generate.main):
        return refused(capsys, *argv, command=command)

    model = ("--model", folder)
    half = b"caf\xe9".decode("utf-8", "surrogateescape")  # as Python hands such arguments on
    said = no(*model, "--prompt", half)
    assert r"the argument caf\udce9 is not valid UTF-8" in said
    assert "is not valid UTF-8" in no(*model, "--prompt", "x", "--stop", half)
    run = (*TINY, "--data", text_file, "--out", tmp_path / "run", "--steps", "1")
    assert "is not valid UTF-8" in no(*run, "--sample-prompt", half, command=train.main)
    assert not (tmp_path / "run").exists()
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"good\ncaf\xe9\n")
    assert "byte 0xe9 at offset 8" in no(*model, "--prompts-file", file)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert "standard input: not UTF-8 text (byte 0xe9 at offset 3)" in no(*model, "--prompt", "-")


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_multi_head_attention_reports_no_latents(tmp_path, text_file, capfd, backend):
    out = tmp_path / "run"
    argv = [*TINY, "--qk-rope-head-dim", "0", "--attention", "mha", "--data", str(text_file)]
    assert train.main([*argv, "--steps", "1", "--out", str(out)]) == 0
    argv = ("--model", out, "--prompt", "x", "--max-tokens", 2, "--backend", backend)
    assert objects(capfd, *argv)[0]["cache"] == "materialized"
    assert generate.main(["--model", str(out), "--prompt", "x", "--max-tokens", "2"]) == 0
    assert "latent" not in capfd.readouterr().err


def test_answers_are_json_whatever_was_sampled(folder, capfd):
    (answer,) = objects(capfd, "--model", folder, "--prompt", "é", "--temp", 100, "--seed", 1)
    assert json.loads(json.dumps(answer))["tokens"] > 0


BYTES = ByteTokenizer().fast_tokenizer()
END = BYTES.eos_token_id


def written(tokens, stop=()) -> str:
    """What a writer gives for tokens, piece by piece."""
    writer, pieces = TextWriter(BYTES, stop), []
    for i, token in enumerate(tokens):
        ended = writer.add(token) is not None
        pieces.append(writer.take(final=not ended and i == len(tokens) - 1))
        if ended:
            break
    return "".join(pieces)


@given(
    st.lists(st.sampled_from([*"ab\n é€🦺".encode(), 0xFF]), min_size=1, max_size=300),
    st.booleans(),
)
def test_text_in_pieces_is_the_text_of_all_tokens(tokens, ends):
    """Characters are cut at any byte, and some bytes are none; windows change nothing."""
    assert written([*tokens, END] if ends else tokens) == BYTES.decode(tokens)


@given(st.text("ab\né", min_size=1, max_size=200), st.text("abé", min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_text(text, stop):
    assert written([*text.encode(), END], [stop]) == text.partition(stop)[0]


def test_the_end_of_text_loses_no_letters_that_began_a_stop_text():
    assert written([*b"ab", END], ["bc"]) == "ab"


def test_decoding_a_long_line_takes_the_same_for_every_token(monkeypatch):
    lengths = []

    class Tokenizer:
        eos_token_id = END

        def decode(self, tokens):
            lengths.append(len(tokens))
            return BYTES.decode(tokens)

    writer = TextWriter(Tokenizer(), [])
    for token in b"x" * 1000:
        writer.add(token)
    assert len(writer.take(final=True)) == 1000
    assert max(lengths) <= LONGEST_WINDOW
