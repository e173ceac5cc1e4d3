"""The cost of a configuration, from its shapes only: parameters, FLOPs, memory, cache bytes."""

import dataclasses
import math

from mlx_mla.errors import UserError
from mlx_mla.machine import physical_memory
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.fusion import Device, fused_by_mlx
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.model.weights import is_trained, moment_shapes, num_parameters, parameter_shapes

BYTES = {"float32": 4, "bfloat16": 2}
BEYOND = 4
"""Maximum estimated memory of a step, as a multiple of the machine's memory. Up to this multiple,
swapping may help."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The figures that `train --dry-run` prints."""

    parameters: int
    """Number of parameters; a tied head counts once."""
    forward_flops_per_token: int
    """FLOPs with multiply-adds counted as 2, averaged over the positions of a sequence, including
    the head."""
    train_flops_per_token: int
    """FLOPs of the forward and backward passes: three times the forward pass."""
    weights_bytes: int
    """float32 weights."""
    optimizer_bytes: int
    """The optimizer's float32 moments."""
    gradient_bytes: int
    """float32 gradients, counted twice if several passes are summed."""
    activation_bytes: int
    """Additional memory at the peak of a step: activations of one pass, logits, bfloat16 copies of
    weights."""
    cache_bytes_per_token: int
    """Decoding cache over all layers, in bfloat16."""
    mha_cache_bytes_per_token: int
    """Decoding cache of multi-head attention of the same shape, in bfloat16."""

    @property
    def total_bytes(self) -> int:
        return (
            self.weights_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes
        )


def estimate(config: TrainConfig, fused_attention: bool) -> Estimate:
    """Estimate the cost of a resolved training configuration.

    Args:
        fused_attention: True if attention stores no matrix of scores (`mlx_mla.model.fusion`).
    """
    m, T = config.model, config.context
    n = num_parameters(m)
    flops = forward_flops_per_token(m, T)
    trained = sum(
        math.prod(shape)
        for name, shape in parameter_shapes(m).items()
        if is_trained(name, config.trainable)
    )
    heads = m.n_head * m.attention_spec.head_dim
    gradients = 4 * trained * (2 if config.passes_per_step > 1 else 1)
    return Estimate(
        parameters=n,
        forward_flops_per_token=flops,
        train_flops_per_token=3 * flops,
        weights_bytes=4 * n,
        optimizer_bytes=4 * sum(map(math.prod, moment_shapes(config).values())),
        gradient_bytes=gradients,
        activation_bytes=max(0, _peak_of_pass(config, fused_attention) - 4 * n),
        cache_bytes_per_token=cache_bytes_per_token(m, 2),
        mha_cache_bytes_per_token=2 * m.n_layer * heads * BYTES["bfloat16"],
    )


