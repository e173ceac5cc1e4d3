"""Multi-head attention converted to MLA: exact at full rank, optimal below, reported, whatever the
text's length."""

import dataclasses
import itertools
import json

import pytest

torch = pytest.importorskip("torch")

import foreign
import numpy as np
from helpers import objects, words
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from convert import __main__ as convert
from convert import latent
from convert.calibration import Text, collect_moments, perplexity
from mlx_mla import checkpoint
from mlx_mla.backends.torch.load import build_model
from mlx_mla.data.tokenizer import ByteTokenizer
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.weights import initial_weights

CPU = torch.device("cpu")


def converted(src, out, *flags):
    argv = words(src, "--out", out, "--to mla --tokenizer bytes --device cpu", *flags)
    assert convert.main(argv) == 0
    return out


@pytest.fixture(scope="module")
def model():
    return foreign.gpt2(spread=0.15)


@pytest.fixture(scope="module")
def hf_folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mla") / "gpt2"
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("calibrated", [False, True])
def test_full_rank_is_exact_with_half_the_cache(calibrated, model, hf_folder, text_file, tmp_path):
    flags = ["--calibration", text_file, "--calibration-tokens", 1000] if calibrated else []
    out = converted(hf_folder, tmp_path / "out", "--rank", 32, *flags)
    x = foreign.ids(length=48)
    torch.testing.assert_close(
        foreign.logits_of_folder(out, x), foreign.logits_of(model, x), atol=1e-4, rtol=0
    )
    report = json.loads((out / "conversion.json").read_text())
    assert report["cache_bytes_per_token"]["before"] == 2 * report["cache_bytes_per_token"]["after"]
    assert checkpoint.integrity_error(out) is None


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_model_without_output_biases_gets_those_that_hold_the_values(
    calibrated, text_file, tmp_path
):
    config = ModelConfig(
        attention="mha", attention_out_bias=False, n_layer=2, n_head=2, n_embd=32, n_positions=48,
        vocab_size=257,
    ).resolved()  # fmt: skip
    weights, rng = initial_weights(config, 0, 0.2), np.random.default_rng(0)
    weights |= {
        n: rng.normal(0, 0.3, w.shape).astype(np.float32)
        for n, w in weights.items() if n.endswith("c_attn.bias")
    }  # fmt: skip
    src = tmp_path / "src"
    src.mkdir()
    checkpoint.write_model(src, config, weights, ByteTokenizer().fast_tokenizer(), "")
    flags = ["--calibration", text_file, "--calibration-tokens", 1000] if calibrated else []
    out = converted(src, tmp_path / "out", "--rank", 32, *flags)
    before, after = (foreign.logits_of_folder(f, foreign.ids(257)) for f in (src, out))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)


def mha_layer(rng, D):
    shapes = {"c_attn.weight": (3 * D, D), "c_attn.bias": (3 * D,), "c_proj.weight": (D, D)}
    shapes["c_proj.bias"] = (D,)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@given(data=st.data())
