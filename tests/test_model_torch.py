"""The PyTorch model: the same folder gives the same logits, and transformers' tools work on it."""

import json
import shutil
from unittest import mock

import pytest

torch = pytest.importorskip("torch")

import mlx.core as mx
import numpy as np
from helpers import TOLERANCE, by_mlx_lm, model_configs, random_weights, refused, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils import find_labels

from convert import __main__ as convert
from mlx_mla import checkpoint, generate
from mlx_mla.backends.mlx.load import build_model
from mlx_mla.data.tokenizer import ByteTokenizer
from mlx_mla.files import atomic_folder
from mlx_mla.model import model_torch
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.weights import initial_weights, parameter_shapes


def torch_model(config: ModelConfig, weights) -> model_torch.MLAGPT2LMHeadModel:
    model = model_torch.MLAGPT2LMHeadModel(model_torch.MLAGPT2Config(**config.to_dict()))
    state = {name: torch.tensor(w) for name, w in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] * config.tie_word_embeddings, [])
    model.tie_weights()
    return model.eval()


def logits(model, x: mx.array, chunks=()) -> np.ndarray:
    """Logits of ids; with chunks, through a cache in chunks of these sizes and then token by
    token."""
    ids = torch.tensor(np.array(x), dtype=torch.long)
    with torch.no_grad():
        if not chunks:
            return model(ids, use_cache=False).logits.numpy()
        out, cache, at = [], None, 0
        for size in [*chunks, *[1] * ids.shape[1]]:
            if at < ids.shape[1]:
                step = model(ids[:, at : at + size], past_key_values=cache, use_cache=True)
                out.append(step.logits)
                cache, at = step.past_key_values, at + size
        return torch.cat(out, dim=1).numpy()


@pytest.fixture(scope="module")
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=True).eval()


@pytest.mark.parametrize("attention", ["mla", "mha"])
def test_a_model_made_from_its_configuration_starts_as_training_does(attention):
    config = ModelConfig(
        attention=attention, vocab_size=256, n_layer=8, n_head=4, n_embd=128, n_positions=64
    ).resolved()
    made = model_torch.MLAGPT2Config(**config.to_dict(), initializer_range=0.08)
    weights = model_torch.MLAGPT2LMHeadModel(made).state_dict()
    for name, ours in initial_weights(config, seed=0, std=0.08).items():
        theirs = weights[name].numpy()
        np.testing.assert_allclose(theirs.mean(), ours.mean(), atol=0.005, err_msg=name)
        np.testing.assert_allclose(theirs.std(), ours.std(), rtol=0.05, err_msg=name)


@given(config=model_configs(), length=st.integers(1, 40), seed=st.integers(0, 99))
def test_logits_are_mlxs(config, length, seed):
    weights = random_weights(config, seed)
    x = token_ids(config, 2, length, seed)
    np.testing.assert_allclose(
        logits(torch_model(config, weights), x),
        np.array(build_model(config, weights)(x)),
        atol=TOLERANCE,
        rtol=1e-4,
    )


@given(
    config=model_configs(),
    batch=st.integers(1, 4),
    length=st.integers(1, 90),
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=4),
)
@settings(max_examples=25)
def test_cached_decoding_gives_the_logits_of_the_full_forward(config, batch, length, chunks):
    model = torch_model(config, random_weights(config, length))
    x = token_ids(config, batch, length)
    np.testing.assert_allclose(
        logits(model, x, chunks), logits(model, x), atol=TOLERANCE, rtol=1e-4
    )


@given(
    config=model_configs(),
    batch=st.integers(1, 3),
    length=st.integers(2, 90),
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=4),
)
@settings(max_examples=15)
def test_absorbed_chunks_give_the_logits_of_the_full_forward(config, batch, length, chunks):
    model = torch_model(config, random_weights(config, length))
    x = token_ids(config, batch, length)
    expected = logits(model, x)
    with mock.patch.object(model_torch.LatentAttention, "_absorbing_is_cheaper", lambda *_: True):
        np.testing.assert_allclose(logits(model, x, chunks), expected, atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "left-padded"])
