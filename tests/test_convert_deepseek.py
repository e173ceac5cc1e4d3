"""`--to deepseek`: DeepSeek-V3's own code, in stock mlx-lm and transformers, gives our logits."""

import concurrent.futures

import pytest

torch = pytest.importorskip("torch")

import foreign
import mlx.core as mx
import mlx_lm
import numpy as np
from helpers import mlx_lm_server, random_weights, run_mlx_lm
from helpers import refused as refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM

from convert import __main__ as convert
from mlx_mla import checkpoint
from mlx_mla.backends import get_backend
from mlx_mla.backends.mlx.load import load
from mlx_mla.data.tokenizer import ByteTokenizer, set_end_ids
from mlx_mla.decoding.request import GenerationOptions
from mlx_mla.model.config import ModelConfig

SMALL = {
    "n_layer": 2,
    "n_head": 3,
    "n_embd": 48,
    "n_positions": 96,
    "vocab_size": 257,
    "norm": "rms_norm",
    "activation_function": "swiglu",
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
}
KINDS = {
    "plain": {},
    "latent_norm": {"latent_norm": True},
    "ranks": {"kv_lora_rank": None, "kv_lora_ranks": [20, 7]},
    "ranks_latent_norm": {"kv_lora_rank": None, "kv_lora_ranks": [7, 20], "latent_norm": True},
    "biases": {"attention_bias": True},
    "biases_latent_norm": {"attention_bias": True, "latent_norm": True},
    "out_bias": {"attention_out_bias": True},
    "q_lora_rank": {"q_lora_rank": 12, "attention_bias": True},
    "k_eq_v": {"attention_k_eq_v": True},
}
PROMPT, TOKENS = "The st", 24


def write(folder, dtype="float32", seed=0, edit=None, ends=(), **changes):
    """One of our folders with random weights, which `edit` may change, and a chat template."""
    config = ModelConfig(**{**SMALL, **changes}).resolved()
    weights = random_weights(config, seed)
    if edit is not None:
        edit(weights)
    tokenizer = ByteTokenizer().fast_tokenizer()
    tokenizer.chat_template = foreign.CHAT
    set_end_ids(tokenizer, list(ends))
    folder.mkdir(parents=True)
    checkpoint.write_model(folder, config, weights, tokenizer, "", dtype)
    return folder


def run(src, out, *flags):
    assert convert.main([str(src), "--out", str(out), "--to", "deepseek", *flags]) == 0
    return out


def of_ours(folder, ids, dtype=None):
    model = load(checkpoint.ModelFolder(folder), dtype)
    return np.array(model(mx.array(ids)).astype(mx.float32))


def of_mlx_lm(folder, ids, steps=None):
    """Logits of stock mlx-lm: of all tokens at once, or of some at a time with its cache."""
    model = mlx_lm.load(str(folder))[0]
    cache = None if steps is None else make_prompt_cache(model)
    parts = np.split(ids, np.cumsum(steps or []), axis=1)
    logits = [model(mx.array(part), cache=cache).astype(mx.float32) for part in parts if part.size]
    return np.concatenate([np.array(part) for part in logits], axis=1)


def of_transformers(folder, ids, steps=None):
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    assert type(model) is DeepseekV3ForCausalLM
    cache, logits = None, []
    with torch.inference_mode():
        for part in np.split(ids, np.cumsum(steps or []), axis=1):
            if part.size:
                out = model(torch.tensor(part), past_key_values=cache, use_cache=steps is not None)
                cache = out.past_key_values
                logits.append(out.logits.float())
    return torch.cat(logits, 1).numpy()


ENGINES = {"mlx-lm": of_mlx_lm, "transformers": of_transformers}


def some_ids(vocab_size=257, length=24):
    return np.random.default_rng(1).integers(0, vocab_size, (2, length))


@given(data=st.data())
@settings(max_examples=12)
def test_any_shape_gives_our_logits_whole_and_with_a_cache(data, tmp_path_factory):
    heads, layers = data.draw(st.sampled_from([1, 2, 5])), data.draw(st.integers(1, 3))
    ranks = st.lists(st.integers(1, 30), min_size=layers, max_size=layers)
    changes = {
        "n_layer": layers,
        "n_head": heads,
        "n_embd": heads * data.draw(st.sampled_from([8, 18])),
        "n_inner": data.draw(st.sampled_from([None, 7])),
        "kv_lora_rank": None,
        "kv_lora_ranks": data.draw(st.none() | ranks),
        "q_lora_rank": data.draw(st.sampled_from([None, 6])),
        "qk_rope_head_dim": data.draw(st.sampled_from([2, 8])),
        "head_dim": data.draw(st.sampled_from([None, 10])),
        "v_head_dim": data.draw(st.sampled_from([None, 6, 24])),
        "rope_theta": data.draw(st.sampled_from([100.0, 10000.0, 1e6])),
        "layer_norm_epsilon": data.draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        **{
            name: data.draw(st.booleans())
            for name in (
                *("latent_norm", "attention_bias", "attention_out_bias"),
                "tie_word_embeddings",
            )
        },
    }
    place = tmp_path_factory.mktemp("any")
    src = write(place / "src", seed=data.draw(st.integers(0, 9)), **changes)
    out, ids = run(src, place / "out"), some_ids()
    expected = of_ours(src, ids)
    for of_engine in ENGINES.values():
        for steps in (None, [9, 1, 1, 4]):
            np.testing.assert_allclose(of_engine(out, ids, steps), expected, atol=1e-4, rtol=0)


