"""mlx-lm's server with its requests checked first: `python -m mlx_mla.serve`.

A request that mlx-lm's generation thread cannot take ends that thread, for all clients; here it
gets a 400. docs/decoding.md says which those are.
"""

import argparse
import contextlib
import http.server
import io
import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from mlx_mla import checkpoint, cli
from mlx_mla.backends.contract import decoding_dtype
from mlx_mla.backends.mlx.caches import KVCache
from mlx_mla.backends.mlx.device import find_device, kind_of
from mlx_mla.backends.mlx.load import load
from mlx_mla.decoding.http_request import RequestChecks
from mlx_mla.decoding.request import outside
from mlx_mla.errors import UserError
from mlx_mla.hub import find_model
from mlx_mla.model.config import InferenceDType

import mlx.core as mx  # isort: skip  (after the backend, which loads its BLAS)
from mlx_lm import server  # isort: skip
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache  # isort: skip
from mlx_lm.utils import load_tokenizer  # isort: skip

PROG = "python -m mlx_mla.serve"
LARGEST_BODY = 2**20
CLIENT_TIMEOUT = 120
DTYPE_HELP = "type of weights, computation and cache; left out, float32 on a CPU, bfloat16 on a GPU"


class Server(http.server.ThreadingHTTPServer):
    """Holds a burst of clients in its queue; the standard library's length of 5 resets some."""

    request_queue_size = 128


class Provider(server.ModelProvider):
    """mlx-lm's, with the package's own model: no code of the folder is run."""

    def __init__(self, args: argparse.Namespace, folder: Path, dtype: InferenceDType):
        super().__init__(args)
        self.folder, self.dtype, self.loaded = folder, dtype, threading.Event()
        self.problem: Exception | None = None

    def _load(self, *_: Any) -> None:
        """Load the model, in the generation thread, which an exception would end."""
        try:
            self.model = load(self.folder, self.dtype)
            count = len(make_prompt_cache(self.model))
            self.model.make_cache = lambda: [KVCache() for _ in range(count)]
            self.tokenizer = load_tokenizer(self.folder)
            self.is_batchable, self.model_key = True, (self.cli_args.model, None, None)
        except Exception as e:
            self.problem = e
        self.loaded.set()


class Handler(server.APIHandler):
    """mlx-lm's, with requests checked before they reach the generation thread."""

    checks: RequestChecks
    rfile: Any
    timeout = CLIENT_TIMEOUT

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length") or ""
        if not self.path.endswith("/completions") or not length.isdecimal():
            return super().do_POST()  # refuses it
        if len(length) > 9 or int(length) > LARGEST_BODY:
            return self._refuse(413, f"the request is larger than {LARGEST_BODY} bytes")
        try:
            body = json.loads(self.rfile.read(int(length)))
            if not isinstance(body, dict):
                raise UserError("the request must be a JSON object")
            body = self.checks.check(body, chat="chat" in self.path)
        except UserError as e:
            return self._refuse(400, str(e))
        except (ValueError, RecursionError) as e:
            return self._refuse(400, f"the request is not JSON in UTF-8: {e}")
        data = json.dumps(body).encode()
        self.headers.replace_header("Content-Length", str(len(data)))
        stream, self.rfile = self.rfile, io.BytesIO(data)
        try:
            return super().do_POST()
        finally:
            self.rfile = stream

    def handle_models_request(self) -> None:
        """The one model; mlx-lm also lists what the hub's cache has, and fails without a cache."""
        self._set_completion_headers(200)
        self.end_headers()
        models = [{"id": n, "object": "model", "created": self.created} for n in self.checks.names]
        self.wfile.write(json.dumps({"object": "list", "data": models}).encode())

    def _refuse(self, status: int, message: str) -> None:
        self._set_completion_headers(status)
        self.end_headers()
        self.wfile.write(json.dumps({"error": message[:500]}).encode())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    own, others = _own_flags(argv)
    device = find_device(own.device)
    dtype = decoding_dtype(own.dtype, kind_of(device))
    # mlx-lm's generation thread asks for MLX's default, which is one for all threads.
    with mx.stream(device):
        return _serve(_flags(others), dtype)


def _serve(args: argparse.Namespace, dtype: InferenceDType) -> int:
    if args.model is None:
        raise UserError(f"--model is missing; see {PROG} --help")
    if args.adapter_path or args.draft_model:
        raise UserError("--adapter-path and --draft-model are for mlx_lm.server; leave them out")
    for name in ("temp", "top_p", "min_p"):
        if problem := outside(name, getattr(args, name)):
            raise UserError(f"--{name.replace('_', '-')} {problem}")
    if args.max_tokens < 1 or not 0 < args.port < 2**16:
        raise UserError("--max-tokens must be at least 1, and --port from 1 to 65535")
    folder = find_model(args.model)
    config, tokenizer = checkpoint.read_config(folder), checkpoint.read_tokenizer(folder)
    assert config.vocab_size
    names = list(dict.fromkeys([args.model, str(folder.resolve()), "default_model"]))
    Handler.checks = RequestChecks(
        tokenizer, config.n_positions, config.vocab_size, names, args.max_tokens
    )
    provider = Provider(args, folder, dtype)
    provider._model_map.update(dict.fromkeys(names, args.model))
    generator = server.ResponseGenerator(provider, LRUPromptCache(args.prompt_cache_size))
    try:
        provider.loaded.wait()
        if provider.problem is not None:
            raise provider.problem
        print(f"serving {args.model} in {dtype} at http://{args.host}:{args.port}/v1", flush=True)
        server._run_http_server(
            args.host, args.port, generator, server_class=Server, handler_class=Handler
        )
    finally:
        generator.stop_and_join()
    return 0


def _own_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """--device and --dtype, which mlx-lm's server has no flags for, and the other arguments."""
    own = argparse.ArgumentParser(
        usage=f"{PROG} --model MODEL [--device DEVICE] [--dtype DTYPE] [flags of mlx_lm.server, "
        "below]",
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    own.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "gpu"),
        help='where to run; "auto" takes a GPU where there is one',
    )
    own.add_argument("--dtype", choices=get_args(InferenceDType), help=DTYPE_HELP)
    if {"-h", "--help"} & set(argv):
        own.print_help()
    try:
        return own.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise UserError(f"{e}; see {PROG} --help") from None


def _flags(argv: Sequence[str]) -> argparse.Namespace:
    """mlx-lm's own flags, as its main reads them before it calls `run`."""
    found: list[argparse.Namespace] = []
    run, arguments, stderr = server.run, sys.argv, io.StringIO()
    server.run = lambda host, port, provider: found.append(provider.cli_args)
    sys.argv = [PROG, *argv]
    try:
        with contextlib.redirect_stderr(stderr):
            server.main()
    except SystemExit as e:
        if e.code in (0, None):
            raise
        said = stderr.getvalue().strip().splitlines() or ["wrong arguments"]
        raise UserError(f"{said[-1].partition('error: ')[2] or said[-1]}; see {PROG} --help") from e
    finally:
        server.run, sys.argv = run, arguments
    return found[0]


if __name__ == "__main__":
    sys.exit(main())
