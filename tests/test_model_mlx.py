"""The MLX model against numpy in float64, transformers, and itself on other paths."""

import dataclasses
import inspect

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
from helpers import (
    KINDS,
    TOLERANCE,
    difference,
    in_chunks,
    model_configs,
    random_weights,
    token_ids,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models.cache import BatchKVCache, KVCache, RotatingKVCache, make_prompt_cache

from mlx_mla.backends.mlx.caches import QuantizedKVCache
from mlx_mla.backends.mlx.load import build_model
from mlx_mla.model import model_mlx
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.configuration_mla_gpt2 import MLAGPT2Config
from mlx_mla.model.model_mlx import Model, ModelArgs
from mlx_mla.model.presets import PRESETS, preset
from mlx_mla.model.weights import initial_weights, num_parameters, parameter_shapes


def test_parameter_counts_are_the_published_ones():
    counts = {name: num_parameters(preset(name).resolved().model) for name in PRESETS}
    assert counts["mla-124m"] == 120_873_216
    assert counts["gpt2-124m"] == 124_439_808
    padded = ModelConfig(vocab_size=50304, kv_lora_rank=384).resolved()
    assert num_parameters(padded) == 120_909_312


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_table_is_the_models(name):
    config = preset(name).resolved().model
    model = Model(ModelArgs.from_dict(config.to_dict()))
    assert {k: v.shape for k, v in tree_flatten(model.parameters())} == parameter_shapes(config)


def test_model_args_are_the_configs_fields():
    fields = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    fields["vocab_size"] = 50257  # for a config.json of GPT-2's; here a tokenizer says it
    mlx = {f.name: f.default for f in dataclasses.fields(ModelArgs)}
    assert mlx.pop("model_type") == MLAGPT2Config.model_type == "mla_gpt2"
    # Of the folder, not of the model's shape: config.json alone has them.
    del mlx["eos_token_id"], mlx["tokenizer_size"]
    assert mlx == fields
    parameters = inspect.signature(MLAGPT2Config).parameters.values()
    # Of transformers' own tools.
    theirs = {"initializer_range", "use_cache", "tokenizer_size", "kwargs"}
    assert {p.name: p.default for p in parameters if p.name not in theirs} == fields


@given(config=model_configs(), length=st.integers(1, 40), seed=st.integers(0, 99))
def test_logits_are_those_of_the_formulas_in_float64(config, length, seed):
    weights = random_weights(config, seed)
    x = token_ids(config, 2, length, seed)
    got = np.array(build_model(config, weights)(x))
    for row, ids in zip(got, np.array(x)):
        np.testing.assert_allclose(
            row, reference.logits(ids, weights, config), atol=TOLERANCE, rtol=1e-4
        )


@given(
    config=model_configs(),
    batch=st.integers(1, 4),
    length=st.integers(1, 90),
    chunks=st.lists(st.integers(1, 40), max_size=4),
    materialize=st.booleans(),
)
@settings(max_examples=40)
def test_cached_decoding_gives_the_logits_of_the_full_forward(
    config, batch, length, chunks, materialize
):
    model = build_model(config, random_weights(config, length))
    x = token_ids(config, batch, length)
    expected = model(x)
    model.materialize_cache(materialize)
    assert difference(in_chunks(model, x, chunks, make_prompt_cache(model)), expected) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("batch", "length"), [(1, 1024), (2, 300), (4, 64)])
