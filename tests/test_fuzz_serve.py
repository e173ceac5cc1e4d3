"""`python -m mlx_mla.serve` under flags and raw HTTP that the fuzzer has spoiled."""

import json
from pathlib import Path

import fuzz
import pytest
from helpers import ask, serving
from test_fuzz_decode import BODY, CHAT, NUMBERS, SEED, TEXTS
from test_serve import good
from test_serve_http import exchange, post

from mlx_mla import cli, serve
from mlx_mla.errors import UserError

FLAGS = {
    **dict.fromkeys(
        ("--temp", "--top-k", "--top-p", "--min-p", "--max-tokens", "--num-draft-tokens", "--port",
         "--prompt-concurrency", "--decode-concurrency", "--prefill-step-size",
         "--prompt-cache-size", "--kv-bits", "--kv-group-size", "--quantized-kv-start"),
        NUMBERS,
    ),
    "--prompt-cache-bytes": (*NUMBERS, "1GB", "0.5M", "\xb2", "5XB"),
    "--chat-template-args": ("{}", "[]", '{"a": 1}', '{"tools": 1}', "[" * 5000, "9" * 5000, "x"),
    "--log-level": ("DEBUG", "x", ""), "--allowed-origins": TEXTS, "--draft-model": ("", "x"),
    "--adapter-path": ("", "."), "--dtype": ("float32", "float8", ""),
    "--device": ("cpu", "mps", "x"),
}  # fmt: skip
LENGTHS = (
    "{0}", " {0} ", "+{0}", "-{0}", "{0}.0", "0x{0:x}", "{0},{0}", "0{0}", "{0}" * 300, "", "x",
    "\xb2",
)  # fmt: skip


def flags(random, folder, model):
    chosen = random.sample(list(FLAGS), random.choice((1, 1, 2, 3)))
    return ["--model", str(model), *(f"{flag}={random.choice(FLAGS[flag])}" for flag in chosen)]


def check_flags(argv):
    """All of the server's start but the server."""

    def body(argv):
        args = serve.read_flags(argv)[0]
        assert 0 <= args.temp <= 100
        assert 0 <= args.top_k < 257
        assert min(args.max_tokens, args.prefill_step_size, args.prompt_concurrency) > 0
        return 0

    return cli.run(body, argv)


def raw(random, folder):
    """A request as bytes, spoiled in its length, its headers or anywhere."""
    chat = random.random() < 0.3
    body = json.dumps({**(CHAT if chat else BODY), "stop": None, "max_tokens": 2}).encode()
    if random.random() < 0.2:
        body = body.decode().encode(random.choice(("utf-16", "utf-32", "utf-8-sig")))
    length = len(body) + random.choice((0, 0, 0, 1, -1, 500, -len(body), 2**21))
    headers = [f"Content-Length: {random.choice(LENGTHS).format(length)}"]
    if random.random() < 0.5:
        headers = [f"Content-Length: {length}"]
    if random.random() < 0.3:
        headers.append(
            random.choice(
                (f"Content-Length: {length}", "Transfer-Encoding: chunked", "Expect: 100-continue",
                 "Connection: keep-alive", "X: " + "y" * 70_000, "no colon", " folded")
            )
        )  # fmt: skip
    request = post(*headers, body=body, path=f"/v1{'/chat' * chat}/completions")
    if random.random() < 0.5:
        request = fuzz.mutate_bytes(random, request)
    (folder / "request").write_bytes(request)
    return [str(folder / "request")]


def client(port):
    """A command that sends bytes, and fails unless the server answers them, or closes where they
    are no request, and then answers a good request."""
    alone = ask(port, good("The st"))[1]["choices"]

    def body(argv):
        status, answer = exchange(port, Path(argv[0]).read_bytes())
        assert ask(port, good("The st"))[1]["choices"] == alone
        if status in (0, 200):
            return 0
        assert 400 <= status < 500 or status in (501, 505), (status, answer)
        raise UserError(f"{status}")

    return lambda argv: cli.run(body, argv)


@pytest.fixture(scope="module")
def served(folder):
    with serving(folder) as port:
        yield port


def test_spoiled_flags(folder, tmp_path):
    codes = fuzz.fuzz(check_flags, lambda r, f: flags(r, f, folder), 60, SEED, tmp_path)
    assert codes[0] and codes[2]


def test_spoiled_http(served, tmp_path):
    codes = fuzz.fuzz(client(served), raw, 40, SEED, tmp_path)
    assert codes[0] and codes[2]


@pytest.mark.slow
def test_many_spoiled_flags(folder, fuzz_many):
    codes = fuzz_many("serve: flags", check_flags, lambda r, f: flags(r, f, folder), 2000)
    assert codes[0] and codes[2]


@pytest.mark.slow
def test_much_spoiled_http(served, fuzz_many):
    codes = fuzz_many("serve: raw HTTP", client(served), raw, 1500)
    assert codes[0] and codes[2]
