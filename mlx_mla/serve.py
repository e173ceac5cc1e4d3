"""Serve a model over HTTP: `python -m mlx_mla.serve`.

This is mlx-lm's server with stricter checks. mlx-lm generates for all clients in one thread, and a
request that it cannot handle ends that thread. Here, such a request gets status 400 instead;
docs/decoding.md lists the checks.
"""

import argparse
import contextlib
import http.server
import io
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn, Optional, get_args

from mlx_mla import cli
from mlx_mla.backends.contract import decoding_dtype
from mlx_mla.backends.mlx.caches import KVCache
from mlx_mla.backends.mlx.device import device_type, find_device
from mlx_mla.backends.mlx.load import load
from mlx_mla.checkpoint import ModelFolder
from mlx_mla.decoding.http_answer import Generator
from mlx_mla.decoding.http_request import RequestChecks, check_template_arguments
from mlx_mla.decoding.request import GREEDY_BELOW, LARGEST_INT, GenerationOptions
from mlx_mla.errors import UserError, flag
from mlx_mla.fields import between, bounds_of
from mlx_mla.files import parse_json_object
from mlx_mla.hub import find_model
from mlx_mla.model.config import InferenceDType

import mlx.core as mx  # isort: skip  (after the backend, which loads its BLAS)
from mlx_lm import server  # isort: skip
from mlx_lm.models.cache import make_prompt_cache  # isort: skip
from mlx_lm.utils import load_tokenizer  # isort: skip

PROG = "python -m mlx_mla.serve"
PATHS = ("/v1/completions", "/v1/chat/completions", "/chat/completions")
LARGEST_BODY = 2**20
CLIENT_TIMEOUT = 120
DRAIN_SECONDS, DRAIN_BYTES = 5, 64 << 20
NOT_TAKEN = ("adapter_path", "draft_model", "use_default_chat_template", "pipeline")
"""Flags of mlx_lm.server that are refused."""
_COUNTS = ("max_tokens", "num_draft_tokens", "decode_concurrency", "prompt_concurrency",
           "prefill_step_size")  # fmt: skip
LIMITS = {
    **{name: bounds_of(GenerationOptions)[name] for name in ("temp", "top_p", "min_p")},
    **dict.fromkeys(_COUNTS, between(1, LARGEST_INT)),
    **dict.fromkeys(("prompt_cache_size", "quantized_kv_start"), between(0, LARGEST_INT)),
    "port": between(1, 2**16 - 1),
}
"""The bounds of mlx-lm's flags."""
KV_BITS, KV_GROUP_SIZES = (4, 8), (32, 64, 128)


