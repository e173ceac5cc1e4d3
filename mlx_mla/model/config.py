"""Every setting of the model and of training, and its validation."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Optional

from tyro.conf import OmitArgPrefixes

from mlx_mla.errors import UserError, flag
from mlx_mla.fields import Bounds, at_least_1, check_bounds, fraction, not_negative, positive, typed
from mlx_mla.model.attention import KINDS, Attention, AttentionName, meaningless_fields

InitializerName = Literal["normal", "fan_in"]
TrainableName = Literal["all", "attention"]
BackendName = Literal["mlx", "torch"]
DeviceName = Literal["auto", "cpu", "gpu", "mps", "cuda"]
DType = Literal["float32", "bfloat16"]
InferenceDType = Literal["float32", "bfloat16", "float16"]

TOKENIZER_IDS: dict[str, int] = {"bytes": 257, "gpt2": 50257}
"""Token ids of each tokenizer: the 256 bytes, or GPT-2's byte pairs, and <|endoftext|>."""

MAX_SEED = 2**63 - 1
"""Largest seed that every generator and TOML take."""

_width = at_least_1(2**20)
MODEL_BOUNDS = {
    "n_layer": at_least_1(1000),
    **dict.fromkeys(("n_head", "n_embd", "n_inner", "n_positions", "vocab_size"), _width),
    **dict.fromkeys(("kv_lora_rank", "kv_lora_ranks", "q_lora_rank", "v_head_dim"), _width),
    **dict.fromkeys(("head_dim", "num_key_value_heads"), _width),
    "num_kv_shared_layers": not_negative(1000),
    "qk_rope_head_dim": not_negative(2**20),
    "rope_theta": Bounds("be at least 1", 1, 1e12),
    "layer_norm_epsilon": Bounds("be at least 1e-12", 1e-12, 1),
    "dropout": fraction("be at least 0 and below 1", below_1=True),
}
"""Valid ranges of the model's numbers, whatever their source. A model beyond the upper bounds means
a damaged file or a typing error."""

TRAIN_BOUNDS = {
    **dict.fromkeys(("steps", "eval_limit", "log_every"), at_least_1(2**31 - 1)),
    **dict.fromkeys(("batch_size", "grad_accum_steps"), at_least_1(2**20)),
    "tokens_per_step": at_least_1(2**28),
    **dict.fromkeys(
        (
            *("warmup_steps", "eval_every", "eval_batches", "final_eval_batches", "save_every"),
            *("keep", "sample_tokens", "sample_every", "activation_checkpointing", "loss_chunk"),
        ),
        not_negative(2**31 - 1),
    ),
    **dict.fromkeys(("grad_clip", "adam_epsilon"), not_negative(1e30)),
    "weight_decay": not_negative(1000),
    # Far above any use, and such that their products stay within float32.
    **dict.fromkeys(("learning_rate", "muon_learning_rate"), positive(1e30)),
    "initializer_range": not_negative(100),
    "seed": not_negative(MAX_SEED),
    "teacher_temperature": Bounds("be at least 0.001", 0.001, 1000),
    "val_fraction": fraction("be between 0 and 1", above_0=True, below_1=True),
    **dict.fromkeys(("min_lr_ratio", "teacher_weight", "decay_fraction"), fraction()),
    **dict.fromkeys(("beta1", "beta2"), fraction("be at least 0 and below 1", below_1=True)),
}
"""The same for a training run."""

RENAMED = {"checkpoint_every": "activation_checkpointing"}
"""Former names of settings, which flags and settings files may still use."""

LARGE_LOGITS = 64 * 2**20
"""Bytes of one pass's float32 logits above which the loss computes them in chunks."""