def check_memory(config: TrainConfig, fused_attention: bool) -> None:
    """Check that a resolved configuration does not need a multiple of this machine's memory.

    Raises:
        UserError: If it needs more than BEYOND times the memory. Even its initial weights could
            then not be drawn.
    """
    needed, there = estimate(config, fused_attention).total_bytes, physical_memory()
    # Token ids and positions of a step's batches, which are read before the step.
    needed += (8 + 200 // config.context) * config.step_tokens
    if needed > BEYOND * there:
        raise UserError(
            f"a step needs about {needed / 2**30:,.0f} GiB, but this machine has "
            f"{there / 2**30:.0f}; use a smaller model, --batch-size or --seq-len (--dry-run lists "
            "what needs how much)"
        )


def teacher_bytes(config: TrainConfig, teacher: ModelConfig) -> int:
    """About what a teacher adds to the memory of a step: its weights, its logits twice (also as
    log-probabilities), and the activations of one block."""
    tokens = config.batch_size * config.context
    assert teacher.vocab_size and teacher.n_inner
    block = 2 * (teacher.n_inner + 2 * teacher.n_embd)
    return 4 * (num_parameters(teacher) + tokens * (2 * teacher.vocab_size + block))


def report(config: TrainConfig) -> str:
    """Describe the cost of a training configuration: the output of `train --dry-run`."""
    config = config.resolved()
    unfused, fused = estimate(config, fused_attention=False), estimate(config, fused_attention=True)
    m = config.model
    tokens = config.total_tokens
    rows = {
        "model": f"{config.name}: {m.attention_spec.text}, {m.family}'s blocks, "
        f"{m.n_layer} layers, {m.n_head} heads, {m.n_embd} wide, context {m.n_positions}, "
        f"vocabulary {m.vocab_size}",
        "parameters": f"{unfused.parameters:,}",
        "FLOPs per token": f"{unfused.forward_flops_per_token:,} forward, "
        f"{unfused.train_flops_per_token:,} training",
        "training": f"{config.steps:,} steps x {config.step_tokens:,} tokens = {tokens:,} tokens, "
        f"{tokens * unfused.train_flops_per_token:.3g} FLOPs",
        "memory, CPU": _memory(unfused),
        "memory, fused SDPA": f"{_memory(fused)}  ({_where_fused(config)})",
        "cache per token": _cache(unfused),
    }
    return (
        "\n".join(f"{name:<21}{value}" for name, value in rows.items())
        + "\ndry run: nothing was trained"
    )


def _where_fused(config: TrainConfig) -> str:
    names: dict[Device, str] = {"metal": "Metal", "cuda": "CUDA"}
    fused = [name for device, name in names.items() if fused_by_mlx(device, config)]
    return ", ".join(fused) or "neither Metal nor CUDA"


def _memory(e: Estimate) -> str:
    return (
        f"{_size(e.total_bytes)}: weights {_size(e.weights_bytes)}, gradients "
        f"{_size(e.gradient_bytes)}, AdamW {_size(e.optimizer_bytes)}, activations "
        f"{_size(e.activation_bytes)}"
    )


def _cache(e: Estimate) -> str:
    ratio = e.mha_cache_bytes_per_token / e.cache_bytes_per_token
    size = f"{e.cache_bytes_per_token:,} bytes in 16 bits"
    if ratio == 1:
        return f"{size}, the same as MHA's"
    than = f"{ratio:.3g}x smaller" if ratio > 1 else f"{1 / ratio:.3g}x larger"
    return f"{size}, {than} than MHA's {e.mha_cache_bytes_per_token:,}"


def _size(n: int) -> str:
    value, unit = float(n), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def memory_advice(config: TrainConfig, fused_attention: bool, limit: int) -> str | None:
    """Say what to change to make a resolved configuration fit into `limit` bytes; None if it
    fits."""
    if estimate(config, fused_attention).total_bytes <= limit:
        return None
    batch = config.batch_size
    for group in (1, config.activation_checkpointing):
        for size in [batch // 2**i for i in range(batch.bit_length())]:
            # Halving the batch must not change the tokens of a step.
            if config.batch_size * config.passes_per_step % size:
                continue
            smaller = dataclasses.replace(config, batch_size=size, activation_checkpointing=group)
            if estimate(smaller, fused_attention).total_bytes <= limit:
                flags = []
                if size != batch:
                    flags.append(f"--batch-size {size} --tokens-per-step {config.step_tokens}")
                if group != config.activation_checkpointing:
                    flags.append(f"--activation-checkpointing {group}")
                return " ".join(flags)
    return "a smaller model or --seq-len"


def matrix_values(m: ModelConfig) -> int:
    """Values of all matrices that a token is multiplied by."""
    # An embedding is only looked up, unless it is also the head's matrix.
    looked_up = ("wpe",) if m.tie_word_embeddings else ("wpe", "wte")
    return sum(
        shape[0] * shape[1]
        for name, shape in parameter_shapes(m).items()
        if len(shape) == 2 and not any(part in name for part in looked_up)
    )


def forward_flops_per_token(m: ModelConfig, context: int) -> int:
    """FLOPs of the forward pass per token, averaged over `context` causal positions."""
    mean_keys = (context + 1) / 2
    return int(2 * matrix_values(m) + m.attention_spec.score_flops() * mean_keys)


def cache_bytes_per_token(m: ModelConfig, bytes_per_value: int) -> int:
    """Bytes that decoding caches for one token of context, over all layers."""
    return m.attention_spec.cached_values() * bytes_per_value


def _peak_of_pass(config: TrainConfig, fused: bool) -> int:
    """Peak bytes of one pass and its update, besides float32 weights and moments.

    During the backward pass, each block's activations are freed and its gradients are allocated.
    The peak is therefore at the beginning of the backward pass, at its end, or in the optimizer's
    update. The coefficients were fitted to `mx.get_peak_memory` of compiled steps on a CPU, over
    widths, lengths, heads, vocabularies, both types and activation checkpointing (docs/diary.md).
    They have not been checked on Metal and CUDA.
    """
    m, tokens = config.model, config.batch_size * config.context
    assert m.n_inner and m.vocab_size
    n, half = num_parameters(m), config.dtype != "float32"
    # In bfloat16 some values of a block stay float32.
    width = 2.15 if half else 4
    scores = 0 if fused else m.n_head * config.context
    gated = m.activation_function == "swiglu"
    mlp = (4.5 if gated else 3.75) * m.n_inner
    kept = (8.5 * m.n_embd + m.attention_spec.kept_values() + mlp + scores) * width * tokens
    # MLP, attention.
    mlp = (12 if gated else 5) * m.n_inner
    working = max(mlp + scores, 22 * m.n_embd + 2 * scores) * width * tokens
    # Logits, their exponentials and their gradient in float32; with chunks, also three copies of
    # the head's gradient.
    head = (16 if half else 12) * m.vocab_size * min(config.loss_chunk or tokens, tokens)
    if 0 < (config.loss_chunk or 0) < tokens:
        head += (10 if half else 12) * m.vocab_size * m.n_embd

    weight = 2 if half else 4  # bytes of a weight that the pass reads, and of its gradient
    of_block = weight * (n - m.vocab_size * m.n_embd) / m.n_layer
    group = min(config.activation_checkpointing, m.n_layer)
    if group:
        begin = m.n_layer / group * m.n_embd * width * tokens + max(head, group * kept + working)
    else:
        # The last block's values are freed while its gradients are allocated: half at the peak.
        begin = m.n_layer * kept + max(head, working - kept / 2)
    # In the last group of blocks, all other gradients are allocated.
    end = weight * n + working + max(kept - of_block, group * (kept - of_block))
    copy = 2 * n if half else 0
    update = 7 * n
    return int(max(copy + begin, copy + end, update))
