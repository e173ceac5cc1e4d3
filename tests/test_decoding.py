"""What decoding keeps and how: cache sizes, prompt-cache files, draft models, `--cache auto`, what
is not computed."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from helpers import edit, greedy, objects, refused, tiny_train, words
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, trim_prompt_cache

from mlx_mla import checkpoint, generate
from mlx_mla.backends import get_backend
from mlx_mla.backends.mlx import prompt_cache
from mlx_mla.backends.mlx.caches import QuantizedKVCache
from mlx_mla.backends.mlx.load import build_model
from mlx_mla.decoding.request import GenerationOptions, cache_of
from mlx_mla.errors import UserError
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.presets import preset
from mlx_mla.model.weights import initial_weights


@pytest.fixture(scope="module")
def quantizable(tmp_path_factory, text_file):
    """Latents 64 wide; learned positions."""
    out = tmp_path_factory.mktemp("runs") / "quantizable"
    shape = ("--n-embd", "64", "--kv-lora-rank", "64", "--qk-rope-head-dim", "0", "--steps", "30")
    tiny_train(out, *shape, "--data", text_file)
    return checkpoint.latest(out)


def bytes_per_token(model, cache) -> float:
    """Of one layer, from a real cache that is full."""
    model(mx.zeros((1, 256), mx.int32), cache=cache)
    return cache[0].nbytes / 256


@pytest.mark.parametrize(
    ("name", "bits", "expected"),
    [
        ("gpt2-124m", None, 3072), ("mla-124m", None, 768), ("mla-124m-r128", None, 256),
        ("mla-124m-r128", 8, 136), ("mla-124m-r128", 4, 72),
    ],
)  # fmt: skip
def test_bytes_per_token_of_context_in_bfloat16(name, bits, expected):
    shape = preset(name).resolved().model.to_dict() | {"n_layer": 1, "kv_lora_ranks": None}
    config = ModelConfig(**shape).resolved()
    model = build_model(config, initial_weights(config, 0))
    model.set_dtype(mx.bfloat16)
    cache = make_prompt_cache(model) if bits is None else [QuantizedKVCache(64, bits)]
    assert bytes_per_token(model, cache) == expected


# --- what is not computed ---


def test_prompts_have_no_logits_but_the_last_ones():
    """Logits of this prompt would take 1,000 times the memory that the model works with."""
    config = ModelConfig(
        n_layer=1, n_head=1, n_embd=8, n_positions=1024, vocab_size=50_000
    ).resolved()
    model = build_model(config, initial_weights(config, 0))
    prompt = [1] * 1000
    whole = len(prompt) * 50_000 * 4

    def peak(action) -> int:
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        action()
        return mx.get_peak_memory() - before

    assert peak(lambda: mx.eval(model(mx.array([prompt])))) >= whole
    assert peak(lambda: next(generate_step(mx.array(prompt), model, max_tokens=1))) < whole / 5

    def batch() -> None:
        generator = BatchGenerator(model)
        generator.insert([prompt, prompt[:700]], [2, 2])
        generator.next_generated()
        generator.close()

    assert peak(batch) < whole / 5


def test_a_step_does_not_copy_the_cache():
    config = ModelConfig(
        n_layer=1, n_head=1, n_embd=8, kv_lora_rank=256, n_positions=16_384, vocab_size=8
    ).resolved()
    model = build_model(config, initial_weights(config, 0))
    cache = make_prompt_cache(model)
    steps = generate_step(
        mx.zeros((16_000,), mx.int32),
        model,
        max_tokens=20,
        prompt_cache=cache,
        prefill_step_size=256,
    )
    for _ in range(3):
        next(steps)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(10):
        next(steps)
    assert mx.get_peak_memory() - before < cache[0].nbytes / 4


# --- prompt-cache files ---


@pytest.mark.parametrize("bits", [None, 8])
def test_a_saved_context_goes_on_as_if_it_had_never_ended(quantizable, tmp_path, capfd, bits):
    argv = ("--model", quantizable, "--temp", "0", *(("--kv-bits", bits) if bits else ()))
    file = tmp_path / "context.safetensors"
    (first,) = objects(
        capfd, *argv, "--prompt", "The st", "--max-tokens 9 --save-prompt-cache", file
    )
    context = list(b"The st") + first["token_ids"]
    cache = load_prompt_cache(str(file))
    assert cache[0].offset == len(context)
    (whole,) = objects(capfd, *argv, "--prompt", "The st", "--max-tokens", "21")
    assert whole["token_ids"][:9] == first["token_ids"]
    (rest,) = objects(capfd, *argv, "--prompt", "", "--prompt-cache", file, "--max-tokens", "12")
    if bits is None:  # else the last bits of what is quantized depend on how it was read
        assert rest["token_ids"] == whole["token_ids"][9:]
    # Text after it, and saved once more.
    more = tmp_path / "more.safetensors"
    argv = (*argv, "--max-tokens", "5")
    (after,) = objects(
        capfd, *argv, "--prompt", " and", "--prompt-cache", file, "--save-prompt-cache", more
    )
    decoder = get_backend("mlx").decoder(checkpoint.ModelFolder(quantizable))
    expected = greedy(decoder, context + list(b" and"), 5, kv_bits=bits)
    if bits is None:
        assert after["token_ids"] == expected
    assert load_prompt_cache(str(more))[0].offset == len(context) + 4 + 5


def test_a_prompt_cache_whose_tokens_or_values_were_changed_is_refused(folder, tmp_path, capfd):
    file = tmp_path / "context.safetensors"
    objects(capfd, "--model", folder, "--prompt", "The st", "--save-prompt-cache", file)
    of_model = checkpoint.ModelFolder(checkpoint.model_folder(folder))
    whole = file.read_bytes()
    at = whole.index(b"[84, 104, 101")
    swapped = whole.replace(b"[84, 104, 101", b"[84, 101, 104")
    later = whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:]
    assert at > 0
    for damaged in (swapped, later):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged \(its sha256 differs"):
            prompt_cache.load(file, of_model, mx.float32)
    length = int.from_bytes(swapped[:8], "little")
    header = json.loads(swapped[8 : 8 + length])
    (seal,) = (key for key in header["__metadata__"] if key.endswith(".sha256"))
    del header["__metadata__"][seal]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + swapped[8 + length :])
    with pytest.raises(UserError, match="has no sha256, with which it can be checked"):
        prompt_cache.load(file, of_model, mx.float32)
    file.write_bytes(whole)
    _, tokens = prompt_cache.load(file, of_model, mx.float32)
    assert bytes(tokens[:6]) == b"The st"


def test_a_text_that_stops_early_is_saved_up_to_there(folder, tmp_path, capfd):
    argv = ("--model", folder, "--prompt", "The st", "--temp", "0")
    text = objects(capfd, *argv)[0]["text"]
    file = tmp_path / "context.safetensors"
    (stopped,) = objects(capfd, *argv, "--stop", text[8:10], "--save-prompt-cache", file)
    assert load_prompt_cache(str(file))[0].offset == 6 + stopped["tokens"]


def test_prompt_caches_are_as_much_smaller_on_disk_as_in_memory(tmp_path):
    sizes = {}
    for name, shape in {
        "mha": {"attention": "mha"},
        "r96": {"kv_lora_rank": 96},
        "r32": {"kv_lora_rank": 32},
    }.items():
        config = ModelConfig(
            n_layer=2, n_head=2, n_embd=192, n_positions=512, vocab_size=257, **shape
        ).resolved()
        decoder = decoder_of(tmp_path / name, config)
        options = GenerationOptions(
            temp=0, max_tokens=1, save_prompt_cache=tmp_path / f"{name}.safetensors"
        )
        list(decoder.stream([1] * 300, options))
        sizes[name] = options.save_prompt_cache.stat().st_size
    # 301 tokens, not the 512 there is room for.
    assert 301 * 2 * 384 * 4 < sizes["mha"] < 301 * 2 * 384 * 4 + 10_000
    assert sizes["mha"] / sizes["r96"] == pytest.approx(4, rel=0.02)
    assert sizes["mha"] / sizes["r32"] == pytest.approx(12, rel=0.05)


def decoder_of(folder, config):
    from mlx_mla.data.tokenizer import ByteTokenizer

    folder.mkdir()
    checkpoint.write_model(
        folder, config, initial_weights(config, 0, 0.2), ByteTokenizer().fast_tokenizer(), ""
    )
    return get_backend("mlx").decoder(checkpoint.ModelFolder(folder))


def test_a_loaded_cache_can_be_trimmed(folder, tmp_path, capfd):
    file = tmp_path / "context.safetensors"
    argv = ("--model", folder, "--temp", "0", "--max-tokens", "12")
    (first,) = objects(capfd, *argv, "--prompt", "The st", "--save-prompt-cache", file)
    cache = load_prompt_cache(str(file))
    trim_prompt_cache(cache, 12)
    decoder = get_backend("mlx").decoder(checkpoint.ModelFolder(folder))
    steps = generate_step(
        mx.array(first["token_ids"][:1]), decoder.model, max_tokens=5, prompt_cache=cache
    )
    assert [int(token) for token, _ in steps] == first["token_ids"][1:6]


def test_prompt_caches_of_other_models_and_broken_ones_are_refused(
    folder, quantizable, tmp_path, capsys
):
    file, base = (
        tmp_path / "context.safetensors",
        ("--prompt", "x", "--max-tokens", "2", "--temp", "0"),
    )
    assert generate.main(["--model", str(folder), *base, "--save-prompt-cache", str(file)]) == 0

    def no(*argv, model=folder):
        return refused(capsys, "--model", model, *base, *argv, command=generate.main)

    said = no("--prompt-cache", file, model=quantizable)
    assert "is of another model" in said and "latents 16 wide" in said and "latents 64 wide" in said
    # The same shape, trained one step further: other weights.
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "SHA256SUMS").unlink()
    weights = checkpoint.ModelFolder(folder).weights()
    weights = {name: w * np.float32(1.01) for name, w in weights.items()}
    checkpoint._save_tensors(other / "model.safetensors", weights)
    assert "is of another model" in no("--prompt-cache", file, model=other)
    # Truncated anywhere.
    for size in (0, 5, 500, file.stat().st_size - 1):
        short = tmp_path / "short.safetensors"
        short.write_bytes(file.read_bytes()[:size])
        assert "it may be truncated" in no("--prompt-cache", short)
    assert "no such file; --save-prompt-cache writes one" in no(
        "--prompt-cache", tmp_path / "none.safetensors"
    )
    assert "has no fingerprint, with which it can" in no(
        "--prompt-cache", folder / "model.safetensors"
    )
    assert "must end in .safetensors" in no("--save-prompt-cache", tmp_path / "x.bin")
    assert "is not a folder" in no("--save-prompt-cache", tmp_path / "none" / "x.safetensors")
    assert "files keep latents" in no("--prompt-cache", file, "--cache", "materialized")
    for name in ("--prompt-cache", "--save-prompt-cache"):
        assert "need a cache, not --cache none" in no(name, file, "--cache", "none")
    # A context past n_positions, counting what the file holds.
    full = tmp_path / "full.safetensors"
    save = ("--model", folder, "--prompt", "x" * 40, "--save-prompt-cache", full)
    assert generate.main(words(*save)) == 0
    assert "n_positions=48" in no("--prompt-cache", full)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n")
    argv = ("--model", folder, "--prompts-file", prompts, "--prompt-cache", file)
    assert "take one --prompt" in refused(capsys, *argv, command=generate.main)


def test_bits_of_a_quantized_file_are_its_own(quantizable, tmp_path, capsys):
    file = tmp_path / "context.safetensors"
    base = ("--model", quantizable, "--prompt", "x", "--max-tokens", "2", "--kv-bits")
    assert generate.main([*map(str, base), "8", "--save-prompt-cache", str(file)]) == 0
    said = refused(capsys, *base, "4", "--prompt-cache", file, command=generate.main)
    assert "has 8 bits per value; leave out --kv-bits 4" in said


def test_fingerprints_tell_models_apart(folder, quantizable):
    prints = [checkpoint.ModelFolder(f).fingerprint for f in (folder, quantizable, folder)]
    assert prints[0] == prints[2] != prints[1]


# --- draft models ---


@pytest.fixture(scope="module")
def draft(tmp_path_factory, text_file):
    """Guesses some tokens right: trained on the same text, and smaller."""
    out = tmp_path_factory.mktemp("runs") / "draft"
    shape = ("--n-layer", "1", "--n-embd", "16", "--steps", "30")
    tiny_train(out, *shape, "--data", text_file)
    return out


@pytest.mark.parametrize("cache", ["latent", pytest.param("materialized", marks=pytest.mark.slow)])
def test_greedy_text_with_a_draft_model_is_the_same(folder, draft, capfd, tmp_path, cache):
    argv = ("--model", folder, "--prompt", "The st", "--temp", "0", "--cache", cache)
    (alone,) = objects(capfd, *argv)
    for guesses in (1, 3, 7):
        (helped,) = objects(capfd, *argv, "--draft-model", draft, "--num-draft-tokens", guesses)
        assert helped["token_ids"] == alone["token_ids"]
        assert 0 <= helped["accepted_draft_tokens"] < helped["tokens"]
    # A model that guesses for itself is always right.
    (helped,) = objects(capfd, *argv, "--draft-model", folder)
    assert helped["token_ids"] == alone["token_ids"]
    assert helped["accepted_draft_tokens"] >= 30
    if cache == "latent":
        file = tmp_path / "context.safetensors"
        (first,) = objects(
            capfd, *argv, "--draft-model", draft, "--max-tokens 11 --save-prompt-cache", file
        )
        argv = words(
            "--model", folder, "--prompt", "", "--temp 0 --prompt-cache", file, "--draft-model",
            draft,
        )  # fmt: skip
        (rest,) = objects(capfd, *argv)
        assert first["token_ids"] + rest["token_ids"] == alone["token_ids"]


@pytest.mark.parametrize("bits", [(), ("--kv-bits", 8)], ids=["whole", "quantized"])
@pytest.mark.parametrize("penalty", [(), ("--repetition-penalty", 1.8)], ids=["plain", "penalty"])
def test_no_draft_and_no_saved_context_changes_a_text(
    quantizable, draft, bits, penalty, tmp_path, capfd
):
    argv = ("--model", quantizable, "--temp 0", *bits, *penalty)
    helped, file = ("--draft-model", draft), tmp_path / "context.safetensors"
    expected = objects(capfd, *argv, "--prompt", "the st", "--max-tokens 16")[0]["token_ids"]
    for more in ((), helped):
        (first,) = objects(
            capfd, *argv, *more, "--prompt", "the st", "--max-tokens 7 --save-prompt-cache", file
        )
        (rest,) = objects(
            capfd, *argv, *more, "--prompt", "", "--max-tokens 9 --prompt-cache", file
        )
        assert first["token_ids"] + rest["token_ids"] == expected
        width = prompt_cache.load(file, checkpoint.ModelFolder(quantizable), mx.float32)[0][0]
        assert isinstance(width, QuantizedKVCache) == bool(bits)


def test_a_place_for_a_context_is_looked_at_before_the_text(folder, tmp_path, capsys):
    (tmp_path / "there.safetensors").mkdir()
    argv = ("--model", folder, "--prompt", "a", "--save-prompt-cache")
    assert "cannot be written" in refused(
        capsys, *argv, tmp_path / "there.safetensors", command=generate.main
    )
    assert capsys.readouterr().out == ""


def test_draft_models_that_cannot_guess_are_refused(folder, draft, tmp_path, capsys, shared_data):
    from mlx_mla.data.tokenizer import GPT2Tokenizer

    def no(*argv):
        return refused(capsys, "--model", folder, "--prompt", "x", *argv, command=generate.main)

    other = tmp_path / "other"
    shutil.copytree(checkpoint.latest(draft), other)
    (other / "SHA256SUMS").unlink()
    edit(other / "config.json", n_positions=20)
    assert "n_positions=20, and prompt and text together take 48" in no("--draft-model", other)
    GPT2Tokenizer(shared_data / "gpt2_bpe").fast_tokenizer().save_pretrained(str(other))
    assert "has another vocabulary (50257 tokens, the model 257)" in no("--draft-model", other)
    assert "no such folder" in no("--draft-model", tmp_path / "none")
    assert "--num-draft-tokens must be at least 1" in no(
        "--draft-model", draft, "--num-draft-tokens 0"
    )
    assert "need a cache" in no("--draft-model", draft, "--cache", "none")


def test_pytorch_says_what_only_mlx_lm_has(folder, draft, tmp_path, capsys):
    pytest.importorskip("torch")
    base = ("--model", folder, "--prompt", "x", "--backend", "torch")
    for name, value in (
        ("draft-model", draft),
        ("prompt-cache", "x.safetensors"),
        ("save-prompt-cache", "x"),
    ):
        assert f"--{name} works only with --backend mlx" in refused(
            capsys, *base, f"--{name}", value, command=generate.main
        )


# --- --cache ---


@pytest.mark.parametrize(
    ("name", "caches"),
    [
        ("mla-124m", {"latent": "latent", "auto": "latent", "materialized": "materialized"}),
        ("mla-124m-tied", {"latent": "latent", "auto": "latent", "materialized": "latent"}),
        ("gpt2-124m", {"latent": "materialized", "auto": "materialized"}),
    ],
)
def test_a_model_decodes_with_the_cache_that_it_has(name, caches):
    config = preset(name).resolved().model
    for asked, expected in {**caches, "none": "none"}.items():
        assert cache_of(config, asked) == expected


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_auto_is_latent(folder, backend, capfd):
    if backend == "torch":
        pytest.importorskip("torch")
    argv = ("--model", folder, "--prompt", "The st", "--temp", "0", "--max-tokens", "4")
    (auto,) = objects(capfd, *argv, "--backend", backend, "--cache", "auto")
    assert auto["cache"] == "latent"
