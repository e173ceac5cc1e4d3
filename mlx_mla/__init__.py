"""Multi-head Latent Attention at GPT-2 scale, for Apple MLX."""

import os

# Without PyTorch transformers warns, when it is imported, that models are not available; none of
# its models is needed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.2.0"
