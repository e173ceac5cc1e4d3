"""Attention with RoPE or grouped queries converted to MLA, layer after layer."""

import json

import pytest

torch = pytest.importorskip("torch")

import foreign
import mlx.core as mx
import numpy as np
from helpers import in_chunks, random_weights
from helpers import refused as refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache
from rich.console import Console
from transformers import DynamicCache

from convert import __main__ as convert
from convert import layerwise, rope
from convert.to_mla import latent_config, widest_latent
from mlx_mla import checkpoint
from mlx_mla.backends.mlx.load import load
from mlx_mla.backends.torch.load import build_model
from mlx_mla.backends.torch.load import load as load_torch
from mlx_mla.model.config import ModelConfig

CPU = torch.device("cpu")


def converted(src, out, *flags):
    argv = [str(src), "--out", str(out), "--to", "mla", "--device", "cpu", *map(str, flags)]
    assert convert.main(argv) == 0
    return out


def layers_of(config, rank, seed=0, windows=6, length=32):
    """The source, the converted model, and what was reported of each layer."""
    weights = random_weights(config, seed)
    model = build_model(config, weights, CPU).requires_grad_(False)
    new_config = latent_config(config, [rank] * config.n_layer)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (windows, length))
    layers = list(layerwise.convert_layers(model, new_config, ids, None, Console()))
    new = {n: w for n, w in weights.items() if ".attn." not in n}
    for i, layer in enumerate(layers):
        new |= {f"transformer.h.{i}.attn.{n}": w for n, w in layer.weights.items()}
    return model, build_model(new_config, new, CPU), layers


def config_of(**changes) -> ModelConfig:
    values = {
        "attention": "mha", "position_embedding_type": "rope", "n_layer": 2, "n_head": 4,
        "num_key_value_heads": 2, "n_embd": 32, "n_positions": 48, "vocab_size": 60,
        "norm": "rms_norm", "activation_function": "swiglu", **changes,
    }  # fmt: skip
    return ModelConfig(**values).resolved()


