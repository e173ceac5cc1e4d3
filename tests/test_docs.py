"""The documents: links lead somewhere, commands parse, pages stay short and pictures used."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from mlx_mla import cli, train
from mlx_mla.errors import UserError
from mlx_mla.model import presets

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for folder in ("*.md", "docs/**/*.md", "bench/**/*.md", ".github/**/*.md")
    for path in ROOT.glob(folder)
)
WRITTEN = [path for path in PAGES if "results" not in path.parts]  # bench writes its reports
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
WIDTH = 100


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    """Markdown without fenced blocks and inline code, where brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    slugs: set[str] = set()
    for heading in HEADING.findall(text):
        slug = re.sub(r"[^\w\- ]", "", LINK.sub("", heading).lower()).replace(" ", "-")
        copies = (slug, *(f"{slug}-{i}" for i in range(1, 100)))
        slugs.add(next(s for s in copies if s not in slugs))
    return slugs


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_and_their_anchors_resolve(page):
    for target in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(file), f"{target}: no such heading"


def test_pages_that_the_code_names_exist():
    folders = ("mlx_mla", "convert", "bench")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for source in sources:
        for page in re.findall(r"docs/[\w-]+\.md", source.read_text(encoding="utf-8")):
            assert (ROOT / page).is_file(), f"{name(source)} names {page}"


def test_the_tests_that_hold_promises_exist():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`tests/(\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 40
    for file, test in named:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"\ndef {test}" in source, f"{file} has no {test}"


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_lines_are_within_100_columns(page):
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        # Tables and addresses cannot be broken.
        if not line.startswith("|") and "://" not in line and not line.startswith("!["):
            assert len(line) <= WIDTH, f"line {number} has {len(line)} columns"
        if not line.startswith("|"):
            assert not re.search(r"[.:)] - [*`A-Z]", line), f"line {number} runs on into an item"


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_picture_is_on_a_page():
    used = {
        (page.parent / target).resolve()
        for page in PAGES
        for target in LINK.findall(page.read_text(encoding="utf-8"))
    }
    pictures = [path for folder in ("docs", "bench") for path in (ROOT / folder).rglob("*.png")]
    assert pictures
    # Reports that bench writes have their pictures beside them under the same name.
    unused = [p for p in pictures if p not in used and not p.with_suffix(".md").exists()]
    assert not unused


def code_lines(text: str) -> tuple[list[str], list[str]]:
    """Lines of code in a page, continuation lines joined, and what is code within its prose."""
    lines: list[str] = []
    prose: list[str] = []
    fenced = False
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line.strip())
        else:
            prose.append(line)
    return lines, [" ".join(c.split()) for c in re.findall(r"`([^`]+)`", "\n".join(prose))]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(module, arguments) of each command of this project in a page."""
    found = []
    lines, inline = code_lines(text)
    for line in lines + inline:
        if make := re.search(r"\bmake train ARGS=\"([^\"]*)\"", line):
            found.append(("mlx_mla.train", shlex.split(make[1])))
        start = re.search(
            r"-m ((?:mlx_mla|bench)\.\w+|convert|bench)\b|\b(bench/\w+)\.py(?= -)", line
        )
        if not start:
            continue
        module = start[1] or start[2].replace("/", ".")
        words = shlex.split(line[start.end() :], comments=True)
        end = next((i for i, w in enumerate(words) if re.match(r"[|;&<>]|\d+<", w)), len(words))
        argv = [word for word in words[:end] if word != "..."]
        if argv or line in lines:  # in prose a command without arguments may be its name alone
            found.append((module, argv))
    return found


COMMANDS = [
    (name(page), module, argv)
    for page in WRITTEN
    for module, argv in commands(page.read_text(encoding="utf-8"))
]
MODULES = {
    "bench": "bench.__main__",
    "convert": "convert.__main__",
    "mlx_mla.convert": "convert.__main__",
}


class Parsed(Exception):
    """Raised in place of doing what a command line asks for."""


def parse_only(module: str, argv: list[str], monkeypatch, folder: Path) -> None:
    """Give a command line to its command, and stop it once its own parser has taken it."""

    def then_stop(parse):
        def parse_and_stop(*args, **kwargs):
            parse(*args, **kwargs)
            raise Parsed

        return parse_and_stop

    monkeypatch.chdir(folder)
    if module == "mlx_mla.train":  # --resume and --config read these
        for option, file in (("--out", "{}/config.toml"), ("--config", "{}")):
            if option in argv:
                path = Path(file.format(argv[argv.index(option) + 1]))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(presets.to_toml(presets.preset("nano")), encoding="utf-8")
        monkeypatch.setattr(train, "configure", then_stop(train.configure))
    elif module == "mlx_mla.serve":
        serve = importlib.import_module(module)
        monkeypatch.setattr(serve, "_flags", then_stop(serve._flags))
    else:
        monkeypatch.setattr(cli, "parse", then_stop(cli.parse))
    command = importlib.import_module(MODULES.get(module, module))
    try:
        code = command.main(argv)
    except (Parsed, SystemExit) as e:
        assert isinstance(e, Parsed) or e.code == 0  # --help
    else:
        assert code == 0


@pytest.mark.parametrize(
    ("page", "module", "argv"), COMMANDS, ids=[f"{p}-{m}" for p, m, _ in COMMANDS]
)
def test_commands_on_the_pages_parse(page, module, argv, monkeypatch, tmp_path, capsys, tiny_run):
    if "--init" in argv:  # its tokenizer is the default
        argv = [str(tiny_run) if argv[i - 1] == "--init" else word for i, word in enumerate(argv)]
    if module.startswith("bench"):
        pytest.importorskip("torch")
    if "evaluation" in argv[:1]:
        pytest.importorskip("lm_eval")
    try:
        parse_only(module, argv, monkeypatch, tmp_path)
    except AssertionError:
        pytest.fail(f"{module} {' '.join(argv)}: {capsys.readouterr().err}")


def test_a_command_that_does_not_parse_is_noticed(monkeypatch, tmp_path):
    [(module, argv)] = commands("    python -m mlx_mla.train --stepz 5 \\\n        --out x  # so")
    assert argv == ["--stepz", "5", "--out", "x"]
    with pytest.raises(AssertionError):
        parse_only(module, argv, monkeypatch, tmp_path)
    with pytest.raises(UserError, match="--steps"):
        train.given_flags(argv)
