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
    data = (
        "Python's built-in documentation"
        if config.data == BUILTIN
        else Path(config.data).resolve().name.replace("|", r"\|")
    )
    loss = "not measured yet" if val_loss is None else f"{val_loss:.4f} nats per token"
    vocabulary = f"vocabulary {config.model.vocab_size} ({Path(config.tokenizer).name})"
    return f"""{_FRONT_MATTER}# {config.name}, step {step:,}

{_architecture(config.model, vocabulary)}

| | |
|---|---|
| training data | {data} |
| steps | {step:,} of {config.steps:,} |
| tokens seen | {step * config.step_tokens:,} |
| validation loss (held-out part of the data) | {loss} |

{_USE}"""


def converted_card(
    config: ModelConfig, name: str, source: str, tokens: int, has_end: bool, steps: list[str]
) -> str:
    """Return the card of a converted model. Like every card, it contains no dates or paths.

    Args:
        source: Format that the source was recognized as.
        tokens: Number of ids of the tokenizer; the embedding may have more rows.
        has_end: True if the tokenizer has an end-of-text token.
        steps: One sentence for each change to the weights beyond renaming.
    """
    rows = config.vocab_size
    assert rows
    padding = f" (of which {rows - tokens} pad the {tokens} tokens)" if rows > tokens else ""
    endless = "\nThe tokenizer has no end-of-text token: text ends only at its maximum length.\n"
    unchanged = "- Nothing: the weights equal the source's, bit for bit.\n"
    done = "".join(f"- {step}\n" for step in steps) or unchanged
    return f"""{_FRONT_MATTER}# {name}, converted

{_architecture(config, f"vocabulary of {rows} rows{padding}")}
{"" if has_end else endless}
Converted from {source} (`{name}`). Changes to the weights:

{done}
{_USE}"""


def _architecture(m: ModelConfig, vocabulary: str) -> str:
    shape = f"{m.n_layer} layers, {m.n_head} heads,\n{m.n_embd} wide, context {m.n_positions}"
    model = f"A {m.family}-style language model with {m.attention_spec.text}"
    return f"""{model}: {shape}, {vocabulary},
{num_parameters(m):,} parameters. Decoding caches
{cache_bytes_per_token(m, 2):,} bytes per token of context in 16-bit types."""