def test_absorbed_decoding_of_every_preset(name, batch, length):
    config = preset(name).resolved().model
    length = min(length, config.n_positions)
    model = build_model(config, initial_weights(config, 1, 0.05))
    x = token_ids(config, batch, length)
    expected = model(x)
    # Most goes in as two chunks, so that only the last tokens take the slow way one by one.
    got = in_chunks(
        model,
        x,
        [length // 2, length - length // 2 - 4] if length > 8 else [],
        make_prompt_cache(model),
    )
    assert difference(got, expected) <= TOLERANCE


def test_latent_cache_is_as_small_as_promised():
    config = ModelConfig(
        n_layer=1, n_embd=96, n_head=3, kv_lora_rank=24, n_positions=16, vocab_size=11
    ).resolved()
    model = build_model(config, initial_weights(config, 0))
    cache = make_prompt_cache(model)
    model(token_ids(config, 1, 5), cache=cache)
    assert type(cache[0]) is KVCache
    assert cache[0].offset == 5
    assert cache[0].keys.shape == (1, 1, cache[0].step, 24)
    assert cache[0].values.size == 0


def test_mha_is_transformers_gpt2():
    torch = pytest.importorskip("torch")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        GPT2Config(n_layer=3, n_head=4, n_embd=64, n_positions=80, vocab_size=99)
    ).eval()
    config = ModelConfig(
        attention="mha", n_layer=3, n_head=4, n_embd=64, n_positions=80, vocab_size=99
    ).resolved()
    state = {k: v.numpy() for k, v in theirs.state_dict().items() if k in parameter_shapes(config)}
    # GPT-2's Conv1D stores matrices (in, out).
    conv = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {k: v.T.copy() if k.endswith(conv) else v for k, v in state.items()}
    x = token_ids(config, 2, 80)
    with torch.no_grad():
        expected = theirs(torch.tensor(np.array(x))).logits.numpy()
    np.testing.assert_allclose(np.array(build_model(config, state)(x)), expected, atol=TOLERANCE)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_rope_and_grouped_queries_are_transformers_llamas(kv_heads):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama as llama

    D, H, N, T = 48, 4, 16, 37
    theirs = LlamaConfig(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=kv_heads, head_dim=N,
        attention_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    attention, rotary = llama.LlamaAttention(theirs, 0), llama.LlamaRotaryEmbedding(theirs)
    x = torch.randn(2, T, D)
    causal = torch.full((T, T), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        expected, _ = attention(x, rotary(x, torch.arange(T)[None]), causal)

    # Llama rotates the pairs (i, i + N/2) of a head, this model (2i, 2i + 1).
    halves = np.arange(N).reshape(2, N // 2).T.ravel()

    def ours(part: str, name: str) -> np.ndarray:
        w = getattr(getattr(attention, f"{part}_proj"), name).detach().numpy()
        return w if part in "vo" else w.reshape(-1, N, *w.shape[1:])[:, halves].reshape(w.shape)

    args = ModelArgs(
        attention="mha", n_embd=D, n_head=H, head_dim=N, num_key_value_heads=kv_heads,
        position_embedding_type="rope", rope_theta=500.0,
    )  # fmt: skip
    mine = model_mlx.MultiHeadAttention(args, 0)
    for name in ("weight", "bias"):
        mine.c_attn[name] = mx.array(np.concatenate([ours(p, name) for p in "qkv"]))
        mine.c_proj[name] = mx.array(ours("o", name))
    got, _ = mine(mx.array(x.numpy()), "causal")
    np.testing.assert_allclose(np.array(got), expected.numpy(), atol=TOLERANCE)


@pytest.mark.parametrize("rope", [0, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_absorb_to_the_same_logits(rope, bits, monkeypatch):
    config = ModelConfig(
        n_layer=2, n_embd=128, n_head=2, kv_lora_rank=64, qk_rope_head_dim=rope, n_positions=64,
        vocab_size=50,
    ).resolved()  # fmt: skip
    model = build_model(config, initial_weights(config, 0, 0.1))
    nn.quantize(
        model, group_size=64, bits=bits, class_predicate=lambda p, m: hasattr(m, "to_quantized")
    )
    x = token_ids(config, 2, 40)
    absorbed = in_chunks(model, x, [20], make_prompt_cache(model))
    assert difference(absorbed, model(x)) <= TOLERANCE
    # Several queries, too.
    monkeypatch.setattr(model_mlx.LatentAttention, "_absorbing_is_cheaper", lambda *_: True)
    absorbed = in_chunks(model, x, [20, 6], make_prompt_cache(model))
    assert difference(absorbed, model(x)) <= TOLERANCE


@pytest.mark.parametrize(
    "kind",
    [
        {"kv_lora_rank": 96},
        {"kv_lora_rank": 64, "qk_rope_head_dim": 32},
        {"kv_lora_rank": 64, "qk_rope_head_dim": 32, "num_kv_shared_layers": 2},
        {"kv_lora_rank": 64, "qk_rope_head_dim": 32, "attention_k_eq_v": True},
        {"attention": "mha", "position_embedding_type": "rope"},
        {"attention": "mha", "position_embedding_type": "rope", "num_key_value_heads": 2},
    ],
    ids=str,
)
def test_quantized_cache_is_close_at_8_bits(kind):
    config = ModelConfig(
        n_layer=3, n_embd=128, n_head=4, n_positions=64, vocab_size=50, **kind
    ).resolved()
    model = build_model(config, initial_weights(config, 0, 0.1))
    x = token_ids(config, 1, 40)
    cache = [QuantizedKVCache(group_size=32, bits=8) for _ in model.layers]
    expected = model(x)
    assert (
        difference(in_chunks(model, x, [20], cache), expected)
        <= 0.05 * mx.abs(expected).max().item()
    )


def test_lora_on_the_up_projection_is_not_bypassed():
    from mlx_lm.tuner.lora import LoRALinear

    config = ModelConfig(n_layer=1, n_embd=32, n_head=2, n_positions=32, vocab_size=20).resolved()
    model = build_model(config, random_weights(config, 0))
    lora = LoRALinear.from_base(model.layers[0].attn.kv_b_proj, r=4)
    lora.lora_b = mx.random.normal(lora.lora_b.shape)
    x = token_ids(config, 1, 12)
    without = model(x)
    model.layers[0].attn.kv_b_proj = lora
    expected = model(x)
    assert difference(expected, without) > 0.01
    assert difference(in_chunks(model, x, [6], make_prompt_cache(model)), expected) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_left_padded_batch_gives_each_row_its_own_logits(kind):
    config = ModelConfig(
        n_layer=3, n_embd=32, n_head=4, n_positions=32, vocab_size=20, **kind
    ).resolved()
    model = build_model(config, random_weights(config, 0))
    short, long = token_ids(config, 1, 9, 1), token_ids(config, 1, 14, 2)
    padded = mx.concatenate([mx.concatenate([mx.zeros((1, 5), short.dtype), short], axis=1), long])
    cache = [BatchKVCache([5, 0]) for _ in model.layers]
    got = in_chunks(model, padded, [10], cache)
    assert difference(got[:1, 5:], model(short)) <= TOLERANCE
    assert difference(got[1:], model(long)) <= TOLERANCE


def test_rotating_cache_is_exact_until_it_turns():
    config = ModelConfig(n_layer=2, n_embd=32, n_head=2, n_positions=32, vocab_size=20).resolved()
    model = build_model(config, random_weights(config, 0))
    x = token_ids(config, 1, 16)
    cache = [RotatingKVCache(max_size=16) for _ in model.layers]
    assert difference(in_chunks(model, x, [7], cache), model(x)) <= TOLERANCE


@pytest.mark.parametrize("rope", [0, 8])
def test_positions_past_the_table_are_refused(rope):
    config = ModelConfig(
        n_layer=1, n_embd=32, n_head=2, n_positions=16, vocab_size=20, qk_rope_head_dim=rope
    ).resolved()
    model = build_model(config, random_weights(config, 0))
    with pytest.raises(ValueError, match="n_positions=16"):
        model(token_ids(config, 1, 17))
    cache = make_prompt_cache(model)
    model(token_ids(config, 1, 16), cache=cache)
    with pytest.raises(ValueError, match="17 tokens of context"):
        model(token_ids(config, 1, 1), cache=cache)


@pytest.mark.parametrize("rope", [0, 8])
def test_a_row_past_the_table_ends_without_touching_its_batch(rope):
    config = ModelConfig(
        n_layer=2, n_embd=32, n_head=2, n_positions=16, vocab_size=20, qk_rope_head_dim=rope
    ).resolved()
    model = build_model(config, random_weights(config, 0))
    model.args.eos_token_id = 19
    short, long = token_ids(config, 1, 12, 1), token_ids(config, 1, 18, 2)
    padded = mx.concatenate([mx.concatenate([mx.zeros((1, 6), short.dtype), short], axis=1), long])
    logits = in_chunks(model, padded, [10, 15], [BatchKVCache([6, 0]) for _ in model.layers])
    assert difference(logits[:1, 6:], model(short)) <= TOLERANCE
    assert difference(logits[1:, :16], model(long[:, :16])) <= TOLERANCE
    likely = mx.softmax(logits[1, 16:], axis=-1)
    assert likely[:, 19].tolist() == [1.0, 1.0]
    assert mx.isfinite(logits).all()


def test_bad_shapes_are_refused_by_the_model_file_itself():
    for values, message in (
        ({"n_embd": 100, "n_head": 12}, "not divisible"),
        ({"attention": "gqa"}, "attention must be one of"),
        ({"activation_function": "relu"}, "gelu_new"),
        ({"position_embedding_type": "alibi"}, r"one of \('learned', 'rope'\)"),
        ({"position_embedding_type": "rope"}, "does not go with qk_rope_head_dim 0"),
        (
            {"position_embedding_type": "learned", "qk_rope_head_dim": 8},
            "does not go with qk_rope_head_dim 8",
        ),
        ({"attention": "mha", "num_key_value_heads": 5}, "num_key_value_heads 5"),
        ({"num_kv_shared_layers": 12}, "from 0 to 11, not 12"),
        (
            {"attention_k_eq_v": True, "kv_lora_rank": 96},
            "equal head_dim, v_head_dim and kv_lora_rank",
        ),
    ):
        for configuration in (ModelArgs.from_dict, lambda v: MLAGPT2Config(**v)):
            with pytest.raises(ValueError, match=message):
                configuration(values)