@given(
    length=st.integers(1, 80),
    before=st.integers(0, 40),
    groups=st.sampled_from([1, 2, 4]),
    widths=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_attention_of_any_widths_is_numpys(masked, length, before, groups, widths, seed):
    rng = np.random.default_rng(seed)
    before = before if masked else 0  # without a mask the first query is the first token
    total = before + length
    q, k, v = (
        rng.standard_normal((2, heads, n, width))
        for heads, n, width in (
            (4, length, widths[0]),
            (groups, total, widths[0]),
            (groups, total, widths[1]),
        )
    )
    allowed = np.tril(np.ones((length, total), bool), before)
    if masked:
        allowed[:, : before // 2] = False
    scores = q @ k.repeat(4 // groups, 1).swapaxes(-1, -2) * 0.3
    scores = np.where(allowed, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    expected = scores / scores.sum(-1, keepdims=True) @ v.repeat(4 // groups, 1)

    mask = torch.tensor(allowed)[None, None] if masked else None
    q, k, v = (torch.tensor(x).float() for x in (q, k, v))
    got = model_torch.attend(q, k, v, mask, 0.3)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("widths", [(24, 16), (16, 24)], ids=str)
def test_gradients_of_keys_wider_than_values_are_those_of_plain_products(widths):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 4, 40, w, dtype=torch.float64) for w in (widths[0], *widths)]
    weight = torch.randn(2, 4, 40, widths[1])

    def gradients(attention, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        (attention(*leaves) * weight.to(dtype)).sum().backward()
        return [leaf.grad.numpy() for leaf in leaves]

    def plain(q, k, v):
        above = torch.ones(40, 40, dtype=torch.bool).triu(1)
        return (q @ k.mT * 0.3).masked_fill(above, -torch.inf).softmax(-1) @ v

    got = gradients(lambda q, k, v: model_torch.attend(q, k, v, None, 0.3), torch.float32)
    for a, b in zip(got, gradients(plain, torch.float64)):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_cache_holds_latents_alone(loaded):
    ids = torch.tensor([[1, 2, 3]])
    cache = loaded(ids, use_cache=True).past_key_values
    assert cache.layers[0].keys.shape == (1, 1, 3, 16 + 8)
    assert cache.layers[0].values.numel() == 0


def test_parameters_are_those_of_the_table(loaded, folder):
    shapes = {k: tuple(v.shape) for k, v in loaded.state_dict().items() if k != "lm_head.weight"}
    assert shapes == parameter_shapes(checkpoint.ModelFolder(folder).config)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_a_folder_loads_by_its_own_code(loaded, folder):
    assert type(loaded).__module__.startswith("transformers_modules.")
    config = checkpoint.ModelFolder(folder).config
    x = token_ids(config, 2, 48)
    expected = build_model(config, checkpoint.ModelFolder(folder).weights(config))(x)
    np.testing.assert_allclose(logits(loaded, x), np.array(expected), atol=TOLERANCE)


def test_text_generation_pipeline(folder):
    generate = pipeline("text-generation", model=str(folder), trust_remote_code=True, device="cpu")
    (answer,) = generate("The st", max_new_tokens=5, do_sample=False)
    assert answer["generated_text"].startswith("The st")


def test_loss_is_that_of_the_shifted_tokens(loaded):
    ids = torch.randint(0, 257, (2, 20))
    with torch.no_grad():
        out = loaded(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def text_of(capsys, folder, *flags: str) -> str:
    """Greedy text of a folder by this project's command."""
    argv = ["--model", str(folder), "--prompt", "The st", "--max-tokens", "8", "--temp", "0"]
    assert generate.main([*argv, *flags]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_saved_by_transformers_is_whole(loaded, folder, shards, tmp_path, capsys):
    """Every tool takes it, also with its weights in several files, as those of large models are."""
    size = sum(p.numel() * p.element_size() for p in loaded.parameters())
    saved = tmp_path / "saved"
    loaded.save_pretrained(str(saved), max_shard_size=size // shards + 1)
    assert len(list(saved.glob("model*.safetensors"))) >= shards
    for name in ("model_mlx.py", "model_torch.py", "configuration_mla_gpt2.py", "tokenizer.json"):
        assert (saved / name).read_bytes() == (folder / name).read_bytes()
    again = AutoModelForCausalLM.from_pretrained(str(saved), trust_remote_code=True).eval()
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again(ids).logits, loaded(ids).logits, rtol=0, atol=0)

    stock, _ = by_mlx_lm(saved)
    np.testing.assert_allclose(
        np.array(stock(mx.array(ids.numpy()))), loaded(ids).logits.detach(), atol=TOLERANCE
    )
    expected = text_of(capsys, folder, "--backend", "mlx")
    for backend in ("mlx", "torch"):
        assert text_of(capsys, saved, "--backend", backend) == expected
    assert convert.main([str(saved), "--out", str(tmp_path / "one")]) == 0
    weights = checkpoint.ModelFolder(folder).weights()
    converted = checkpoint.ModelFolder(tmp_path / "one").weights(
        checkpoint.ModelFolder(folder).config
    )
    for name, values in weights.items():
        np.testing.assert_array_equal(converted[name], values)


def test_a_folder_without_one_of_its_shards_is_refused(loaded, tmp_path, capsys):
    saved = tmp_path / "saved"
    loaded.save_pretrained(str(saved), max_shard_size="50KB")
    lost = sorted(saved.glob("model-*.safetensors"))[1]
    lost.unlink()
    prompt = ["--prompt", "x", "--model", str(saved)]
    for command, argv in (
        (generate.main, [*prompt, "--backend", "torch"]),
        (generate.main, [*prompt, "--backend", "mlx"]),
        (convert.main, [str(saved), "--out", str(tmp_path / "out")]),
    ):
        line = refused(capsys, *argv, command=command)
        assert f"{lost}: no such file, and model.safetensors.index.json names it" in line


def test_saving_over_a_folder_leaves_no_checksums_of_the_old_one(folder, loaded, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    model = AutoModelForCausalLM.from_pretrained(str(copy), trust_remote_code=True)
    with torch.no_grad():
        model.transformer.ln_f.weight += 1
    model.save_pretrained(str(copy))
    assert (copy / "model_mlx.py").read_bytes() == (folder / "model_mlx.py").read_bytes()
    text_of(capsys, copy)  # not damaged


def test_a_model_made_from_a_configuration_is_saved_whole(folder, tmp_path):
    config = model_torch.MLAGPT2Config(**checkpoint.ModelFolder(folder).config.to_dict())
    made = model_torch.MLAGPT2LMHeadModel(config).eval()
    made.save_pretrained(str(tmp_path))
    AutoTokenizer.from_pretrained(str(folder)).save_pretrained(str(tmp_path))
    ids = torch.tensor([[5, 6, 7]])
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path), trust_remote_code=True).eval()
    torch.testing.assert_close(again(ids).logits, made(ids).logits, rtol=0, atol=0)
    stock, _ = by_mlx_lm(tmp_path)
    np.testing.assert_allclose(
        np.array(stock(mx.array(ids.numpy()))), made(ids).logits.detach(), atol=TOLERANCE
    )


def test_the_width_of_latents_of_several_widths_is_the_largest():
    shape = {"n_layer": 3, "n_head": 2, "n_embd": 32, "num_kv_shared_layers": 1}
    config = model_torch.MLAGPT2Config(kv_lora_ranks=[4, 8], **shape)
    assert config.kv_lora_rank == 8


@pytest.mark.parametrize("rope", [False, True])
def test_a_multi_head_model_saved_by_transformers_is_read(rope, tmp_path):
    position = "rope" if rope else "learned"
    config = ModelConfig(
        attention="mha", position_embedding_type=position, n_layer=1, n_head=2, n_embd=16,
        n_positions=32, vocab_size=257,
    ).resolved()  # fmt: skip
    src, saved = tmp_path / "src", tmp_path / "saved"
    src.mkdir()
    tokenizer = ByteTokenizer().fast_tokenizer()
    checkpoint.write_model(src, config, initial_weights(config, 0, 0.2), tokenizer, "")
    AutoModelForCausalLM.from_pretrained(str(src), trust_remote_code=True).save_pretrained(saved)
    read = checkpoint.ModelFolder(saved).config
    assert read.beyond_gpt2 == config.beyond_gpt2
    assert parameter_shapes(read) == parameter_shapes(config)


def test_where_the_mlx_model_is_lost_the_folder_does_not_name_it(folder, tmp_path):
    gone = tmp_path / "gone"
    shutil.copytree(folder, gone)
    model = AutoModelForCausalLM.from_pretrained(str(gone), trust_remote_code=True)
    shutil.rmtree(gone)
    model.save_pretrained(str(tmp_path / "saved"))
    assert "model_file" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(str(tmp_path / "saved"), trust_remote_code=True)


@pytest.mark.parametrize("cached", [False, True])
def test_hidden_states_are_what_the_blocks_read_and_the_last(loaded, cached):
    ids = torch.tensor([list(b"The stone")])
    read = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        for block in loaded.transformer.h
    ]
    out = loaded(ids, output_hidden_states=True, use_cache=cached)
    for hook in hooks:
        hook.remove()
    assert len(out.hidden_states) == loaded.config.n_layer + 1
    h = out.hidden_states
    torch.testing.assert_close(h[0], loaded.transformer.wte(ids), rtol=0, atol=0)  # it has RoPE
    for found, expected in zip(h, read):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(loaded.lm_head(h[-1]), out.logits, rtol=0, atol=0)
    assert loaded(ids).hidden_states is None
    loaded.config.output_hidden_states = True
    try:
        assert len(loaded(ids).hidden_states) == loaded.config.n_layer + 1
    finally:
        loaded.config.output_hidden_states = False
    assert isinstance(loaded(ids, return_dict=False), tuple)


def test_what_the_model_does_not_do_is_refused_by_name(loaded):
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        loaded(ids, output_attentions=True)
    for model in (loaded, loaded.transformer):
        with pytest.raises(TypeError, match="head_msk"):
            model(ids, head_msk=None)


def test_the_trainers_loss_is_over_all_its_accumulated_tokens(loaded):
    ids = torch.randint(0, 257, (2, 20))
    mean, divided = (
        loaded(ids, labels=ids).loss,
        loaded(ids, labels=ids, num_items_in_batch=76).loss,
    )
    torch.testing.assert_close(divided, mean / 2)
    # Else its evaluation waits for more labels, and reports no loss.
    assert find_labels(type(loaded)) == ["labels"]


class Packed(torch.Tensor):  # type: ignore[name-defined]
    """A weight stored in a form of its own that knows one product alone, as quantized ones do."""

    @staticmethod
    def __new__(cls, weight):
        shape, dtype = weight.shape, weight.dtype
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=weight.device)

    def __init__(self, weight):
        self.whole = weight

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            return function(args[0], args[1].whole, *args[2:])
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].whole)
        raise NotImplementedError(f"{function} of packed weights")


def test_weights_of_other_tensor_types_are_expanded(folder):
    model = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=True).eval()
    ids = mx.array([list(b"The stone")])
    expected = logits(model, ids)
    for block in model.transformer.h:
        weight = block.attn.kv_b_proj.weight.detach()
        block.attn.kv_b_proj.weight = torch.nn.Parameter(Packed(weight), requires_grad=False)
    np.testing.assert_allclose(logits(model, ids, [4]), expected, atol=TOLERANCE)


