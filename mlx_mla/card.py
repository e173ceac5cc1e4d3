"""The model card, README.md of every model folder."""

from pathlib import Path

from mlx_mla.data.corpus import BUILTIN
from mlx_mla.model.config import ModelConfig, TrainConfig
from mlx_mla.model.estimate import cache_bytes_per_token
from mlx_mla.model.weights import num_parameters


def model_card(config: TrainConfig, step: int, val_loss: float | None) -> str:
    """Text of the card: what the model is, what it was trained on, how to load it.

    It depends on the run alone (no dates, no paths), so that equal checkpoints have equal cards.
    """
    m = config.model
    data = "Python's built-in documentation" if config.data == BUILTIN else Path(config.data).name
    loss = "not measured yet" if val_loss is None else f"{val_loss:.4f} nats per token"
    return f"""---
library_name: mlx
pipeline_tag: text-generation
tags: [mlx, mla_gpt2]
---
# {config.preset}, step {step:,}

A {m.family}-style language model with {m.kind.text}: {m.n_layer} layers, {m.n_head} heads,
{m.n_embd} wide, context {m.n_positions}, vocabulary {m.vocab_size} ({Path(config.tokenizer).name}),
{num_parameters(m):,} parameters. Decoding caches
{cache_bytes_per_token(m, 2):,} bytes per token of context in 16-bit types.

| | |
|---|---|
| training data | {data} |
| steps | {step:,} of {config.steps:,} |
| tokens seen | {step * config.step_tokens:,} |
| validation loss (held-out part of the data) | {loss} |

## Use

    python -m mlx_mla.generate --model THIS_FOLDER --prompt "The "
    mlx_lm.generate --model THIS_FOLDER --trust-remote-code --prompt "The "

`--trust-remote-code` lets mlx-lm run `model_mlx.py` from this folder. In PyTorch, with
`model_torch.py`:

    AutoModelForCausalLM.from_pretrained("THIS_FOLDER", trust_remote_code=True)
"""


def converted_card(
    config: ModelConfig, name: str, kind: str, tokens: int, has_end: bool, steps: list[str]
) -> str:
    """Text of README.md; like every card it has no dates and no paths.

    Args:
        name: What the source is called.
        kind: What the source was recognised as.
        tokens: Ids of the tokenizer; the embedding may have more rows.
        has_end: Whether the tokenizer has an end-of-text token.
        steps: What was done to the weights beyond renaming, a sentence each.
    """
    c = config
    assert c.vocab_size
    padding = (
        f" (of which {c.vocab_size - tokens} pad the {tokens} tokens)"
        if c.vocab_size > tokens
        else ""
    )
    endless = (
        "" if has_end else "\nThe tokenizer has no end-of-text token: texts end at their length.\n"
    )
    done = (
        "".join(f"- {step}\n" for step in steps)
        or "- Nothing: the weights are the source's, bit for bit.\n"
    )
    return f"""---
library_name: mlx
pipeline_tag: text-generation
tags: [mlx, mla_gpt2]
---
# {name}, converted

A {c.family}-style language model with {c.kind.text}: {c.n_layer} layers, {c.n_head} heads,
{c.n_embd} wide, context {c.n_positions}, vocabulary of {c.vocab_size} rows{padding},
{num_parameters(c):,} parameters. Decoding caches
{cache_bytes_per_token(c, 2):,} bytes per token of context in 16-bit types.
{endless}
Converted from {kind} (`{name}`). What was done to the weights:

{done}
## Use

    python -m mlx_mla.generate --model THIS_FOLDER --prompt "The "
    mlx_lm.generate --model THIS_FOLDER --trust-remote-code --prompt "The "

`--trust-remote-code` lets mlx-lm run `model_mlx.py` from this folder. In PyTorch, with
`model_torch.py`:

    AutoModelForCausalLM.from_pretrained("THIS_FOLDER", trust_remote_code=True)
"""
