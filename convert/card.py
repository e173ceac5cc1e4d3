"""The model card of a converted model."""

from mlx_mla.config import ModelConfig
from mlx_mla.estimate import cache_bytes_per_token
from mlx_mla.weights import num_parameters


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

A GPT-2-style language model with {c.kind.text}: {c.n_layer} layers, {c.n_head} heads,
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
