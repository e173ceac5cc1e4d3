"""Every setting of training, and its validation."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

from tyro.conf import OmitArgPrefixes

from mlx_mla.errors import UserError, flag
from mlx_mla.fields import (
    Bounds,
    OpenFraction,
    at_least_1,
    check_bounds,
    fraction,
    not_negative,
    positive,
)
from mlx_mla.model.config import (
    TOKENIZER_IDS,
    BackendName,
    Decay,
    DeviceName,
    DType,
    InitializerName,
    ModelConfig,
    Seed,
    TrainableName,
    Width,
)

Positive = Annotated[int, at_least_1(2**31 - 1)]
NotNegative = Annotated[int, not_negative(2**31 - 1)]
Share = Annotated[float, fraction()]
# Far above any use, and such that the products of rates stay within float32.
Rate = Annotated[float, positive(1e30)]

RENAMED = {"checkpoint_every": "activation_checkpointing"}
"""Former names of settings, which settings files may still use."""

ONLY_WITH: dict[str, tuple[str, Optional[str], float]] = {
    "teacher_weight": ("teacher", None, 0.5),
    "teacher_temperature": ("teacher", None, 1.0),
    "muon_learning_rate": ("optimizer", "muon", 0.02),
    "decay_fraction": ("lr_schedule", "wsd", 0.2),
}
"""Settings that belong to one choice of an option (None: to any), and their defaults there."""

LARGE_LOGITS = 64 * 2**20
"""Bytes of one pass's float32 logits above which the loss computes them in chunks."""


@dataclasses.dataclass(kw_only=True)
class DataSettings:
    """Data."""

    data: str = "builtin"
    """Training text: a UTF-8 text file, a folder of token shards (from mlx_mla.prepare,
    build-nanogpt, llm.c or nanoGPT), or "builtin", the documentation that comes with Python."""
    val_fraction: OpenFraction = 0.1
    """Share of the text, at its end, that is held out for validation. Not used if the folder has
    validation shards."""
    tokenizer: str = "bytes"
    """"bytes" (256 bytes and <|endoftext|>), "gpt2" (GPT-2's byte-pair encoding, 50257 ids), or a
    folder with tokenizer.json, such as any model's. Default with --init or --teacher: that
    model's."""
    bpe_dir: Optional[str] = None
    """Folder with encoder.json and vocab.bpe for --tokenizer gpt2. None: tiktoken downloads them
    once."""
    batch_size: Width = 16
    """Sequences in one forward and backward pass. Halve it if memory runs out."""
    tokens_per_step: Optional[Annotated[int, at_least_1(2**28)]] = None
    """Tokens in one optimizer step; sets --grad-accum-steps. None: --grad-accum-steps decides."""
    grad_accum_steps: Optional[Width] = None
    """Passes whose gradients are averaged into one optimizer step, in the memory of one pass.
    None: as many as --tokens-per-step needs, or 1."""
    seq_len: Optional[int] = None
    """Tokens in one sequence. None: n_positions; with --init at most 1024."""


@dataclasses.dataclass(kw_only=True)
class OptimizerSettings:
    """Optimizer."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """"muon" orthogonalizes the updates of the blocks' matrices; embeddings, biases and norms keep
    AdamW."""
    weight_decay: Annotated[float, not_negative(1000)] = 0.1
    """Decoupled weight decay, on matrices only."""
    beta1: Decay = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: Decay = 0.95
    """AdamW's decay of the mean squared gradient."""
    adam_epsilon: Annotated[float, not_negative(1e30)] = 1e-8
    """AdamW's epsilon."""
    grad_clip: Annotated[float, not_negative(1e30)] = 1.0
    """Maximum global norm of the gradient. 0: no clipping."""
    trainable: TrainableName = "all"
    """Parameters to train. "attention": those of the attention alone, in less time and memory, such
    as after a conversion to MLA."""
    teacher: Optional[str] = None
    """Model folder to distil from: adds the divergence from its predictions to the loss. None:
    off."""
    teacher_weight: Optional[Share] = None
    """Share of that divergence in the loss, from 0 to 1; the rest is cross-entropy. None: 0.5 with
    --teacher."""
    teacher_temperature: Optional[Annotated[float, Bounds("be at least 0.001", 0.001, 1000)]] = None
    """Temperature of both softmaxes in that divergence. None: 1 with --teacher."""