def test_offloaded_weights_are_expanded(folder):
    accelerate = pytest.importorskip("accelerate", reason="needs the extra named referees")
    model = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=True).eval()
    ids = mx.array([list(b"The stone")])
    expected = logits(model, ids)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.transformer.h[0].attn.kv_b_proj.weight.is_meta
    np.testing.assert_allclose(logits(model, ids, [4]), expected, atol=TOLERANCE)


def test_positions_past_the_table_are_refused(loaded):
    with pytest.raises(
        ValueError, match="49 tokens of context do not fit this model's n_positions=48"
    ):
        loaded(torch.zeros((1, 49), dtype=torch.long))


def test_a_row_past_the_table_ends_without_touching_its_batch(loaded, folder):
    """As in MLX: in a batch each row has its own positions, and one that is too long ends."""
    tokenizer = AutoTokenizer.from_pretrained(
        str(folder), padding_side="left", pad_token="<|endoftext|>"
    )
    prompts = ["The st", "x" * 46]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    many = {"max_new_tokens": 12, "do_sample": False}
    short = tokenizer(prompts[0], return_tensors="pt")
    alone = loaded.generate(**short, **many)[0, 6:].tolist()
    for use_cache in (True, False):
        together = loaded.generate(**batch, **many, use_cache=use_cache)[:, 46:].tolist()
        assert together[0][: len(alone)] == alone
        # Two tokens have their places in the table of 48, and one comes after the last of them.
        assert set(together[1][3:]) == {tokenizer.eos_token_id}
    ids = torch.randint(0, 257, (2, 50))
    where = torch.arange(50) - torch.tensor([[4], [0]])  # four tokens of padding before the first
    seen = (where >= 0).long()
    logits = loaded(ids, attention_mask=seen, position_ids=where.clamp(min=0)).logits
    torch.testing.assert_close(logits[:1, 4:], loaded(ids[:1, 4:]).logits)
    torch.testing.assert_close(logits[1:, :48], loaded(ids[1:, :48]).logits)
    ends = logits[1, 48:].softmax(-1)[:, tokenizer.eos_token_id]
    assert ends.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="49 tokens"):
        loaded.generate(**tokenizer(prompts[1], return_tensors="pt"), **many)


