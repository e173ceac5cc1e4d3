"""`python -m mlx_mla.train` as its users meet it: runs, resumes, refuses."""

import dataclasses
import itertools
import re
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import (
    TINY,
    WITHOUT_TORCH,
    file_size_limit,
    python,
    refused,
    tiny_train,
    train_command,
    unmeasured,
    words,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_mla import checkpoint, generate, train
from mlx_mla.backends.mlx.backend import MLXBackend
from mlx_mla.data.tokenizer import end_ids, set_end_ids
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.presets import PRESETS, overlay, preset, to_toml
from mlx_mla.model.schedule import learning_rate
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.model.weights import num_parameters
from mlx_mla.training import loop, recovery
from mlx_mla.training.metrics import read_metrics


def test_a_run_leaves_the_documented_files(tiny_run):
    assert {p.name for p in tiny_run.iterdir()} == {
        "config.toml", "metrics.jsonl", "samples.jsonl", "loss.png", "checkpoints", "latest",
    }  # fmt: skip
    folder = tiny_run / "checkpoints" / (tiny_run / "latest").read_text().strip()
    assert folder.name == "step-000040"
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "model.safetensors", "model_mlx.py", "model_torch.py",
        "configuration_mla_gpt2.py", "tokenizer.json", "tokenizer_config.json", "README.md",
        "train_state.safetensors", "train_state.json", "SHA256SUMS",
    }  # fmt: skip
    assert (tiny_run / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (folder / "README.md").read_text()
    assert "40 of 40" in card
    rows = read_metrics(tiny_run / "metrics.jsonl")
    for row in rows:
        mfu = ["mfu"] if row["split"] == "train" else []
        measured = ["tokens_per_sec", "peak_memory_bytes", *mfu, "seconds"]
        assert list(row) == ["step", "split", "loss", "lr", "tokens", *measured]
        assert row["tokens"] == row["step"] * 4 * 48
    assert [r["step"] for r in rows if r["split"] == "train"] == [1, 10, 20, 30, 40]
    assert [r["seconds"] for r in rows] == sorted(r["seconds"] for r in rows)
    assert rows[-1]["split"] == "val"
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert f"{rows[-1]['loss']:.4f}" in card


def test_the_end_of_a_run_says_where_it_is_and_how_to_go_on(tmp_path, text_file, capfd):
    out = tmp_path / "run"
    tiny_train(out, "--data", text_file, "--steps 3 --sample-prompt Ab")
    said = capfd.readouterr().out
    assert "--- sample ---\nAb" in said
    assert f"python -m mlx_mla.generate --model {out} --prompt Ab" in said
    assert generate.main(["--model", str(out), "--prompt", "Ab", "--max-tokens", "3"]) == 0


def test_dry_run_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--dry-run", "--preset", "mla-124m"]) == 0
    said = capsys.readouterr().out
    found = ("120,873,216", "FLOPs per token", "memory", "9,216 bytes", "4x smaller")
    assert all(text in said for text in (*found, "nothing was trained"))
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away_is_no_error():
    command = " ".join(python("-m", "mlx_mla.train", "--dry-run"))
    done = subprocess.run(f"{command} | true", shell=True, stderr=subprocess.PIPE, check=False)
    assert done.stderr == b""


def test_settings_come_from_preset_then_file_then_flags(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('preset = "mla-124m-r128"\nsteps = 7\nseed = 5\n[model]\nn_layer = 3\n')
    command = train_command(["--config", str(path), "--seed", "6", "--n-layer", "4"])
    found = (command.steps, command.seed, command.model.n_layer, command.model.kv_lora_rank)
    assert found == (7, 6, 4, 128)


def test_a_former_name_of_a_setting_is_still_taken(tmp_path, capsys):
    path = tmp_path / "c.toml"
    path.write_text("checkpoint_every = 2\n")
    assert train_command(["--config", str(path)]).activation_checkpointing == 2
    path.write_text("checkpoint_every = 2\nactivation_checkpointing = 1\n")
    assert "checkpoint_every is the former name of activation_checkpointing" in refused(
        capsys, "--config", path
    )
    for argv in (["--help-all"], ["--help"]):
        with pytest.raises(SystemExit):
            train.main(argv)
        assert "checkpoint-every" not in capsys.readouterr().out


def test_help_shows_the_common_settings_and_help_all_every_one(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")

    def flags(text):
        return set(re.findall(r"^[^\w-]{0,2}(--[a-z0-9][a-z0-9-]*)", text, re.MULTILINE))

    def shown(*argv):
        with pytest.raises(SystemExit) as end:
            train.main([*argv])
        assert end.value.code == 0
        return capsys.readouterr().out

    common, everything = shown("--help"), shown("--help-all")
    assert len(common.splitlines()) <= 60 and max(map(len, common.splitlines())) <= 100
    assert flags(common) == {f"--{n.replace('_', '-')}" for n in train.COMMON}
    names = {f.name for cls in (train.TrainCommand, ModelConfig) for f in dataclasses.fields(cls)}
    assert flags(everything) == {f"--{n.replace('_', '-')}" for n in names - {"model"}}
    titles = re.findall(r"^[^a-z]+([a-z][a-z ]+) options [^a-z]+$", everything, re.MULTILINE)
    assert titles == [
        "common", "model", "data", "optimizer", "schedule", "evaluation", "logging and trackers",
        "run and machine",
    ]  # fmt: skip
    defaults = " ".join(shown("--preset", "mla-124m", "--help").split())
    assert "Optimizer steps in all. (default: 19073)" in defaults


def test_the_file_decides_between_tokens_and_passes_of_a_step(tmp_path):
    """A preset's tokens give way to a file's passes; of a run's own two the tokens stay."""
    path = tmp_path / "c.toml"
    path.write_text('preset = "mla-124m"\ngrad_accum_steps = 3\n')
    assert train_command(["--config", str(path)]).resolved().passes_per_step == 3
    path.write_text(to_toml(preset("mla-124m").resolved()))
    changed = train_command(["--config", str(path), "--batch-size", "8"]).resolved()
    assert (changed.step_tokens, changed.passes_per_step) == (524288, 64)


CHOICES = {"batch_size": 2, "optimizer": "muon", "lr_schedule": "wsd", "seq_len": 64}
OF_MODEL = {"n_embd": 96, "head_dim": 32, "activation_function": "swiglu", "norm": "rms_norm"}


@given(
    st.sampled_from(sorted(PRESETS)),
    st.sets(st.sampled_from(list(CHOICES))),
    st.sets(st.sampled_from(list(OF_MODEL))),
)
def test_a_runs_settings_lose_what_follows_from_them(name, choices, of_model):
    values = {n: CHOICES[n] for n in choices} | {"model": {n: OF_MODEL[n] for n in of_model}}
    config = overlay(preset(name), values, "test").resolved()
    bare = config.without_derived()
    assert bare.resolved() == config
    kept = {**bare.to_dict(), **bare.model.to_dict()}
    assert not kept.keys() & {"n_inner", "decay_fraction", "muon_learning_rate"}


@pytest.mark.parametrize(
    ("flags", "changes", "expected"),
    [
        ("", "--n-embd 64", {"n_inner": 256, "kv_lora_rank": 32, "v_head_dim": 32}),
        ("", "--activation-function swiglu", {"n_inner": 384}),
        ("", "--batch-size 8", {"grad_accum_steps": 1, "tokens_per_step": 2048}),
        ("", "--attention mha", {"kv_lora_rank": None, "position_embedding_type": "rope"}),
        (
            "--lr-schedule wsd --decay-fraction 0.3",
            "--lr-schedule cosine",
            {"decay_fraction": None},
        ),
        ("--optimizer muon", "--optimizer adamw", {"muon_learning_rate": None}),
        ("--kv-lora-rank 24", "--n-embd 64", {"kv_lora_rank": 24}),
        (
            "--qk-rope-head-dim 0 --attention-k-eq-v --kv-lora-rank 32",
            "--no-attention-k-eq-v",
            {"kv_lora_rank": 32, "head_dim": None, "v_head_dim": 64},
        ),
    ],
)
def test_flags_over_a_runs_settings_derive_the_rest_anew(flags, changes, expected, tmp_path):
    path = tmp_path / "config.toml"
    command = train_command(flags.split())
    values = {f.name: getattr(command, f.name) for f in dataclasses.fields(TrainConfig)}
    path.write_text(to_toml(TrainConfig(**values).resolved()))
    config = train_command(["--config", str(path), *words(changes)]).resolved()
    found = {**dataclasses.asdict(config), **dataclasses.asdict(config.model)}
    assert {name: found[name] for name in expected} == expected


def test_a_file_with_the_tokens_and_the_passes_of_a_step_keeps_its_preset(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('preset = "gpt2-124m"\ntokens_per_step = 8192\ngrad_accum_steps = 2\n')
    config = train_command(["--config", str(path)]).resolved()
    assert (config.model.attention, config.tokenizer, config.steps) == ("mha", "gpt2", 19073)


def test_a_file_may_name_another_attention_than_its_preset(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[model]\nattention = "mha"\n')
    kind = train_command(["--config", str(path)]).resolved().model.attention_spec
    assert kind.text.startswith("multi-head")


def test_multi_head_attention_is_one_flag_apart(capsys):
    for name in ("nano", "mla-124m", "mla-124m-r128", "mla-124m-rope", "mla-124m-tied"):
        mla = train_command(["--preset", name])
        mha = train_command(["--preset", name, "--attention", "mha"])
        assert mha.resolved().model.attention == "mha"
        assert (mha.steps, mha.seed, mha.model.n_embd) == (mla.steps, mla.seed, mla.model.n_embd)
    rope = train_command(["--preset", "mla-124m-rope", "--attention", "mha"]).resolved().model
    assert rope == preset("gpt2-124m-rope").resolved().model
    grouped = ["--attention", "mha", "--num-key-value-heads", "1", "--n-embd", "126"]
    assert train_command(grouped).resolved().model.attention_spec.cached_values() == 3 * 2 * 63
    assert "no meaning with --attention mha" in refused(capsys, "--attention mha --kv-lora-rank 8")


def test_the_default_run_folder_is_never_taken_twice(tmp_path, text_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("nano", "nano-2", "nano-3"):
        assert train.main([*TINY, "--data", str(text_file), "--steps", "1"]) == 0
        assert (tmp_path / "runs" / expected / "latest").is_file()


def test_learning_rate_warms_up_and_decays_to_its_floor():
    argv = words("--steps 100 --warmup-steps 10 --learning-rate 1 --min-lr-ratio 0.1")
    config = train_command(argv)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1)
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("warmup", [10, 60, 100])
def test_the_decay_begins_after_the_warm_up(warmup):
    argv = words("--steps 100 --lr-schedule wsd --decay-fraction 0.5 --learning-rate 1")
    config = train_command([*argv, "--warmup-steps", str(warmup), "--min-lr-ratio", "0"]).resolved()
    rates = [learning_rate(config, step) for step in range(100)]
    assert max(rates) == 1
    steepest = max(1 / warmup, 1 / max(1, min(50, 100 - warmup)))
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= steepest + 1e-9


def test_init_starts_from_another_models_weights(tiny_run, tmp_path, text_file):
    out = tmp_path / "recovered"
    argv = words("--data", text_file, "--out", out, "--init", tiny_run, "--steps 1 --no-compile")
    assert train.main(argv) == 0
    old, new = (read_metrics(run / "metrics.jsonl") for run in (tiny_run, out))
    assert new[0]["loss"] == pytest.approx(old[-2]["loss"], abs=0.3)
    assert new[0]["loss"] < old[0]["loss"] - 0.5
    card = (checkpoint.latest(out) / "README.md").read_text()
    assert f"# {tiny_run.name}, step 1" in card  # and not the default preset


def test_a_chat_template_and_further_ends_of_text_outlive_training(tiny_run, tmp_path, text_file):
    chat = shutil.copytree(checkpoint.latest(tiny_run), tmp_path / "chat")
    tokenizer = checkpoint.ModelFolder(chat).tokenizer
    tokenizer.chat_template = "{{ messages[0].content }}"
    set_end_ids(tokenizer, [256, 10])
    tokenizer.save_pretrained(str(chat))
    (chat / "SHA256SUMS").unlink()
    out = tmp_path / "run"
    assert train.main(words("--data", text_file, "--out", out, "--init", chat, "--steps 1")) == 0
    trained = checkpoint.ModelFolder(checkpoint.latest(out)).tokenizer
    assert trained.chat_template == tokenizer.chat_template
    assert end_ids(trained) == [256, 10]


def test_init_refuses_what_the_folder_decides(tiny_run, tmp_path, text_file, capsys, shared_data):
    argv = ("--data", text_file, "--out", tmp_path / "run", "--init", tiny_run)
    assert "--n-layer: is 5, but the model of --init has" in refused(capsys, *argv, "--n-layer 5")
    file = tmp_path / "c.toml"
    for text, option in (
        ("initializer = 'fan_in'", "initializer"),
        ("[model]\nn_embd = 8", "n-embd"),
    ):
        file.write_text(text)
        assert f"--{option}: " in refused(capsys, *argv, "--config", file)
    gpt2 = ("--tokenizer", "gpt2", "--bpe-dir", shared_data / "gpt2_bpe")
    assert "its tokenizer has 257 ids" in refused(capsys, *argv, *gpt2)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_tiny_shakespeare_trains_with_either_tokenizer(shared_data, tmp_path, tokenizer):
    out = tmp_path / "run"
    argv = words(
        "--data", shared_data / "corpus/tinyshakespeare/input.txt", "--tokenizer", tokenizer,
        "--out", out, "--steps 30 --batch-size 2 --n-layer 1 --n-embd 64 --eval-batches 2",
        "--val-fraction 0.01 --sample-tokens 10",
        *(("--bpe-dir", str(shared_data / "gpt2_bpe")) if tokenizer == "gpt2" else ()),
    )  # fmt: skip
    assert train.main(argv) == 0
    rows = read_metrics(out / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert checkpoint.ModelFolder(checkpoint.latest(out)).config.vocab_size == (
        257 if tokenizer == "bytes" else 50257
    )
    assert generate.main(["--model", str(out), "--prompt", "ROMEO:", "--max-tokens", "5"]) == 0


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_samples_on_the_way_change_nothing_of_the_training(tmp_path, text_file, capfd, backend):
    outcomes = []
    for every in ("0", "2"):
        out = tmp_path / every
        flags = words(
            *TINY, "--data", text_file, "--out", out, "--backend", backend, "--dropout 0.2"
        )
        flags += words("--steps 7 --log-every 1 --learning-rate 0.01 --warmup-steps 0")
        assert train.main([*flags, "--sample-every", every]) == 0
        rows = unmeasured(out)
        weights = (checkpoint.latest(out) / "model.safetensors").read_bytes()
        state = (checkpoint.latest(out) / "train_state.safetensors").read_bytes()
        outcomes.append((rows, weights, state))
    assert outcomes[0] == outcomes[1]
    plain, often = (read_metrics(tmp_path / every / "samples.jsonl") for every in ("0", "2"))
    assert [row["step"] for row in often] == [2, 4, 6, 7]
    assert plain == often[-1:]
    assert len({row["text"] for row in often}) > 1
    said = capfd.readouterr().out
    for row in often[:-1]:
        assert row["text"].startswith("The ")
        assert f"--- sample after step {row['step']} ---" in said


# --- resuming ---


def test_a_finished_run_goes_on_with_more_steps(run_copy):
    so_far = read_metrics(run_copy / "metrics.jsonl")[-1]["seconds"]
    assert train.main(["--resume", "--out", str(run_copy), "--steps", "45"]) == 0
    times = [r["seconds"] for r in read_metrics(run_copy / "metrics.jsonl")]
    assert times == sorted(times)
    assert times[-1] > so_far
    assert [r["step"] for r in read_metrics(run_copy / "samples.jsonl")] == [40, 45]
    assert checkpoint.latest(run_copy).name == "step-000045"
    steps = [r["step"] for r in read_metrics(run_copy / "metrics.jsonl") if r["split"] == "train"]
    assert steps == [1, 10, 20, 30, 40, 45]


def test_auto_resume_stays_on_the_branch_that_from_step_began(run_copy, monkeypatch):
    """The run has checkpoints of steps 20 and 40; the branch from 20 ends before its first."""

    def ends(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(loop._Loop, "run", ends)
        argv = words("--resume --from-step 20 --learning-rate 1e-5 --out", run_copy)
        assert train.main(argv) == 130
    assert recovery.find_restart(run_copy)[0] == 20
    assert checkpoint.latest(run_copy).name == "step-000020"
    assert train.main(words("--auto-resume --out", run_copy)) == 0
    rows = read_metrics(run_copy / "metrics.jsonl")
    assert rows[-1]["step"] == 40 and rows[-1]["lr"] <= 1e-5


def test_a_run_that_was_killed_as_it_began_is_started_again(run_copy):
    shutil.rmtree(run_copy / "checkpoints")
    (run_copy / "latest").unlink()
    assert train.main(words("--auto-resume --steps 2 --out", run_copy)) == 0


def test_what_a_sample_cannot_use_is_said_before_the_first_step(tmp_path, capsys):
    few = Tokenizer(models.WordLevel({"A": 0, "C": 1, "<eos>": 2}))
    few.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=few, eos_token="<eos>")
    tokenizer.save_pretrained(str(tmp_path / "few"))
    (tmp_path / "text.txt").write_text("ACCA" * 200)
    argv = [*TINY, "--tokenizer", tmp_path / "few", "--data", tmp_path / "text.txt", "--steps 2"]
    argv += ["--out", tmp_path / "run"]
    said = refused(capsys, *argv)
    assert "--sample-prompt: " in said and "give another, or --sample-tokens 0" in said
    assert not (tmp_path / "run").exists()
    assert train.main(words(*argv, "--sample-prompt A")) == 0


def test_one_position_has_no_sample(tmp_path, text_file):
    argv = words("--n-layer 1 --n-head 2 --n-embd 16 --n-positions 1 --steps 1 --data", text_file)
    assert train.main([*argv, "--out", str(tmp_path / "run")]) == 0


def test_a_dry_run_is_of_the_model_that_init_names(tiny_run, capsys):
    assert train.main(words("--init", tiny_run, "--dry-run")) == 0
    said = capsys.readouterr().out
    assert f"{num_parameters(checkpoint.ModelFolder(checkpoint.latest(tiny_run)).config):,}" in said


def test_auto_resume_completes_a_run_that_was_killed_while_its_last_picture_was_written(run_copy):
    picture = run_copy / "loss.png"
    leftover = run_copy / ".loss.png.tmp-0123456789abcdef"
    picture.rename(leftover)
    metrics = (run_copy / "metrics.jsonl").read_bytes()
    assert train.main(["--auto-resume", "--out", str(run_copy)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not leftover.exists()
    assert (run_copy / "metrics.jsonl").read_bytes() == metrics


def test_resume_refuses_what_would_be_another_run(run_copy, tmp_path, text_file, capsys):
    resume = ("--resume", "--out", run_copy, "--steps", "50")
    assert "--n-embd is 32" in refused(capsys, *resume, "--n-embd", "64")
    assert "--kv-lora-rank is 16" in refused(capsys, *resume, "--kv-lora-rank", "8")
    assert "--attention is mla" in refused(capsys, *resume, "--preset gpt2-124m --tokenizer bytes")
    assert "--seed is 1337" in refused(capsys, *resume, "--seed", "1")
    assert "--batch-size is 4" in refused(capsys, *resume, "--batch-size", "8")
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    assert "is not the text that" in refused(capsys, *resume, "--data", other)
    # Nor has a run with other settings or data finished because this one has.
    restart = ("--auto-resume", "--out", run_copy)
    assert "--n-embd is 32" in refused(capsys, *restart, "--n-embd", "64")
    assert "is not the text that" in refused(capsys, *restart, "--data", other)
    assert "has finished its 40 steps; give a larger --steps" in refused(
        capsys, "--resume --out", run_copy
    )
    assert "needs --out" in refused(capsys, "--resume")
    assert "holds no run to resume" in refused(capsys, "--resume", "--out", tmp_path / "none")
    assert "--from-step requires --resume" in refused(capsys, "--from-step", "3")
    assert "has checkpoints of steps 20, 40" in refused(capsys, *resume, "--from-step", "30")


def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(run_copy, capsys):
    path = run_copy / "checkpoints" / "step-000040" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    resume = ("--resume", "--out", run_copy, "--steps", "41")
    said = refused(capsys, *resume)
    assert "model.safetensors is truncated or changed" in said
    assert "--from-step 20" in said
    assert train.main([*map(str, resume), "--from-step", "20"]) == 0
    # The damaged folder was written anew on the way, and steps 21-40 are logged once.
    assert checkpoint.integrity_error(run_copy / "checkpoints" / "step-000040") is None
    steps = [r["step"] for r in read_metrics(run_copy / "metrics.jsonl") if r["split"] == "train"]
    assert steps == [1, 10, 20, 30, 40, 41]


def test_a_run_that_is_stopped_before_its_first_step_has_saved_nothing(
    tmp_path, text_file, monkeypatch, capsys
):
    out = tmp_path / "run"
    stopped = loop.RunResult(checkpoint.checkpoint_path(out, 0), 0, None, None, signal.SIGINT)
    monkeypatch.setattr(loop, "train", lambda *_, **__: stopped)
    assert train.main(words("--data", text_file, "--out", out)) == 130
    assert "stopped after step 0 and saved nothing yet; resume with" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
     pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_run_that_is_stopped_finishes_the_step_saves_and_says_how_to_go_on(
    tmp_path, text_file, number, code
):
    """By Ctrl-C, a closed terminal, a termination."""
    out = tmp_path / "run"
    argv = words(*TINY, "--data", text_file, "--out", out, "--steps 100000 --save-every 0")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(python("-m", "mlx_mla.train", *argv), env=WITHOUT_TORCH, **pipes)
    deadline = time.monotonic() + 120
    while not read_metrics(out / "metrics.jsonl") and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    said, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    step = int(re.search(r"stopped after step (\d+)", said).group(1))
    assert f"python -m mlx_mla.train --resume --out {out}" in said
    assert checkpoint.latest(out).name == f"step-{step:06d}"
    assert train.main(words("--resume --out", out, "--steps", step + 2)) == 0


# --- bad input: one line, exit code 2, nothing lost ---


def test_mistakes_on_the_command_line(capsys):
    assert "did you mean 'nano'" in refused(capsys, "--preset", "nan")
    assert "unknown argument '--lerning-rate'; did you mean --learning-rate?" in refused(
        capsys, "--lerning-rate 1"
    )
    assert "Error parsing --steps" in refused(capsys, "--steps", "many")
    assert "invalid choice 'fp8'" in refused(capsys, "--dtype", "fp8")
    assert "--steps" in refused(capsys, "--steps")
    assert "no such file" in refused(capsys, "--config", "nowhere.toml")
    assert "unknown argument 'stray'" in refused(capsys, "stray")


def test_impossible_settings(tmp_path, text_file, capsys):
    out = ("--out", tmp_path / "run", "--data", text_file)
    assert "not divisible" in refused(capsys, *out, "--n-embd", "100", "--n-head", "12")
    assert "--kv-lora-rank must be at least 1" in refused(capsys, *out, "--kv-lora-rank", "-1")
    assert "fewer than one context of 9000" in refused(capsys, *out, "--n-positions", "9000")
    assert "no such file" in refused(
        capsys, "--out", tmp_path / "run", "--data", tmp_path / "nothing"
    )
    assert "no such model folder" in refused(capsys, *out, "--init", tmp_path / "nothing")
    assert "requires --backend torch" in refused(capsys, *out, "--device", "mps")
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_never_overwritten(run_copy, tmp_path, text_file, capsys):
    before = {p: p.read_bytes() for p in run_copy.rglob("*") if p.is_file()}
    said = refused(capsys, *TINY, "--data", text_file, "--out", run_copy)
    assert "holds another run; add --resume" in said
    assert {p: p.read_bytes() for p in run_copy.rglob("*") if p.is_file()} == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("x")
    assert "not an empty folder" in refused(
        capsys, "--data", text_file, "--out", tmp_path / "notes"
    )


def test_divergence_stops_and_keeps_the_last_good_checkpoint(run_copy, capsys):
    argv = ("--resume", "--out", run_copy, "--steps", "60", "--save-every", "1")
    said = refused(capsys, *argv, "--learning-rate", "1e30", "--grad-clip", "0")
    assert re.search(r"diverged at step 4\d \(loss (nan|inf|\d)", said)
    assert "newest good checkpoint is" in said
    newest = checkpoint.latest(run_copy)
    assert checkpoint.integrity_error(newest) is None
    # What was saved holds finite weights only.
    weights = checkpoint.ModelFolder(newest).weights()
    assert all(abs(w).max() < float("inf") for w in weights.values())


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_an_update_that_diverges_is_never_saved(tmp_path, text_file, capsys, backend):
    # Positions that no sequence reaches have no gradient, and AdamW's step there is 0 / 0: the loss
    # never shows it.
    argv = (*TINY, "--data", text_file, "--backend", backend, "--qk-rope-head-dim", "0")
    argv = (*argv, "--seq-len", "16", "--save-every", "1", "--out", tmp_path / "run")
    said = refused(capsys, *argv, "--steps", "2", "--adam-epsilon", "0")
    assert "diverged at step 1 (weights that are not finite)" in said
    assert "no checkpoint has been saved yet" in said
    assert checkpoint.latest(tmp_path / "run") is None
    assert [r["split"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")] == ["train"]

    good = ("--adam-epsilon", "1e-8", "--save-every", "1")
    resume = ("--auto-resume", "--out", tmp_path / "run", "--backend", backend)
    assert train.main([*map(str, resume), *good, "--steps", "2"]) == 0
    said = refused(capsys, *resume, "--steps", "4", "--adam-epsilon", "0", "--save-every", "1")
    assert "diverged at step 3 (weights that are not finite)" in said
    newest = tmp_path / "run" / "checkpoints" / "step-000002"
    assert f"newest good checkpoint is {newest}" in said
    assert checkpoint.latest(tmp_path / "run") == newest
    assert train.main([*map(str, resume), *good, "--steps", "4"]) == 0


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_validation_loss_that_is_no_number_is_never_reported(
    tmp_path, text_file, capsys, backend
):
    spoiling = ("--learning-rate", "1e30", "--warmup-steps", "0", "--grad-clip", "0")
    argv = (*TINY, "--data", text_file, "--out", tmp_path / "run", "--steps", "1")
    said = refused(capsys, *argv, "--backend", backend, *spoiling)
    assert "diverged at step 1 (validation loss nan)" in said
    assert "--learning-rate must be at most 1e+30" in refused(capsys, *argv, "--learning-rate 1e38")


def test_a_copy_of_a_checkpoint_in_the_run_folder_is_in_nobodys_way(run_copy):
    folder = run_copy / "checkpoints"
    shutil.copytree(folder / "step-000020", folder / "step-000020-backup")
    shutil.copytree(folder / "step-000020", folder / "step-x")
    (folder / "step-000099").write_text("a file")
    assert [p.name for p in checkpoint.checkpoints(run_copy)] == ["step-000020", "step-000040"]
    assert train.main(["--resume", "--out", str(run_copy), "--steps", "41", "--keep", "1"]) == 0
    assert {p.name for p in folder.iterdir()} == {
        "step-000041", "step-000020-backup", "step-x", "step-000099",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["checkpoints", "latest"])
def test_a_folder_or_file_where_the_run_writes_is_reported(run_copy, capsys, name):
    path = run_copy / name
    shutil.move(path, run_copy / "moved")
    path.write_text("") if name == "checkpoints" else path.mkdir()
    step = () if name == "checkpoints" else ("--from-step", "40")
    said = refused(capsys, "--resume", "--out", run_copy, "--steps", "41", *step)
    assert f"{path}: c" in said  # "could not be written" or "cannot be made"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["mlx_mla.train", "convert"])
def test_ctrl_c_while_modules_are_imported_leaves_no_traceback(command):
    for tenths in range(0, 15, 3):
        process = subprocess.Popen(
            python("-X", "importtime", "-m", command, "--out", "/dev/null/x", "/dev/null"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        # What is interrupted before the package itself has been read is Python's own start.
        while (line := process.stderr.readline()).split("|")[-1].strip() != "mlx_mla":
            assert line
        time.sleep(tenths / 10)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGINT, 130, 2), err
        assert "Traceback" not in err


def test_a_full_disk_leaves_the_old_checkpoint(run_copy, capsys):
    old = {p.name: p.read_bytes() for p in (run_copy / "checkpoints" / "step-000040").iterdir()}
    limit = 60_000  # less than the weights, more than all else
    assert len(old["model.safetensors"]) > limit
    with file_size_limit(limit):
        said = refused(capsys, "--resume --out", run_copy, "--steps 42 --save-every 1")
    assert "could not be written" in said
    folder = run_copy / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-000020", "step-000040"]
    assert {p.name: p.read_bytes() for p in (folder / "step-000040").iterdir()} == old
    assert (run_copy / "latest").read_text() == "step-000040\n"


def test_a_run_folder_that_cannot_be_made(tmp_path, text_file, capsys):
    (tmp_path / "file").write_text("x")
    assert "could not be written" in refused(
        capsys, "--data", text_file, "--out", tmp_path / "file" / "run"
    )


def test_a_step_that_exceeds_memory_is_warned_of(tmp_path, text_file, capsys, monkeypatch):
    monkeypatch.setattr(MLXBackend, "memory_bytes", lambda self: 4_000_000)
    tiny_train(tmp_path / "run", "--data", text_file, "--steps 1 --batch-size 8")
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: a step needs about" in said
    assert re.search(
        r"to fit: (--batch-size \d --tokens-per-step 384 )?--activation-checkpointing 1", said
    )


def test_the_last_validation_is_bounded(tmp_path, text_file):
    def last(*flags):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        argv = words(*TINY, "--data", text_file, "--out", out, "--steps 2 --eval-every 2")
        assert train.main([*argv, *flags]) == 0
        return read_metrics(out / "metrics.jsonl")[-1]["loss"]

    every = last("--final-eval-batches", "0")
    assert every == last("--final-eval-batches", "1000") != last("--final-eval-batches", "1")
    assert TrainConfig().final_eval_batches == 0


def test_training_runs_outside_the_main_thread(tmp_path, text_file):
    """There, Python allows no handlers of signals."""
    argv = [*TINY, "--data", str(text_file), "--out", str(tmp_path / "run"), "--steps", "2"]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train.main, argv).result() == 0
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 2


def test_a_state_that_does_not_fit_leaves_the_run_as_it_was(run_copy, capsys):
    last = run_copy / "checkpoints" / "step-000040"
    (last / "SHA256SUMS").unlink()
    state = load_file(last / "train_state.safetensors")
    key = "exp_avg.transformer.wte.weight"
    save_file(state | {key: state[key][:-1]}, last / "train_state.safetensors")
    before = {p: p.read_bytes() for p in run_copy.rglob("*") if p.is_file()}
    said = refused(capsys, "--resume", "--out", run_copy, "--steps", "42")
    assert f"{last / 'train_state.safetensors'}: the optimizer state does not fit" in said
    assert f"tensor {key} has shape (256, 32), and the model needs (257, 32)" in said
    assert {p: p.read_bytes() for p in run_copy.rglob("*") if p.is_file()} == before