@dataclasses.dataclass(kw_only=True)
class ModelConfig:
    """Shape of the transformer, as config.json holds it; names are those of GPT-2 and DeepSeek."""

    attention: AttentionName = "mla"
    """"mla" caches one latent per token; "mha" is GPT-2's own attention."""
    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads; must divide n_embd, or come with head_dim."""
    n_embd: int = 768
    """Width of the residual stream."""
    n_inner: Optional[int] = None
    """Width of the MLP. None: 4 x n_embd; with "swiglu" 8/3 x n_embd, rounded up to a multiple of
    64, which gives about as many parameters."""
    n_positions: int = 1024
    """Longest context, in tokens."""
    vocab_size: Optional[int] = None
    """Rows of the embedding. None: as many as the tokenizer has."""
    position_embedding_type: Optional[Literal["learned", "rope"]] = None
    """"learned" adds a table of positions to the embedding. "rope" rotates queries and keys: all of
    them with "mha", a part beside the latent with "mla". None: "rope" if qk_rope_head_dim > 0."""
    head_dim: Optional[int] = None
    """Width of a head's queries, keys and values; with "mla", of their part without RoPE
    (DeepSeek's qk_nope_head_dim). None: n_embd / n_head."""
    num_key_value_heads: Optional[int] = None
    """MHA: heads of keys and values, each shared by a group of query heads (grouped-query
    attention; 1 is multi-query attention). None: n_head."""
    kv_lora_rank: Optional[int] = None
    """MLA: width of the cached key/value latent. None: n_embd / 2, or the largest of kv_lora_ranks,
    or head_dim with attention_k_eq_v."""
    kv_lora_ranks: Optional[list[int]] = None
    """MLA: the width of each layer that has a latent of its own, if they differ. None: kv_lora_rank
    for all."""
    num_kv_shared_layers: int = 0
    """MLA: this many last layers cache nothing. Each reads the latent (and the RoPE key) of the
    layer before them through its own up-projection (Gemma 3n's name). 0: none."""
    q_lora_rank: Optional[int] = None
    """MLA: width of a query latent, as in DeepSeek-V2. None: queries are projected directly."""
    qk_rope_head_dim: int = 0
    """MLA: width of the decoupled RoPE part of queries and keys; it replaces the learned positions.
    0: off."""
    v_head_dim: Optional[int] = None
    """MLA: width of a value head. None: head_dim."""
    attention_k_eq_v: bool = False
    """MLA without an up-projection: the latent is the value of every head and, beside the RoPE
    part, its key. Heads are kv_lora_rank wide (Gemma 4's name; Grouped-Tied Attention,
    arXiv:2505.21487)."""
    latent_norm: bool = False
    """MLA: RMSNorm on the latents, as in DeepSeek-V2."""
    attention_bias: Optional[bool] = None
    """Bias on the attention's projections that read x. None: only for "mha" with "layer_norm", as
    in GPT-2."""
    attention_out_bias: Optional[bool] = None
    """Bias on the attention's output projection. None: only with "layer_norm"."""
    mlp_bias: Optional[bool] = None
    """Biases of the MLP. None: only with "layer_norm"."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """Normalization before attention, MLP and output head: GPT-2's LayerNorm, or Llama's RMSNorm,
    which has no bias."""
    rope_theta: float = 10000.0
    """Base of RoPE's wavelengths."""
    activation_function: Literal["gelu_new", "gelu", "swiglu"] = "gelu_new"
    """"gelu_new" is GPT-2's tanh approximation, "gelu" the exact function, "swiglu" Llama's gated
    SiLU, silu(gate(x)) * up(x)."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance in every LayerNorm, and to the mean square in every RMSNorm."""
    tie_word_embeddings: bool = True
    """Use the embedding as the output head, as in GPT-2. --no-tie-word-embeddings: a matrix of its
    own, as in minGPT."""
    dropout: float = 0.0
    """Dropout in training, on embeddings and on the output of every attention and MLP."""

    def resolved(self, tokenizer_size: Optional[int] = None) -> "ModelConfig":
        """A copy with all defaults filled in and every value checked.

        Args:
            tokenizer_size: Number of token ids of the model's tokenizer, if known.

        Raises:
            UserError: For an impossible value; the message names the option.
        """
        c = dataclasses.replace(self)
        check_bounds(c, MODEL_BOUNDS)
        as_wide_as_latent = c.attention_k_eq_v and c.kv_lora_rank is not None
        if c.head_dim is None and not as_wide_as_latent and c.n_embd % c.n_head:
            raise UserError(
                f"{flag('n_embd')} {c.n_embd} is not divisible by {flag('n_head')} {c.n_head}; try "
                f"{flag('n_embd')} {max(1, round(c.n_embd / c.n_head)) * c.n_head}"
            )
        if c.n_inner is None:
            gated = c.activation_function == "swiglu"
            c.n_inner = -(-8 * c.n_embd // 192) * 64 if gated else 4 * c.n_embd
        if c.vocab_size is None:
            if tokenizer_size is None:
                raise UserError("--vocab-size is needed, since no tokenizer gives it")
            c.vocab_size = tokenizer_size
        if tokenizer_size is not None and c.vocab_size < tokenizer_size:
            raise UserError(
                f"--vocab-size {c.vocab_size} is smaller than the tokenizer's {tokenizer_size} "
                f"ids; use at least {tokenizer_size}, or leave it out"
            )
        of_gpt2 = c.norm == "layer_norm"
        if c.attention_bias is None:
            c.attention_bias = of_gpt2 and KINDS[c.attention].biased
        if c.attention_out_bias is None:
            c.attention_out_bias = of_gpt2
        if c.mlp_bias is None:
            c.mlp_bias = of_gpt2
        for name in meaningless_fields(c.attention):
            if getattr(c, name):
                raise UserError(
                    f"{flag(name)} has no meaning with --attention {c.attention}; leave it out"
                )
        KINDS[c.attention].resolve(c)
        return c

    @property
    def kind(self) -> Attention:
        """The attention of a resolved configuration: its shapes, widths, costs and description."""
        return KINDS[self.attention](self)

    @property
    def family(self) -> str:
        """The model whose blocks these are most like, in a word."""
        return "GPT-2" if self.norm == "layer_norm" else "Llama"

    @property
    def beyond_gpt2(self) -> list[str]:
        """The flags of a resolved configuration that a GPT-2 has no name for; empty for a GPT-2."""
        beyond = self.kind.beyond_gpt2
        if self.norm != "layer_norm":
            beyond.append(f"--norm {self.norm}")
        if self.activation_function == "swiglu":
            beyond.append("--activation-function swiglu")
        return beyond

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, without those that are None."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config.json") -> "ModelConfig":
        """Read the model's fields from a config.json and ignore all others.

        Args:
            where: Name of the file, for messages.

        Raises:
            UserError: For a value of another type.
        """
        return cls(**typed(cls, values, where))

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str) -> "ModelConfig":
        """Read as `from_dict` does, and resolve; every error names the file."""
        config = cls.from_dict(values, where)
        try:
            return config.resolved()
        except UserError as e:
            raise UserError(f"{where}: {e}") from None


