"""What several test files use: tiny models and runs, and how a command is called and refused."""

import contextlib
import json
import mmap
import os
import resource
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

import mlx.core as mx
import mlx_lm
import numpy as np
from hypothesis import strategies as st

from convert import __main__ as convert
from mlx_mla import checkpoint, generate, train
from mlx_mla.backends.mlx.session import MLXTrainSession
from mlx_mla.checks.commands import free_ports
from mlx_mla.data.tokenizer import GPT2Tokenizer
from mlx_mla.decoding.request import GenerationOptions
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.model.weights import initial_weights
from mlx_mla.training.metrics import read_metrics


def words(*parts: object) -> list[str]:
    """Command line arguments. A string that begins with "--" is split at its spaces, so one string
    may hold several flags with their values; any other part is one argument."""
    split = (p.split() if isinstance(p, str) and p.startswith("--") else [str(p)] for p in parts)
    return [word for part in split for word in part]


# A model small enough for a training step in milliseconds.
TINY = words(
    "--n-layer 2 --n-head 2 --n-embd 32 --n-positions 48 --qk-rope-head-dim 8",
    "--batch-size 4 --eval-batches 2 --final-eval-batches 2 --sample-tokens 8 --no-compile",
)


def tiny_train(out: Path, *flags: object) -> Path:
    """The folder of a run of `mlx_mla.train` on the tiny model, which must succeed."""
    assert train.main(words(*TINY, "--out", out, *flags)) == 0
    return out


def converted(src: object, out: Path, *flags: object) -> Path:
    """The folder that `convert` makes of a source, which must succeed."""
    assert convert.main(words(src, "--out", out, *flags)) == 0
    return out


def python(*args: str) -> list[str]:
    """Command line of this interpreter."""
    return [sys.executable, *args]


# Environment of a process without PyTorch, whose import, which transformers begins wherever it is
# installed, is most of a command's start.
HERE = Path(__file__).resolve().parent
WITHOUT_TORCH = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(HERE / "without_torch"), str(HERE.parent)]),
}


def ran(*argv: object, code: int = 0, **settings) -> subprocess.CompletedProcess[str]:
    """What this interpreter with such arguments put out, once it has ended with `code`; it has no
    PyTorch unless `env` says otherwise."""
    settings = {"env": WITHOUT_TORCH, **settings}
    command = python(*words(*argv))
    done = subprocess.run(command, capture_output=True, text=True, check=False, **settings)
    assert done.returncode == code, done.stderr[-2000:]
    return done


@contextlib.contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """A disk on which no file of this process may be larger, as a full one refuses to go on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def edit(path: Path, **changes: object) -> None:
    """Change some values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def greedy(decoder, prompt: bytes | list[int], tokens: int, **options) -> list[int]:
    """The tokens of the likeliest text after a prompt."""
    request = GenerationOptions(temp=0, max_tokens=tokens, **options)
    return [t for piece in decoder.stream(list(prompt), request) for t in piece.token_ids]


def take_memory(nbytes: int) -> int:
    """Have so many bytes in memory that no allocator kept from before, and give them back; 0."""
    with mmap.mmap(-1, nbytes) as memory:
        for page in range(0, nbytes, mmap.PAGESIZE):
            memory[page] = 1
    return 0


MEASURED = ("tokens_per_sec", "peak_memory_bytes", "mfu", "seconds")


def unmeasured(run: Path) -> list[dict]:
    """The metrics of a run without what was measured: a repetition gives the same."""
    rows = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def refused(capsys, *argv: object, command=train.main) -> str:
    """Run a command that must be refused; returns its one line."""
    capsys.readouterr()
    assert command(words(*argv)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def train_command(argv: list[str]) -> train.TrainCommand:
    """What a command line of mlx_mla.train asks for."""
    return train.configure(train.given_flags(argv))


def objects(capfd, *argv: object) -> list[dict]:
    capfd.readouterr()
    assert generate.main(words(*argv, "--json")) == 0
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=32, n_positions=24, qk_rope_head_dim=4)