def test_latents_without_an_up_projection(tmp_path):
    src = write(tmp_path / "src", **KINDS["k_eq_v"])
    out, ids = run(src, tmp_path / "out"), some_ids()
    for of_engine in ENGINES.values():
        got = of_engine(out, ids, [9, 1, 1])
        np.testing.assert_allclose(got, of_ours(src, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("factor", [2.0**12, 2.0**-12])
def test_latents_of_any_size(factor, tmp_path):
    def edit(weights):
        weights["transformer.h.1.attn.c_attn.weight"][-28:-8] *= factor
        weights["transformer.h.1.attn.kv_b_proj.weight"] /= factor

    src = write(tmp_path / "src", edit=edit)
    out, ids = run(src, tmp_path / "out"), some_ids()
    for of_engine in ENGINES.values():
        np.testing.assert_allclose(of_engine(out, ids), of_ours(src, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_costs_what_it_costs_ours(kind, engine, tmp_path):
    """Root mean square error, beside the same weights in float32."""
    src = write(tmp_path / "src", "bfloat16", **KINDS[kind])
    out, ids = run(src, tmp_path / "out"), some_ids(length=64)
    exact = of_ours(src, ids, "float32")
    error, own = (
        np.sqrt(np.mean((logits - exact) ** 2))
        for logits in (ENGINES[engine](out, ids), of_ours(src, ids))
    )
    assert 0 < error < 1.4 * own


def test_float16_holds_a_model_with_latent_norm(tmp_path, capsys):
    src = write(tmp_path / "src", latent_norm=True)
    out, ids = run(src, tmp_path / "out", "--dtype", "float16"), some_ids()
    for of_engine in ENGINES.values():
        np.testing.assert_allclose(of_engine(out, ids), of_ours(src, ids), atol=0.1, rtol=0)
    src = write(tmp_path / "other", "float16")
    line = refusal(capsys, src, "--out", tmp_path / "no", "--to", "deepseek", command=convert.main)
    assert "numbers smaller than float16 has; use --dtype bfloat16" in line


def test_the_cache_holds_our_latents_and_no_more(tmp_path):
    src = write(tmp_path / "src")
    out, ids = run(src, tmp_path / "out"), mx.array(some_ids())
    caches = []
    for model in (mlx_lm.load(str(out))[0], load(checkpoint.ModelFolder(src))):
        caches.append(make_prompt_cache(model))
        model(ids, cache=caches[-1])
    for their_layer, our_layer in zip(*caches, strict=True):
        theirs = their_layer.keys, their_layer.values  # the latents, and the RoPE keys
        both = np.concatenate([np.array(x) for x in theirs], axis=-1)
        np.testing.assert_allclose(both, np.array(our_layer.keys), atol=1e-4, rtol=1e-5)
    assert not list(out.glob("*.py"))


def greedy(folder) -> str:
    """Our own greedy text."""
    options = GenerationOptions(temp=0, max_tokens=TOKENS)
    decoder = get_backend("mlx").decoder(checkpoint.ModelFolder(folder))
    pieces = decoder.stream(list(PROMPT.encode()), options)
    return "".join(piece.text for piece in pieces)


def likely(weights):
    """The likeliest tokens are ASCII, so texts can be compared; rows of padding are likelier."""
    embedding = weights["transformer.wte.weight"]
    embedding[:33], embedding[127:257] = 0, 0
    embedding[257:] *= 30


PADDED = {"vocab_size": 300, "edit": likely}


def test_greedy_text_its_end_and_the_chat_template_are_ours(tmp_path):
    src = write(tmp_path / "src", ends=[7], **PADDED)
    out = run(src, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(str(out))
    model = AutoModelForCausalLM.from_pretrained(str(out))
    assert model.generation_config.eos_token_id == [256, 7]
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 96
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    got = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(got) == greedy(src)
    chat = [{"role": "user", "content": "hi"}]
    ours = checkpoint.ModelFolder(src).tokenizer
    assert tokenizer.apply_chat_template(chat) == ours.apply_chat_template(chat)
    model, wrapped = mlx_lm.load(str(out))[:2]
    assert wrapped.eos_token_ids == {256, 7}
    assert mlx_lm.generate(model, wrapped, PROMPT, max_tokens=TOKENS) == greedy(src)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {
                "attention": "mha",
                "kv_lora_rank": None,
                "qk_rope_head_dim": 0,
                "position_embedding_type": "rope",
            },
            "--attention mha",
        ),
        ({"qk_rope_head_dim": 0}, "--qk-rope-head-dim 0"),
        ({"norm": "layer_norm", "mlp_bias": False}, "--norm layer_norm"),
        ({"activation_function": "gelu"}, "--activation-function gelu"),
        ({"mlp_bias": True}, "--mlp-bias True"),
        ({"num_kv_shared_layers": 1}, "--num-kv-shared-layers 1"),
        ({"n_layer": 62, "n_embd": 6}, "--n-layer 62 (at most 61)"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_name(changes, named, tmp_path, capsys):
    src = write(tmp_path / "src", **changes)
    flags = ("--out", tmp_path / "out", "--to", "deepseek")
    line = refusal(capsys, src, *flags, command=convert.main)
    assert line.endswith(f"and this model has {named}\n")
    assert [f.name for f in tmp_path.iterdir()] == ["src"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Ours and DeepSeek's; the widths are multiples of mlx-lm's quantization group, 64."""
    place = tmp_path_factory.mktemp("stock")
    widths = {"n_embd": 128, "n_head": 2, "kv_lora_rank": 64, "qk_rope_head_dim": 16}
    src = write(place / "src", **PADDED, **widths)
    return src, run(src, place / "out")


def generated(folder) -> str:
    flags = ("--model", folder, "--temp", 0, "--max-tokens", TOKENS, "--prompt", PROMPT)
    text = run_mlx_lm("generate", *flags, "--ignore-chat-template").stdout
    return text.split("==========\n")[1].removesuffix("\n")


@pytest.mark.slow
def test_mlx_lm_generates_without_trust(folders):
    ours, theirs = folders
    assert generated(theirs).strip() == greedy(ours).strip()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_by_mlx_lm_it_stays_close(bits, folders, tmp_path):
    ours, theirs = folders
    out = tmp_path / "quantized"
    run_mlx_lm("convert", "--hf-path", theirs, "--mlx-path", out, "-q", "--q-bits", bits)
    size = (out / "model.safetensors").stat().st_size
    assert size < (0.25 if bits == 4 else 0.4) * (theirs / "model.safetensors").stat().st_size
    assert generated(out)
    ids = some_ids()
    exact, got = of_ours(ours, ids)[..., :257], of_mlx_lm(out, ids)
    # What the same bits cost our own folder.
    own = tmp_path / "own"
    flags = ("--trust-remote-code", "-q", "--q-bits", bits)
    run_mlx_lm("convert", "--hf-path", ours, "--mlx-path", own, *flags)
    cost = np.sqrt(np.mean((of_ours(own, ids)[..., :257] - exact) ** 2))
    assert 0 < np.sqrt(np.mean((got - exact) ** 2)) < 1.4 * cost


@pytest.mark.slow
def test_mlx_lm_batch_and_a_saved_prompt_cache(folders, tmp_path):
    ours, theirs = folders
    model, tokenizer = mlx_lm.load(str(theirs))[:2]
    prompts = [list(PROMPT.encode()), list(b"A rather longer beginning of"), list(b"x")]
    together = mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=TOKENS).texts
    alone = [mlx_lm.generate(model, tokenizer, p, max_tokens=TOKENS) for p in prompts]
    assert together == alone
    assert alone[0] == greedy(ours)
    cache = make_prompt_cache(model)
    model(mx.array([prompts[0][:-1]]), cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    again = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    last = mx.array(prompts[0][-1:])
    steps = generate_step(last, model, max_tokens=TOKENS, prompt_cache=again)
    assert tokenizer.decode([int(token) for token, _ in steps]) == greedy(ours)


@pytest.mark.slow
def test_mlx_lm_server_answers_three_at_once_as_it_answers_each(folders):
    prompts = [PROMPT, "A rather longer beginning of", "x"]
    with mlx_lm_server(folders[1]) as ask:
        alone = [ask(prompt) for prompt in prompts]
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            assert list(pool.map(ask, prompts)) == alone
    assert all(alone)
    assert alone[0] == greedy(folders[0])[: len(alone[0])]


@pytest.mark.slow
def test_smollm2(smollm2_mla, tmp_path):
    out = run(smollm2_mla, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(str(out))
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    expected = of_ours(smollm2_mla, [ids])
    for of_engine in ENGINES.values():
        # Logits reach 30 here; ours in PyTorch and in MLX differ by as much.
        got = of_engine(out, np.array([ids]))
        np.testing.assert_allclose(got, expected, atol=5e-4, rtol=0)
    decoder = get_backend("mlx").decoder(checkpoint.ModelFolder(smollm2_mla))
    pieces = decoder.stream(ids, GenerationOptions(temp=0, max_tokens=TOKENS))
    text = "".join(piece.text for piece in pieces)
    model, wrapped = mlx_lm.load(str(out))[:2]
    assert mlx_lm.generate(model, wrapped, ids, max_tokens=TOKENS) == text
