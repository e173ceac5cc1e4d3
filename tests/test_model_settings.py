"""Every setting of the attention through every tool: folders, caches, stock mlx-lm, transformers,
training, conversion."""

import dataclasses
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from helpers import (
    TOLERANCE,
    by_mlx_lm,
    difference,
    greedy,
    model_configs,
    random_weights,
    run_mlx_lm,
    token_ids,
    words,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import batch_generate, generate_step, speculative_generate_step
from mlx_lm.models.cache import (
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)

from convert import hf
from mlx_mla import checkpoint, train
from mlx_mla.backends import get_backend
from mlx_mla.backends.mlx.load import build_model
from mlx_mla.data.tokenizer import ByteTokenizer
from mlx_mla.decoding.request import GenerationOptions
from mlx_mla.errors import UserError
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.model.weights import initial_weights
from mlx_mla.training.starting_models import initial_weights_of

KINDS = {
    "mha-rope": {"attention": "mha", "position_embedding_type": "rope"},
    "gqa-rope": {"attention": "mha", "position_embedding_type": "rope", "num_key_value_heads": 2},
    "mqa-wide": {"attention": "mha", "num_key_value_heads": 1, "head_dim": 64},
    "mla-wide": {"kv_lora_rank": 32, "qk_rope_head_dim": 32, "head_dim": 48},
    "mla-shared": {"kv_lora_rank": 32, "num_kv_shared_layers": 2, "latent_norm": True},
    "mla-rope-shared": {
        "kv_lora_rank": 32, "qk_rope_head_dim": 32, "num_kv_shared_layers": 1, "q_lora_rank": 24,
    },
    "mla-k-eq-v": {"attention_k_eq_v": True, "qk_rope_head_dim": 32, "num_kv_shared_layers": 1},
    "mha-untied": {"attention": "mha", "tie_word_embeddings": False},
    "mla-untied": {"kv_lora_rank": 32, "tie_word_embeddings": False},
    "gqa-llama": {
        "attention": "mha", "num_key_value_heads": 2, "position_embedding_type": "rope",
        "norm": "rms_norm", "activation_function": "swiglu",
    },
    "mla-llama": {
        "kv_lora_rank": 32, "qk_rope_head_dim": 32, "norm": "rms_norm",
        "activation_function": "swiglu", "attention_bias": True,
    },
}  # fmt: skip
PROMPT, LENGTH = b"The st", 16


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> ModelConfig:
    return ModelConfig(
        n_layer=3, n_embd=128, n_head=4, n_positions=96, vocab_size=257, **KINDS[request.param]
    ).resolved()


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    """A model folder whose random weights are large enough for sharp predictions."""
    path = tmp_path_factory.mktemp("kind")
    tokenizer = ByteTokenizer().fast_tokenizer()
    weights = initial_weights(kind, 1, 0.2)
    head = weights.get("lm_head.weight", weights["transformer.wte.weight"])
    head[tokenizer.eos_token_id] = 0  # no text ends early
    checkpoint.write_model(path, kind, weights, tokenizer, "")
    return path


def text_of(decoder, prompt=PROMPT, **options) -> list[int]:
    return greedy(decoder, prompt, LENGTH, **options)


@pytest.fixture(scope="module")
def expected(folder) -> list[int]:
    """The greedy text without a cache."""
    return text_of(get_backend("mlx").decoder(checkpoint.ModelFolder(folder), "none"))


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_every_cache_gives_the_same_text(backend, kind, folder, expected):
    if backend == "torch":
        pytest.importorskip("torch")
    prompts = [PROMPT, b"A longer beginning", b"x"]
    caches = [("latent", False), ("materialized", False), ("none", False)]
    if backend == "torch":
        caches += [("latent", True), ("materialized", True)]  # of fixed shapes, as on MPS
    for cache, fixed in caches:
        decoder = get_backend(backend).decoder(checkpoint.ModelFolder(folder), cache)
        decoder.fixed_shapes = fixed
        alone = [text_of(decoder, p) for p in prompts]
        assert alone[0] == expected, cache
        texts: list[list[int]] = [[], [], []]
        options = GenerationOptions(temp=0, max_tokens=LENGTH)
        for i, piece in decoder.batch([list(p) for p in prompts], options):
            texts[i] += piece.token_ids
        assert texts == alone, cache


def test_files_drafts_and_quantized_caches(kind, folder, expected, tmp_path):
    decoder = get_backend("mlx").decoder(checkpoint.ModelFolder(folder))
    file = tmp_path / "context.safetensors"
    begun = text_of(decoder, save_prompt_cache=file)
    assert begun == expected
    held = load_prompt_cache(str(file))
    assert len(held) == kind.n_layer - kind.num_kv_shared_layers
    decoder = get_backend("mlx").decoder(checkpoint.ModelFolder(folder))
    rest = text_of(decoder, prompt=(), prompt_cache=file)
    assert rest == text_of(decoder, [*PROMPT, *begun])
    assert text_of(decoder, draft_model=str(folder)) == expected
    sizes = {}
    for bits in (None, 8):
        options = GenerationOptions(temp=0, max_tokens=4, kv_bits=bits)
        sizes[bits] = [p.figures["kv_cache_bytes"] for p in decoder.stream(list(b"abc"), options)][
            -1
        ]
    # 8 bits a value, and a scale and a bias in float32 for each group of 64 or of 32.
    assert sizes[8] / sizes[None] in (pytest.approx(9 / 32), pytest.approx(10 / 32))


def test_stock_mlx_lm(kind, folder, expected):
    model, tokenizer = by_mlx_lm(folder)
    assert type(model).__module__ != "mlx_mla.model.model_mlx"
    prompt = mx.array(list(PROMPT))

    def taken(steps) -> list[int]:
        return [int(token) for token, *_ in steps]

    cache = make_prompt_cache(model)
    assert taken(generate_step(prompt, model, max_tokens=LENGTH, prompt_cache=cache)) == expected
    trim_prompt_cache(cache, cache[0].offset - 10)
    rest = mx.array([*PROMPT, *expected][10:12])
    assert taken(generate_step(rest, model, max_tokens=5, prompt_cache=cache)) == expected[6:11]
    assert taken(speculative_generate_step(prompt, model, model, max_tokens=LENGTH)) == expected
    prompts = [list(PROMPT), list(b"A longer beginning")]
    texts = batch_generate(model, tokenizer, prompts, max_tokens=LENGTH).texts
    assert texts[0] == tokenizer.decode(expected)
    if not kind.num_kv_shared_layers:
        assert all(type(c) is RotatingKVCache for c in make_prompt_cache(model, max_kv_size=8))


@pytest.mark.parametrize("kind", ["mla-rope-shared"], indirect=True)
def test_stock_mlx_lms_command_quantizes_a_cache_that_layers_share(folder):
    cache = "--kv-bits 8 --kv-group-size 32 --quantized-kv-start 8"
    argv = ("--model", folder, "--prompt", PROMPT.decode(), "--max-tokens 4 --temp 0", cache)
    run_mlx_lm("generate", *argv, "--trust-remote-code --ignore-chat-template")


def test_transformers(kind, folder, expected):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=True).eval()
    prompt = torch.tensor([list(PROMPT)])
    how = {"max_new_tokens": LENGTH, "do_sample": False}
    assert model.generate(prompt, **how)[0, prompt.shape[1] :].tolist() == expected
    # A shorter prompt beside it, padded on the left.
    padded = torch.tensor([list(PROMPT), [0] * 5 + [120]])
    mask = torch.tensor([[1] * 6, [0] * 5 + [1]])
    both = model.generate(padded, attention_mask=mask, **how)[:, 6:].tolist()
    alone = model.generate(torch.tensor([[120]]), **how)[0, 1:].tolist()
    assert both == [expected, alone]
    beams = [
        model.generate(prompt, num_beams=3, use_cache=c, **how).tolist() for c in (True, False)
    ]
    assert beams[0] == beams[1]


