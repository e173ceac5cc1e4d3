"""Multi-head Latent Attention at GPT-2 scale, for Apple MLX."""

from mlx_mla.blas import load_openblas

__version__ = "0.1.0"

# Must run before anything imports mlx.core, so it is the first thing the package does.
load_openblas()
