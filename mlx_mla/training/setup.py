"""What every rank of a run needs before its first step: settings, data, tasks and the start."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mlx_mla.backends.contract import Start
from mlx_mla.data.dataset import TrainingData
from mlx_mla.data.tokenizer import Tokenizer, get_tokenizer
from mlx_mla.errors import UserError
from mlx_mla.evaluation.runner import PreparedTask, load, task_names
from mlx_mla.evaluation.tasks import TASKS, TaskSetup
from mlx_mla.evaluation.tasks.wikitext2 import WINDOW
from mlx_mla.files import parse_toml
from mlx_mla.model.presets import overlay, to_toml
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.training.starting_models import with_shape_of_init
from mlx_mla.training.tracking import tracker_names
from mlx_mla.world import Share, World, same_everywhere, share_of


@dataclasses.dataclass(frozen=True)
class Run:
    """The checked parts of a run on this rank."""

    config: TrainConfig
    """The settings of all ranks, resolved."""
    data: TrainingData
    tasks: Sequence[PreparedTask]
    """On rank 0; the other ranks run none."""
    world: World
    share: Share


def prepare_run(config: TrainConfig, resume: bool, world: World) -> Run:
    """Prepare the settings of all ranks, and the data and tasks of this rank.

    Raises:
        UserError: If a setting is impossible, or the data differ between ranks.
    """
    if world.rank == 0:
        tokenizer = get_tokenizer(config.tokenizer, config.bpe_dir)
        if config.init is not None and not resume:
            config = with_shape_of_init(config, tokenizer)
        config = config.resolved(tokenizer.size)
        _check_sample(config, tokenizer)
    if world.size > 1:
        settings = parse_toml(world.first(to_toml(config)), "rank 0")
        config = overlay(TrainConfig(), settings, "rank 0")
    if world.rank:
        tokenizer = get_tokenizer(config.tokenizer, config.bpe_dir)
    share = share_of(world.size, config.batch_size, config.passes_per_step)
    data = TrainingData(config, tokenizer)
    same_everywhere(
        world, f"{data.fingerprint} {data.samples}", f"other tokens in --data {config.data}"
    )
    tasks = _tasks(config, data) if world.rank == 0 else []
    tracker_names(config.track)
    return Run(config, data, tasks, world, share)


def _check_sample(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """UserError if the prompt of the samples cannot be encoded, which would end the run after its
    last step."""
    if config.sample_tokens:
        try:
            tokenizer.encode(config.sample_prompt)
        except UserError as e:
            raise UserError(f"--sample-prompt: {e}; give another, or --sample-tokens 0") from None


def _tasks(config: TrainConfig, data: TrainingData) -> list[PreparedTask]:
    """Prepare the tasks of --eval-tasks, with the samples that the whole run uses."""
    if not config.eval_tasks:
        return []
    n_positions = config.model.n_positions
    # Windows as long as the model allows: they show the run's progress, and need not be comparable
    # with published values.
    window = min(WINDOW, n_positions)
    setup = TaskSetup(data.fast_tokenizer, n_positions, window, config.eval_limit, config.seed)
    folder = None if config.eval_data_dir is None else Path(config.eval_data_dir)
    prepared = []
    for name in task_names(config.eval_tasks, "--eval-tasks"):
        documents = load(TASKS[name], "standard", folder, config.eval_limit, config.seed)
        prepared.append(PreparedTask(TASKS[name], documents, "standard", setup))
    return prepared


def shared_start(world: World, start: Start | None) -> Start:
    """Rank 0's start on every rank; the other ranks pass None."""
    point = world.first(
        None if start is None else [start.step, start.val_loss, start.optimizer_state is not None]
    )
    step, val_loss, has_state = point
    weights = world.broadcast(None if start is None else start.weights)
    state = None if start is None else start.optimizer_state
    return Start(weights, step, world.broadcast(state) if has_state else None, val_loss)
