"""Small checkpoints of other projects, written as those projects write them, with the logits they
give."""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from mlx_mla import checkpoint
from mlx_mla.backends.torch.load import build_model
from mlx_mla.data.tokenizer import ByteTokenizer

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
LLMC_ORDER = (
    "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight",
    "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias",
    "mlp.c_proj.weight", "mlp.c_proj.bias",
)  # fmt: skip


def gpt2(seed: int = 0, spread: float = 0.2, **changes) -> GPT2LMHeadModel:
    """A random GPT-2 of transformers, every tensor random, biases and norms too."""
    values = {
        "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 48, "vocab_size": 300, **changes,
    }  # fmt: skip
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=256, eos_token_id=256, **values)).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            p.copy_(centre + spread * torch.randn(p.shape, generator=random))
    return model


def llama(kind: str = "llama", seed: int = 0, **changes) -> PreTrainedModel:
    """A random Llama, Mistral or Qwen2 of transformers, every tensor random; grouped queries."""
    values = {
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "hidden_size": 32, "intermediate_size": 56, "max_position_embeddings": 48,
        "vocab_size": 300, "bos_token_id": 256, "eos_token_id": 256,
        **({"sliding_window": None} if kind == "mistral" else {}), **changes,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(("norm" in name) + 0.2 * torch.randn(p.shape, generator=random))
    return model


def save_llama(folder: Path, *args, **changes) -> PreTrainedModel:
    """Its folder, with the byte tokenizer and a chat template; returns the model."""
    model = llama(*args, **changes)
    model.save_pretrained(str(folder))
    tokenizer = ByteTokenizer().fast_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(str(folder))
    return model


def linear_state(model: GPT2LMHeadModel, bias: bool = True) -> dict[str, torch.Tensor]:
    """The state dict with matrices as nn.Linear stores them, tied head included, as Karpathy's
    models have it."""
    state = {n: p.detach() for n, p in model.named_parameters()}
    state = {n: p.T.contiguous() if n.endswith(CONV1D) else p for n, p in state.items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return {n: p for n, p in state.items() if bias or not n.endswith(".bias")}


def settings_of(model: GPT2LMHeadModel) -> dict[str, int]:
    c = model.config
    return {
        "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "block_size": c.n_positions,
        "vocab_size": c.vocab_size,
    }  # fmt: skip


def save_nanogpt(
    path: Path, model: GPT2LMHeadModel, bias: bool = True, prefix: str = "_orig_mod."
) -> None:
    """As nanoGPT's train.py: exact GELU, so the model must have activation_function="gelu"."""
    state = {prefix + n: p for n, p in linear_state(model, bias).items()}
    optimizer = {
        "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)}},
        "param_groups": [{"lr": 1e-3}],
    }
    args = {**settings_of(model), "bias": bias, "dropout": 0.0}
    torch.save(
        {"model": state, "optimizer": optimizer, "model_args": args, "iter_num": 7,
         "best_val_loss": torch.tensor(3.0),
         "config": {"dataset": "openwebtext", "batch_size": 12}},
        path,
    )  # fmt: skip


def save_mingpt(path: Path, model: GPT2LMHeadModel) -> None:
    """As minGPT's projects, the state dict alone; its head is not tied, and every block has the
    causal mask."""
    state = linear_state(model) | {"lm_head.weight": model.lm_head.weight.detach()}
    n = model.config.n_positions
    for i in range(model.config.n_layer):
        state[f"transformer.h.{i}.attn.bias"] = torch.tril(torch.ones(n, n)).view(1, 1, n, n)
    torch.save(state, path)


def save_build_nanogpt(path: Path, model: GPT2LMHeadModel, module: str = "__main__") -> None:
    """As build-nanogpt's train_gpt2.py: its config is an object of a class defined in the
    script."""

    class GPTConfig:
        pass

    config = GPTConfig()
    config.__dict__.update(settings_of(model))
    GPTConfig.__module__, GPTConfig.__qualname__ = module, "GPTConfig"
    script = sys.modules.setdefault(module, type(sys)(module))
    script.GPTConfig = GPTConfig
    try:
        torch.save(
            {"model": linear_state(model), "config": config, "step": 5, "val_loss": 3.25}, path
        )
    finally:
        del script.GPTConfig


def save_llmc(path: Path, model: GPT2LMHeadModel, version: int, vocab_size: int) -> None:
    """As llm.c's gpt2_write_to_checkpoint; bf16 (version 5) rounds as torch does."""
    c, state = model.config, linear_state(model)
    header = np.zeros(256, "<i4")
    header[:8] = (
        20240326, version, c.n_positions, vocab_size, c.n_layer, c.n_head, c.n_embd, c.vocab_size,
    )  # fmt: skip
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    names += [f"transformer.h.{i}.{part}" for part in LLMC_ORDER for i in range(c.n_layer)]
    names += ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    with path.open("wb") as f:
        f.write(header.tobytes())
        for name in names:
            t = state[name] if version == 3 else state[name].bfloat16().view(torch.int16)
            f.write(t.contiguous().numpy().tobytes())


class OriginalAttention(nn.Module):
    """Attention of MLA-Transformer, from its description."""

    def __init__(self, width: int, rank: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.c_proj = nn.Linear(width, rank, bias=False)
        self.k_from_c = nn.Linear(rank, width, bias=False)
        self.v_from_c = nn.Linear(rank, width, bias=False)
        self.c_proj_out = nn.Linear(width, width)

    def forward(self, x):
        c = self.c_proj(x)
        parts = (self.q_proj(x), self.k_from_c(c), self.v_from_c(c))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj_out(y.transpose(1, 2).flatten(2))


class OriginalBlock(nn.Module):
    def __init__(self, width: int, rank: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = OriginalAttention(width, rank, heads)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        )

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))


class Original(nn.Module):
    """The model of MLA-Transformer, small; its state dict has that project's names."""

    def __init__(
        self, width: int = 32, rank: int = 12, heads: int = 2, layers: int = 2, vocab: int = 300
    ):
        super().__init__()
        self.settings = {
            "block_size": 48,
            "vocab_size": vocab,
            "n_layer": layers,
            "n_head": heads,
            "n_embd": width,
        }
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, width),
                "wpe": nn.Embedding(48, width),
                "h": nn.ModuleList([OriginalBlock(width, rank, heads) for _ in range(layers)]),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        with torch.no_grad():
            for name, p in self.named_parameters():
                centre = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
                p.copy_(
                    centre
                    + 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
                )

    def forward(self, ids):
        t = self.transformer
        x = t["wte"](ids) + t["wpe"](torch.arange(ids.shape[1]))
        for block in t["h"]:
            x = block(x)
        return self.lm_head(t["ln_f"](x))


def save_original(path: Path, model: Original, bare: bool = False, prefix: str = "") -> None:
    """As MLA-Transformer's training script, or its state dict alone."""
    state = {prefix + n: p for n, p in model.state_dict().items()}
    if not bare:
        state = {
            "step": 19535,
            "model": state,
            "optimizer": {"state": {}},
            "config": model.settings,
        }
    torch.save(state, path)


def ids(vocab: int = 300, batch: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(1))


def logits_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def logits_of_folder(folder: Path, x: torch.Tensor) -> torch.Tensor:
    """Logits of one of this project's folders, in PyTorch."""
    config = checkpoint.ModelFolder(folder).config
    return logits_of(
        build_model(config, checkpoint.ModelFolder(folder).weights(config), torch.device("cpu")), x
    )
