"""`mlx-mla COMMAND` and `python -m mlx_mla COMMAND` run every command by its name."""

import importlib

import pytest
from helpers import ran, refused

from mlx_mla import __main__ as dispatcher
from mlx_mla import generate


def test_commands_are_those_of_the_package(capsys):
    assert dispatcher.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in dispatcher.COMMANDS:
        assert f"  {name} " in shown
        module = "convert.__main__" if name == "convert" else name
        assert callable(importlib.import_module(f"mlx_mla.{module}").main)


def test_a_command_gets_its_arguments(folder, capsys):
    argv = ["--model", str(folder), "--prompt", "The ", "--temp", "0", "--max-tokens", "5"]
    assert generate.main(argv) == 0
    expected = capsys.readouterr().out
    assert dispatcher.main(["generate", *argv]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["--steps", "5"], "unknown command '--steps'; known: train, generate, "),
    ],
)
def test_an_unknown_command_names_the_nearest(capsys, argv, hint):
    assert hint in refused(capsys, *argv, command=dispatcher.main)


def test_python_m_mlx_mla():
    done = ran("-m", "mlx_mla", "train", "--steps x", code=2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
