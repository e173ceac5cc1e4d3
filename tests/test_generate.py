"""`python -m mlx_mla.generate`: options, caches, batches, refusals, and stock mlx-lm on the same
folder."""

import io
import shutil
from unittest.mock import ANY

import pytest
from helpers import TINY, edit, objects, refused, run_mlx_lm, tiny_train, words

from mlx_mla import checkpoint, generate, train
from mlx_mla.backends import get_backend
from mlx_mla.decoding.request import GenerationOptions


@pytest.fixture(scope="module")
def learned_run(tmp_path_factory, text_file):
    """Learned positions, and a vocabulary with rows that stand for no token."""
    out = tmp_path_factory.mktemp("runs") / "learned"
    argv = words(*TINY, "--qk-rope-head-dim 0 --vocab-size 320 --data", text_file, "--out", out)
    assert train.main([*argv, "--steps", "15"]) == 0
    return out


def test_json_has_the_documented_keys(folder, capfd):
    (answer,) = objects(capfd, "--model", folder, "--prompt", "The", "--max-tokens", "5")
    assert {
        "text", "tokens", "prompt_tokens", "prompt_tps", "generation_tps", "ttft_ms",
        "kv_cache_bytes", "peak_memory_bytes", "backend", "cache",
    } <= answer.keys()  # fmt: skip
    assert (answer["tokens"], answer["prompt_tokens"], answer["cache"]) == (5, 3, "latent")
    assert answer["finish_reason"] == "length"


def test_text_streams_to_stdout_and_figures_to_stderr(folder, capfd):
    argv = words("--model", folder, "--prompt The --max-tokens 7 --temp 0")
    assert generate.main(argv) == 0
    out, err = capfd.readouterr()
    (answer,) = objects(capfd, *argv)
    assert out == answer["text"] + "\n"
    assert err.count("\n") == 1
    assert "3 prompt tokens" in err
    assert "7 tokens" in err


def test_streamed_text_is_the_decoded_tokens(folder):
    decoder = get_backend("mlx").decoder(checkpoint.ModelFolder(folder))
    for seed in range(5):
        # Hot: bytes that are not UTF-8.
        options = GenerationOptions(temp=3.0, seed=seed, max_tokens=40)
        pieces = list(decoder.stream([84, 104], options))
        tokens = [t for p in pieces for t in p.token_ids if t != 256]
        assert "".join(p.text for p in pieces) == decoder.tokenizer.decode(tokens)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_sampling_is_seeded_and_options_narrow_it(folder, capfd, backend):
    argv = ("--model", folder, "--prompt", "The st", "--max-tokens 30 --backend", backend)
    a, b, c = (objects(capfd, *argv, "--temp 1 --seed", seed)[0]["text"] for seed in (1, 1, 2))
    assert a == b != c
    greedy = objects(capfd, *argv, "--temp", "0")[0]["text"]
    for narrow in (("--top-k", "1"), ("--top-p", "0.000001"), ("--min-p", "1")):
        assert objects(capfd, *argv, "--temp", "1", *narrow)[0]["text"] == greedy
    penalized = objects(capfd, *argv, "--temp", "0", "--repetition-penalty", "5")[0]
    assert len(set(penalized["token_ids"])) > len(set(greedy.encode()))


def test_a_stop_string_ends_the_text_before_it(folder, capfd):
    argv = ("--model", folder, "--prompt", "The st", "--temp", "0")
    whole = objects(capfd, *argv)[0]["text"]
    stop = whole[10:13]
    (answer,) = objects(capfd, *argv, "--stop", "never", stop)
    assert answer["text"] == whole[: whole.find(stop)]
    assert answer["finish_reason"] == "stop"
    # A beginning of the stop string that does not continue is ordinary text.
    assert objects(capfd, *argv, "--stop", whole[-1] + "\x00")[0]["text"] == whole


def test_a_batch_gives_each_prompt_its_own_text(folder, tmp_path, capfd):
    prompts = ["The", "A much longer prompt of words", "x", "def f(self)"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts) + "\n\n")
    argv = ("--model", folder, "--max-tokens", "15", "--temp", "0")
    together = objects(capfd, *argv, "--prompts-file", file)
    assert [a["prompt"] for a in together] == prompts
    for prompt, answer in zip(prompts, together):
        assert answer["text"] == objects(capfd, *argv, "--prompt", prompt)[0]["text"]
        assert answer["tokens"] == 15
    file.write_text("The\n")  # also a file of one
    assert objects(capfd, *argv, "--prompts-file", file) == [
        {**together[0], **{k: ANY for k in together[0] if k.endswith(("_tps", "_ms", "_bytes"))}}
    ]
    file.write_text("\n".join(prompts))
    stop = together[1]["text"][3:5]
    stopped = objects(capfd, *argv, "--prompts-file", file, "--stop", stop)
    for with_stop, without in zip(stopped, together):
        assert with_stop["text"] == without["text"].split(stop)[0]


def test_prompts_may_come_from_stdin_or_be_empty(folder, monkeypatch, capfd):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"The st")))
    argv = ("--model", folder, "--max-tokens", "5", "--temp", "0")
    assert objects(capfd, *argv, "--prompt", "-")[0]["prompt_tokens"] == 6
    assert objects(capfd, *argv, "--prompt", "")[0]["prompt_tokens"] == 1


