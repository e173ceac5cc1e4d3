"""The model card: the README.md of every model folder."""

from pathlib import Path

from mlx_mla.data.corpus import BUILTIN
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.estimate import cache_bytes_per_token
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.model.weights import num_parameters

_FRONT_MATTER = """---
library_name: mlx
pipeline_tag: text-generation
tags: [mlx, mla_gpt2]
---
"""

_USE = """## Use

    python -m mlx_mla.generate --model THIS_FOLDER --prompt "The "
    mlx_lm.generate --model THIS_FOLDER --trust-remote-code --prompt "The "

`--trust-remote-code` lets mlx-lm run `model_mlx.py` from this folder. In PyTorch, with
`model_torch.py`:

    AutoModelForCausalLM.from_pretrained("THIS_FOLDER", trust_remote_code=True)
"""


def model_card(config: TrainConfig, step: int, val_loss: float | None) -> str:
    """Return the card of a trained model: its architecture, its training data, how to load it.

    The text contains no dates or paths, so identical checkpoints have identical cards.
    """
    m = config.model
    data = "Python's built-in documentation" if config.data == BUILTIN else Path(config.data).name
    loss = "not measured yet" if val_loss is None else f"{val_loss:.4f} nats per token"
    return f"""{_FRONT_MATTER}# {config.preset}, step {step:,}

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

{_USE}"""


def converted_card(
    config: ModelConfig, name: str, kind: str, tokens: int, has_end: bool, steps: list[str]
) -> str:
    """Return the card of a converted model. Like every card, it contains no dates or paths.

    Args:
        config: The configuration of the converted model.
        name: Name of the source.
        kind: Format that the source was recognized as.
        tokens: Number of ids of the tokenizer; the embedding may have more rows.
        has_end: True if the tokenizer has an end-of-text token.
        steps: One sentence for each change to the weights beyond renaming.
    """
    c = config
    assert c.vocab_size
    padding = (
        f" (of which {c.vocab_size - tokens} pad the {tokens} tokens)"
        if c.vocab_size > tokens
        else ""
    )
    endless = (
        ""
        if has_end
        else "\nThe tokenizer has no end-of-text token: text ends only at its maximum length.\n"
    )
    done = (
        "".join(f"- {step}\n" for step in steps)
        or "- Nothing: the weights equal the source's, bit for bit.\n"
    )
    return f"""{_FRONT_MATTER}# {name}, converted

A {c.family}-style language model with {c.kind.text}: {c.n_layer} layers, {c.n_head} heads,
{c.n_embd} wide, context {c.n_positions}, vocabulary of {c.vocab_size} rows{padding},
{num_parameters(c):,} parameters. Decoding caches
{cache_bytes_per_token(c, 2):,} bytes per token of context in 16-bit types.
{endless}
Converted from {kind} (`{name}`). Changes to the weights:

{done}
{_USE}"""