@given(data=st.data())
@settings(max_examples=15)
def test_what_loses_no_rotation_is_exact_at_full_rank(data):
    """One group of keys is the shared key itself; without RoPE there is nothing to lose."""
    rotates = data.draw(st.booleans())
    config = config_of(
        position_embedding_type="rope" if rotates else "learned",
        num_key_value_heads=1 if rotates else data.draw(st.sampled_from([1, 2, 4])),
        head_dim=data.draw(st.sampled_from([None, 6, 12])),
        norm=data.draw(st.sampled_from(["layer_norm", "rms_norm"])),
        attention_bias=data.draw(st.booleans()),
        attention_out_bias=data.draw(st.booleans()),
        tie_word_embeddings=data.draw(st.booleans()),
    )
    model, new, layers = layers_of(config, widest_latent(config), data.draw(st.integers(0, 99)))
    ids = torch.randint(0, 60, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(new(ids).logits, model(ids).logits, atol=1e-4, rtol=0)
    assert all(layer.errors[-1] < 1e-6 for layer in layers)  # rounding
    assert not rotates or all(x.rope_energy == pytest.approx(1) for x in layers)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_a_multi_query_llama_gives_its_logits_in_every_way_to_run_it(kind, text_file, tmp_path):
    model = foreign.save_llama(tmp_path / "src", kind, num_key_value_heads=1)
    width = model.config.hidden_size // model.config.num_attention_heads
    flags = ["--rank", width, "--calibration", text_file, "--calibration-tokens", 1000]
    out = converted(tmp_path / "src", tmp_path / "out", *flags)
    ids = foreign.ids(257, length=24)
    tokens = len(checkpoint.ModelFolder(out).tokenizer)
    with torch.inference_mode():
        expected = model(ids).logits[..., :tokens]
    got = foreign.logits_of_folder(out, ids)[..., :tokens]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    torch_model, cache = load_torch(checkpoint.ModelFolder(out), CPU), DynamicCache()
    with torch.inference_mode():
        got = [torch_model(part, past_key_values=cache).logits for part in ids.split([9, 14, 1], 1)]
    torch.testing.assert_close(torch.cat(got, 1)[..., :tokens], expected, atol=1e-4, rtol=0)
    ours, x = load(checkpoint.ModelFolder(out)), mx.array(ids.numpy())
    for logits in (ours(x), in_chunks(ours, x, [5, 3], make_prompt_cache(ours))):
        np.testing.assert_allclose(
            np.array(logits)[..., :tokens], expected.numpy(), atol=1e-4, rtol=0
        )
    config = checkpoint.ModelFolder(out).config
    assert (config.qk_rope_head_dim, config.kv_lora_rank) == (width, width)
    assert config.attention_bias is (kind == "qwen2") and not config.attention_out_bias


def layer_of(rng, n_head, n_group, d, width, bias):
    shapes = [(n_head * d, width), (n_group * d, width), (n_group * d, width)]
    q, k, v = (rng.normal(size=(rows, columns + bias)) for rows, columns in shapes)
    theta = 100.0 ** (-np.arange(0, d, 2) / d)
    return rope.Source(q, k, v, rng.normal(size=(width, n_head * d)), n_head, theta)


def rotated(x, at, theta):
    """RoPE of pairs (2i, 2i + 1) by matrices of two by two."""
    out = x.copy()
    for i, t in enumerate(theta):
        c, s = np.cos(at * t), np.sin(at * t)
        out[2 * i : 2 * i + 2] = np.array([[c, -s], [s, c]]) @ x[2 * i : 2 * i + 2]
    return out


@given(data=st.data())
@settings(max_examples=15)
def test_the_shared_key_and_the_rest_add_up_to_the_scores(data):
    """Turned by RoPE both give the source's scores; and the shared key takes all it can."""
    n_group = data.draw(st.sampled_from([1, 2, 3]))
    n_head, d, width = 2 * n_group, data.draw(st.sampled_from([2, 4, 6])), 9
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    layer = layer_of(rng, n_head, n_group, d, width, data.draw(st.booleans()))
    X = rng.normal(size=(50, layer.q.shape[1]))
    second = X.T @ X / 50
    split = rope.shared_key(layer, second, np.eye(1, 7).repeat(n_head, 0))
    x, y, at, to = X[0], X[1], 11.0, 4.0
    theta = layer.theta
    for h in range(n_head):
        rows, g = slice(h * d, h * d + d), h // 2
        of_group = slice(g * d, g * d + d)
        expected = rotated(layer.q[rows] @ x, at, theta) @ rotated(layer.k[of_group] @ y, to, theta)
        shared = rotated(split.query[rows] @ x, at, theta) @ rotated(split.key @ y, to, theta)
        # All attention is at distance 0, where RoPE does nothing to what reads the rest.
        rest = rotated(split.rest_query[rows] @ x, at, theta) @ rotated(
            split.rest[of_group] @ y, to, theta
        )
        assert shared + rest == pytest.approx(expected, abs=1e-9)
    # The first principal component of the weighted keys, frequency by frequency.
    most = total = 0.0
    for i in range(d // 2):
        queries = (X @ layer.q.T).reshape(50, n_group, 2, d)[..., 2 * i : 2 * i + 2]
        weight = np.sqrt((queries**2).sum((2, 3)).mean(0))
        pairs = (X @ layer.k.T).reshape(50, n_group, d)[..., 2 * i : 2 * i + 2]
        s = np.linalg.svd((pairs[..., 0] + 1j * pairs[..., 1]) * weight)[1]
        most, total = most + s[0] ** 2, total + (s**2).sum()
    assert split.kept == pytest.approx(most / total, rel=1e-5)


def test_queries_of_the_rest_hold_ropes_mean_effect():
    """Their scores are the mean of the rotated ones over the distances that a head attends to."""
    rng = np.random.default_rng(0)
    layer = layer_of(rng, 2, 2, 4, 9, False)
    distances = rng.exponential(size=(2, 5))
    split = rope.shared_key(layer, np.eye(9), distances)
    x, y = rng.normal(size=(2, 9))
    for h in range(2):
        q, k = layer.q[4 * h : 4 * h + 4] @ x, split.rest[4 * h : 4 * h + 4] @ y
        scores = [rotated(q, t, layer.theta) @ k for t in range(5)]
        expected = np.average(scores, weights=distances[h])
        assert split.rest_query[4 * h : 4 * h + 4] @ x @ k == pytest.approx(expected)


def test_the_latent_is_the_best_under_the_attentions_weight():
    """The squared error of scores without RoPE and of outputs, each relative to its size, against
    what the singular values say it is, and against other latents."""
    rng = np.random.default_rng(1)
    layer = layer_of(rng, 4, 2, 4, 12, False)
    X = rng.normal(size=(300, 12)) * np.geomspace(1, 0.1, 12)
    second, rank = X.T @ X / 300, 5
    distances = np.eye(1, 3).repeat(4, 0)
    split = rope.shared_key(layer, second, distances)
    new = rope.closed_form(layer, second, distances, rank)

    def errors(up, down):
        by_head = up.reshape(4, 2, 4, -1)
        scores = outputs = all_scores = all_outputs = 0.0
        for h in range(4):
            of_group = slice(4 * (h // 2), 4 * (h // 2) + 4)
            q = X @ split.rest_query[4 * h : 4 * h + 4].T
            k, v = X @ split.rest[of_group].T, X @ layer.v[of_group].T
            W = layer.out[:, 4 * h : 4 * h + 4]
            c = X @ down.T
            scores += ((q @ (k - c @ by_head[h, 0].T).T) ** 2).sum()
            all_scores += ((q @ k.T) ** 2).sum()
            outputs += (((v - c @ by_head[h, 1].T) @ W.T) ** 2).sum()
            all_outputs += ((v @ W.T) ** 2).sum()
        return scores / all_scores + rope.GAMMA**2 * outputs / all_outputs

    lost = np.sum(new.singular_values[rank:] ** 2)
    best = errors(new.up, new.down[:rank])
    assert best == pytest.approx(lost, rel=1e-2)
    for _ in range(20):
        other = new.down[:rank] + 0.1 * rng.normal(size=(rank, 12))
        assert errors(new.up, other) > best
    assert np.mean((X @ new.down[:rank].T) ** 2) == pytest.approx(1)


@given(seed=st.integers(0, 99), ridge=st.sampled_from([0.0, 0.01, 1.0]))
def test_the_refit_is_ridge_regression_around_the_old_projection(seed, ridge):
    rng = np.random.default_rng(seed)
    o, target, start = rng.normal(size=(40, 6)), rng.normal(size=(40, 3)), rng.normal(size=(3, 6))
    W = rope.refit(o.T @ o, target.T @ o, start, ridge)
    lam = ridge * np.mean(np.sum(o**2, axis=0))
    rows = np.concatenate([o, np.sqrt(lam) * np.eye(6)])
    wanted = np.concatenate([target, np.sqrt(lam) * start.T])
    np.testing.assert_allclose(W.T, np.linalg.lstsq(rows, wanted, rcond=None)[0], atol=1e-8)


@pytest.mark.parametrize("bias", [False, True])
def test_refit_and_fit_lower_the_error_of_every_layer(bias, monkeypatch):
    monkeypatch.setattr(layerwise, "BATCH_TOKENS", 128)
    config = config_of(n_layer=3, attention_bias=bias, attention_out_bias=bias)
    model, new, layers = layers_of(config, 12, windows=16)
    for layer in layers:
        closed, refitted, fitted = layer.errors
        assert refitted < 0.98 * closed and fitted < 0.95 * refitted
        assert 0.5 < layer.rope_energy < 1
    # What is reported of the last layer is the error of the stream after its attention.
    ids = torch.tensor(np.random.default_rng(0).integers(0, 60, (16, 32)))
    streams = []
    for m in (model, new):
        seen = []
        m.transformer.h[2].ln_2.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0]))
        with torch.inference_mode():
            m(ids)
        streams.append(seen[0])
    errors = (streams[1] - streams[0]).square().sum(-1) / streams[0].square().sum(-1)
    assert layers[2].errors[-1] == pytest.approx(float(errors.mean()), rel=1e-3)
    again = layers_of(config, 12, windows=16)[2]
    for a, b in zip(layers, again, strict=True):
        assert all(np.array_equal(a.weights[n], b.weights[n]) for n in a.weights)


@pytest.fixture
def llama(tmp_path):
    foreign.save_llama(tmp_path / "src", "qwen2")
    return tmp_path / "src"


def test_report_and_budget(llama, text_file, tmp_path):
    flags = ["--calibration", text_file, "--calibration-tokens", 3000, "--rank-budget", 9]
    out = converted(llama, tmp_path / "out", *flags)
    report = json.loads((out / "conversion.json").read_text())
    assert sum(report["kv_lora_ranks"]) == 18
    assert checkpoint.ModelFolder(out).config.attention_spec.latent_ranks == report["kv_lora_ranks"]
    assert len(report["rope_energy"]) == 2
    for closed, refitted, fitted in zip(*report["residual_error"].values(), strict=True):
        assert 0 < fitted <= refitted < closed
    assert report["perplexity"]["after"] > 0
    # 2 layers, 2 groups of 8 keys and values; the latents and keys of 8 with RoPE.
    assert report["cache_bytes_per_token"] == {"before": 2 * 64, "after": 2 * (18 + 16)}
    assert "The shared RoPE key holds" in (out / "README.md").read_text()


def test_bad_input_leaves_nothing(llama, text_file, tmp_path, capsys):
    def refused(*flags, src=llama):
        argv = [src, "--out", tmp_path / "out", "--to", "mla", "--device", "cpu", *flags]
        line = refusal(capsys, *argv, command=convert.main)
        assert not (tmp_path / "out").exists()
        return line

    text = ["--calibration", text_file]
    assert "--rank must be from 1 to 24" in refused("--rank", "25", *text)
    assert "--rank-budget must be from 1 to 24" in refused("--rank-budget", "25", *text)
    assert "needs --calibration TEXT for a model with --position" in refused("--rank", "4")
    short = tmp_path / "short.txt"
    short.write_text("too short for a window")
    said = refused("--rank", "4", "--calibration", short)
    assert "short.txt: has 20 tokens to calibrate on, fewer than a window of 49" in said
    mla = converted(llama, tmp_path / "mla", "--rank", "4", *text, "--calibration-tokens", "500")
    assert "attention is MLA already" in refused("--rank", "4", *text, src=mla)


@pytest.mark.slow
def test_smollm2_at_half_its_cache(smollm2_mla):
    report = json.loads((smollm2_mla / "conversion.json").read_text())
    cache = report["cache_bytes_per_token"]
    assert (cache["before"], cache["after"]) == (30 * 2 * 384, 30 * 2 * 192)
    assert min(report["rope_energy"]) > 0.9
    # A quarter of the default calibration tokens, hence the wide bound.
    assert 1 < report["perplexity"]["after"] / report["perplexity"]["before"] < 1.8
