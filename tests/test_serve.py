"""`python -m mlx_mla.serve`, and stock `mlx_lm.server` on our folders, under requests that are
wrong or too long: every good request is answered as it is alone, every bad one is refused."""

import concurrent.futures
import contextlib
import json
import math
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import TextIO

import pytest
from helpers import python, refused

from mlx_mla import serve
from mlx_mla.checks.commands import free_ports
from mlx_mla.data.tokenizer import ByteTokenizer
from mlx_mla.decoding.http_request import RequestChecks
from mlx_mla.errors import UserError

STOCK = "import mlx_mla.backends.mlx; from mlx_lm.server import main; main()"
N_POSITIONS = 48  # of the tiny run
PROMPTS = ["The st", "A longer prompt of words", "x", "def f(self)", "1, 2, 3"]


@contextlib.contextmanager
def serving(*command: str):
    """A server on a free port of this machine."""
    (port,) = free_ports(1)
    with tempfile.TemporaryFile("w+") as log:  # a pipe would fill, and stop the server
        yield from _started(
            python(*command, "--port", str(port), "--log-level", "ERROR"), port, log
        )


def _started(command: list[str], port: int, log: TextIO) -> Iterator[int]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
    try:
        for _ in range(600):
            assert process.poll() is None, (log.seek(0), log.read())[1]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def port(folder):
    with serving("-m", "mlx_mla.serve", "--model", str(folder), "--dtype", "float32") as port:
        yield port


