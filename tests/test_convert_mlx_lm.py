"""Stock mlx-lm on a converted model: every tool of it that the README promises."""

import concurrent.futures
import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import foreign
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from helpers import by_mlx_lm, mlx_lm_server, run_mlx_lm, words
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

from convert import __main__ as convert
from mlx_mla import checkpoint
from mlx_mla.backends import get_backend
from mlx_mla.decoding.request import GenerationOptions

pytestmark = pytest.mark.slow

PROMPT, TOKENS = "The st", 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A latent model; its widths are multiples of mlx-lm's quantization group, 64."""
    tmp = tmp_path_factory.mktemp("mlx_lm")
    model = foreign.gpt2(spread=0.15, n_embd=128, n_positions=128, vocab_size=257)
    with torch.no_grad():  # the likeliest tokens are then ASCII, so texts can be compared
        for ids in (slice(0, 33), slice(127, None)):
            model.transformer.wte.weight[ids] = 0
    model.save_pretrained(str(tmp / "hf"))
    argv = words(tmp / "hf", "--out", tmp / "mla", "--tokenizer bytes --to mla --rank 64")
    assert convert.main(argv) == 0
    return tmp / "mla"


@pytest.fixture(scope="module")
def expected(folder):
    """Our own greedy text."""
    options = GenerationOptions(temp=0, max_tokens=TOKENS)
    decoder = get_backend("torch", "cpu").decoder(checkpoint.ModelFolder(folder))
    return "".join(p.text for p in decoder.stream(list(PROMPT.encode()), options))


def generated(folder, *flags: object) -> str:
    flags = ("--model", folder, "--trust-remote-code", "--temp", 0, "--max-tokens", TOKENS, *flags)
    text = run_mlx_lm("generate", *flags, "--prompt", PROMPT).stdout
    return text.split("==========\n")[1].removesuffix("\n")


def test_generate(folder, expected):
    assert generated(folder).strip() == expected.strip()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_it_loads_and_generates(bits, folder, tmp_path, expected):
    out = tmp_path / f"q{bits}"
    run_mlx_lm(
        "convert", "--hf-path", folder, "--mlx-path", out, "-q", "--q-bits", bits,
        "--trust-remote-code",
    )  # fmt: skip
    assert json.loads((out / "config.json").read_text())["quantization"]["bits"] == bits
    smaller = (out / "model.safetensors").stat().st_size / (
        folder / "model.safetensors"
    ).stat().st_size
    assert smaller < (0.25 if bits == 4 else 0.4)
    text = generated(out)
    assert text
    if bits == 8:  # the first characters of a random model survive eight bits
        assert text.strip()[:2] == expected.strip()[:2]


def test_quantized_in_two_widths_as_docs_decoding_md_does(folder, tmp_path):
    """mlx-lm's own recipes of that kind know other models' names, for every GPT-2."""
    page = (Path(__file__).parents[1] / "docs" / "decoding.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    exec(code, {"FOLDER": str(folder), "QUANTIZED": str(tmp_path / "mixed")})
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization"]
    assert config["transformer.h.0.mlp.c_proj"]["bits"] == 6
    assert config["transformer.h.0.mlp.c_fc"]["bits"] == 4
    assert "transformer.wpe" not in {k for k, v in config.items() if isinstance(v, dict) and v}
    assert generated(tmp_path / "mixed")
    with pytest.raises(ValueError, match="does not have expected keys for mixed quant"):
        how = {"quantize": True, "quant_predicate": "mixed_4_6", "trust_remote_code": True}
        mlx_lm.convert(str(folder), str(tmp_path / "no"), **how)


def test_prompt_cache_saved_and_loaded(folder, tmp_path, expected):
    model, tokenizer = by_mlx_lm(folder)
    ids = tokenizer.encode(PROMPT, add_special_tokens=False)
    cache = make_prompt_cache(model)
    model(mx.array([ids[:-1]]), cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    again = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert again[0].offset == len(ids) - 1
    assert again[0].keys.shape[-1] == 64 and again[0].values.shape[-1] == 0
    steps = generate_step(mx.array(ids[-1:]), model, max_tokens=TOKENS, prompt_cache=again)
    got = tokenizer.decode([int(token) for token, _ in steps])
    assert got == expected


def loss(folder, text: str, **adapter) -> float:
    model, tokenizer = by_mlx_lm(folder, **adapter)
    ids = mx.array([tokenizer.encode(text)])
    return float(nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="mean"))


def test_lora_trains_some_steps_and_its_adapter_loads(folder, tmp_path):
    data, adapter = tmp_path / "data", tmp_path / "adapter"
    data.mkdir()
    for split in ("train", "valid"):
        lines = [json.dumps({"text": f"The story of number {i} is short."}) for i in range(8)]
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    run_mlx_lm(
        "lora", "--model", folder, "--train", "--data", data, "--iters", 20, "--batch-size", 4,
        "--num-layers", 2, "--learning-rate", 1e-3, "--adapter-path", adapter, "--steps-per-eval",
        20, "--val-batches", 1, "--trust-remote-code",
    )  # fmt: skip
    text = "The story of number 3 is short."
    assert loss(folder, text, adapter_path=str(adapter)) < 0.9 * loss(folder, text)
    assert generated(folder, "--adapter-path", adapter)


def test_server_answers_three_at_once_as_it_answers_each(folder):
    prompts = ["The st", "A rather longer beginning of", "x"]
    with mlx_lm_server(folder, "--trust-remote-code") as ask:
        alone = [ask(prompt) for prompt in prompts]
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            together = list(pool.map(ask, prompts))
    assert all(alone)
    assert together == alone
