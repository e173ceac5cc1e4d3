"""Hides PyTorch from a process with this folder on its PYTHONPATH."""

from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: (
    None if name.partition(".")[0] == "torch" else find(name, *args)
)
