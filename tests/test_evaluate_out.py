"""What evaluate writes replaces nothing but results that are resumed, and says what it is refused;
and the texts that it reads."""

import json

import pytest
from helpers import file_size_limit, refused, words
from safetensors.numpy import load_file, save_file

from mlx_mla import checkpoint, evaluate


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("lambada", "hellaswag"):
        (folder / name).mkdir()
    rows = [{"text": f"a few words {i} end"} for i in range(4)]
    (folder / "lambada" / "lambada_test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def argv(tiny_run, data):
    return ["--model", str(tiny_run), "--data-dir", str(data), "--tasks", "lambada"]


def test_the_results_may_not_be_their_own_report(argv, tmp_path, capsys):
    for name in ("r.png", "r.md", "r", "r.json.items", ".json"):
        said = refused(capsys, *argv, "--out", tmp_path / name, command=evaluate.main)
        assert "must be a file ending in .json" in said
    (tmp_path / "folder.json").mkdir()
    refused(capsys, *argv, "--out", tmp_path / "folder.json", command=evaluate.main)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.json"]


@pytest.mark.parametrize("name", ["mine.png", "mine.md"])
def test_files_of_the_user_are_not_replaced(argv, tmp_path, capsys, name):
    (tmp_path / name).write_text("mine")
    for more in ((), ("--resume",)):
        said = refused(capsys, *argv, "--out", tmp_path / "mine.json", *more, command=evaluate.main)
        assert f"{name} exists and would be replaced" in said
    (tmp_path / "mine.json").write_text('{"models": "mine"}')
    said = refused(
        capsys, *argv, "--out", tmp_path / "mine.json", "--resume", command=evaluate.main
    )
    assert "protocol is missing; give --out a new name" in said
    assert (tmp_path / name).read_text() == "mine"
    assert (tmp_path / "mine.json").read_text() == '{"models": "mine"}'


def test_results_are_resumed_with_their_report(argv, tmp_path, capsys):
    out = tmp_path / "new" / "r.json"
    assert evaluate.main([*argv, "--out", str(out)]) == 0
    before = json.loads(out.read_text())["models"]
    assert evaluate.main([*argv, "--out", str(out), "--resume"]) == 0
    assert json.loads(out.read_text())["models"] == before
    out.unlink()  # killed before its first results, with items and a plot there
    assert evaluate.main([*argv, "--out", str(out), "--resume"]) == 0
    assert json.loads(out.read_text())["models"] == before


def test_a_model_whose_weights_have_changed_is_scored_again(data, run_copy, tmp_path, capsys):
    out, found = tmp_path / "r.json", []
    folder = checkpoint.latest(run_copy)
    path = folder / "model.safetensors"
    (folder / "SHA256SUMS").unlink()
    for factor in (1, 2):
        weights = {n: factor * w for n, w in load_file(str(path)).items()}
        save_file(weights, str(path), {"format": "pt"})
        argv = words("--model", folder, "--data-dir", data, "--tasks lambada --resume --out", out)
        assert evaluate.main(argv) == 0
        found.append(json.loads(out.read_text())["models"][0]["tasks"]["lambada"]["ppl"])
    assert found[0] != pytest.approx(found[1], rel=1e-3)


def test_disks_that_refuse_are_one_line(argv, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    said = refused(capsys, *argv, "--out", tmp_path / "file" / "r.json", command=evaluate.main)
    assert "cannot be written" in said
    for limit in (100, 3000):  # of a file's size: the items, the plot
        out = tmp_path / str(limit) / "r.json"
        with file_size_limit(limit):
            code = evaluate.main(words(*argv, "--out", out))
        said, err = capsys.readouterr()
        assert "File too large" in err
        if limit == 100:
            assert code == 2 and err.count("\n") == 1
        else:  # a picture that cannot be written is a warning
            assert code == 0 and "r.png: no picture drawn" in err
            assert "| lambada | acc" in said


@pytest.mark.parametrize("seed", ["-1", str(2**63), str(2**64), "x"])
def test_seeds_are_bounded(argv, capsys, seed):
    assert "--seed" in refused(capsys, *argv, "--seed", seed, command=evaluate.main)


def test_half_characters_in_rows_are_told_by_line_and_field(tiny_run, data, tmp_path, capsys):
    good = {
        "activity_label": "a", "ctx_a": "b", "ctx_b": "c", "ctx": "b c", "label": 0,
        "endings": ["w", "x", "y", "z"],
    }  # fmt: skip
    file = data / "hellaswag" / "hellaswag_val.jsonl"
    for field, value in (("ctx", "b \ud800"), ("endings", ["w", "x", "y", "\udcff"])):
        file.write_text(json.dumps(good) + "\n" + json.dumps({**good, field: value}))
        said = refused(
            capsys, "--model", tiny_run, "--data-dir", data, "--tasks hellaswag",
            command=evaluate.main,
        )  # fmt: skip
        assert f"line 2: {field}" in said and "holds half a character" in said


def test_names_in_results_are_only_names(tiny_run, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [r"$\foo$", "a[/x]", "m[1]"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tiny_run)
    argv = ["--model", *names, "--data-dir", str(data), "--tasks", "lambada", "--out", "r.json"]
    assert evaluate.main(argv) == 0
    assert [m["model"] for m in json.loads((tmp_path / "r.json").read_text())["models"]] == names
