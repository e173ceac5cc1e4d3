"""Checkpoints of other projects: the converted folder gives the logits of the model it came
from."""

import json

import pytest

torch = pytest.importorskip("torch")

import foreign
import huggingface_hub.constants
import mlx.core as mx
import mlx_lm
import numpy as np
from helpers import edit, refused, words
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from convert import __main__ as convert
from mlx_mla import checkpoint, generate
from mlx_mla.backends.mlx.load import load
from mlx_mla.data.tokenizer import ByteTokenizer

BYTES = ("--tokenizer", "bytes")


def converted(src, out, *flags):
    """Convert with the byte tokenizer, which needs no files; returns the folder."""
    assert convert.main([str(src), "--out", str(out), *map(str, flags or BYTES)]) == 0
    return out


def same_logits(model, folder, atol=1e-5, vocab=300):
    x = foreign.ids(vocab)
    torch.testing.assert_close(
        foreign.logits_of_folder(folder, x), foreign.logits_of(model, x), atol=atol, rtol=1e-4
    )


@pytest.fixture(scope="module")
def model():
    return foreign.gpt2()


@pytest.fixture(scope="module")
def hf_folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "gpt2"
    model.save_pretrained(str(folder))
    return folder


def test_hugging_face_folder(model, hf_folder, tmp_path):
    same_logits(model, converted(hf_folder, tmp_path / "out"))


def test_the_folder_is_one_of_ours(hf_folder, tmp_path, capfd):
    out = converted(hf_folder, tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {
        "config.json", "model.safetensors", "model_mlx.py", "model_torch.py",
        "configuration_mla_gpt2.py", "tokenizer.json", "tokenizer_config.json", "README.md",
        "SHA256SUMS",
    }  # fmt: skip
    assert checkpoint.integrity_error(out) is None
    assert "43 pad the 257 tokens" in (out / "README.md").read_text()
    texts = []
    for backend in ("mlx", "torch"):
        capfd.readouterr()
        argv = words(
            "--model", out, "--prompt ab --max-tokens 20 --temp 0 --backend", backend, "--json"
        )
        assert generate.main(argv) == 0
        texts.append(json.loads(capfd.readouterr().out)["token_ids"])
        assert max(texts[-1]) < 257  # padding is never sampled
    assert texts[0] == texts[1]


@given(data=st.data())
@settings(max_examples=12)
def test_any_shape_and_option_of_gpt2(data, tmp_path_factory):
    heads = data.draw(st.sampled_from([1, 2, 3]))
    changes = {
        "n_layer": data.draw(st.integers(1, 3)),
        "n_head": heads,
        "n_embd": heads * data.draw(st.sampled_from([4, 8, 10])),
        "n_inner": data.draw(st.sampled_from([None, 24])),
        "vocab_size": data.draw(st.integers(257, 310)),
        "activation_function": data.draw(
            st.sampled_from(["gelu_new", "gelu", "gelu_pytorch_tanh", "gelu_fast"])
        ),
        "layer_norm_epsilon": data.draw(st.sampled_from([1e-5, 1e-2])),
        "scale_attn_weights": data.draw(st.booleans()),
        "scale_attn_by_inverse_layer_idx": data.draw(st.booleans()),
    }
    model = foreign.gpt2(data.draw(st.integers(0, 9)), **changes)
    tmp_path = tmp_path_factory.mktemp("any")
    model.save_pretrained(str(tmp_path / "hf"))
    out = converted(tmp_path / "hf", tmp_path / "out")
    same_logits(model, out, atol=1e-4, vocab=changes["vocab_size"])
    by_layer = changes["scale_attn_by_inverse_layer_idx"] and changes["n_layer"] > 1
    scaled = by_layer or not changes["scale_attn_weights"]
    card = (out / "README.md").read_text()
    assert "# hf, converted" in card
    assert ("bit for bit" not in card) == scaled


@pytest.mark.parametrize(
    "form", ["sharded", "bin", "sharded bin", "no prefix", "old masks", "half"]
)
def test_every_form_of_the_hugging_face_folder(form, model, hf_folder, tmp_path):
    src = tmp_path / "src"
    state = {n: p.detach() for n, p in model.named_parameters()}
    if form == "sharded":
        model.save_pretrained(str(src), max_shard_size="20KB")
        assert len(list(src.glob("model-*.safetensors"))) > 1
    else:
        src.mkdir()
        (src / "config.json").write_bytes((hf_folder / "config.json").read_bytes())
    if form == "no prefix":
        state = {n.removeprefix("transformer."): p for n, p in state.items()}
    if form == "old masks":
        for i in range(2):
            state[f"transformer.h.{i}.attn.bias"] = torch.ones(
                1, 1, 48, 48, dtype=torch.bool
            ).tril()
            state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        state["lm_head.weight"] = state["transformer.wte.weight"]
    if form == "half":
        state = {n: p.half() for n, p in state.items()}
    if form == "sharded bin":
        names = list(state)
        parts = {
            "pytorch_model-00001-of-00002.bin": names[:9],
            "pytorch_model-00002-of-00002.bin": names[9:],
        }
        for file, own in parts.items():
            torch.save({n: state[n] for n in own}, src / file)
        index = {"weight_map": {n: file for file, own in parts.items() for n in own}}
        (src / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    elif form != "sharded":
        torch.save(state, src / "pytorch_model.bin")
    same_logits(model, converted(src, tmp_path / "out"), atol=0.05 if form == "half" else 1e-5)


def test_hub_id_comes_from_the_hubs_cache_at_the_asked_revision(
    model, hf_folder, tmp_path, monkeypatch
):
    repo = tmp_path / "cache" / "models--someone--small-gpt2"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "v1").write_text("a" * 40)
    (repo / "snapshots").mkdir()
    hf_folder.rename(hf_folder.with_name("moved"))
    (repo / "snapshots" / ("a" * 40)).symlink_to(hf_folder.with_name("moved"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(repo.parent))
    monkeypatch.setattr(
        "huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(repo.parent)
    )
    try:
        out = converted("someone/small-gpt2", tmp_path / "out", "--revision", "v1", *BYTES)
        same_logits(model, out)
        assert "someone/small-gpt2" in (out / "README.md").read_text()
    finally:
        hf_folder.with_name("moved").rename(hf_folder)


def test_back_to_hugging_face_bit_for_bit(model, hf_folder, tmp_path):
    ours = converted(hf_folder, tmp_path / "ours")
    back = converted(ours, tmp_path / "back", "--to", "hf")
    again, info = GPT2LMHeadModel.from_pretrained(str(back), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items()):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32)), name
    for field in (
        "n_layer",
        "n_head",
        "n_embd",
        "n_positions",
        "vocab_size",
        "activation_function",
        "eos_token_id",
    ):
        assert getattr(again.config, field) == getattr(model.config, field)
    ids = foreign.ids()
    stock = np.array(mlx_lm.load(str(back))[0](mx.array(ids.numpy())))
    np.testing.assert_allclose(stock, foreign.logits_of(model, ids), atol=1e-4, rtol=0)


