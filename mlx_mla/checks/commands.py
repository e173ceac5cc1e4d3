"""The commands, as a user starts them, each in a process of its own."""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_mla.errors import last_line

ROOT = Path(__file__).resolve().parents[2]
"""Of the checkout, where this is one."""
LIMIT = 1800
"""Seconds that a command may take."""


def run(module: str, *argv: object, cwd: Path | None = None) -> str:
    """Run `python -m MODULE` to its end and give what it printed.

    Raises:
        RuntimeError: With the last line of stderr, if it fails.
    """
    done = subprocess.run(
        _command(module, *argv),
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
        cwd=cwd,
    )
    if done.returncode:
        said = last_line(done.stderr)
        raise RuntimeError(f"{module} ended with exit code {done.returncode}: {said}")
    return done.stdout


@contextlib.contextmanager
def started(
    module: str, *argv: object, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen]:
    """A command that runs meanwhile, and is ended with the block; its output goes to a file."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            _command(module, *argv),
            stdout=log,
            stderr=log,
            text=True,
            env={**os.environ, **(env or {})},
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def ranks(place: Path, size: int, module: str, *argv: object) -> None:
    """Run a command as several ranks of an MLX ring over loopback, as mlx.launch starts them."""
    hosts = place / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                started(module, *argv, env={"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)})
            )
            for rank in range(size)
        ]
        for rank, process in enumerate(processes):
            if process.wait(LIMIT):
                raise RuntimeError(f"rank {rank} ended with exit code {process.returncode}")


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


@contextlib.contextmanager
def serving(model: Path) -> Iterator[str]:
    """The server with a model, in float32, in which a text does not depend on the others of its
    batch; gives the address of its completions."""
    (port,) = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    with started(
        "mlx_mla.serve", "--model", model, "--port", port, "--dtype", "float32"
    ) as process:
        for _ in range(1200):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with exit code {process.returncode}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            time.sleep(0.1)
        yield f"{address}/v1/completions"


def ask(address: str, body: Any) -> tuple[int, str]:
    """Status, and the text or the error, that the server answers a request with."""
    request = urllib.request.Request(address, json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.loads(answer.read())["choices"][0]["text"]
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


def converter() -> str:
    """The module of the converter: in the wheel it is part of the package."""
    installed = importlib.util.find_spec("mlx_mla.convert") is not None
    return "mlx_mla.convert" if installed else "convert"


def _command(module: str, *argv: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, argv)]
