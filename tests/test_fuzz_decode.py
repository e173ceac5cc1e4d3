"""What generating, evaluating and serving read, spoiled by the fuzzer.

Prompts, flags, prompt caches, model folders, evaluation data and HTTP bodies: a few cases of each
by default, thousands among the slow tests.
"""

import itertools
import json
import math
import os
import shutil
from pathlib import Path

import fuzz
import pytest
from helpers import ask, serving
from test_serve import BAD, good

from mlx_mla import cli, evaluate, generate
from mlx_mla.decoding.http_request import RequestChecks
from mlx_mla.errors import UserError
from mlx_mla.files import SUMS, parse_json_object, read_text

SEED = 16
SHORT = ("--max-tokens", "3", "--temp", "0")
PROMPTS = "The st\ndef f(self):\n1, 2, 3\nnaïve \U0001f999\n"
HELLASWAG = {
    "activity_label": "Cooking", "ctx_a": "A man", "ctx_b": "he", "ctx": "A man he", "label": 1,
    "endings": ["eats.", "runs [title] off.", "sings.", "sleeps."],
}  # fmt: skip
WIKI = " = Title = \n \n Some text , of the @-@ page .\n \n = Other = \n \n More of it .\n"
BODY = {
    "model": "default_model", "prompt": "The st", "max_tokens": 4, "temperature": 0.5,
    "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "stop": ["x", "yz"],
    "logit_bias": {"5": 1.5}, "logprobs": True, "top_logprobs": 2, "seed": 3, "stream": False,
    "xtc_probability": 0.5, "xtc_threshold": 0.1, "presence_penalty": 0.1,
    "frequency_penalty": 0.1, "repetition_context_size": 20, "presence_context_size": 20,
    "frequency_context_size": 20, "num_draft_tokens": 3, "stream_options": {"include_usage": True},
}  # fmt: skip
CHAT = {
    **{k: v for k, v in BODY.items() if k != "prompt"},
    "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}],
    "role_mapping": {"user": "U: ", "stop": "\n"}, "tools": [], "chat_template_kwargs": {},
}  # fmt: skip
TEXTS = (
    "", " ", "\n", "x", "The st", "x" * 47, "x" * 48, "y" * 5000, "<|endoftext|>", "\x01\x7f", "é",
    "\u202e\u200d", "\U0001f469\u200d\U0001f9b3", "\udcff", "a\udce9b", "\x1b[2J", "-", "--",
)  # fmt: skip
NUMBERS = (
    "0", "1", "-1", "3", "0.5", "1e-320", "1e-40", "1e308", "1e999", "nan", "inf", "-inf", "None",
    "", "x", "9" * 400, "9" * 5000, *map(str, fuzz.NUMBERS),
)  # fmt: skip
GENERATE_FLAGS = {
    **dict.fromkeys(
        ("--temp", "--top-k", "--top-p", "--min-p", "--repetition-penalty", "--num-draft-tokens",
         "--repetition-context-size", "--seed", "--max-tokens", "--max-kv-size", "--kv-bits"),
        NUMBERS,
    ),
    "--cache": ("latent", "materialized", "auto", "none", "x", ""), "--stop": TEXTS,
    "--device": ("cpu", "gpu", "mps", "tpu", ""),
    "--backend": ("mlx", "mlx", "mlx", "torch", "jax"),
    "--draft-model": ("runs/x", "", ".", "a/b/c", "\udcff"),
    "--prompt-cache": ("", ".", "x.safetensors", "\udcff", "n" * 300),
    "--save-prompt-cache": ("", ".", "/x/y.safetensors", "x", "n" * 300 + ".safetensors"),
}  # fmt: skip
EVALUATE_FLAGS = {
    **dict.fromkeys(("--limit", "--seed", "--window", "--batch-size"), NUMBERS),
    "--tasks": ("lambada", "hellaswag", "wikitext2", "lambada,", ",", "", "x", "\udcff"),
    "--protocol": ("standard", "original", "x"), "--dtype": ("float32", "bfloat16", "float8"),
    "--data-dir": ("", ".", "/", "/dev/null", "n" * 300, "\udcff"),
    "--out": ("r.json", "r.png", "", ".", "/dev/full", "/dev/null/r.json", "n" * 300 + ".json"),
    "--model": ("", ".", "a/b/c", "x" * 5000, "runs/x", "\udcff"),
}  # fmt: skip