def test_a_folder_that_mlx_lm_has_quantized(folder, tmp_path):
    from mlx_lm import convert

    out = tmp_path / "quantized"
    convert(str(folder), str(out), quantize=True, q_bits=8, q_group_size=32, trust_remote_code=True)
    latent, without = (
        get_backend("mlx").decoder(checkpoint.ModelFolder(out), cache)
        for cache in ("latent", "none")
    )
    assert text_of(latent) == text_of(without)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_training_and_resuming(backend, kind, tmp_path, text_file):
    if backend == "torch":
        pytest.importorskip("torch")
    fields = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    fields["qk_rope_head_dim"] = 32  # nano's
    flags = []
    for name, value in kind.to_dict().items():
        if value != fields[name] and not isinstance(value, bool):
            flags += [f"--{name.replace('_', '-')}", str(value)]
    switches = ("latent_norm", "attention_k_eq_v")
    flags += [f"--{name.replace('_', '-')}" for name in switches if getattr(kind, name)]
    flags += ["--attention-bias", str(kind.attention_bias)]
    flags += [] if kind.tie_word_embeddings else ["--no-tie-word-embeddings"]
    common = words(
        *flags, "--data", text_file, "--backend", backend,
        "--seq-len 32 --batch-size 2 --eval-batches 2 --final-eval-batches 2",
        "--sample-tokens 4 --no-compile --save-every 2 --keep 0", "--activation-checkpointing 2",
    )  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train.main([*common, "--steps", "4", "--out", str(whole)]) == 0
    shutil.copytree(whole, cut)
    resumed = ["--resume", "--from-step", "2", "--out", str(cut)]
    assert train.main(resumed) == 0
    last = checkpoint.latest(whole)
    assert checkpoint.ModelFolder(last).config == kind
    ours = (last / "model.safetensors").read_bytes()
    assert (checkpoint.latest(cut) / "model.safetensors").read_bytes() == ours


