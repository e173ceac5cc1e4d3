"""Half-precision types: where bfloat16 and float16 may round, and where they must not; --dtype."""

import dataclasses
import json

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from helpers import BASE, MODEL, difference, objects, ran, refused
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

import convert.__main__ as convert
from mlx_mla import checkpoint, evaluate, serve
from mlx_mla.backends import get_backend
from mlx_mla.backends.contract import Start
from mlx_mla.backends.mlx import prompt_cache
from mlx_mla.backends.mlx.load import load
from mlx_mla.backends.mlx.loss import cross_entropy
from mlx_mla.data.tokenizer import ByteTokenizer
from mlx_mla.model.model_mlx import LatentAttention, ModelArgs
from mlx_mla.model.weights import initial_weights

HALF = ["bfloat16", "float16"]


# --- training ---


def embedding_gradient(backend: str, dtype: str, rows: np.ndarray, **changes) -> np.ndarray:
    """Of the first step, (V, D) float64, the head being another matrix."""
    model = dataclasses.replace(MODEL, n_positions=128, tie_word_embeddings=False)
    config = dataclasses.replace(
        BASE, model=model, seq_len=128, batch_size=len(rows), tokens_per_step=None,
        grad_accum_steps=None, grad_clip=0.0, dtype=dtype, **changes,
    ).resolved()  # fmt: skip
    weights = initial_weights(config.model, 0)
    session = get_backend(backend).train_session(config, Start(weights))
    session.step(0, 0.0, [(rows[:, :-1], rows[:, 1:])])
    # With one step behind it AdamW's mean gradient is (1 - beta1) times the gradient.
    mean = session.optimizer_state()["exp_avg.transformer.wte.weight"]
    return mean.astype(np.float64) / (1 - config.beta1)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": 1, "loss_chunk": 100}])
def test_a_byte_seen_hundreds_of_times_gets_its_gradient_in_bfloat16(backend, changes, rng):
    """Summed in bfloat16 it is 2 % too short: what is added becomes too small for the sum."""
    rows = rng.integers(0, 60, (16, 129)).astype(np.int32)
    rows[rng.random(rows.shape) < 0.2] = 32
    assert (rows[:, :-1] == 32).sum() > 300
    expected = embedding_gradient("mlx", "float32", rows)[32]
    got = embedding_gradient(backend, "bfloat16", rows, **changes)[32]
    assert got @ expected / (expected @ expected) == pytest.approx(1, abs=1e-3)
    assert np.linalg.norm(got - expected) < 0.01 * np.linalg.norm(expected)