@pytest.fixture(scope="module")
def cache_file(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "c.safetensors"
    argv = ["--model", str(folder), "--prompt", "The st", *SHORT, "--save-prompt-cache", str(path)]
    assert generate.main(argv) == 0
    return path


@pytest.fixture(scope="module")
def evaluated(folder, tmp_path_factory):
    """A results file with the scores of its items beside it, and the flags that made it."""
    root = tmp_path_factory.mktemp("evaluated")
    (root / "lambada").mkdir()
    rows = [json.dumps({"text": f"some words and the last number {i}"}) for i in range(5)]
    (root / "lambada" / "lambada_test.jsonl").write_text("\n".join(rows) + "\n")
    argv = ["--model", str(folder), "--data-dir", str(root), "--tasks", "lambada"]
    assert evaluate.main([*argv, "--out", str(root / "r.json")]) == 0
    return root / "r.json", argv


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Relative names that a case makes up are not of the working tree."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True, scope="module")
def small_machine(cache_file):
    with fuzz.small_machine():  # with its libraries loaded, by what the fixture ran
        yield


def prompts(random, folder, model):
    argv = ["--model", str(model), *SHORT]
    if random.random() < 0.3:
        return [*argv, f"--prompt={random.choice(TEXTS[:-3])}"]
    path = folder / "prompts.txt"
    path.write_bytes(fuzz.mutate_text(random, PROMPTS))
    return [*argv, "--prompts-file", str(path), *(["--json"] if random.random() < 0.5 else [])]


def flags(random, folder, model):
    chosen = random.sample(list(GENERATE_FLAGS), random.choice((1, 1, 2, 3)))
    argv = [f"{flag}={random.choice(GENERATE_FLAGS[flag])}" for flag in chosen]
    if "--max-tokens" not in chosen or "--max-kv-size" in chosen:
        argv = [a for a in argv if not a.startswith("--max-tokens")] + ["--max-tokens=3"]
    return ["--model", str(model), "--prompt", "The st", *argv]


def caches(random, folder, model, cache_file):
    path = folder / "c.safetensors"
    path.write_bytes(fuzz.mutate_safetensors(random, cache_file.read_bytes()))
    return ["--model", str(model), "--prompt", "x", *SHORT, "--prompt-cache", str(path)]


def folders(random, folder, model):
    copy = folder / "model"
    copy.mkdir()
    for path in model.iterdir():
        # A test before may have imported the folder's code, which leaves a __pycache__.
        if path.is_file() and path.name not in (SUMS, "train_state.safetensors"):
            os.link(path, copy / path.name)
    name = random.choice(["config.json", "config.json", "tokenizer.json", "tokenizer_config.json"])
    (copy / name).unlink()
    values = json.loads(read_text(model / name))
    (copy / name).write_bytes(fuzz.mutate_json(random, values))
    backend = random.choice(("mlx", "torch"))
    return ["--model", str(copy), "--prompt", "The", *SHORT, "--backend", backend]


def evaluation_data(random, folder, model):
    task = random.choice(("lambada", "hellaswag", "wikitext2"))
    (folder / task).mkdir()
    if task == "wikitext2":
        text = fuzz.mutate_text(random, WIKI)[:5000]  # a long text takes long, which is no hang
        (folder / task / "wiki.test.raw").write_bytes(text)
    else:
        row = {"text": "some words and the last"} if task == "lambada" else HELLASWAG
        name = "lambada_test.jsonl" if task == "lambada" else "hellaswag_val.jsonl"
        rows = [json.dumps(row).encode(), fuzz.mutate_json(random, row), json.dumps(row).encode()]
        text = b"\n".join(rows)
        if random.random() < 0.3:
            text = fuzz.mutate_text(random, text.decode("utf-8", "replace"))
        (folder / task / name).write_bytes(text)
    return ["--model", str(model), "--data-dir", str(folder), "--tasks", task, "--window", "16",
            "--backend", random.choice(("mlx", "torch"))]  # fmt: skip


def items(random, folder, model, evaluated):
    """An evaluation to resume, with its results or the scores of items spoiled."""
    results, data = evaluated
    shutil.copy(results, folder)
    shutil.copytree(f"{results}.items", folder / f"{results.name}.items")
    if random.random() < 0.2:
        path = folder / results.name
        path.write_bytes(fuzz.mutate_json(random, json.loads(path.read_bytes())))
    else:
        path = random.choice(list((folder / f"{results.name}.items").iterdir()))
        path.write_bytes(fuzz.mutate_json_lines(random, path.read_bytes()))
    return [*data, "--out", str(folder / results.name), "--resume"]


def evaluate_flags(random, folder, model):
    (folder / "lambada").mkdir()
    row = json.dumps({"text": "some words and the last"})
    (folder / "lambada" / "lambada_test.jsonl").write_text(f"{row}\n{row}\n")
    argv = {"--model": str(model), "--data-dir": str(folder), "--tasks": "lambada"}
    for flag in random.sample(list(EVALUATE_FLAGS), random.choice((1, 1, 2))):
        argv[flag] = random.choice(EVALUATE_FLAGS[flag])
        if flag == "--out" and argv[flag].startswith(("r.", "n")):
            argv[flag] = str(folder / argv[flag])
    return [f"{flag}={value}" for flag, value in argv.items()]


def bodies(random, folder):
    chat = random.random() < 0.3
    path = folder / ("chat.json" if chat else "body.json")
    path.write_bytes(fuzz.mutate_json(random, CHAT if chat else BODY))
    return [str(path)]


def check_body(argv):
    """The checks of `mlx_mla.serve` as a command."""
    checks = RequestChecks(48, 257, ["m", "default_model"], 512)

    def body(argv):
        values = parse_json_object(Path(argv[0]).read_bytes(), "the request")
        checked = checks.check(values, chat="chat" in argv[0])
        assert 1 <= checks.room([0], checked.get("max_tokens")) < 48
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            assert math.isfinite(checked.get(name, 0))
        return 0

    return cli.run(body, argv)


def everything(folder, cache_file, evaluated):
    """Command, spoiler and default number of cases of every surface."""
    return {
        "prompts": (generate.main, lambda r, f: prompts(r, f, folder), 12),
        "flags": (generate.main, lambda r, f: flags(r, f, folder), 20),
        "caches": (generate.main, lambda r, f: caches(r, f, folder, cache_file), 15),
        "folders": (generate.main, lambda r, f: folders(r, f, folder), 20),
        "data": (evaluate.main, lambda r, f: evaluation_data(r, f, folder), 15),
        "evaluate": (evaluate.main, lambda r, f: evaluate_flags(r, f, folder), 15),
        "items": (evaluate.main, lambda r, f: items(r, f, folder, evaluated), 15),
        "bodies": (check_body, bodies, 60),
    }


MANY = {"prompts": 300, "flags": 500, "caches": 400, "folders": 300, "data": 150, "evaluate": 300,
        "items": 300,
        "bodies": 3000}  # fmt: skip


@pytest.mark.parametrize("surface", MANY)
def test_a_few_spoiled_inputs(surface, folder, cache_file, evaluated, tmp_path):
    main, spoil, cases = everything(folder, cache_file, evaluated)[surface]
    codes = fuzz.fuzz(main, spoil, cases, SEED, tmp_path)
    assert codes[2] > 0  # some were refused


@pytest.mark.slow
@pytest.mark.parametrize("surface", MANY)
def test_many_spoiled_inputs(surface, folder, cache_file, evaluated, fuzz_many):
    main, spoil, _ = everything(folder, cache_file, evaluated)[surface]
    command = {generate.main: "generate", evaluate.main: "evaluate", check_body: "serve"}[main]
    assert fuzz_many(f"{command}: {surface}", main, spoil, MANY[surface])[2] > 0


@pytest.fixture(scope="module")
def port(folder):
    with serving(folder) as port:
        yield port


def requests(random, folder):
    argv = bodies(random, folder)
    if random.random() < 0.2:
        bad = random.choice(BAD)
        data = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
        Path(argv[0]).write_bytes(data)
    return argv


def client(port):
    """A command that sends a request, and every 20th time a good one, which is always answered as
    it was at first."""
    alone = ask(port, good("The st"))[1]["choices"]
    sent = itertools.count(1)

    def body(argv):
        chat = "/chat" if "chat" in argv[0] else ""
        data = Path(argv[0]).read_bytes()
        status, answer = ask(port, data, f"/v1{chat}/completions")
        if next(sent) % 20 == 0:
            assert ask(port, good("The st"))[1]["choices"] == alone
        if status == 200:
            return 0
        assert 400 <= status < 500, (status, answer)
        raise UserError(answer["error"])

    return lambda argv: cli.run(body, argv)


def test_a_server_under_spoiled_requests(port, tmp_path):
    codes = fuzz.fuzz(client(port), requests, 40, SEED, tmp_path)
    assert codes[0] and codes[2]


@pytest.mark.slow
def test_a_server_under_many_spoiled_requests(port, fuzz_many):
    codes = fuzz_many("serve: requests", client(port), requests, 1500)
    assert codes[0] and codes[2]
