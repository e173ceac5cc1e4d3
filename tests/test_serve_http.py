"""How `python -m mlx_mla.serve` reads HTTP, takes flags, and ends."""

import contextlib
import json
import signal
import socket
import threading
import time

import pytest
from helpers import ask, refused, serving, started
from test_serve import BAD, N_POSITIONS, good

from mlx_mla import serve

BODY = json.dumps(good("The st")).encode()
DYING = """
from mlx_lm.models import cache
from mlx_mla import serve

def fetch(self, model, tokens):
    raise RuntimeError("the cache is broken")

cache.LRUPromptCache.fetch_nearest_cache = fetch
serve.process()
"""


@pytest.fixture(scope="module")
def served(folder):
    with started("-m", "mlx_mla.serve", "--model", folder, "--dtype float32") as served:
        yield served


def post(*headers: str, body: bytes = BODY, path: str = "/v1/completions") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def exchange(port: int, request: bytes) -> tuple[int, bytes]:
    """Status (0: none) and body of the answer to bytes, after which the client sends no more."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(2**16), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head.startswith(b"HTTP/") else 0, body


N = len(BODY)
LONG = json.dumps({"prompt": "x" * 5000, "top_k": 999}).encode()


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (post(f"Content-Length: {N}"), 200), (post(f"Content-Length:\t{N} "), 200),
        (post(f"Content-Length: {N}", body=BODY + b"more"), 200),
        (post(f"Content-Length: +{len(LONG)}", body=LONG), 400), (post("Content-Length: -5"), 400),
        (post(f"Content-Length: {N}.0"), 400), (post(f"Content-Length: {hex(N)}"), 400),
        (post(f"Content-Length: 1_{N}"), 400), (post("Content-Length: \xb2"), 400),
        (post("Content-Length: "), 400), (post(f"Content-Length: {N}, {N}"), 400),
        (post(f"Content-Length: {N}", f"Content-Length: {N}"), 400),
        (post(f"Content-Length: {N}", f"Content-Length: {N - 1}"), 400),
        (post(f"Content-Length: {N + 1}"), 400), (post("Content-Length: " + "9" * 5000), 413),
        (post(f"Content-Length: {2**21}", body=b" " * 2**21), 413),
        (post(f"Content-Length: {2**21}", body=b" " * 2**21, path="/v1/nothing"), 404),
        (post(), 411), (post("Transfer-Encoding: chunked", body=f"{N:x}\r\n".encode() + BODY), 411),
        (post(f"Content-Length: {N}", "Transfer-Encoding: chunked"), 411),
        (post("Content-Length: 0", body=b""), 400),
        *(
            (post(f"Content-Length: {len(data)}", body=data), 400)
            for data in (json.dumps(good("x")).encode(code) for code in ("utf-16", "utf-32-le"))
        ),
    ],
)  # fmt: skip
def test_only_what_was_read_and_checked_is_passed_on(served, request_bytes, status):
    found, body = exchange(served.port, request_bytes)
    assert found == status, body
    if status not in (200, 404):
        assert json.loads(body)["error"]


def test_a_client_that_sends_all_of_a_large_body_can_read_its_413(served):
    status, answer = ask(served.port, b"x" * 2**24)
    assert (status, answer["error"]) == (413, "the request is larger than 1048576 bytes")


def test_clients_that_leave_are_no_traceback(served):
    long = json.dumps({**good("The st"), "max_tokens": N_POSITIONS - 6, "stream": True}).encode()
    for body in (BODY, long):
        for cut in (0, len(body) // 2):
            request = post(f"Content-Length: {len(body)}", body=body[: len(body) - cut])
            with socket.create_connection(("127.0.0.1", served.port)) as connection:
                # Closing then resets the connection.
                linger = b"\1\0\0\0" + b"\0" * 4
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                connection.sendall(request)
                time.sleep(0.01)
    assert ask(served.port, good("The st"))[0] == 200
    assert "Traceback" not in served.logged()


def test_a_dead_generation_thread_ends_the_process(folder):
    with started("-c", DYING, "--model", folder) as served:
        status, answer = exchange(served.port, post(f"Content-Length: {N}"))
        assert status == 503, answer
        assert served.process.wait(30) == 1
        assert "RuntimeError: the cache is broken" in served.logged()


@pytest.mark.parametrize("signals", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_ctrl_c_under_load_is_exit_code_130(folder, signals):
    with started("-m", "mlx_mla.serve", "--model", folder) as served:

        def client():
            for _ in range(10_000):
                try:
                    ask(served.port, good("The st"))
                except OSError:
                    return

        clients = [threading.Thread(target=client) for _ in range(8)]
        for thread in clients:
            thread.start()
        time.sleep(0.5)
        for _ in range(signals):
            served.process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        assert served.process.wait(30) == 130, served.logged()
        for thread in clients:
            thread.join()
        assert "interrupted" in served.logged()


def test_bad_flags_are_one_line(folder, tmp_path, capsys):
    def no(*argv):
        return refused(capsys, *argv, command=serve.main)

    assert "--model is missing" in no()
    assert "no such folder" in no("--model", tmp_path / "none")
    for name, values in {
        "temp": ("nan", "-1", "inf"),
        "top-p": ("0", "nan"),
        "min-p": ("2", "nan"),
        "top-k": ("257", "100000", "-1"),
        "max-tokens": ("0",),
        "num-draft-tokens": ("-1",),
        "prefill-step-size": ("-1", "0", "9" * 400),
        "prompt-concurrency": ("0", "-8"),
        "decode-concurrency": ("0",),
        "prompt-cache-size": ("-1",),
        "prompt-cache-bytes": ("-5", "5XB", "x"),
        "port": ("0", "99999", "x"),
        "chat-template-args": ("5", "[", "[" * 9999, '{"chat_template": "x"}'),
        "adapter-path": (tmp_path,),
        "draft-model": (folder,),
        "host": ("no.such.host.invalid", "", "x" * 70, "192.0.2.1"),
    }.items():
        for value in values:
            assert f"--{name}" in no("--model", folder, f"--{name}", value), (name, value)
    assert "--use-default-chat-template" in no("--model", folder, "--use-default-chat-template")


def test_a_quantized_cache_must_fit_its_groups(folder, capsys):
    def no(*argv):
        return refused(capsys, "--model", folder, *argv, command=serve.main)

    assert "--kv-bits must be 4 or 8" in no("--kv-bits", "3")
    assert "--kv-group-size" in no("--kv-bits", "4", "--kv-group-size", "48")
    assert "does not divide" in no("--kv-bits", "4", "--kv-group-size", "128")
    assert "--quantized-kv-start" in no("--kv-bits", "4", "--quantized-kv-start", "-1")


def test_a_port_that_is_taken_is_named(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(capsys, "--model", folder, "--port", port, command=serve.main)
    assert f"--port {port}: Address already in use" in said


def test_the_lowest_flags_serve_as_the_defaults_do(folder, served):
    lowest = (
        "--prompt-cache-size 0 --prompt-concurrency 1 --decode-concurrency 1",
        "--prefill-step-size 1 --num-draft-tokens 1 --prompt-cache-bytes 0",
    )
    with serving(folder, "--dtype float32", *lowest) as p:
        for _ in range(2):
            bodies = [good("The st"), good("The stx"), BAD[0], {**good("1, 2"), "seed": 1}]
            for body in bodies:
                own, answer = ask(p, body)
                status, expected = ask(served.port, body)
                assert (own, answer.get("choices")) == (status, expected.get("choices"))