@dataclasses.dataclass(kw_only=True)
class ScheduleSettings:
    """Schedule."""

    steps: Positive = 1000
    """Optimizer steps in all."""
    learning_rate: Rate = 6e-4
    """Peak learning rate of AdamW, reached after the warm-up."""
    muon_learning_rate: Optional[Rate] = None
    """Peak learning rate of Muon's matrices, on the same schedule. None: 0.02 with --optimizer
    muon."""
    warmup_steps: NotNegative = 100
    """Steps over which the learning rate rises from 0. 0: no warm-up."""
    lr_schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up, "cosine" decays over all remaining steps. "wsd" (warm-up, stable, decay)
    keeps the peak and falls linearly over the last --decay-fraction, so a run can be extended."""
    decay_fraction: Optional[Share] = None
    """Share of all steps in which "wsd" decays. None: 0.2 with --lr-schedule wsd."""
    min_lr_ratio: Share = 0.1
    """Share of the peak learning rate that is left at the end of the decay."""


@dataclasses.dataclass(kw_only=True)
class EvaluationSettings:
    """Evaluation."""

    eval_every: NotNegative = 100
    """Steps between measurements of the validation loss. 0: only at the end."""
    eval_batches: NotNegative = 20
    """Batches of each measurement, spread evenly over the held-out text. 0: all of it."""
    final_eval_batches: NotNegative = 0
    """Batches of the last measurement, at the end of the run. 0: the whole held-out text."""
    eval_tasks: str = ""
    """Tasks to run at the same steps, separated by commas: wikitext2, lambada, hellaswag. Empty:
    none."""
    eval_limit: Positive = 100
    """Items per task: a random sample, the same for the whole run."""
    eval_data_dir: Optional[str] = None
    """Folder with the tasks' files, as --data-dir of mlx_mla.evaluate. None: the Hugging Face
    hub."""


@dataclasses.dataclass(kw_only=True)
class LoggingSettings:
    """Logging and trackers."""

    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    sample_prompt: str = "The "
    """Prompt of the printed samples."""
    sample_tokens: NotNegative = 200
    """Tokens of a sample. 0: no samples."""
    sample_every: NotNegative = 0
    """Steps between samples, which are also kept in samples.jsonl. 0: only at the end."""
    track: str = ""
    """Trackers that also receive the metrics, separated by commas: tensorboard, wandb, trackio.
    Empty: none."""


@dataclasses.dataclass(kw_only=True)
class RunSettings:
    """Run and machine."""

    preset: str = "nano"
    """Starting point for every other setting: nano, mla-124m, mla-124m-r256, mla-124m-r128,
    mla-124m-rope, mla-124m-tied, mla-124m-llama, gpt2-124m, gpt2-124m-rope or llama-124m."""
    seed: Seed = 1337
    """Seed of the initial weights, the order of the data and the dropout."""
    save_every: NotNegative = 200
    """Steps between checkpoints. 0: only at the end."""
    keep: NotNegative = 2
    """Number of newest checkpoints to keep. 0: all."""
    dtype: DType = "float32"
    """Type of the computation; weights and optimizer state stay float32. bfloat16 is slow on
    CPUs."""
    activation_checkpointing: NotNegative = 0
    """Keep activations only between groups of this many blocks and recompute the others in the
    backward pass: less memory for up to a third more time. 1 saves most. 0: off."""
    loss_chunk: Optional[NotNegative] = None
    """Tokens whose logits the loss holds at a time. 0: all of a pass. None: 1024 if the logits of
    a pass exceed 64 MiB, else all."""
    compile: bool = True
    """Compile the training step: mx.compile, and torch.compile on CUDA. --no-compile runs it
    eagerly, for debugging."""
    backend: BackendName = "mlx"
    """Framework that runs the model. A run started in one can be resumed in the other."""
    device: DeviceName = "auto"
    """Device of the backend: cpu or gpu for mlx; cpu, mps or cuda for torch. "auto" uses a GPU if
    there is one."""


@dataclasses.dataclass(kw_only=True)
class InitialSettings:
    """Model."""

    init: Optional[str] = None
    """Model folder to take the initial weights and the model's shape from. None: random
    weights."""
    initializer_range: Annotated[float, not_negative(100)] = 0.02
    """Initialization std of embeddings and matrices; residual projections get 1/sqrt(2 n_layer) of
    it."""
    initializer: InitializerName = "normal"
    """"normal" gives every matrix that std, as GPT-2 does; "fan_in" makes it proportional to
    1/sqrt(inputs): a matrix with n_embd inputs keeps it, one with fewer gets more."""
    model: OmitArgPrefixes[ModelConfig] = dataclasses.field(default_factory=ModelConfig)


@dataclasses.dataclass(kw_only=True)
class TrainConfig(  # a dataclass takes the fields of its last base first
    RunSettings,
    LoggingSettings,
    EvaluationSettings,
    ScheduleSettings,
    OptimizerSettings,
    DataSettings,
    InitialSettings,
):
    """Settings of a training run; `config.toml` in the run folder holds them all."""

    @property
    def name(self) -> str:
        """The preset, or the model that `init` names."""
        return Path(self.init or "").name or self.preset

    @property
    def context(self) -> int:
        """Tokens of one training sequence."""
        return self.seq_len or self.model.n_positions

    @property
    def passes_per_step(self) -> int:
        """Passes of one optimizer step of a resolved configuration."""
        assert self.grad_accum_steps
        return self.grad_accum_steps

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step of a resolved configuration."""
        return self.batch_size * self.passes_per_step * self.context

    @property
    def total_tokens(self) -> int:
        """Tokens of all steps of a resolved configuration."""
        return self.steps * self.step_tokens

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, the model's under `model`, without those that are None."""
        values = {**dataclasses.asdict(self), "model": self.model.to_dict()}
        return {name: value for name, value in values.items() if value is not None}

    def make_paths_absolute(self) -> None:
        """Make the paths that exist absolute, so a run can be resumed from any directory."""
        for name in ("data", "init", "teacher", "tokenizer", "bpe_dir", "eval_data_dir"):
            value = getattr(self, name)
            if value not in (None, *TOKENIZER_IDS) and Path(value).exists():
                setattr(self, name, str(Path(value).resolve()))

    def resolved(self, tokenizer_size: Optional[int] = None) -> "TrainConfig":
        """A copy with defaults filled in and every value checked.

        Args:
            tokenizer_size: Number of token ids of the tokenizer. None: that of "bytes" and "gpt2".

        Raises:
            UserError: For an impossible value; the message names the option.
        """
        check_bounds(self)
        if self.bpe_dir is not None and self.tokenizer != "gpt2":
            raise UserError("--bpe-dir requires --tokenizer gpt2; leave out --bpe-dir")
        if self.eval_data_dir is not None and not self.eval_tasks:
            raise UserError("--eval-data-dir requires --eval-tasks; leave out --eval-data-dir")
        model = self.model.resolved(tokenizer_size or TOKENIZER_IDS.get(self.tokenizer))
        if self.seq_len is not None and not 1 <= self.seq_len <= model.n_positions:
            raise UserError(
                f"--seq-len must be from 1 to --n-positions ({model.n_positions}), not "
                f"{self.seq_len}"
            )
        resolved = dataclasses.replace(
            self,
            model=model,
            seq_len=self.seq_len or model.n_positions,
        )
        for name, condition in ONLY_WITH.items():
            setattr(resolved, name, self._only_with(name, *condition))
        resolved.grad_accum_steps = resolved._passes()
        resolved.tokens_per_step = resolved.step_tokens
        if resolved.loss_chunk is None:
            assert model.vocab_size
            logits = 4 * resolved.batch_size * resolved.context * model.vocab_size
            # Distillation compares whole rows of logits.
            resolved.loss_chunk = 1024 if logits > LARGE_LOGITS and self.teacher is None else 0
        if resolved.loss_chunk and self.teacher is not None:
            raise UserError(
                "--loss-chunk cannot be combined with --teacher, whose loss needs all logits; "
                "leave out --loss-chunk"
            )
        return resolved

    def without_derived(self) -> "TrainConfig":
        """A copy of a resolved configuration without the values that follow from the others.

        Positions stay: with another attention they are the same.
        """
        bare = dataclasses.replace(self, model=dataclasses.replace(self.model))
        for settings in (bare, bare.model):
            # Last those that others follow from, as grad_accum_steps does from tokens_per_step.
            last = ("tokens_per_step", "kv_lora_rank")
            for field in sorted(dataclasses.fields(settings), key=lambda f: f.name in last):
                value = getattr(settings, field.name)
                if field.default is None and field.name != "position_embedding_type":
                    setattr(settings, field.name, None)
                    if not bare._resolves_to(self):
                        setattr(settings, field.name, value)
        return bare

    def _resolves_to(self, other: "TrainConfig") -> bool:
        try:
            return self.resolved() == other
        except UserError:
            return False

    def _only_with(
        self, name: str, option: str, choice: Optional[str], default: float
    ) -> Optional[float]:
        """Value or default of a setting of ONLY_WITH; UserError if it is given without its
        option."""
        value: Optional[float] = getattr(self, name)
        chosen = getattr(self, option)
        if chosen is not None and choice in (None, chosen):
            return default if value is None else value
        if value is not None:
            raise UserError(f"{flag(name)} requires {flag(option)} {choice or 'DIR'}; leave it out")
        return None

    def _passes(self) -> int:
        """Passes of a step that reach --tokens-per-step."""
        if self.tokens_per_step is None:
            return self.grad_accum_steps or 1
        one = self.batch_size * self.context
        passes, rest = divmod(self.tokens_per_step, one)
        if rest:
            raise UserError(
                f"--tokens-per-step {self.tokens_per_step} is not a multiple of a pass "
                f"(--batch-size {self.batch_size} x {self.context} tokens = {one}); use "
                f"{max(1, round(self.tokens_per_step / one)) * one}, or another --batch-size"
            )
        if self.grad_accum_steps not in (None, passes):
            raise UserError(
                f"--tokens-per-step {self.tokens_per_step} asks for --grad-accum-steps {passes}, "
                f"not {self.grad_accum_steps}; leave out one of the two"
            )
        return passes
