"""Rows that pad the vocabulary are no tokens: no tool samples them, and none is lost."""

import json

import pytest

torch = pytest.importorskip("torch")

import foreign
import mlx.core as mx
import numpy as np
from helpers import by_mlx_lm, converted
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from mlx_mla import checkpoint

TOKENS, ROWS = 257, 304
PROMPT = list(b"The st")
BYTES = "--tokenizer bytes"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A GPT-2 whose padding is likelier than its tokens."""
    model = foreign.gpt2(n_layer=1, vocab_size=ROWS)
    with torch.no_grad():
        model.transformer.wte.weight[TOKENS:] *= 2
    folder = tmp_path_factory.mktemp("padding") / "gpt2"
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module", params=[(), ("--to", "mla", "--rank", "16")], ids=["mha", "mla"])
def folder(source, request, tmp_path_factory):
    return converted(source, tmp_path_factory.mktemp("ours") / "ours", BYTES, *request.param)


def sampled_by_transformers(model):
    torch.manual_seed(0)
    prompt = torch.tensor([PROMPT] * 16)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 24, "pad_token_id": 256}
    with torch.inference_mode():
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


def test_transformers(source, folder):
    plain = GPT2LMHeadModel.from_pretrained(str(source))
    assert sampled_by_transformers(plain).max() >= TOKENS
    ours = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=True)
    assert sampled_by_transformers(ours).max() < TOKENS


def test_transformers_own_gpt2(source, tmp_path):
    ours = converted(source, tmp_path / "ours", BYTES)
    back = converted(ours, tmp_path / "back", BYTES, "--to hf")
    model = GPT2LMHeadModel.from_pretrained(str(back))
    assert sampled_by_transformers(model).max() < TOKENS
    for name, values in load_file(str(source / "model.safetensors")).items():
        found = load_file(str(back / "model.safetensors"))[name.removeprefix("transformer.")]
        np.testing.assert_array_equal(found, values)


def test_stock_mlx_lm(folder):
    model = by_mlx_lm(folder)[0]
    mx.random.seed(0)
    tokens = []
    for _ in range(8):
        steps = generate_step(
            mx.array(PROMPT), model, sampler=make_sampler(temp=1.0), max_tokens=30
        )
        tokens += [int(token) for token, _ in steps]
    assert max(tokens) < TOKENS


def test_probabilities_of_the_tokens_are_those_without_the_padding(source, folder):
    """The softmax is over the tokens, in both frameworks, and the weights are untouched."""
    x = foreign.ids(TOKENS)
    ours = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=True)
    config = checkpoint.ModelFolder(folder).config
    whole = foreign.logits_of_folder(folder, x)  # our own commands' model, which masks later
    expected = torch.log_softmax(whole[..., :TOKENS], -1)
    found = torch.log_softmax(foreign.logits_of(ours, x), -1)
    torch.testing.assert_close(found[..., :TOKENS], expected)
    assert found[..., TOKENS:].max() < -1e30
    model = by_mlx_lm(folder)[0]
    logits = model(mx.array(x.numpy()))
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    np.testing.assert_allclose(logprobs[..., :TOKENS], expected.numpy(), atol=1e-4)
    assert config.vocab_size == ROWS
    theirs = load_file(str(source / "model.safetensors"))["transformer.wte.weight"]
    ours_wte = checkpoint.ModelFolder(folder).weights(config)["transformer.wte.weight"]
    np.testing.assert_array_equal(ours_wte, theirs)


def test_training_sees_the_logits_of_the_padding_too(folder):
    """A loss that uses every logit (label smoothing, entropy) stays finite there."""
    x = foreign.ids(TOKENS)
    ours = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=True).train()
    logits = ours(x, labels=x).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x.flatten(), label_smoothing=0.1)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert loss.item() < 100 and entropy.isfinite().all()
    whole = foreign.logits_of_folder(folder, x)  # our own commands' model, which masks nothing here
    torch.testing.assert_close(logits.detach(), whole, rtol=1e-4, atol=1e-4)
    loss.backward()
    assert ours.transformer.wte.weight.grad[TOKENS:].abs().max() > 0
    model = by_mlx_lm(folder)[0]
    model.train()
    np.testing.assert_allclose(np.array(model(mx.array(x.numpy()))), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_masked_logits_are_finite(folder, dtype):
    """-inf is no JSON, and no number to a distillation loss."""
    model = by_mlx_lm(folder)[0]
    model.set_dtype(dtype)
    assert mx.isfinite(model(mx.array([PROMPT]))).all()


def test_rows_that_transformers_resizes_are_tokens(folder):
    model = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=True)
    model.resize_token_embeddings(TOKENS + 2)
    assert model.config.tokenizer_size is None
    logits = foreign.logits_of(model, foreign.ids(TOKENS))
    assert logits.shape[-1] == TOKENS + 2
    assert logits.min() > -1e30


def test_folders_without_padding_have_no_such_field(tmp_path):
    foreign.gpt2(n_layer=1, vocab_size=TOKENS).save_pretrained(str(tmp_path / "gpt2"))
    out = converted(tmp_path / "gpt2", tmp_path / "out", BYTES)
    assert "tokenizer_size" not in json.loads((out / "config.json").read_text())
