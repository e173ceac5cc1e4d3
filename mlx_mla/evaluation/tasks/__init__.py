"""The evaluation tasks by name. Each has two protocols."""

from mlx_mla.evaluation.tasks.base import Definition, Measured, Task, TaskSetup
from mlx_mla.evaluation.tasks.hellaswag import HellaSwag
from mlx_mla.evaluation.tasks.lambada import Lambada
from mlx_mla.evaluation.tasks.wikitext2 import WikiText2

TASKS: dict[str, Task] = {task.name: task for task in (WikiText2(), Lambada(), HellaSwag())}

__all__ = ["TASKS", "Definition", "Measured", "Task", "TaskSetup"]
