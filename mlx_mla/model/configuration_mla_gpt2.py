"""Configuration of GPT-2 with Multi-head Latent Attention (MLA), for transformers; needs no
PyTorch.

A copy travels in every model folder (`auto_map` in config.json), where `AutoConfig` and
`AutoTokenizer`, and mlx-lm through them, find it.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import cached_file, logging

logger = logging.get_logger(__name__)

MLX_FILE = "model_mlx.py"
CODE = (MLX_FILE, "model_torch.py", "configuration_mla_gpt2.py")
AUTO_MAP = {
    "AutoConfig": "configuration_mla_gpt2.MLAGPT2Config",
    "AutoModelForCausalLM": "model_torch.MLAGPT2LMHeadModel",
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


class MLAGPT2Config(PretrainedConfig):
    """Shape of the model; the keys of config.json. See `mlx_mla.model.config.ModelConfig` for each
    field."""

    model_type = "mla_gpt2"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (transformers' own form)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }

    def __init__(
        self,
        vocab_size: int = 50257,
        n_positions: int = 1024,
        n_embd: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        n_inner: int | None = None,
        attention: str = "mla",
        position_embedding_type: str | None = None,
        head_dim: int | None = None,
        num_key_value_heads: int | None = None,
        kv_lora_rank: int | None = None,
        kv_lora_ranks: list[int] | None = None,
        num_kv_shared_layers: int = 0,
        q_lora_rank: int | None = None,
        qk_rope_head_dim: int = 0,
        v_head_dim: int | None = None,
        attention_k_eq_v: bool = False,
        latent_norm: bool = False,
        attention_bias: bool | None = None,
        attention_out_bias: bool | None = None,
        mlp_bias: bool | None = None,
        norm: str = "layer_norm",
        rope_theta: float = 10000.0,
        activation_function: str = "gelu_new",
        layer_norm_epsilon: float = 1e-5,
        dropout: float = 0.0,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tokenizer_size: int | None = None,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ):
        if position_embedding_type is None:
            position_embedding_type = "rope" if qk_rope_head_dim else "learned"
        for name, value, known in (
            ("attention", attention, ("mla", "mha")),
            ("position_embedding_type", position_embedding_type, ("learned", "rope")),
            ("norm", norm, ("layer_norm", "rms_norm")),
            ("activation_function", activation_function, ("gelu_new", "gelu", "swiglu")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, not {value!r}")
        if head_dim is None and n_embd % n_head:
            raise ValueError(f"n_embd {n_embd} is not divisible by n_head {n_head}")
        if num_key_value_heads and n_head % num_key_value_heads:
            raise ValueError(
                f"n_head {n_head} is not divisible by num_key_value_heads {num_key_value_heads}"
            )
        if not 0 <= num_kv_shared_layers < n_layer:
            raise ValueError(
                f"num_kv_shared_layers must be from 0 to {n_layer - 1}, not {num_kv_shared_layers}"
            )
        if attention == "mla" and (position_embedding_type == "rope") != bool(qk_rope_head_dim):
            raise ValueError(
                f"position_embedding_type {position_embedding_type!r} does not go with "
                f"qk_rope_head_dim {qk_rope_head_dim}"
            )
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        gated = activation_function == "swiglu"
        self.n_inner = n_inner or (-(-8 * n_embd // 192) * 64 if gated else 4 * n_embd)
        self.attention = attention
        self.position_embedding_type = position_embedding_type
        self.head_dim = head_dim or n_embd // n_head
        if attention == "mha":
            self.num_key_value_heads = num_key_value_heads or n_head
        self.kv_lora_rank = kv_lora_rank
        if attention == "mla" and kv_lora_rank is None:
            self.kv_lora_rank = max(kv_lora_ranks) if kv_lora_ranks else n_embd // 2
        self.kv_lora_ranks = kv_lora_ranks
        self.num_kv_shared_layers = num_kv_shared_layers
        self.q_lora_rank = q_lora_rank
        self.qk_rope_head_dim = qk_rope_head_dim
        v_head_dim = v_head_dim or self.head_dim
        if attention == "mla":
            self.v_head_dim = v_head_dim
        self.attention_k_eq_v = attention_k_eq_v
        if attention_k_eq_v and not self.head_dim == v_head_dim == self.kv_lora_rank:
            raise ValueError(
                "attention_k_eq_v needs equal head_dim, v_head_dim and kv_lora_rank, not "
                f"{self.head_dim}, {v_head_dim} and {self.kv_lora_rank}"
            )
        self.latent_norm = latent_norm
        of_gpt2 = norm == "layer_norm"
        biased = of_gpt2 and attention == "mha"
        self.attention_bias = biased if attention_bias is None else attention_bias
        self.attention_out_bias = of_gpt2 if attention_out_bias is None else attention_out_bias
        self.mlp_bias = of_gpt2 if mlp_bias is None else mlp_bias
        self.norm = norm
        self.rope_theta = rope_theta
        self.activation_function = activation_function
        self.layer_norm_epsilon = layer_norm_epsilon
        self.dropout = dropout
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.tokenizer_size = tokenizer_size
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Also write the code that config.json names, and the tokenizer if the folder has none.

        transformers saves a model through its configuration, and copies only what the PyTorch
        model imports; mlx-lm needs model_mlx.py and the tokenizer, too. They are those of the
        folder or repository that the model was loaded from.
        """
        folder = Path(save_directory)
        if not folder.is_file():  # otherwise transformers raises its own error
            folder.mkdir(parents=True, exist_ok=True)
            self.model_file, self.auto_map = MLX_FILE, dict(AUTO_MAP)
            missing = [name for name in CODE if not self._copy(name, folder)]
            if MLX_FILE in missing:
                del self.model_file
                logger.warning(
                    f"{folder}: {MLX_FILE} was not found in {self._name_or_path!r}; copy it from a "
                    'model folder and set "model_file" in config.json for mlx-lm to load the model'
                )
            for name in TOKENIZER:
                if not (folder / name).exists():
                    self._copy(name, folder)
            # A list of checksums there is of the files before.
            (folder / "SHA256SUMS").unlink(missing_ok=True)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def _copy(self, name: str, folder: Path) -> bool:
        """Copy a file of this model into a folder; False if there is none."""
        found: Any = Path(__file__).with_name(name)
        if not found.is_file() and self._name_or_path:
            try:
                revision = getattr(self, "_commit_hash", None)
                found = cached_file(self._name_or_path, name, revision=revision)
            except (OSError, ValueError):
                return False
        if found is None or not os.path.isfile(found):
            return False
        if not (folder / name).exists() or not os.path.samefile(found, folder / name):
            shutil.copyfile(found, folder / name)
        return True