@dataclasses.dataclass(kw_only=True)
class DataSettings:
    """Data."""

    data: str = "builtin"
    """Training text: a UTF-8 text file, a folder of token shards (from mlx_mla.prepare,
    build-nanogpt, llm.c or nanoGPT), or "builtin", the documentation that comes with Python."""
    val_fraction: float = 0.1
    """Share of the text, at its end, that is held out for validation. Not used if the folder has
    validation shards."""
    tokenizer: str = "bytes"
    """"bytes" (256 bytes and <|endoftext|>), "gpt2" (GPT-2's byte-pair encoding, 50257 ids), or a
    folder with tokenizer.json, such as any model's. Default with --init or --teacher: that
    model's."""
    bpe_dir: Optional[str] = None
    """Folder with encoder.json and vocab.bpe for --tokenizer gpt2. None: tiktoken downloads them
    once."""
    batch_size: int = 16
    """Sequences in one forward and backward pass. Halve it if memory runs out."""
    tokens_per_step: Optional[int] = None
    """Tokens in one optimizer step; sets --grad-accum-steps. None: --grad-accum-steps decides."""
    grad_accum_steps: Optional[int] = None
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
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient. 0: no clipping."""
    trainable: TrainableName = "all"
    """Parameters to train. "attention": those of the attention alone, in less time and memory, such
    as after a conversion to MLA."""
    teacher: Optional[str] = None
    """Model folder to distil from: adds the divergence from its predictions to the loss. None:
    off."""
    teacher_weight: Optional[float] = None
    """Share of that divergence in the loss, from 0 to 1; the rest is cross-entropy. None: 0.5 with
    --teacher."""
    teacher_temperature: Optional[float] = None
    """Temperature of both softmaxes in that divergence. None: 1 with --teacher."""


@dataclasses.dataclass(kw_only=True)
class ScheduleSettings:
    """Schedule."""

    steps: int = 1000
    """Optimizer steps in all."""
    learning_rate: float = 6e-4
    """Peak learning rate of AdamW, reached after the warm-up."""
    muon_learning_rate: Optional[float] = None
    """Peak learning rate of Muon's matrices, on the same schedule. None: 0.02 with --optimizer
    muon."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0. 0: no warm-up."""
    lr_schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up, "cosine" decays over all remaining steps. "wsd" (warm-up, stable, decay)
    keeps the peak and falls linearly over the last --decay-fraction, so a run can be extended."""
    decay_fraction: Optional[float] = None
    """Share of all steps in which "wsd" decays. None: 0.2 with --lr-schedule wsd."""
    min_lr_ratio: float = 0.1
    """Share of the peak learning rate that is left at the end of the decay."""


@dataclasses.dataclass(kw_only=True)
class EvaluationSettings:
    """Evaluation."""

    eval_every: int = 100
    """Steps between measurements of the validation loss. 0: only at the end."""
    eval_batches: int = 20
    """Batches of each measurement, spread evenly over the held-out text. 0: all of it."""
    final_eval_batches: int = 0
    """Batches of the last measurement, at the end of the run. 0: the whole held-out text."""
    eval_tasks: str = ""
    """Tasks to run at the same steps, separated by commas: wikitext2, lambada, hellaswag. Empty:
    none."""
    eval_limit: int = 100
    """Items of each task: one random sample, fixed for the whole run."""
    eval_data_dir: Optional[str] = None
    """Folder with the tasks' files, as --data-dir of mlx_mla.evaluate. None: the Hugging Face
    hub."""


@dataclasses.dataclass(kw_only=True)
class LoggingSettings:
    """Logging and trackers."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    sample_prompt: str = "The "
    """Prompt of the printed samples."""
    sample_tokens: int = 200
    """Length of a sample. 0: none."""
    sample_every: int = 0
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
    seed: int = 1337
    """Seed of the initial weights, the order of the data and the dropout."""
    save_every: int = 200
    """Steps between checkpoints. 0: only at the end."""
    keep: int = 2
    """Newest checkpoints to keep. 0: all."""
    dtype: DType = "float32"
    """Type of the computation; weights and optimizer state stay float32. bfloat16 is slow on
    CPUs."""
    activation_checkpointing: int = 0
    """Keep activations only between groups of this many blocks and recompute the others in the
    backward pass: less memory for up to a third more time. 1 saves most. 0: off."""
    loss_chunk: Optional[int] = None
    """Tokens whose logits the loss holds at a time. 0: all of a pass. None: 1024 if the logits of
    a pass exceed 64 MiB, else all."""
    compile: bool = True
    """Compile the training step: mx.compile, and torch.compile on CUDA. --no-compile runs it
    eagerly, for debugging."""
    backend: BackendName = "mlx"
    """Framework that runs the model. A run started in one can be resumed in the other."""
    device: DeviceName = "auto"
    """Device of the backend: cpu or gpu for mlx; cpu, mps or cuda for torch. "auto" takes a GPU if
    there is one."""