@settings(max_examples=15)
def test_full_rank_is_exact_for_any_shape(data):
    heads, width = data.draw(st.sampled_from([(1, 6), (2, 8), (3, 12), (4, 20)]))
    D, rng = width, np.random.default_rng(data.draw(st.integers(0, 99)))
    bias = data.draw(st.booleans())
    calibrated = data.draw(st.booleans())
    layer = mha_layer(rng, D)
    if not bias:
        del layer["c_attn.bias"]
    # Fewer samples than directions: the moments are singular, and the model must be exact all the
    # same.
    x, g = rng.normal(1, 1, (4, D)), rng.normal(size=(4, 2 * D))
    moments = latent.Moments(x.mean(0), np.cov(x.T, bias=True), g.T @ g / 4)
    factors = latent.decompose(layer["c_attn.weight"][D:], moments if calibrated else None)
    new = latent.to_latent(layer, factors, D, heads, moments.mean)
    up = (
        new["kv_b_proj.weight"]
        .reshape(heads, 2, D // heads, D)
        .transpose(1, 0, 2, 3)
        .reshape(2 * D, D)
    )
    np.testing.assert_allclose(
        up.astype(np.float64) @ new["c_attn.weight"][D:], layer["c_attn.weight"][D:], atol=1e-4
    )
    expected = layer["c_proj.bias"] + (
        layer["c_proj.weight"] @ layer["c_attn.bias"][2 * D :] if bias else 0
    )
    np.testing.assert_allclose(new["c_proj.bias"], expected, atol=1e-3)


def test_factors_are_the_best_latent_for_text_and_gradient():
    rng = np.random.default_rng(1)
    A, x = rng.normal(size=(16, 8)), rng.normal(size=(200, 8))
    g = rng.normal(size=(200, 16)) * np.geomspace(1, 0.05, 16)
    moments = latent.Moments(x.mean(0), np.cov(x.T, bias=True), g.T @ g / 200)

    def with_ridge(matrix, ridge):
        return matrix + ridge * np.trace(matrix) / len(matrix) * np.eye(len(matrix))

    G = with_ridge(moments.gradient, latent.GRADIENT_RIDGE)
    C = with_ridge(moments.covariance, latent.RIDGE)

    def change(factors, rank):
        E = A - factors.up[:, :rank] @ factors.down[:rank]
        return np.trace(G @ E @ C @ E.T)

    best, plain = latent.decompose(A, moments), latent.decompose(A, None)
    for rank in range(1, 8):
        assert change(best, rank) == pytest.approx(np.sum(best.singular_values[rank:] ** 2))
        assert change(best, rank) < change(plain, rank)
    for _ in range(20):
        other = dataclasses.replace(best, down=best.down + 0.1 * rng.normal(size=(8, 8)))
        assert change(other, 4) > change(best, 4)


@given(data=st.data())
@settings(max_examples=30)
def test_a_budget_is_shared_out_as_well_as_can_be(data):
    """Against every other way of giving three layers the same average."""
    average, comparable = data.draw(st.integers(1, 5)), data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    spectra = [np.sort(rng.exponential(10.0**i, 6))[::-1] for i in rng.permutation(3)]

    def lost(ranks):
        tails = [
            s[r:] @ s[r:] / (1 if comparable else s @ s)
            for s, r in zip(spectra, ranks, strict=True)
        ]
        return sum(tails)

    ranks = latent.share_ranks(spectra, average, comparable)
    assert sum(ranks) == 3 * average and min(ranks) >= 1 and max(ranks) <= 6
    others = [r for r in itertools.product(range(1, 7), repeat=3) if sum(r) == 3 * average]
    assert lost(ranks) == pytest.approx(min(map(lost, others)))


@pytest.mark.parametrize(("average", "block"), [(96, 32), (48, 16), (32, 8), (8, 2)])
def test_a_budget_is_shared_out_in_blocks_that_quantized_caches_take(average, block):
    """The second layer is worth more than the first, so some of the width always moves."""
    spectra = [np.exp(-np.arange(192) / 50), 3 * np.exp(-np.arange(192) / 50)]
    ranks = latent.share_ranks(spectra, average, comparable=True)
    assert ranks[0] < average < ranks[1] and sum(ranks) == 2 * average
    assert all(r % block == 0 for r in ranks)


def test_keys_constants_and_values_means_cost_nothing(model, text_file):
    """Directions that the text holds constant leave the outputs as they were at any rank."""
    D = 8
    rng = np.random.default_rng(0)
    layer = mha_layer(rng, D)
    x = np.concatenate([rng.normal(size=(50, 3)), np.full((50, 5), 2.0)], axis=1)
    moments = latent.Moments(x.mean(0), np.cov(x.T, bias=True), np.eye(2 * D))
    factors = latent.decompose(layer["c_attn.weight"][D:], moments)
    new = latent.to_latent(layer, factors, 3, 1, moments.mean)
    v = x @ layer["c_attn.weight"][2 * D :].T + layer["c_attn.bias"][2 * D :]
    v_new = x @ (new["kv_b_proj.weight"][D:] @ new["c_attn.weight"][D:]).T
    p = rng.dirichlet(np.ones(50))
    old_out, new_out = (
        (p @ v) @ layer["c_proj.weight"].T + layer["c_proj.bias"],
        (p @ v_new) @ new["c_proj.weight"].T + new["c_proj.bias"],
    )
    np.testing.assert_allclose(new_out, old_out, atol=1e-3)
    k, k_new = (
        x @ layer["c_attn.weight"][D : 2 * D].T,
        x @ (new["kv_b_proj.weight"][:D] @ new["c_attn.weight"][D:]).T,
    )
    np.testing.assert_allclose(k_new - k_new.mean(0), k - k.mean(0), atol=1e-3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_file):
    """A multi-head model that has learned something."""
    from mlx_mla import train

    out = tmp_path_factory.mktemp("runs") / "mha"
    argv = words("--attention mha --n-layer 2 --n-head 2 --n-embd 32 --n-positions 48")
    argv += words("--data", text_file, "--out", out, "--steps 120 --batch-size 8 --sample-tokens 0")
    argv += ["--eval-every", "0"]
    assert train.main([*argv, "--backend", "torch", "--device", "cpu", "--vocab-size", "272"]) == 0
    return out


def test_a_fit_to_a_text_loses_less_than_weights_alone(trained, text_file, tmp_path, capfd):
    flags = ["--calibration", text_file, "--calibration-tokens", 8000, "--held-out-tokens", 0]
    out = converted(trained, tmp_path / "fitted", "--rank", 6, *flags)
    report = json.loads((out / "conversion.json").read_text())
    p = report["perplexity"]
    assert p["masked_rows"] == 15 and 1500 < p["tokens"] < 2100
    assert len(report["singular_values"]) == 2 and len(report["singular_values"][0]) == 32
    assert all(0.1 < kept < 1 for kept in report["kept_energy"])
    for closed, refitted, fitted in zip(*report["residual_error"].values(), strict=True):
        assert fitted < refitted < closed
    assert (out / "conversion.png").read_bytes().startswith(b"\x89PNG")
    assert "15 rows of padding masked" in (out / "README.md").read_text()
    assert "Perplexity on" in capfd.readouterr().out
    blind = converted(trained, tmp_path / "blind", "--rank", 6)
    lost = [perplexity_of(folder, text_file) / p["before"] - 1 for folder in (out, blind)]
    assert lost[0] == pytest.approx(p["after"] / p["before"] - 1, abs=1e-4)
    assert 0 < lost[0] < 0.5 * lost[1], lost


def perplexity_of(folder, text_file) -> float:
    model = checkpoint.ModelFolder(folder)
    text = text_of(text_file, model.config.n_positions)
    return perplexity(build_model(model.config, model.weights(), CPU), text, 0)[0]


def greedy_texts(folder, capfd) -> set[str]:
    """What a model writes in either framework, with latents and without a cache."""
    argv = ("--model", folder, "--prompt", "The ", "--temp 0 --max-tokens 30")
    return {
        objects(capfd, *argv, "--backend", backend, "--cache", cache)[0]["text"]
        for backend, cache in itertools.product(("mlx", "torch"), ("latent", "none"))
    }


def test_a_converted_model_decodes_as_in_full(trained, text_file, tmp_path, capfd):
    out = converted(trained, tmp_path / "out", "--rank", 12, "--calibration", text_file)
    assert len(greedy_texts(out, capfd)) == 1


def test_a_rank_budget_gives_layers_widths_of_their_own(trained, text_file, tmp_path, capfd):
    flags = ["--calibration", text_file, "--calibration-tokens", 8000]
    out = converted(trained, tmp_path / "out", "--rank-budget", 7, *flags)
    config = checkpoint.ModelFolder(out).config
    report = json.loads((out / "conversion.json").read_text())
    ranks = report["kv_lora_ranks"]
    assert sum(ranks) == 14 and ranks[0] != ranks[1]
    assert (config.kv_lora_ranks, config.kv_lora_rank) == (ranks, max(ranks))
    assert report["cache_bytes_per_token"]["after"] == 2 * sum(ranks)
    assert f"{min(ranks)} to {max(ranks)}, 7 on average" in (out / "README.md").read_text()
    assert len(greedy_texts(out, capfd)) == 1
    # Recovery fine-tuning also continues from such a model.
    from mlx_mla import train

    argv = words("--init", out, "--data", text_file, "--steps 2 --out", tmp_path / "recovered")
    assert train.main([*argv, "--sample-tokens", "0", "--batch-size", "2"]) == 0


def text_of(path, context=16) -> Text:
    return Text(str(path), ByteTokenizer().fast_tokenizer(), context)


@pytest.fixture(scope="module")
def ours(hf_folder, tmp_path_factory):
    """That model as our own of multi-head attention."""
    out = tmp_path_factory.mktemp("ours") / "mha"
    assert convert.main(words(hf_folder, "--out", out, "--tokenizer bytes")) == 0
    folder = checkpoint.ModelFolder(out)
    return build_model(folder.config, folder.weights(folder.config), CPU)


def test_moments_are_those_of_all_tokens_at_once(ours, tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(bytes(range(32, 127)) * 100)
    text = text_of(file)
    moments, tokens = collect_moments(ours, text, 0, True, Console())
    seen = []
    handle = ours.transformer.h[1].attn.c_attn.register_forward_pre_hook(
        lambda m, x: seen.append(x[0].flatten(0, 1))
    )
    with torch.no_grad():
        for batch in text.calibration(0):
            ours(torch.tensor(batch[:, :-1]))
    handle.remove()
    x = torch.cat(seen).double().numpy()
    assert tokens == len(x) == 9500 * 9 // 10 // 16 * 16
    np.testing.assert_allclose(moments[1].mean, x.mean(0), atol=1e-5)
    np.testing.assert_allclose(moments[1].covariance, np.cov(x.T, bias=True), atol=1e-4)
    g = moments[1].gradient
    assert g.shape == (64, 64) and np.linalg.eigvalsh(g).min() > -1e-9


def test_text_streams_without_gap_or_overlap(tmp_path, monkeypatch):
    monkeypatch.setattr("convert.calibration.BLOCK", 37)
    file = tmp_path / "text.txt"
    content = "naïve 東京 text. " * 200
    file.write_text(content, encoding="utf-8")
    text = text_of(file)
    batches = list(text.calibration(0))
    got = bytes(t for b in batches for row in b for t in row[:-1] if t < 256)
    assert content.encode().startswith(got)
    assert len(got) > 0.88 * len(content.encode())
    for b in batches:
        assert (b[1:, 0] == b[:-1, -1]).all()
    held = bytes(t for b in text.held_out(0) for row in b for t in row[:-1] if t < 256)
    assert held in content.encode()
    assert sum(b.shape[0] * (b.shape[1] - 1) for b in text.calibration(100)) <= 2048


def test_perplexity_is_of_the_tokens_alone(ours, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("abcdefgh" * 100)
    value, tokens = perplexity(ours, text_of(file), 0)
    batch = np.concatenate(list(text_of(file).held_out(0)))
    with torch.no_grad():
        logits = ours(torch.tensor(batch[:, :-1])).logits[..., :257]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(batch[:, 1:]).flatten()
    )
    assert value == pytest.approx(float(loss.exp()), rel=1e-5)
    assert tokens == batch[:, 1:].size