@pytest.mark.parametrize("cache", ["latent", "materialized", "none"])
def test_max_kv_size_goes_on_past_the_context(folder, capfd, cache):
    argv = ("--model", folder, "--prompt", "The st", "--temp", "0", "--cache", cache)
    (answer,) = objects(capfd, *argv, "--max-tokens", "100", "--max-kv-size", "48")
    assert answer["tokens"] == 100
    # Up to the limit it is the plain continuation; after it, that of the newest half.
    plain = objects(capfd, *argv)[0]["token_ids"]
    assert answer["token_ids"][: len(plain)] == plain
    half = bytes((list(b"The st") + plain)[-24:]).decode()
    (rest,) = objects(capfd, "--model", folder, "--prompt", half, "--temp 0 --max-tokens 20")
    assert answer["token_ids"][len(plain) :][:20] == rest["token_ids"]


def test_quantized_cache_runs_in_fewer_bytes(tmp_path, text_file, capfd):
    out = tmp_path / "run"
    shape = ("--n-embd", "64", "--kv-lora-rank", "64", "--qk-rope-head-dim", "0", "--steps", "2")
    tiny_train(out, *shape, "--data", text_file)
    argv = ("--model", out, "--prompt", "The st", "--temp", "0", "--max-tokens", "10")
    sizes = {
        bits: objects(capfd, *argv, *(("--kv-bits", bits) if bits else ()))[0]["kv_cache_bytes"]
        for bits in (None, 8, 4)
    }
    assert sizes[4] < sizes[8] < sizes[None]


def test_padding_rows_of_the_vocabulary_are_never_sampled(learned_run, capfd):
    for seed in range(4):
        argv = ("--model", learned_run, "--prompt", "T", "--temp", "50", "--seed", seed)
        assert max(objects(capfd, *argv)[0]["token_ids"]) <= 256


def test_stock_mlx_lm_generates_the_same_from_the_folder(folder, capfd):
    (answer,) = objects(capfd, "--model", folder, "--prompt", "The st", "--temp 0 --max-tokens 20")
    argv = ("--model", folder, "--prompt", "The st", "--max-tokens 20 --temp 0 --trust-remote-code")
    done = run_mlx_lm("generate", *argv)
    # mlx-lm drops a leading blank.
    assert answer["text"].removeprefix(" ") in done.stdout


def test_code_in_a_folder_is_not_run(folder, tmp_path, capfd):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "SHA256SUMS").unlink()
    (copy / "model_mlx.py").write_text("raise SystemExit('code of the folder was run')")
    assert objects(capfd, "--model", copy, "--prompt", "The", "--max-tokens", "2")[0]["tokens"] == 2


# --- bad input ---


def test_bad_input_gets_one_line(folder, tiny_run, tmp_path, capsys):
    def no(*argv):
        return refused(capsys, *argv, command=generate.main)

    model = ("--model", folder)
    prompt = (*model, "--prompt", "The")
    assert "use --max-tokens 45, or give --max-kv-size 48" in no(*prompt, "--max-tokens", "46")
    assert "n_positions=48; shorten the prompt" in no(*model, "--prompt", "x" * 48)
    assert "--max-kv-size must be from 2 to n_positions (48)" in no(*prompt, "--max-kv-size", "49")
    assert "--max-tokens must be at least 1" in no(*prompt, "--max-tokens", "0")
    assert "--temp must be from 0 to 100 (0 is greedy), not -1.0" in no(*prompt, "--temp", "-1")
    assert "--top-p must be from 1e-06 to 1 (1 is off), not 2.0" in no(*prompt, "--top-p", "2")
    assert "--top-k must be from 0 (off) to 256" in no(*prompt, "--top-k", "257")
    assert "--repetition-penalty must be from 0.01 to 100" in no(*prompt, "--repetition-penalty 0")
    assert "needs multiples of 32; a width of 32 would fit, in groups of 32" in no(
        *prompt, "--kv-bits 4"
    )
    assert "--kv-bits needs a cache" in no(*prompt, "--kv-bits", "4", "--cache", "none")
    assert "invalid choice" in no(*prompt, "--cache", "big")
    assert "either --prompt TEXT or --prompts-file" in no(*model)
    assert "has no prompts" in no(*model, "--prompts-file", "/dev/null")
    assert "no such file" in no(*model, "--prompts-file", tmp_path / "none")
    assert "did you mean --prompt?" in no(*model, "--promt", "x")
    assert "no such folder" in no("--model", tmp_path / "none", "--prompt", "x")
    assert "hub cannot be reached" in no("--model", "someone/something", "--prompt", "x")


def test_incomplete_and_foreign_folders_are_refused(folder, run_copy, tmp_path, capsys):
    def no(path):
        return refused(capsys, "--model", path, "--prompt", "x", command=generate.main)

    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "SHA256SUMS").unlink()
    (copy / "model.safetensors").unlink()
    assert "has no weights" in no(copy)

    (copy / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    assert "error:" in no(copy)

    shutil.copy(folder / "model.safetensors", copy)
    edit(copy / "config.json", n_layer=5)
    assert "do not fit config.json" in no(copy)
    edit(copy / "config.json", model_type="llama")
    assert "model_type 'llama'" in no(copy)

    path = run_copy / "checkpoints" / "step-000040" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    said = no(run_copy)
    assert "model.safetensors is truncated or changed" in said
    assert "the one before is" in said
    assert "step-000020" in said
    # One after it, of a run that has since gone on from an earlier step, is not before it.
    shutil.copytree(path.parent, path.parent.with_name("step-000060"))
    assert "step-000020" in no(run_copy)


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path, capsys, shared_data):
    from mlx_mla.data.tokenizer import GPT2Tokenizer

    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "SHA256SUMS").unlink()
    GPT2Tokenizer(shared_data / "gpt2_bpe").fast_tokenizer().save_pretrained(str(copy))
    said = refused(capsys, "--model", copy, "--prompt", "Hello world", command=generate.main)
    assert "outside the model's vocabulary of 257" in said