@dataclasses.dataclass(kw_only=True)
class InitialSettings:
    """Model."""

    init: Optional[str] = None
    """Model folder to take the initial weights and the model's shape from. None: random
    weights."""
    initializer_range: float = 0.02
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

    def make_paths_absolute(self) -> None:
        """Make the paths that exist absolute, so a run can be resumed from any directory."""
        for name in ("data", "init", "teacher", "tokenizer", "bpe_dir", "eval_data_dir"):
            value = getattr(self, name)
            if value not in (None, *TOKENIZER_IDS) and Path(value).exists():
                setattr(self, name, str(Path(value).resolve()))

    def resolved(self) -> "TrainConfig":
        """A copy with defaults filled in and every value checked; a UserError names the option."""
        check_bounds(self, TRAIN_BOUNDS)
        if self.bpe_dir is not None and self.tokenizer != "gpt2":
            raise UserError("--bpe-dir requires --tokenizer gpt2; leave out --bpe-dir")
        if self.eval_data_dir is not None and not self.eval_tasks:
            raise UserError("--eval-data-dir requires --eval-tasks; leave out --eval-data-dir")
        weight, temperature = self._distillation()
        muon_rate = self._only_with("muon_learning_rate", 0.02, "optimizer", "muon")
        decay = self._only_with("decay_fraction", 0.2, "lr_schedule", "wsd")
        model = self.model.resolved(TOKENIZER_IDS.get(self.tokenizer))
        if self.seq_len is not None and not 1 <= self.seq_len <= model.n_positions:
            raise UserError(
                f"--seq-len must be from 1 to --n-positions ({model.n_positions}), not "
                f"{self.seq_len}"
            )
        resolved = dataclasses.replace(
            self,
            model=model,
            seq_len=self.seq_len or model.n_positions,
            teacher_weight=weight,
            teacher_temperature=temperature,
            muon_learning_rate=muon_rate,
            decay_fraction=decay,
        )
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

    def _only_with(self, name: str, default: float, option: str, choice: str) -> Optional[float]:
        """Value or default of a setting that belongs to one choice of an option; refused for the
        other choices."""
        value: Optional[float] = getattr(self, name)
        if getattr(self, option) == choice:
            return default if value is None else value
        if value is not None:
            raise UserError(f"{flag(name)} requires {flag(option)} {choice}; leave it out")
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

    def _distillation(self) -> tuple[Optional[float], Optional[float]]:
        """Weight and temperature of the teacher; None for both without one."""
        if self.teacher is None:
            for name in ("teacher_weight", "teacher_temperature"):
                if getattr(self, name) is not None:
                    raise UserError(f"{flag(name)} requires --teacher DIR; leave it out")
            return None, None
        weight = 0.5 if self.teacher_weight is None else self.teacher_weight
        temperature = 1.0 if self.teacher_temperature is None else self.teacher_temperature
        return weight, temperature