def test_every_end_of_text_comes_along(model, tmp_path):
    src = tmp_path / "src"
    model.save_pretrained(str(src))
    ByteTokenizer().fast_tokenizer().save_pretrained(str(src))
    edit(src / "generation_config.json", eos_token_id=[10, 256])
    ours = converted(src, tmp_path / "ours")
    back = converted(ours, tmp_path / "back", "--to", "hf")
    assert GPT2LMHeadModel.from_pretrained(str(back)).generation_config.eos_token_id == [256, 10]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod.module."])
def test_nanogpt(bias, prefix, tmp_path):
    model = foreign.gpt2(activation_function="gelu")
    if not bias:
        for name, p in model.named_parameters():
            if name.endswith(".bias"):
                p.data.zero_()
    foreign.save_nanogpt(tmp_path / "ckpt.pt", model, bias, prefix)
    out = converted(tmp_path / "ckpt.pt", tmp_path / "out")
    same_logits(model, out)
    assert checkpoint.ModelFolder(out).config.activation_function == "gelu"
    if not bias:  # GPT2LMHeadModel has every bias
        back = converted(out, tmp_path / "back", "--to", "hf")
        same_logits(GPT2LMHeadModel.from_pretrained(str(back)), out)


@pytest.fixture(scope="module")
def untied():
    """A GPT-2 whose head is a matrix of its own."""
    model = foreign.gpt2(tie_word_embeddings=False)
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    return model


def same_in_every_tool(model, out):
    """Logits in our PyTorch, our MLX, and transformers on the folder."""
    same_logits(model, out)
    x = foreign.ids(257)
    expected = foreign.logits_of(model, x)[..., :257]
    theirs = AutoModelForCausalLM.from_pretrained(str(out), trust_remote_code=True)
    torch.testing.assert_close(
        foreign.logits_of(theirs, x)[..., :257], expected, atol=1e-5, rtol=1e-4
    )
    found = np.array(load(checkpoint.ModelFolder(out))(mx.array(x.numpy())))[..., :257]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4, rtol=1e-4)


def test_a_head_of_its_own(untied, tmp_path):
    untied.save_pretrained(str(tmp_path / "hf"))
    out = converted(tmp_path / "hf", tmp_path / "out")
    assert checkpoint.ModelFolder(out).config.tie_word_embeddings is False
    same_in_every_tool(untied, out)
    back = converted(out, tmp_path / "back", "--to", "hf")
    again = GPT2LMHeadModel.from_pretrained(str(back))
    assert again.config.tie_word_embeddings is False
    for (name, a), (_, b) in zip(untied.state_dict().items(), again.state_dict().items()):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32)), name
    same_logits(untied, converted(out, tmp_path / "mla", "--to", "mla", "--rank", "32"), atol=1e-4)


