"""Multi-head Latent Attention at GPT-2 scale, for Apple MLX."""

__version__ = "0.1.0"
