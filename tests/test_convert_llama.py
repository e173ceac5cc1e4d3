"""Llama, Mistral and Qwen2: the converted folder gives their logits, and their files come back."""

import json
import shutil

import pytest

torch = pytest.importorskip("torch")

import foreign
import mlx.core as mx
import numpy as np
from helpers import converted, edit, words
from helpers import refused as refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm import load as mlx_lm_load
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from convert import __main__ as convert
from mlx_mla import checkpoint, generate, train
from mlx_mla.backends import get_backend
from mlx_mla.backends.mlx.load import load
from mlx_mla.data.tokenizer import end_ids
from mlx_mla.decoding.text import TextWriter
from mlx_mla.model.weights import num_parameters

KINDS = ["llama", "mistral", "qwen2"]


def same_logits(model, folder, ids, atol=1e-4):
    """Of the source in transformers, and of the folder in both backends."""
    tokens = len(checkpoint.ModelFolder(folder).tokenizer)  # the rows beyond are masked
    with torch.inference_mode():
        expected = model(ids).logits[..., :tokens]
    got = foreign.logits_of_folder(folder, ids)[..., :tokens]
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)
    got = np.array(load(checkpoint.ModelFolder(folder))(mx.array(ids.numpy())))[..., :tokens]
    np.testing.assert_allclose(got, expected.numpy(), atol=atol, rtol=0)


@given(data=st.data())
@settings(max_examples=12)
def test_any_shape_gives_transformers_logits_and_comes_back_bit_for_bit(data, tmp_path_factory):
    kind = data.draw(st.sampled_from(KINDS))
    heads = data.draw(st.sampled_from([1, 2, 3, 6]))
    head_dim = data.draw(st.sampled_from([4, 10, 16]))
    hidden = heads * head_dim
    groups = data.draw(st.sampled_from([g for g in (1, 2, 3, 6) if heads % g == 0]))
    changes = {
        "num_hidden_layers": data.draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": data.draw(st.sampled_from([7, 56])),
        "rms_norm_eps": data.draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "tie_word_embeddings": data.draw(st.booleans()),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": data.draw(st.sampled_from([100.0, 10000.0, 1e6])),
        },
        "vocab_size": data.draw(st.integers(257, 300)),
        "hidden_size": hidden,
    }
    if kind != "qwen2" and data.draw(st.booleans()):
        changes |= {"head_dim": head_dim, "hidden_size": hidden + 6}
    if kind == "llama":
        changes |= {name: data.draw(st.booleans()) for name in ("attention_bias", "mlp_bias")}
    half = data.draw(st.sampled_from([None, torch.bfloat16, torch.float16]))
    place = tmp_path_factory.mktemp("any")
    model = foreign.llama(kind, data.draw(st.integers(0, 9)), **changes)
    tokenizer = foreign.ByteTokenizer().fast_tokenizer()
    tokenizer.save_pretrained(str(place / "hf"))
    # Several files, and a file of half precision: the type is the source's.
    stored = model if half is None else foreign.llama(kind, 0, **changes).to(half)
    stored.save_pretrained(str(place / "hf"), max_shard_size="20KB")
    out = converted(place / "hf", place / "out")
    ids = foreign.ids(257)
    assert num_parameters(checkpoint.ModelFolder(out).config) == sum(
        p.numel() for p in model.parameters()
    )
    if half is None:
        same_logits(model, out, ids)
    back = converted(out, place / "back", "--to", "hf")
    if half is None:
        stock = np.array(mlx_lm_load(str(back))[0](mx.array(ids.numpy())))
        with torch.inference_mode():
            np.testing.assert_allclose(stock, model(ids).logits, atol=1e-4, rtol=0)
    before, again = (
        AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto")
        for folder in (place / "hf", back)
    )
    expected = dict(before.named_parameters())
    assert dict(again.named_parameters()).keys() == expected.keys()
    for name, p in again.named_parameters():
        assert p.dtype == expected[name].dtype
        assert torch.equal(p, expected[name]), name
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, before(ids).logits)


@pytest.fixture
def source(tmp_path):
    def make(kind="llama", **changes):
        foreign.save_llama(tmp_path / "src", kind, **changes)
        return tmp_path / "src"

    return make


def test_the_tokenizer_its_chat_template_and_every_end_of_text_come_along(source, tmp_path):
    src = source()
    edit(src / "generation_config.json", eos_token_id=[10, 256])
    edit(src / "tokenizer.json", post_processor=TEMPLATE)
    out = converted(src, tmp_path / "out")
    back = converted(out, tmp_path / "back", "--to", "hf")
    theirs = AutoTokenizer.from_pretrained(str(src))
    for folder in (out, back):
        ours = AutoTokenizer.from_pretrained(str(folder))
        assert ours("as it is").input_ids == theirs("as it is").input_ids == [256, *b"as it is"]
        chat = [{"role": "user", "content": "hi"}]
        assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
        assert ours.special_tokens_map == theirs.special_tokens_map
    config = json.loads((out / "config.json").read_text())
    assert sorted(config["eos_token_id"]) == [10, 256]
    assert json.loads((back / "generation_config.json").read_text())["eos_token_id"] == [256, 10]
    tokenizer = checkpoint.ModelFolder(out).tokenizer
    assert end_ids(tokenizer) == [256, 10]
    decoder = get_backend("mlx").decoder(checkpoint.ModelFolder(out))
    assert generate.encode(decoder, "as it is") == [256, *b"as it is"]
    assert TextWriter(tokenizer, []).add(10) == "stop"
    _, wrapped = mlx_lm_load(str(out), {"trust_remote_code": True}, trust_remote_code=True)[:2]
    assert wrapped.eos_token_ids == {10, 256}


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {
        "<|endoftext|>": {"id": "<|endoftext|>", "ids": [256], "tokens": ["<|endoftext|>"]}
    },
}