@pytest.mark.torch
def test_the_cpu_adds_up_the_gradients_that_mps_would_add_in_any_order(rng):
    import torch

    from mlx_mla.backends.torch.loss import look_up

    ids, up = torch.tensor(rng.integers(0, 5, (4, 50))), torch.randn(4, 50, 8)
    tables = [torch.randn(9, 8, requires_grad=True) for _ in range(2)]
    with torch.no_grad():
        tables[1].copy_(tables[0])
    looked_up = [look_up(t, ids, one_order=o) for t, o in zip(tables, (True, False))]
    assert torch.equal(*looked_up)
    for h in looked_up:
        (h * up).sum().backward()
    expected = np.zeros((9, 8))
    np.add.at(expected, ids.numpy(), up.double().numpy())
    for table in tables:
        np.testing.assert_allclose(table.grad, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_the_loss_of_half_precision_logits_is_summed_in_float32(dtype, rng):
    logits = mx.array(rng.standard_normal((7, 5000)).astype(np.float32)).astype(dtype)
    y = rng.integers(0, 5000, 7)
    z = np.array(logits.astype(mx.float32)).astype(np.float64)
    expected = np.log(np.exp(z).sum(-1)) - z[np.arange(7), y]
    loss = cross_entropy(logits, mx.array(y))
    assert loss.dtype == mx.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


# --- attention on latents ---


def large_scores(rng, rope: int) -> tuple[np.ndarray, ...]:
    """Queries (1, H, 1, N + P), latents (1, 1, T, R + P) and W_up (H, N + V, R), bfloat16, such
    that a few scores are near 37 and share the weight; heads of width 64, R = 384. Keys come from
    one half of a latent, values from the other."""
    H, N, R, T = 4, 64, 384, 200
    w = rng.standard_normal((H, 2 * N, R)) / (R / 2) ** 0.5
    w[:, :N, R // 2 :] = w[:, N:, : R // 2] = 0
    q = rng.standard_normal((1, H, 1, N + rope))
    q[:, 1:] = q[:, :1]
    w[1:] = w[:1]
    latent = rng.standard_normal((1, 1, T, R + rope))
    towards = q[0, 0, 0, :N] @ w[0, :N]
    latent[..., :5, :R] += 37 * (N + rope) ** 0.5 * towards / (towards @ towards)
    return tuple(a.astype(ml_dtypes.bfloat16) for a in (q, latent, w))


def float64_attention(q, latent, w) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and the output (1, H, 1, V), from the formulas in the model file."""
    q, latent, w = (a.astype(np.float64) for a in (q, latent, w))
    N, R = w.shape[1] // 2, w.shape[2]
    keys = np.einsum("tr,hnr->htn", latent[0, 0, :, :R], w[:, :N])
    rope = np.broadcast_to(latent[0, 0, :, R:], (len(w), *latent[0, 0, :, R:].shape))
    keys = np.concatenate([keys, rope], axis=-1)
    scores = np.einsum("hn,htn->ht", q[0, :, 0], keys) * q.shape[-1] ** -0.5
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    values = np.einsum("tr,hvr->htv", latent[0, 0, :, :R], w[:, N:])
    return scores, np.einsum("ht,htv->hv", p, values)[None, :, None]


def layer_shape(w: np.ndarray, rope: int) -> dict:
    H, rows, R = w.shape
    shape = {"n_layer": 1, "n_head": H, "n_embd": H * rows // 2, "kv_lora_rank": R}
    return {**shape, "qk_rope_head_dim": rope, "vocab_size": 9, "n_positions": 512}


def as_mlx(a: np.ndarray) -> mx.array:
    return mx.array(a.astype(np.float32)).astype(mx.bfloat16)


@pytest.mark.parametrize("rope", [0, 32])
@pytest.mark.parametrize("seed", [0, 1])
def test_absorbed_scores_are_not_rounded_to_bfloat16(rope, seed):
    """Rounded to steps of 0.25, scores near 37 would change the output by 2 to 7 %."""
    q, latent, w = large_scores(np.random.default_rng(seed), rope)
    scores, expected = float64_attention(q, latent, w)
    assert scores.max() > 30
    layer = LatentAttention(ModelArgs.from_dict(layer_shape(w, rope)), 0)
    layer.kv_b_proj.weight = as_mlx(w.reshape(-1, w.shape[-1]))
    absorb = layer._absorbable_weights()
    found = layer._attend_absorbed(as_mlx(q), as_mlx(latent), None, None, *absorb)
    assert found.dtype == mx.bfloat16
    off = np.abs(np.array(found.astype(mx.float32)) - expected).max() / np.abs(expected).max()
    assert off < 0.01


@pytest.mark.torch
@pytest.mark.parametrize("rope", [0, 32])
def test_absorbed_scores_are_not_rounded_to_bfloat16_in_pytorch(rope, rng):
    import torch

    from mlx_mla.model.model_torch import LatentAttention, MLAGPT2Config

    q, latent, w = large_scores(rng, rope)
    _, expected = float64_attention(q, latent, w)
    layer = LatentAttention(MLAGPT2Config(**layer_shape(w, rope)), 0).bfloat16()
    args = [torch.tensor(a.astype(np.float32)).bfloat16() for a in (q, latent, w)]
    with torch.no_grad():
        layer.kv_b_proj.weight.copy_(args[2].flatten(0, 1))
        found = layer._attend_absorbed(args[0], args[1], None)
    off = np.abs(found.float().numpy() - expected).max() / np.abs(expected).max()
    assert off < 0.01


@pytest.mark.torch
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_attention_on_a_cpu_computes_in_float32_in_pytorch(autocast, rng):
    """It rounds its result alone, and gradients are as exact."""
    import torch

    from mlx_mla.model.model_torch import attend

    q, k, v = (rng.standard_normal((2, h, 40, d)) for h, d in ((4, 24), (2, 24), (2, 16)))
    args = [torch.tensor(a).bfloat16().requires_grad_() for a in (q, k, v)]
    exact = [a.detach().double().requires_grad_() for a in args]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = attend(*args, mask=None, scale=0.5)
    expected = attend(*exact, mask=None, scale=0.5)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)
    found.sum().backward()
    expected.sum().backward()
    for a, b in zip(args, exact):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=2**-7, atol=1e-5)


# --- --dtype ---


def test_the_default_type_goes_by_the_device():
    """In a process of its own: the tests' own default is float32 everywhere."""
    code = (
        "from mlx_mla.backends.contract import decoding_dtype as d; print(*[d(None, k) for k in "
        "('cpu', 'gpu', 'cuda', 'mps')], d('float16', 'cpu'))"
    )
    done = ran("-c", code)
    assert done.stdout.split() == ["float32", "bfloat16", "bfloat16", "bfloat16", "float16"]


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_generate_computes_and_caches_in_the_type(folder, capfd, backend):
    argv = ("--model", folder, "--prompt", "The st", "--temp", "0", "--max-tokens", "9")
    argv = (*argv, "--backend", backend, "--device", "cpu")
    plain = objects(capfd, *argv)[0]
    assert plain["dtype"] == "float32"
    assert plain == {**objects(capfd, *argv, "--dtype", "float32")[0], **times(plain)}
    for dtype in HALF:
        (answer,) = objects(capfd, *argv, "--dtype", dtype)
        assert (answer["dtype"], answer["tokens"]) == (dtype, 9)
        assert answer["kv_cache_bytes"] == plain["kv_cache_bytes"] // 2
        # The first token of a trained model is likelier than the next by more than rounding.
        assert answer["token_ids"][0] == plain["token_ids"][0]


def times(answer: dict) -> dict:
    return {k: answer[k] for k in ("prompt_tps", "generation_tps", "ttft_ms", "peak_memory_bytes")}


def test_a_cache_file_is_brought_to_the_type_of_the_model(folder, tmp_path, capfd):
    file = tmp_path / "cache.safetensors"
    argv = ("--model", folder, "--temp", "0", "--device", "cpu", "--max-tokens", "4")
    save = ("--prompt", "The st", "--save-prompt-cache", file)
    objects(capfd, *argv, *save, "--dtype", "bfloat16")
    for dtype, kind in (("float32", mx.float32), ("bfloat16", mx.bfloat16)):
        cache, tokens = prompt_cache.load(file, checkpoint.ModelFolder(folder), kind)
        assert {c.keys.dtype for c in cache} == {kind}
        assert len(tokens) == 10
        (answer,) = objects(capfd, *argv, "--prompt-cache", file, "--prompt", "x", "--dtype", dtype)
        assert answer["tokens"] == 4


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_evaluate_scores_in_the_type(folder, tmp_path, backend):
    data = tmp_path / "data" / "lambada"
    data.mkdir(parents=True)
    lines = [json.dumps({"text": f"The story of a {w} day"}) for w in ("fine", "cold", "long")]
    (data / "lambada_test.jsonl").write_text("\n".join(lines) + "\n")
    values = {}
    for dtype in ("float32", *HALF):
        out = tmp_path / f"{dtype}.json"
        argv = ["--model", str(folder), "--tasks", "lambada", "--data-dir", str(tmp_path / "data")]
        argv += ["--backend", backend, "--device", "cpu", "--dtype", dtype, "--out", str(out)]
        assert evaluate.main(argv) == 0
        (row,) = json.loads(out.read_text())["models"]
        assert row["dtype"] == dtype
        values[dtype] = row["tasks"]["lambada"]["ppl"]
    for dtype in HALF:
        assert values[dtype] != values["float32"]
        assert np.log(values[dtype]) == pytest.approx(np.log(values["float32"]), rel=0.01)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", HALF)
def test_convert_stores_the_type_that_other_tools_then_compute_in(folder, tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "half"
    assert convert.main([str(folder), "--out", str(out), "--dtype", dtype]) == 0
    source, config = (
        load_file(str(folder / "model.safetensors")),
        checkpoint.ModelFolder(folder).config,
    )
    stored = load_file(str(out / "model.safetensors"))
    for name, w in source.items():
        assert stored[name].dtype == np.dtype(dtype)
        np.testing.assert_array_equal(stored[name], w.astype(dtype))
        np.testing.assert_array_equal(
            checkpoint.ModelFolder(out).weights(config)[name], stored[name]
        )
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    assert f"rounded to {dtype}" in (out / "README.md").read_text()
    theirs = AutoModelForCausalLM.from_pretrained(str(out), trust_remote_code=True)
    assert str(theirs.dtype) == f"torch.{dtype}"
    ids = np.arange(40)[None]
    expected, found = (
        load(checkpoint.ModelFolder(f), "float32")(mx.array(ids)) for f in (folder, out)
    )
    scale = float(mx.abs(expected).max())
    assert 0 < difference(found, expected) < 0.03 * scale


@pytest.mark.torch
def test_convert_writes_hugging_faces_gpt2_in_the_type(tmp_path):
    import foreign
    from transformers import GPT2LMHeadModel

    source = foreign.gpt2(n_layer=1, vocab_size=257)
    source.save_pretrained(str(tmp_path / "gpt2"))
    argv = [str(tmp_path / "gpt2"), "--tokenizer", "bytes", "--to", "hf", "--dtype", "bfloat16"]
    assert convert.main([*argv, "--out", str(tmp_path / "out")]) == 0
    model = GPT2LMHeadModel.from_pretrained(str(tmp_path / "out"))
    expected = source.bfloat16().state_dict()
    assert all((w == expected[name]).all() for name, w in model.state_dict().items())
    assert {str(w.dtype) for w in model.state_dict().values()} == {"torch.bfloat16"}


def test_weights_too_large_for_float16_are_refused(folder, tmp_path, capsys):
    config = checkpoint.ModelFolder(folder).config
    weights = checkpoint.ModelFolder(folder).weights(config)
    weights["transformer.ln_f.weight"] = weights["transformer.ln_f.weight"] + np.float32(1e5)
    source = tmp_path / "large"
    source.mkdir()
    checkpoint.write_model(source, config, weights, ByteTokenizer().fast_tokenizer(), "")
    argv = (str(source), "--out", str(tmp_path / "out"), "--dtype")
    error = refused(capsys, *argv, "float16", command=convert.main)
    assert "transformer.ln_f.weight" in error
    assert "bfloat16" in error
    assert not (tmp_path / "out").exists()
    assert convert.main([*argv, "bfloat16"]) == 0


def test_the_server_holds_the_model_in_the_type(folder):
    own, others = serve._own_flags(["--model", str(folder), "--dtype", "bfloat16"])
    provider = serve.Provider(serve._flags(others), checkpoint.ModelFolder(folder), own.dtype)
    provider._load()
    assert provider.problem is None
    assert {w.dtype for _, w in tree_flatten(provider.model.parameters())} == {mx.bfloat16}
