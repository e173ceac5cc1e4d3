"""What is printed, and where: no terminal, reader or disk ends a run, names are shown as they are,
and lines stay short."""

import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TINY, WITHOUT_TORCH, python, ran, refused

from convert import __main__ as convert
from mlx_mla import cli, evaluate, generate, plot, train
from mlx_mla.cli import Output, shortened
from mlx_mla.errors import UserError
from mlx_mla.pictures import plain
from mlx_mla.training.metrics import perplexity_text

STEPS = ["--steps", "4", "--sample-every", "1", "--sample-tokens", "30", "--log-every", "1"]


def train_argv(out: Path, text_file: Path) -> list[str]:
    """Four steps with samples of an untrained model, which are not ASCII."""
    return [*TINY, *STEPS, "--data", str(text_file), "--out", str(out), "--seed", "3"]


def train_with(out: Path, text_file: Path, stdout):
    """Such a run in a process."""
    argv = python("-m", "mlx_mla.train", *train_argv(out, text_file))
    return subprocess.Popen(argv, stdout=stdout, stderr=subprocess.PIPE, env=WITHOUT_TORCH)


def finished(process, out: Path) -> bytes:
    """What a run wrote to stderr; it must have come to its end."""
    err = process.communicate(timeout=300)[1]
    assert process.returncode == 0, err
    assert whole(out)
    return err