def test_nothing_allocates_by_the_longest_context(source, tmp_path):
    """Positions of a million tokens at 32 values each would be 128 MB alone."""
    out = converted(source(max_position_embeddings=2**20), tmp_path / "out")
    ids = torch.arange(12)[None]
    mx.synchronize()
    mx.reset_peak_memory()
    model = load(checkpoint.ModelFolder(out))
    mx.eval(model(mx.array(ids.numpy())))
    assert mx.get_peak_memory() < 8 * 2**20
    same_logits(AutoModelForCausalLM.from_pretrained(str(tmp_path / "src")), out, ids)
    argv = words("--init", out, "--tokenizer bytes --steps 1 --sample-tokens 0 --batch-size 1")
    argv += words("--eval-batches 1 --final-eval-batches 1 --out", tmp_path / "run")
    assert train.main(argv) == 0
    config = (tmp_path / "run" / "config.toml").read_text()
    assert "seq_len = 1024\n" in config


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters of type 'llama3'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling of type 'linea"),
        ("qwen2", {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling of type 'yarn' is not su"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling is 'linear', and should be an object"),
        ("llama", {"rope_parameters": {"rope_theta": "x"}}, "rope_theta is 'x', and should be a"),
        ("mistral", {"sliding_window": 16}, "sliding_window 16 is not supported"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "sliding_window 16 is not"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attent"),
        ("llama", {"num_hidden_layers": "x"}, "num_hidden_layers = 'x' is not a value of type int"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassificatio"),
        ("llama", {"model_type": "qwen3"}, "model_type 'qwen3') is not supported; supported are"),
        ("llama", {"model_type": "mixtral"}, "model_type 'mixtral') is not supported"),
        (
            "llama",
            {"vocab_size": 200},
            "has shape (300, 32), but the configuration requires (200, 32)",
        ),
        (
            "qwen2",
            {"model_type": "llama", "architectures": None},
            "unexpected tensors model.layers.0.self_attn.k_proj.b",
        ),
    ],
)
def test_what_is_computed_otherwise_is_refused(source, tmp_path, capsys, kind, changes, message):
    src = source(kind)
    edit(src / "config.json", **changes)
    assert message in refusal(capsys, src, "--out", tmp_path / "out", command=convert.main)
    assert not (tmp_path / "out").exists()


def test_a_damaged_download_is_refused(source, tmp_path, capsys):
    foreign.llama().save_pretrained(str(source()), max_shard_size="20KB")
    src = tmp_path / "src"
    (src / "model.safetensors").unlink()
    shards = sorted(src.glob("model-*.safetensors"))

    def refused():
        line = refusal(capsys, src, "--out", tmp_path / "out", command=convert.main)
        assert not (tmp_path / "out").exists()
        return line

    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: len(whole) // 2])
    assert f"{shards[1]}: not readable as safetensors" in refused()
    shards[1].unlink()
    assert f"{shards[1]}: no such file" in refused()
    shards[1].write_bytes(whole)
    index = json.loads((src / "model.safetensors.index.json").read_text())
    edit(src / "model.safetensors.index.json", weight_map={**index["weight_map"], "x": "none"})
    assert f"{src / 'none'}: no such file" in refused()
    (src / "model.safetensors.index.json").unlink()
    assert "has no weights" in refused()


def test_a_tokenizer_that_does_not_fit_is_refused(source, tmp_path, capsys):
    def refused(src):
        return refusal(capsys, src, "--out", tmp_path / "out", command=convert.main)

    src = source(vocab_size=200, eos_token_id=0, bos_token_id=0)
    assert "has 257 ids, but the model has 200 rows" in refused(src)
    (src / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused(src)


@pytest.mark.slow
def test_smollm2(smollm2, tmp_path):
    out = converted(smollm2, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(str(smollm2))
    assert num_parameters(checkpoint.ModelFolder(out).config) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(str(smollm2))
    ids = tokenizer("The capital of France is Paris, and that of", return_tensors="pt").input_ids
    same_logits(model, out, ids)
    ours = checkpoint.ModelFolder(out).tokenizer
    chat = [{"role": "user", "content": "What is 2 + 2?"}]
    for ask in ({}, {"add_generation_prompt": True}):
        theirs = tokenizer.apply_chat_template(chat, **ask)
        assert ours.apply_chat_template(chat, **ask) == theirs
    assert ours.special_tokens_map == tokenizer.special_tokens_map
    back = converted(out, tmp_path / "back", "--to", "hf")
    shutil.rmtree(out)
    expected = load_file(str(smollm2 / "model.safetensors"))
    got = load_file(str(back / "model.safetensors"))
    assert got.keys() == expected.keys()
    assert all(np.array_equal(got[n], expected[n]) for n in got)