@given(config=model_configs(), seed=st.integers(0, 9))
@settings(max_examples=40)
def test_what_gpt2_cannot_say_is_refused_by_name_and_the_rest_comes_back(
    config, seed, tmp_path_factory
):
    path, weights = tmp_path_factory.mktemp("hf"), random_weights(config, seed)
    tokenizer = ByteTokenizer().fast_tokenizer()
    said = {
        "--attention mla": config.attention == "mla",
        "--position-embedding-type rope": config.attention == "mha"
        and config.position_embedding_type == "rope",
        f"--num-key-value-heads {config.num_key_value_heads}": config.attention == "mha"
        and config.num_key_value_heads != config.n_head,
        f"--head-dim {config.head_dim}": config.attention == "mha"
        and config.head_dim is not None
        and config.head_dim * config.n_head != config.n_embd,
        "--norm rms_norm": config.norm == "rms_norm",
        "--activation-function swiglu": config.activation_function == "swiglu",
    }
    if any(said.values()):
        with pytest.raises(UserError) as refused:
            hf.write_gpt2(path, config, weights, tokenizer)
        assert all((flag in str(refused.value)) == on for flag, on in said.items())
        return
    hf.write_gpt2(path, config, weights, tokenizer)
    source = hf.read_gpt2(path, "x")
    again = {name: tensor.read() for name, tensor in source.tensors.items()}
    for name, tensor in again.items():  # GPT-2 always has biases
        np.testing.assert_array_equal(tensor, weights.get(name, np.zeros_like(tensor)))
    assert again.keys() >= weights.keys()
    x = token_ids(config, 1, 20)
    model, original = build_model(source.config, again), build_model(config, weights)
    assert difference(model(x), original(x)) <= TOLERANCE  # a bias of 0 rounds otherwise


def test_folders_and_runs_from_before_these_settings(tiny_run, run_copy):
    """Without the new keys they are the same model, and the run resumes."""
    new = ("position_embedding_type", "head_dim", "num_key_value_heads", "num_kv_shared_layers")
    new += ("attention_k_eq_v", "attention_out_bias", "mlp_bias", "norm")
    toml = run_copy / "config.toml"
    lines = [ln for ln in toml.read_text().splitlines() if not ln.startswith(new)]
    assert len(lines) < len(toml.read_text().splitlines())
    toml.write_text("\n".join(lines))
    folder = checkpoint.latest(run_copy)
    (folder / "SHA256SUMS").unlink()
    values = json.loads((folder / "config.json").read_text())
    before = {k: v for k, v in values.items() if k not in new}
    assert before != values
    (folder / "config.json").write_text(json.dumps(before))
    assert (
        checkpoint.ModelFolder(folder).config
        == checkpoint.ModelFolder(checkpoint.latest(tiny_run)).config
    )
    assert text_of(get_backend("mlx").decoder(checkpoint.ModelFolder(folder))) == text_of(
        get_backend("mlx").decoder(checkpoint.ModelFolder(checkpoint.latest(tiny_run)))
    )
    assert train.main(["--resume", "--out", str(run_copy), "--steps", "41"]) == 0


def test_fan_in_initialization_makes_the_values_of_mla_as_large_as_those_of_mha():
    shape = {"n_layer": 1, "n_embd": 256, "n_head": 4, "position_embedding_type": "rope"}
    models = {
        "mha": ModelConfig(attention="mha", **shape),
        "mla": ModelConfig(kv_lora_rank=32, qk_rope_head_dim=64, **shape),
    }
    x = np.random.default_rng(0).standard_normal((500, 256), dtype=np.float32)
    sizes, weights = {}, {}
    for name, model in models.items():
        for initializer in ("normal", "fan_in"):
            run = TrainConfig(model=model, initializer_range=1 / 16, initializer=initializer)
            w = weights[name, initializer] = initial_weights_of(run.resolved())
            rows = w["transformer.h.0.attn.c_attn.weight"]
            if name == "mha":
                values = x @ rows[512:].T
            else:
                latents = x @ rows[4 * 128 : 4 * 128 + 32].T
                values = latents @ w["transformer.h.0.attn.kv_b_proj.weight"].T
            sizes[name, initializer] = values.std()
    assert sizes["mha", "fan_in"] == sizes["mha", "normal"] == pytest.approx(1, rel=0.05)
    assert sizes["mla", "fan_in"] == pytest.approx(1, rel=0.1)
    assert sizes["mla", "normal"] == pytest.approx(8**-0.5, rel=0.1)  # sqrt(32 / 256)
    # What does not read n_embd values: the MLP's second matrix, a residual projection of 4 n_embd.
    w = weights["mla", "fan_in"]
    assert w["transformer.h.0.mlp.c_proj.weight"].std() == pytest.approx(2**-5.5, rel=0.05)
    # Everything else is as without it, and "normal" is what it was before there was a choice.
    model, normal = models["mla"].resolved(257), weights["mla", "normal"]
    before = initial_weights(model, TrainConfig().seed, 1 / 16)
    for name, values in before.items():
        assert np.array_equal(values, normal[name])
        if "kv_b_proj" not in name and "mlp.c_proj" not in name:
            assert np.array_equal(values, w[name])