def whole(out: Path) -> bool:
    return (out / "checkpoints" / "step-000004" / "model.safetensors").is_file() and (
        len((out / "samples.jsonl").read_text().splitlines()) == 4
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_the_characters_ends_no_run(tmp_path, text_file, encoding, monkeypatch):
    with (tmp_path / "log").open("w", encoding=encoding) as log:
        monkeypatch.setattr(sys, "stdout", log)
        assert train.main(train_argv(tmp_path / "run", text_file)) == 0
    assert whole(tmp_path / "run")
    assert "\\ufffd" in (tmp_path / "log").read_text(encoding)  # a byte that is no character


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_no_run(tmp_path, text_file):
    process = train_with(tmp_path / "run", text_file, subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert finished(process, tmp_path / "run") == b""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
def test_a_full_disk_under_the_output(tmp_path, text_file, tiny_run):
    with Path("/dev/full").open("wb") as full:
        process = train_with(tmp_path / "run", text_file, full)
        assert finished(process, tmp_path / "run") == b""
        argv = ("-m", "mlx_mla.generate", "--model", str(tiny_run), "--prompt", "x")
        pipes = {"stdout": full, "stderr": subprocess.PIPE, "text": True, "env": WITHOUT_TORCH}
        done = subprocess.run(python(*argv), check=False, **pipes)
    assert done.returncode == 2
    assert done.stderr == (
        "error: standard output cannot be written: No space left on device; redirect it elsewhere\n"
    )


def test_generating_ends_quietly_with_its_reader(tiny_run):
    argv = ("-m", "mlx_mla.generate", "--model", str(tiny_run), "--prompt", "The", "--temp", "0")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": WITHOUT_TORCH}
    process = subprocess.Popen(python(*argv), **pipes)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0
    process.stderr.close()


def test_output_without_a_stream_is_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.run(lambda _: print("x") or 0, []) == 0
    silent = Output(None, "nothing", may_fail=False)
    assert silent.write("text") == 4
    assert not silent.isatty()


def test_libraries_warnings_are_not_printed_among_our_lines(tiny_run, capfd, monkeypatch):
    import logging

    import transformers

    monkeypatch.setattr(sys, "warnoptions", [])

    def body(_):
        import warnings

        warnings.warn("a library's", stacklevel=1)
        print("ours")
        return 0

    assert cli.run(body, []) == 0
    assert capfd.readouterr() == ("ours\n", "")
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
    assert transformers.utils.logging.get_verbosity() == logging.ERROR
    env = {k: v for k, v in WITHOUT_TORCH.items() if not k.endswith("_VERBOSITY")}
    argv = ("-m", "mlx_mla.generate", "--model", tiny_run, "--prompt", "x" * 60)
    done = ran(*argv, code=2, env=env)
    assert done.stderr.startswith("error: 60 prompt tokens exceed")  # and no warning of the length
    assert done.stderr.count("\n") == 1


# --- error lines ---


def test_lines_that_repeat_long_input_are_cut_and_keep_their_remedy(capsys, tmp_path):
    for argument in ("x" * 5000, "many words " * 500, "a/" * 2000, "\u00e9" * 1000):
        said = refused(capsys, "--model", argument, "--prompt", "x", command=generate.main)
        assert len(said) <= 201
        assert argument[:20] in said
    said = refused(capsys, "--model", "m", "--" + "flag" * 500, "1", command=generate.main)
    assert len(said) <= 201
    assert said.endswith("see python -m mlx_mla.generate --help\n")
    message = f"{'word ' * 100}is not there; give another one"
    assert shortened(message, [("word " * 100).strip()]).endswith("is not there; give another one")


def test_lines_of_our_own_words_are_whole():
    message = "a sentence of ours that says what is wrong with which file, " * 5 + "; a remedy"
    assert shortened(message) == message
    path = "/a/folder" * 14
    assert shortened(f"{path}: no such file; check the path").startswith(path)


def test_what_the_system_refuses_is_one_line(capsys, tmp_path):
    def body(argv):
        Path(argv[0]).write_text("x")
        return 0

    assert "No such file or directory" in refused(capsys, tmp_path / "a" / "b", command=_run(body))
    assert "Is a directory" in refused(capsys, tmp_path, command=_run(body))
    assert "File name too long" in refused(capsys, tmp_path / ("n" * 300), command=_run(body))


def _run(body):
    return lambda argv: cli.run(body, argv)


def test_a_fault_of_ours_is_no_users_mistake():
    def body(_):
        raise KeyError("ours")

    with pytest.raises(KeyError):
        cli.run(body, [])


# --- names ---


NAMES = ["a[/x]", r"m[1] [red]b $\foo$", "semi;colon 'quote\" émoji-🦙", "-x"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_only_names(tmp_path, text_file, name, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = f"./{name}" if name.startswith("-") else name
    argv = [*TINY, "--steps", "2", "--save-every", "1", "--data", str(text_file)]
    assert train.main([*argv, "--out", out]) == 0
    shown = capfd.readouterr().out
    assert f"training nano into {Path(out)}" in shown
    # The command that it prints, as a shell takes it apart, without the program.
    command = shown.strip().splitlines()[-1].strip().removeprefix("python -m mlx_mla.generate ")
    parted = subprocess.run(
        ["sh", "-c", f'for a in {command}; do printf "%s\\0" "$a"; done'],
        capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    assert parted[:-1] == ["--model", str(Path(out)), "--prompt", "The "]
    for backend in ("mlx", "torch") if importlib.util.find_spec("torch") else ("mlx",):
        more = ["--max-tokens", "2", "--backend", backend]
        assert generate.main([f"--model={out}", "--prompt", "x", *more]) == 0
    assert plot.main([out, "--out", "p.png"]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_folder_here_may_be_the_run(tmp_path, text_file, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [*TINY, "--steps", "2", "--data", str(text_file), "--out", "."]
    assert train.main(argv) == 0
    assert generate.main(["--model", ".", "--prompt", "x", "--max-tokens", "2"]) == 0
    assert train.main([*argv, "--steps", "3", "--resume"]) == 0
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    said = refused(capsys, tmp_path, "--out", ".", command=convert.main)
    assert "is the folder you are in" in said


@pytest.mark.parametrize("name", ["n" * 300, "a" * 200 + "/" + "b" * 300])
def test_names_that_no_disk_takes_are_refused(tmp_path, text_file, capsys, name, tiny_run):
    argv = [*TINY, "--steps", "1", "--data", text_file]
    refused(capsys, *argv, "--out", tmp_path / name)
    refused(capsys, *argv[:-1], tmp_path / name, "--out", tmp_path / "run")
    refused(capsys, "--model", name, "--prompt", "x", command=generate.main)
    refused(capsys, "--model", tiny_run, "--prompts-file", name, command=generate.main)
    refused(capsys, tiny_run, "--out", tmp_path / f"{name}.png", command=plot.main)
    argv = ("--model", tiny_run, "--tasks", "speed", "--out", tmp_path / f"{name}.json")
    refused(capsys, *argv, command=evaluate.main)


def test_local_names_are_not_asked_of_the_hub(tiny_run, capsys, monkeypatch, tmp_path):
    from mlx_mla import hub

    def ask(*_, **__):
        pytest.fail("the hub was asked")  # no Exception, which would be a failed download

    monkeypatch.setattr(hub, "snapshot_download", ask)
    monkeypatch.chdir(tiny_run.parent)
    (tmp_path / "there").mkdir()
    name = f"{tiny_run.parent.name}/x"
    for model in ("runs/nope", "./a", "a", "a/b/c", "a b/c", "../x", "x/..", "/a/b", ""):
        refused(capsys, "--model", model, "--prompt", "x", command=generate.main)
    monkeypatch.chdir(tiny_run.parent.parent)
    near = refused(capsys, "--model", f"{name[:-1]}tinny", "--prompt", "x", command=generate.main)
    assert f"did you mean {tiny_run.parent.name}/tiny?" in near
    with pytest.raises(pytest.fail.Exception, match="the hub was asked"):
        generate.main(["--model", "owner/name", "--prompt", "x"])


def test_names_in_pictures_are_no_formulas():
    assert plain(r"$\foo$") == r"\$\foo\$"
    assert plain("a\nb\udcff") == "a?b?"
    assert len(plain("x" * 300)) == 60
    from matplotlib.text import Text

    shown, math = Text()._preprocess_math(plain(r"a $\foo$ b"))
    assert (shown, math) == (r"a $\foo$ b", False)


# --- numbers ---


def test_perplexities_have_the_figures_that_mean_something():
    assert perplexity_text(3.0) == "20.09"
    assert perplexity_text(20.0) == "4.9e+08"
    assert perplexity_text(5000.0) == "over 1e304"
    assert perplexity_text(float("nan")) == "nan"


def test_output_passes_on_what_it_is_not_asked_to_survive():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="results cannot be written: No space left"):
        Output(Full(), "results", may_fail=False).write("x")
    assert Output(Full(), "results", may_fail=True).write("x") == 1


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_wrong_values_are_told_the_same_on_every_terminal(encoding):
    env = {**WITHOUT_TORCH, "PYTHONIOENCODING": encoding}
    done = ran("-m", "mlx_mla.generate", "--model m --seed x", code=2, env=env)
    assert done.stderr == (
        "error: Error parsing --seed: invalid literal for int() with base 10: 'x'; see python -m "
        "mlx_mla.generate --help\n"
    )


def test_only_flags_of_the_command_are_suggested(capsys):
    """The description of --eval-data-dir names --data-dir, which is another command's."""
    line = refused(capsys, "--data-dir", "x")
    assert "unknown argument '--data-dir'; did you mean --eval-data-dir?" in line


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no names that are not UTF-8")
def test_a_working_folder_that_is_no_text(tmp_path, text_file):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    (Path(os.fsdecode(folder)) / "a.txt").write_bytes(text_file.read_bytes())
    argv = ("-m", "mlx_mla.train", *TINY, "--steps 1 --data a.txt --out run")
    done = ran(*argv, code=2, cwd=folder)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "is not valid UTF-8" in done.stderr