def test_a_head_that_only_looks_tied_is_refused(untied, tmp_path, capsys):
    untied.save_pretrained(str(tmp_path / "hf"))
    edit(tmp_path / "hf" / "config.json", tie_word_embeddings=True)
    argv = (tmp_path / "hf", "--out", tmp_path / "out", *BYTES)
    line = refused(capsys, *argv, command=convert.main)
    assert "set tie_word_embeddings to false" in line


def test_mingpt(untied, tmp_path, capsys):
    foreign.save_mingpt(tmp_path / "model.pt", untied)
    out = converted(tmp_path / "model.pt", tmp_path / "out", "--n-head", "2", *BYTES)
    same_in_every_tool(untied, out)
    assert "Converted from minGPT" in (out / "README.md").read_text()
    argv = (tmp_path / "model.pt", "--out", tmp_path / "no", *BYTES)
    assert "minGPT does not record its number of heads; give --n-head" in refused(
        capsys, *argv, command=convert.main
    )


@pytest.mark.parametrize("module", ["__main__", "train_gpt2"])
def test_build_nanogpt_with_its_pickled_config(module, model, tmp_path):
    foreign.save_build_nanogpt(tmp_path / "model_00005.pt", model, module)
    same_logits(model, converted(tmp_path / "model_00005.pt", tmp_path / "out"))


@pytest.mark.parametrize("version", [3, 5])
def test_llmc(version, model, tmp_path):
    foreign.save_llmc(tmp_path / "model.bin", model, version, vocab_size=280)
    out = converted(tmp_path / "model.bin", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["dtype"] == (
        "bfloat16" if version == 5 else "float32"
    )
    if version == 5:
        model = foreign.gpt2()
        for p in model.parameters():
            p.data = p.data.bfloat16().float()
    same_logits(model, out)
    assert checkpoint.ModelFolder(out).config.vocab_size == 300


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("bare", [False, True])
def test_the_originals_checkpoint(prefix, bare, tmp_path):
    model = foreign.Original()
    foreign.save_original(tmp_path / "step019535.pt", model, bare, prefix)
    flags = ["--n-head", "2"] if bare else []
    out = converted(tmp_path / "step019535.pt", tmp_path / "out", *flags, *BYTES)
    same_logits(model, out)
    config = checkpoint.ModelFolder(out).config
    assert (config.attention, config.kv_lora_rank, config.attention_bias) == ("mla", 12, False)


def test_a_bare_state_dict_has_heads_of_64(tmp_path):
    model = foreign.Original(width=128, rank=20)
    foreign.save_original(tmp_path / "model.pt", model, bare=True)
    out = converted(tmp_path / "model.pt", tmp_path / "out")
    same_logits(model, out)
    assert checkpoint.ModelFolder(out).config.n_head == 2


def test_our_own_run_folder_is_a_source_too(tiny_run, tmp_path):
    out = converted(tiny_run, tmp_path / "out", "--tokenizer", "bytes")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (checkpoint.latest(tiny_run) / name).read_bytes()


def test_gpt2s_vocabulary_and_padding(shared_data, tmp_path, capfd):
    model = foreign.gpt2(n_layer=1, n_embd=8, vocab_size=50304)
    model.save_pretrained(str(tmp_path / "hf"))
    out = converted(tmp_path / "hf", tmp_path / "out", "--bpe-dir", shared_data / "gpt2_bpe")
    assert "50257 tokens; 47 rows of padding are kept" in capfd.readouterr().out
    tokenizer = checkpoint.ModelFolder(out).tokenizer
    assert (len(tokenizer), tokenizer.eos_token_id) == (50257, 50256)
    weights = checkpoint.ModelFolder(out).weights()
    np.testing.assert_array_equal(
        weights["transformer.wte.weight"], model.transformer.wte.weight.detach().numpy()
    )


def test_the_sources_own_tokenizer_is_taken(shared_data, tmp_path):
    from mlx_mla.data.tokenizer import GPT2Tokenizer

    model = foreign.gpt2(n_layer=1, n_embd=8, vocab_size=50257)
    tokenizer = GPT2Tokenizer(shared_data / "gpt2_bpe")
    text = "It's  1984,\n\nnaïve 東京 <|endoftext|>x"
    expected = tokenizer.fast_tokenizer().encode(text)
    for form in ("tokenizer.json", "vocab.json"):
        src = tmp_path / form
        model.save_pretrained(str(src))
        if form == "tokenizer.json":
            tokenizer.fast_tokenizer().save_pretrained(str(src))
        else:  # as OpenAI published it
            (src / "vocab.json").write_bytes(
                (shared_data / "gpt2_bpe" / "encoder.json").read_bytes()
            )
            (src / "merges.txt").write_bytes((shared_data / "gpt2_bpe" / "vocab.bpe").read_bytes())
        out = tmp_path / f"out-{form}"
        assert convert.main([str(src), "--out", str(out)]) == 0
        tokenizer = checkpoint.ModelFolder(out).tokenizer
        assert tokenizer.encode(text) == expected
        assert tokenizer.eos_token_id == 50256