def ask(port: int, body, path: str = "/v1/completions") -> tuple[int, dict]:
    """Status and answer, which is empty where it was streamed to its end; the body is an object, or
    bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read()
            if answer.headers["Content-type"] == "text/event-stream":
                assert text.endswith(b"data: [DONE]\n\n"), text[-200:]
                return answer.status, {}
            return answer.status, json.loads(text)
    except urllib.error.HTTPError as e:
        return e.code, json.loads(e.read())


def good(prompt: str) -> dict:
    return {"prompt": prompt, "max_tokens": 12, "temperature": 0}


BAD = [
    {"prompt": "x" * N_POSITIONS},
    {"prompt": "x" * 5000},
    {"prompt": "The", "max_tokens": N_POSITIONS},
    {"prompt": "The", "max_tokens": 0},
    {"prompt": "The", "max_completion_tokens": -1},
    {"prompt": ""},
    {"prompt": ["a", "b"]},
    {"prompt": [1, 2]},
    {"prompt": "\ud800"},
    {},
    {"prompt": "x", "stop": 5},
    {"prompt": "x", "stop": [""]},
    {"prompt": "x", "logit_bias": {"9999": 1}},
    {"prompt": "x", "logit_bias": {"1": None}},
    {"prompt": "x", "logit_bias": [1]},
    {"prompt": "x", "top_k": 257, "temperature": 1},
    {"prompt": "x", "top_k": 10**30},
    {"prompt": "x", "temperature": math.nan},
    {"prompt": "x", "temperature": True},
    {"prompt": "x", "top_p": 1e-320},
    {"prompt": "x", "repetition_penalty": math.inf},
    {"prompt": "x", "repetition_context_size": 10**30},
    {"prompt": "x", "xtc_probability": 1.0, "xtc_threshold": 0.9},
    {"prompt": "x", "seed": -1},
    {"prompt": "x", "model": "another/one"},
    {"prompt": "x", "adapters": "/tmp"},
    {"prompt": "x", "stream_options": 3, "stream": True},
    b"[1]",
    b"{",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"prompt": ' + b"9" * 5000 + b"}",
]


def test_bad_requests_get_a_400_that_says_why(port):
    for body in BAD:
        status, answer = ask(port, body)
        assert status == 400, (body, answer)
        assert answer["error"], body
    for body in (
        {"messages": []},
        {"messages": [1]},
        {"messages": [{"content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://x"}]}]},
        {"messages": [{"role": "user", "content": "x" * 100}]},
    ):  # fmt: skip
        assert ask(port, body, "/v1/chat/completions")[0] == 400, body
    assert ask(port, good("x"))[0] == 200


def test_requests_without_a_limit_get_what_fits(port):
    status, answer = ask(port, {"prompt": "The st", "temperature": 0})
    assert status == 200
    assert answer["usage"]["completion_tokens"] <= N_POSITIONS - 6
    assert (
        ask(port, {**good("The st"), "temperature": 1e-40})[1]["choices"]
        == (ask(port, good("The st"))[1]["choices"])
    )
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    assert ask(port, chat, "/v1/chat/completions")[0] == 200
    streamed = {**good("The st"), "stream": True, "stream_options": {}}
    assert ask(port, streamed)[0] == 200


def test_the_models_are_the_one_served(port, folder):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=60) as answer:
        names = [m["id"] for m in json.loads(answer.read())["data"]]
    assert names == [str(folder), "default_model"]
    for name in names:
        status, answer = ask(port, {**good("x"), "model": name})
        assert (status, answer["model"]) == (200, name)


def test_a_burst_of_connections_is_answered(port):
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: ask(port, {"prompt": ""})[0], range(1000)))
    assert answers == [400] * 1000


def under_load(port: int, seconds: float, bad: list) -> None:
    """16 clients, of whose requests every tenth is bad."""
    alone = {p: ask(port, good(p))[1]["choices"][0]["text"] for p in PROMPTS}
    end = time.monotonic() + seconds

    def client(number: int) -> int:
        count = 0
        while time.monotonic() < end or count < 10:
            turn = number + 16 * count
            if turn % 10 == 3:
                status, answer = ask(port, bad[turn // 10 % len(bad)])
                assert 400 <= status < 500, answer
            else:
                prompt = PROMPTS[turn % len(PROMPTS)]
                status, answer = ask(port, good(prompt))
                assert (status, answer["choices"][0]["text"]) == (200, alone[prompt])
            count += 1
        return count

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert min(pool.map(client, range(16))) >= 10


def test_sixteen_clients_of_which_some_are_wrong(port):
    under_load(port, 3, BAD)


@pytest.mark.slow
def test_sixteen_clients_for_a_minute(port):
    under_load(port, 60, BAD)


def test_stock_mlx_lm_outlives_a_request_that_is_too_long(folder):
    """Stock `mlx_lm.server`, on our model file alone: the long request ends, others go on."""
    with serving("-c", STOCK, "--model", str(folder), "--trust-remote-code") as port:
        alone = ask(port, good("The st"))
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            long = pool.submit(ask, port, {"prompt": "x" * 100, "max_tokens": 9})
            default = pool.submit(ask, port, {"prompt": "The st", "temperature": 0})  # 512 tokens
            others = [pool.submit(ask, port, good("The st")) for _ in range(4)]
            for other in others:
                assert other.result()[1]["choices"] == alone[1]["choices"]
            for status, answer in (long.result(), default.result()):
                assert status == 200
                assert answer["choices"][0]["finish_reason"] == "stop"
            assert long.result()[1]["choices"][0]["text"] == ""
            assert default.result()[1]["usage"]["completion_tokens"] <= N_POSITIONS - 6 + 2
        assert ask(port, good("The st"))[1]["choices"] == alone[1]["choices"]


def test_checks_count_tokens_as_the_model_sees_them():
    checks = RequestChecks(ByteTokenizer().fast_tokenizer(), 10, 257, ["m", "default_model"], 512)
    assert checks.check({"prompt": "abc"}, chat=False)["max_tokens"] == 7
    assert checks.check({"prompt": "a" * 9, "max_tokens": 1}, chat=False)["max_tokens"] == 1
    with pytest.raises(UserError, match="10 prompt tokens exceed the model's n_positions=10"):
        checks.check({"prompt": "é" * 5}, chat=False)
    with pytest.raises(UserError, match="3 prompt tokens and max_tokens 8 exceed"):
        checks.check({"prompt": "abc", "max_completion_tokens": 8}, chat=False)


def test_bad_flags_are_one_line(folder, tmp_path, capsys):
    def no(*argv):
        return refused(capsys, *argv, command=serve.main)

    assert "--model is missing" in no()
    assert "no such folder" in no("--model", tmp_path / "none")
    assert "--temp must be from 0 to 100" in no("--model", folder, "--temp", "nan")
    assert "invalid int value" in no("--model", folder, "--port", "x")
    assert "--port from 1 to 65535" in no("--model", folder, "--port", "99999")
    assert "--adapter-path" in no("--model", folder, "--adapter-path", tmp_path)