class Server(http.server.ThreadingHTTPServer):
    """Answers requests while the generation thread is alive."""

    # The standard library's 5 would refuse some of many clients that come at once.
    request_queue_size = 128
    generator: Generator

    def service_actions(self) -> None:
        if not self.generator.is_healthy:
            time.sleep(1.5)  # mlx-lm's handlers check once a second, and still answer
            raise RuntimeError("the generation thread died")

    def finish_request(self, request: Any, client_address: Any) -> None:
        fingerprint = server.get_system_fingerprint()
        Handler(self.generator, request, client_address, self, system_fingerprint=fingerprint)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection after reading what the client still sends.

        Closing a connection with unread bytes resets it, perhaps before the client has read the
        answer.
        """
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            request.settimeout(DRAIN_SECONDS)
            end, left = time.monotonic() + DRAIN_SECONDS, DRAIN_BYTES
            while time.monotonic() < end and left > 0 and (data := request.recv(2**16)):
                left -= len(data)
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, (ConnectionError, TimeoutError)):
            logging.info(f"The client at {client_address[0]} disconnected: {error}")
        elif self.generator.is_healthy:
            super().handle_error(request, client_address)


class Provider(server.ModelProvider):
    """mlx-lm's model provider, for the package's own model class: it runs no code of the folder."""

    def __init__(self, args: argparse.Namespace, folder: ModelFolder, dtype: InferenceDType):
        super().__init__(args)
        self.folder, self.dtype, self.loaded = folder, dtype, threading.Event()
        self.problem: Exception | None = None

    def new_tokenizer(self) -> Any:
        """A new tokenizer. Each thread needs its own."""
        end = self.folder.tokenizer.eos_token
        template = self.cli_args.chat_template
        settings = {
            "trust_remote_code": False,
            **({"eos_token": end} if end else {}),
            **({"chat_template": template} if template else {}),
        }
        return load_tokenizer(self.folder.path, settings)

    def _load(self, *_: Any) -> None:
        """Load the model. This runs in the generation thread, which an exception would end."""
        try:
            self.model = load(self.folder, self.dtype)
            count = len(make_prompt_cache(self.model))
            self.model.make_cache = lambda: [KVCache() for _ in range(count)]
            self.tokenizer = self.new_tokenizer()
            self.is_batchable, self.model_key = True, (self.cli_args.model, None, None)
        except Exception as e:
            self.problem = e
        finally:
            self.loaded.set()


class Handler(server.APIHandler):
    """mlx-lm's request handler, which checks requests before they reach the generation thread."""

    checks: RequestChecks
    rfile: Any
    timeout = CLIENT_TIMEOUT

    def do_POST(self) -> None:
        if self.path not in PATHS:
            return super().do_POST()  # answers 404
        lengths = self.headers.get_all("Content-Length", [])
        if not lengths or "Transfer-Encoding" in self.headers:
            return self._refuse(411, "the request needs a Content-Length header")
        length = lengths[0].strip(" \t")
        if len(lengths) > 1 or not length.isdecimal():
            return self._refuse(400, "Content-Length must be one decimal number")
        if len(length) > 9 or int(length) > LARGEST_BODY:
            return self._refuse(413, f"the request is larger than {LARGEST_BODY} bytes")
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            return self._refuse(400, f"the body ended after {len(data)} of {length} bytes")
        try:
            body = parse_json_object(data, "the request")
            data = json.dumps(self.checks.check(body, chat="chat" in self.path)).encode()
        except UserError as e:
            return self._refuse(400, str(e))
        except RecursionError:
            return self._refuse(400, "the request is nested too deeply")
        # mlx-lm then reads the checked body, and nothing else.
        self.headers.replace_header("Content-Length", str(len(data)))
        stream, self.rfile = self.rfile, io.BytesIO(data)
        try:
            return super().do_POST()
        finally:
            self.rfile = stream

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        asked = self.body.get("max_completion_tokens", self.body.get("max_tokens"))
        try:
            tokens = self.response_generator.tokenize(request, self)
            self.max_tokens = self.checks.room(tokens, asked)
        except UserError as e:
            return self._refuse(400, str(e))
        return super().handle_completion(request, stop_words)

    def handle_models_request(self) -> None:
        """List the served model only. mlx-lm also lists the hub's cache, and fails without one."""
        self._set_completion_headers(200)
        self.end_headers()
        models = [{"id": n, "object": "model", "created": self.created} for n in self.checks.names]
        self.wfile.write(json.dumps({"object": "list", "data": models}).encode())

    def _set_completion_headers(self, status_code: int = 200) -> None:
        if status_code == 404 and not self.response_generator.is_healthy:
            status_code = 503  # mlx-lm's 404 would blame the client
        super()._set_completion_headers(status_code)

    def _refuse(self, status: int, message: str) -> None:
        self._set_completion_headers(status)
        self.end_headers()
        self.wfile.write(json.dumps({"error": message[:500]}).encode())


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    args, device, dtype, folder = read_flags(argv)
    # mlx-lm's generation thread uses MLX's default device, which all threads share.
    with mx.stream(device), _bound(args.host, args.port) as httpd:
        return _serve(args, folder, dtype, httpd)


def read_flags(
    argv: Sequence[str],
) -> tuple[argparse.Namespace, mx.Device, InferenceDType, ModelFolder]:
    """Parse and check all flags: those of mlx-lm's server, the device, the type and the model.

    Raises:
        UserError: If a flag is wrong; the message names it.
    """
    own, others = _own_flags(argv)
    args = _flags(others)
    folder = check_flags(args)
    device = find_device(own.device)
    return args, device, decoding_dtype(own.dtype, device_type(device)), folder


