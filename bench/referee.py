"""lm-evaluation-harness on local files, with its own definitions of the tasks."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

YAMLS = {
    "wikitext2": "wikitext/wikitext.yaml",
    "lambada": "lambada/lambada_openai.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
}
"""Its definition of each of our tasks."""


def local_tasks(files: Mapping[str, Path], folder: Path) -> TaskManager:
    """Its tasks, as `local_NAME`, reading local files.

    Args:
        files: JSON-lines file of each task by our name, with the fields that the hub's has.
        folder: Where to write the definitions.
    """
    own = Path(lm_eval.__file__).parent / "tasks"
    for name, data in files.items():
        definition = {
            "include": str(own / YAMLS[name]), "task": f"local_{name}", "dataset_path": "json",
            "dataset_name": None, "training_split": None, "validation_split": None,
            "test_split": "test", "dataset_kwargs": {"data_files": {"test": str(data)}},
        }  # fmt: skip
        text = json.dumps(definition)  # which is YAML, too
        (folder / f"local_{name}.yaml").write_text(text, encoding="utf-8")
    return TaskManager(include_path=str(folder))


def evaluate(
    model: Any, tasks: TaskManager, name: str, batch_size: int, limit: int | None = None
) -> dict[str, float]:
    """Metrics of one local task.

    Args:
        model: An `lm_eval.models.huggingface.HFLM`.
        limit: First items only (for warming up).
    """
    outcome = lm_eval.simple_evaluate(
        model=model, tasks=[f"local_{name}"], task_manager=tasks, batch_size=batch_size,
        limit=limit, bootstrap_iters=0,
    )  # fmt: skip
    results: dict[str, Any] = outcome["results"][f"local_{name}"]
    return {k.removesuffix(",none"): v for k, v in results.items() if isinstance(v, float)}