BASE = TrainConfig(batch_size=4, learning_rate=1e-2, compile=False, model=MODEL).resolved()


def batch(step: int, size: int = 4):
    rows = np.random.default_rng(step).integers(0, 60, (size, 25)).astype(np.int32)
    return rows[:, :-1], rows[:, 1:]


def largest_difference(a: MLXTrainSession, b: MLXTrainSession) -> float:
    first, second = a.weights(), b.weights()
    return max(np.abs(first[k] - second[k]).max() for k in first)


TOLERANCE = 1e-4


KINDS = {
    "mla": {}, "mla-rope": {"qk_rope_head_dim": 8}, "mla-shared": {"num_kv_shared_layers": 1},
    "mla-rope-shared": {"qk_rope_head_dim": 8, "num_kv_shared_layers": 2},
    "mla-k-eq-v": {"attention_k_eq_v": True, "qk_rope_head_dim": 8},
    "mha-rope": {"attention": "mha", "position_embedding_type": "rope"},
    "gqa-rope": {
        "attention": "mha", "position_embedding_type": "rope", "num_key_value_heads": 2,
    },
    "mqa": {"attention": "mha", "num_key_value_heads": 1},
    "gqa-llama": {
        "attention": "mha", "num_key_value_heads": 2, "position_embedding_type": "rope",
        "norm": "rms_norm", "activation_function": "swiglu",
    },
    "mla-llama": {
        "qk_rope_head_dim": 8, "norm": "rms_norm", "activation_function": "swiglu",
        "attention_bias": True,
    },
}  # fmt: skip


@st.composite
def model_configs(draw) -> ModelConfig:
    """Small models with every feature on and off."""
    heads = draw(st.sampled_from([1, 2, 3, 4]))
    width = heads * draw(st.sampled_from([8, 16, 20]))
    common = {
        "tie_word_embeddings": draw(st.booleans()), "n_layer": draw(st.integers(1, 3)),
        "n_head": heads, "n_embd": width, "n_positions": 96, "vocab_size": draw(st.integers(2, 70)),
        "norm": draw(st.sampled_from(["layer_norm", "rms_norm"])),
        "activation_function": draw(st.sampled_from(["gelu_new", "gelu", "swiglu"])),
        **{
            f"{name}_bias": draw(st.sampled_from([None, True, False]))
            for name in ("attention", "attention_out", "mlp")
        },
        "head_dim": draw(st.sampled_from([None, None, 6, 24])),
    }  # fmt: skip
    if draw(st.integers(0, 2)) == 0:
        return ModelConfig(
            attention="mha",
            position_embedding_type=draw(st.sampled_from(["learned", "rope"])),
            num_key_value_heads=draw(st.sampled_from([n for n in (1, 2, 3, 4) if heads % n == 0])),
            **common,
        ).resolved()
    shared = draw(st.integers(0, common["n_layer"] - 1))
    if draw(st.integers(0, 3)) == 0:
        return ModelConfig(
            attention_k_eq_v=True,
            num_kv_shared_layers=shared,
            qk_rope_head_dim=draw(st.sampled_from([0, 4, 8])),
            latent_norm=draw(st.booleans()),
            **common,
        ).resolved()
    ranks = st.integers(1, width)
    latents = common["n_layer"] - shared
    return ModelConfig(
        kv_lora_ranks=draw(st.none() | st.lists(ranks, min_size=latents, max_size=latents)),
        num_kv_shared_layers=shared,
        q_lora_rank=draw(st.sampled_from([None, 5, 16])),
        qk_rope_head_dim=draw(st.sampled_from([0, 0, 4, 8])),
        v_head_dim=draw(st.sampled_from([None, 6, 24])),
        latent_norm=draw(st.booleans()),
        **common,
    ).resolved()