def check_flags(args: argparse.Namespace) -> ModelFolder:
    """Refuse flags that would make mlx-lm fail, now or at a later request.

    Returns:
        The folder of --model.

    Raises:
        UserError: If a flag is wrong; the message names it.
    """
    if args.model is None:
        raise UserError(f"--model is missing; see {PROG} --help")
    for name in NOT_TAKEN:
        if getattr(args, name):
            raise UserError(f"{flag(name)} is a flag of mlx_lm.server alone; leave it out")
    for name, limit in LIMITS.items():
        if problem := limit.problem(getattr(args, name)):
            raise UserError(f"{flag(name)} {problem}")
    if args.temp < GREEDY_BELOW:
        args.temp = 0
    if not isinstance(args.chat_template_args, dict):
        raise UserError("--chat-template-args must be a JSON object")
    check_template_arguments("--chat-template-args", args.chat_template_args)
    folder = find_model(args.model)
    config = folder.config
    assert config.vocab_size
    if not 0 <= args.top_k < config.vocab_size:
        raise UserError(f"--top-k must be from 0 (off) to {config.vocab_size - 1}")
    if args.kv_bits is not None:
        widths = {
            w for i in range(config.n_layer) for _, w in config.attention_spec.cached(i, False)
        }
        if args.kv_bits not in KV_BITS or args.kv_group_size not in KV_GROUP_SIZES:
            raise UserError("--kv-bits must be 4 or 8, and --kv-group-size 32, 64 or 128")
        if any(width % args.kv_group_size for width in widths):
            raise UserError(
                f"--kv-group-size {args.kv_group_size} does not divide the cache's width of "
                f"{' or '.join(map(str, sorted(widths)))}; choose another group size"
            )
    return folder


def _bound(host: str, port: int) -> Server:
    """A server that is bound to its address but does not listen yet."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as e:
        raise UserError(
            f"--host {host} does not resolve: {e}; use 127.0.0.1 for this machine"
        ) from None
    address: Any = found[0][4]
    Server.address_family = found[0][0]
    httpd = Server(address, Handler, bind_and_activate=False)
    try:
        httpd.server_bind()
    except OSError as e:
        httpd.server_close()
        raise UserError(f"--host {host} --port {port}: {e.strerror}; choose another") from None
    return httpd


def _serve(
    args: argparse.Namespace,
    folder: ModelFolder,
    dtype: InferenceDType,
    httpd: Server,
) -> int:
    config = folder.config
    names = list(dict.fromkeys([args.model, str(folder.path.resolve()), "default_model"]))
    assert config.vocab_size
    Handler.checks = RequestChecks(config.n_positions, config.vocab_size, names, args.max_tokens)
    provider = Provider(args, folder, dtype)
    provider._model_map.update(dict.fromkeys(names, args.model))
    httpd.generator = Generator(provider)
    try:
        provider.loaded.wait()
        if provider.problem is not None:
            raise provider.problem
        print(f"serving {args.model} in {dtype} at http://{args.host}:{args.port}/v1", flush=True)
        httpd.server_activate()
        httpd.serve_forever()
    finally:
        httpd.generator.stop_and_join()
    return 0


def _own_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse --device and --dtype, which mlx-lm's server lacks; also returns the other arguments."""
    own = argparse.ArgumentParser(
        usage=f"{PROG} --model MODEL [--device DEVICE] [--dtype DTYPE] [flags of mlx_lm.server, "
        f"below, except {', '.join(map(flag, NOT_TAKEN))}]",
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    own.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "gpu"),
        help='device to run on; "auto" uses a GPU if there is one',
    )
    own.add_argument(
        "--dtype",
        choices=get_args(InferenceDType),
        help="type of weights, computation and cache; default: float32 on a CPU, bfloat16 on a GPU",
    )
    if {"-h", "--help"} & set(argv):
        own.print_help()
    try:
        return own.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise UserError(f"{e}; see {PROG} --help") from None


def _flags(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the flags of mlx-lm's server with its own parser."""
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
    except (ArithmeticError, LookupError):
        raise UserError("--prompt-cache-bytes must be a size such as 500MB or 2GB") from None
    except RecursionError:
        raise UserError("--chat-template-args is nested too deeply") from None
    finally:
        server.run, sys.argv = run, arguments
        for handler in logging.getLogger().handlers:  # mlx-lm has made one for its messages
            if isinstance(handler, logging.StreamHandler) and handler.stream is stderr:
                handler.setStream(sys.stderr)
    return found[0]


def process(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command, and end the process with its exit code.

    Python's normal exit would abort if a client's thread were still inside MLX or a tokenizer.
    """
    code = cli.EXIT_INTERRUPTED
    try:
        code = main(argv)
    except SystemExit as e:
        code = int(bool(e.code))  # --help
    except Exception:
        traceback.print_exc()
        code = cli.EXIT_FAULT
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    process()
