"""Arrows run one way: what imports what, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SERVER = ("mlx_mla/serve.py", "mlx_mla/decoding/http_answer.py", "mlx_mla/decoding/http_request.py")
"""mlx-lm's own, with checks of requests in front: it has no other backend."""
KERNELS = "mlx_mla/checks/metal.py"
"""What Metal's kernels take is asked of MLX itself."""
COMMANDS = {"serve", "train", "generate", "evaluate", "prepare", "plot", "doctor"}


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it, `from a import b` also as `a.b`; not those that
    only annotations name."""
    found = set()
    waiting = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
                waiting.append(node)
    return found


FILES = {p.relative_to(ROOT).as_posix(): imports(p) for p in (ROOT / "mlx_mla").rglob("*.py")}


def importers(*modules: str) -> set[str]:
    """Files of the package that import one of these modules or something in it."""
    return {
        path
        for path, names in FILES.items()
        if any(n == m or n.startswith(f"{m}.") for n in names for m in modules)
    }


def outside(paths: set[str], *allowed: str) -> set[str]:
    return {p for p in paths if not p.startswith(allowed)}


def test_the_package_imports_neither_the_converter_nor_the_benchmarks():
    assert not importers("convert", "bench", "tests", "mlx_mla.convert")


@pytest.mark.parametrize(
    ("framework", "rooms"),
    [
        (
            ("mlx", "mlx_lm"),
            ("mlx_mla/backends/mlx/", "mlx_mla/model/model_mlx.py", KERNELS, *SERVER),
        ),
        (("torch",), ("mlx_mla/backends/torch/", "mlx_mla/model/model_torch.py")),
    ],
)
def test_a_framework_is_imported_in_its_own_room(framework, rooms):
    assert importers(*framework)
    assert not outside(importers(*framework), *rooms)


def test_one_place_names_the_backends():
    for name in ("mlx", "torch"):
        own = f"mlx_mla/backends/{name}/"
        others = outside(importers(f"mlx_mla.backends.{name}"), own, KERNELS, *SERVER)
        assert others == {"mlx_mla/backends/__init__.py"}


def test_both_backends_have_the_same_files():
    mlx, torch = (
        {p.name for p in (ROOT / "mlx_mla" / "backends" / name).glob("*.py")}
        for name in ("mlx", "torch")
    )
    assert mlx - torch == {"prompt_cache.py"}  # files of mlx-lm's
    assert not torch - mlx


def test_no_library_imports_a_command():
    for command in COMMANDS:
        assert not importers(f"mlx_mla.{command}"), command


def test_the_model_files_stand_alone():
    """Copies of them travel in model folders."""
    for name in ("model_mlx", "model_torch", "configuration_mla_gpt2"):
        assert not {n for n in FILES[f"mlx_mla/model/{name}.py"] if n.startswith("mlx_mla")}


def test_modules_do_not_import_each_other_in_circles():
    modules = {p.removesuffix(".py").removesuffix("/__init__").replace("/", "."): names
               for p, names in FILES.items()}  # fmt: skip
    arrows = {m: {n for n in names if n in modules and n != m} for m, names in modules.items()}
    while arrows:
        ends = {m for m, to in arrows.items() if not to & arrows.keys()}
        assert ends, sorted(arrows)
        arrows = {m: to for m, to in arrows.items() if m not in ends}
