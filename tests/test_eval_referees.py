"""Scores against lm-evaluation-harness and transformers, on the real files."""

import json

import numpy as np
import pytest
from helpers import words, write_gpt2_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from convert import __main__ as convert

torch = pytest.importorskip("torch")
lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval, in the extra named referees")

from mlx_mla import checkpoint, evaluate
from mlx_mla.backends import get_backend
from mlx_mla.evaluation.tasks import TASKS

pytestmark = pytest.mark.slow
ITEMS = {"gpt2": 200, "begins a text": 50, "smollm2": 20}
"""Models, and how many items of LAMBADA and HellaSwag each scores."""


@pytest.fixture(scope="module", params=ITEMS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, shared_data, tmp_path_factory, request):
    """A model folder: GPT-2's tokenizer, the same with a beginning of text that it puts before
    every text as Llama's does, or a real model whose beginning and end of text differ."""
    path = tmp_path_factory.mktemp("referee") / "model"
    if name == "smollm2":
        source = request.getfixturevalue("smollm2")
        assert convert.main(words(source, "--out", path, "--dtype float32")) == 0
        return path
    write_gpt2_model(path, shared_data)
    if name == "begins a text":
        tokenizer = checkpoint.ModelFolder(path).tokenizer
        start = tokenizer.convert_ids_to_tokens(11)
        tokenizer.bos_token = start
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, 11)]
        )
        tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sample(name, shared_data, tmp_path_factory):
    """A data folder with random rows of each jsonl file and the first pages of WikiText, as it is
    published."""
    folder = tmp_path_factory.mktemp("sample")
    for task in ("lambada", "hellaswag"):
        path = TASKS[task].files["standard"]
        lines = (shared_data / path).read_text(encoding="utf-8").splitlines()
        chosen = np.random.default_rng(0).choice(len(lines), ITEMS[name], replace=False)
        (folder / path).parent.mkdir()
        (folder / path).write_text(
            "\n".join(lines[i] for i in sorted(chosen)) + "\n", encoding="utf-8"
        )
    (folder / "wikitext2").mkdir()
    text = (shared_data / "wikitext2/wiki.test.raw").read_text(encoding="utf-8")
    (folder / "wikitext2/wiki.test.raw").write_text(
        text[: 10_000 if name == "smollm2" else 60_000].rpartition("\n")[0] + "\n", encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="module")
def ours(folder, sample, tmp_path_factory):
    """Results of both backends."""
    results = {}
    for backend in ("mlx", "torch"):
        out = tmp_path_factory.mktemp("ours") / "results.json"
        argv = words("--model", folder, "--data-dir", sample, "--out", out, "--backend", backend)
        assert evaluate.main([*argv, "--tasks", "wikitext2,lambada,hellaswag"]) == 0
        results[backend] = json.loads(out.read_text())["models"][0]["tasks"]
    return results


@pytest.fixture(scope="module")
def theirs(name, folder, sample, tmp_path_factory, request):
    """lm_eval's results through its `hf` model, with its own tasks pointed at the same files; of a
    real model, as transformers itself reads its source."""
    if name == "smollm2":
        folder = request.getfixturevalue("smollm2")
    from lm_eval.models.huggingface import HFLM

    from bench import evaluation

    pages = tmp_path_factory.mktemp("pages") / "pages.jsonl"
    documents = TASKS["wikitext2"].documents_from_file(
        sample / "wikitext2/wiki.test.raw", "standard"
    )
    pages.write_text(
        "\n".join(json.dumps({"page": p}) for kind, p in documents if kind == "page"),
        encoding="utf-8",
    )
    files = {
        "wikitext2": pages,
        "lambada": sample / "lambada/lambada_test.jsonl",
        "hellaswag": sample / "hellaswag/hellaswag_val.jsonl",
    }
    tasks = evaluation.local_tasks(files, tmp_path_factory.mktemp("tasks"))
    model = HFLM(
        pretrained=str(folder), trust_remote_code=True, dtype="float32", device="cpu", batch_size=8
    )
    return {task: evaluation.evaluate(model, tasks, task, 8) for task in files}


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_hellaswag_is_lm_evals(name, ours, theirs, backend):
    for metric in ("acc", "acc_norm"):
        assert ours[backend]["hellaswag"][metric] == pytest.approx(
            theirs["hellaswag"][metric], abs=1e-9
        )
        assert ours[backend]["hellaswag"]["n"] == ITEMS[name]


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_lambada_is_lm_evals(ours, theirs, backend):
    mine, other = ours[backend]["lambada"], theirs["lambada"]
    assert np.log(mine["ppl"]) == pytest.approx(np.log(other["perplexity"]), rel=1e-4)
    assert mine["ppl"] == pytest.approx(other["perplexity"], rel=1e-3)
    assert mine["acc"] == pytest.approx(other["acc"], abs=1e-9)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_wikitext_pages_are_lm_evals(name, ours, theirs, backend):
    if name == "begins a text":
        pytest.skip("lm_eval scores a beginning of text after its own beginning of text")
    mine, other = ours[backend]["wikitext2"], theirs["wikitext2"]
    assert mine["word_ppl"] == pytest.approx(other["word_perplexity"], rel=1e-3)
    assert mine["byte_ppl"] == pytest.approx(other["byte_perplexity"], rel=1e-3)
    assert mine["bits_per_byte"] == pytest.approx(other["bits_per_byte"], rel=1e-4)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize("stride", [1024, 512])
def test_windows_are_those_of_transformers_documentation(
    name, ours, folder, sample, backend, stride
):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    documents = TASKS["wikitext2"].documents_from_file(
        sample / "wikitext2/wiki.test.raw", "standard"
    )
    scorer = get_backend(backend).scorer(checkpoint.ModelFolder(folder))
    ids = torch.tensor([scorer.tokenizer.encode(documents[0][1], add_special_tokens=False)])
    total, count, before = 0.0, 0, 0
    for start in range(0, ids.shape[1], stride):
        end = min(start + 1024, ids.shape[1])
        labels = ids[:, start:end].clone()
        labels[:, : before - start] = -100
        with torch.no_grad():
            loss = model(ids[:, start:end], labels=labels).loss.item()
        scored = int((labels[:, 1:] != -100).sum())
        total, count, before = total + loss * scored, count + scored, end
        if end == ids.shape[1]:
            break
    metric = "token_ppl" if stride == 1024 else "token_ppl_stride512"
    # Numbers of 20,000 in the real model's residual stream cost digits of float32.
    tolerance = 5e-4 if name == "smollm2" else 1e-4
    assert ours[backend]["wikitext2"][metric] == pytest.approx(np.exp(total / count), rel=tolerance)
    assert ours[backend]["wikitext2"][f"{metric}_count"] == {"token": count}