def test_a_folder_with_its_configuration_in_the_model_file_loads_too(folder, loaded, tmp_path):
    """As folders were written at first: one file for both classes, and `auto_map` naming it
    twice."""
    old = tmp_path / "old"
    with atomic_folder(old) as making:
        for path in folder.iterdir():
            if path.name not in ("configuration_mla_gpt2.py", "SHA256SUMS"):
                shutil.copy(path, making)
        model_file, configuration = making / "model_torch.py", folder / "configuration_mla_gpt2.py"
        line = "from .configuration_mla_gpt2 import MLAGPT2Config\n"
        assert line in model_file.read_text()
        model_file.write_text(model_file.read_text().replace(line, configuration.read_text()))
        values = json.loads((making / "config.json").read_text())
        values["auto_map"]["AutoConfig"] = "model_torch.MLAGPT2Config"
        (making / "config.json").write_text(json.dumps(values))
    again = AutoModelForCausalLM.from_pretrained(str(old), trust_remote_code=True).eval()
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again(ids).logits, loaded(ids).logits, rtol=0, atol=0)
    for backend in ("mlx", "torch"):
        flags = ["--prompt", "x", "--max-tokens", "2", "--backend", backend]
        assert generate.main(["--model", str(old), *flags]) == 0


def test_the_copied_files_are_the_packages(folder):

    for name in ("model_mlx.py", "model_torch.py", "configuration_mla_gpt2.py"):
        assert (folder / name).read_bytes() == (checkpoint.MODEL_FILES / name).read_bytes()
