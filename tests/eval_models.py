"""Small random models with GPT-2's vocabulary, sharp enough that endings differ."""

from pathlib import Path

from mlx_mla import checkpoint
from mlx_mla.config import ModelConfig
from mlx_mla.data.tokenizer import GPT2Encoder
from mlx_mla.weights import initial_weights


def write(folder: Path, data: Path, seed: int = 0, **config) -> Path:
    """A model folder; `data` is the folder of real files."""
    values = {
        "vocab_size": 50257,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 48,
        "n_positions": 1024,
        "attention": "mla",
        "kv_lora_rank": None if config.get("attention") == "mha" else 16,
        **config,
    }
    model = ModelConfig(**values).resolved()
    folder.mkdir(parents=True)
    tokenizer = GPT2Encoder(data / "gpt2_bpe").fast_tokenizer()
    checkpoint.write_model(folder, model, initial_weights(model, seed, 0.3), tokenizer, "")
    return folder