def random_weights(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Weights large enough that attention is far from uniform, and biases and gains that matter."""
    rng = np.random.default_rng(seed)
    weights = initial_weights(config, seed, 0.25)
    for name, w in weights.items():
        if w.ndim == 1:
            weights[name] = w + 0.1 * rng.standard_normal(w.shape, dtype=np.float32)
    return weights


def token_ids(config: ModelConfig, batch: int, length: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length)))


def write_gpt2_model(folder: Path, data: Path, seed: int = 0, **config) -> Path:
    """A model folder; `data` is the folder of real files."""
    values = {
        "vocab_size": 50257, "n_layer": 2, "n_head": 2, "n_embd": 48, "n_positions": 1024,
        "attention": "mla", "kv_lora_rank": None if config.get("attention") == "mha" else 16,
        **config,
    }  # fmt: skip
    model = ModelConfig(**values).resolved()
    folder.mkdir(parents=True)
    tokenizer = GPT2Tokenizer(data / "gpt2_bpe").fast_tokenizer()
    checkpoint.write_model(folder, model, initial_weights(model, seed, 0.3), tokenizer, "")
    return folder


def difference(a: mx.array, b: mx.array) -> float:
    return mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max().item()


def in_chunks(model, x: mx.array, sizes, cache) -> mx.array:
    """Logits of feeding x through a cache in chunks of the given sizes, then token by token."""
    out, at = [], 0
    for size in [*sizes, *[1] * x.shape[1]]:
        if at < x.shape[1]:
            out.append(model(x[:, at : at + size], cache=cache))
            mx.eval(out[-1])
            at += size
    return mx.concatenate(out, axis=1)


def run_mlx_lm(tool: str, *args: object) -> subprocess.CompletedProcess:
    """Run a command of stock mlx-lm, which must succeed."""
    return ran("-m", "mlx_lm", tool, *args, timeout=300)


class Served(NamedTuple):
    process: subprocess.Popen
    port: int
    log: TextIO

    def logged(self) -> str:
        self.log.seek(0)
        return self.log.read()


@contextlib.contextmanager
def started(*command: object) -> Iterator[Served]:
    """A server on a free port of this machine, without PyTorch, once it answers."""
    (port,) = free_ports(1)
    with tempfile.TemporaryFile("w+") as log:  # a pipe would fill, and stop the server
        argv = python(*words(*command, "--port", port, "--log-level ERROR"))
        silent = {"stdout": subprocess.DEVNULL, "stderr": log}
        served = Served(subprocess.Popen(argv, env=WITHOUT_TORCH, **silent), port, log)
        try:
            for _ in range(600):
                assert served.process.poll() is None, served.logged()
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                time.sleep(0.1)
            yield served
        finally:
            served.process.terminate()
            served.process.wait(30)


@contextlib.contextmanager
def serving(folder: Path, *flags: str) -> Iterator[int]:
    """The port of this project's server with a model."""
    with started("-m", "mlx_mla.serve", "--model", folder, *flags) as served:
        yield served.port


def ask(port: int, body, path: str = "/v1/completions") -> tuple[int, dict]:
    """Status and answer, which is empty where it was streamed to its end; the body is an object, or
    bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    json_body = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, json_body)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read()
            if answer.headers["Content-type"] == "text/event-stream":
                assert text.endswith(b"data: [DONE]\n\n"), text[-200:]
                return answer.status, {}
            return answer.status, json.loads(text)
    except urllib.error.HTTPError as e:
        return e.code, json.loads(e.read())


@contextlib.contextmanager
def mlx_lm_server(folder: Path, *flags: str) -> Iterator[Callable[[str], str]]:
    """Stock mlx-lm's server; yields a function that returns its greedy answer to a prompt."""
    with started("-m", "mlx_lm", "server", "--model", folder, *flags) as served:

        def answer(prompt: str) -> str:
            body = {"prompt": prompt, "max_tokens": 16, "temperature": 0.0}
            return ask(served.port, body)[1]["choices"][0]["text"]

        yield answer


def by_mlx_lm(folder: Path, **options):
    """The model and tokenizer of a folder as stock mlx-lm loads them."""
    trust = {"trust_remote_code": True}
    return mlx_lm.load(str(folder), trust, **trust, **options)[:2]
