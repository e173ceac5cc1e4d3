"""Foreign checkpoints into model folders, and multi-head attention into latent attention.

`python -m convert SRC --out DIR`; see `__main__.py`. Installed, the package is `mlx_mla.convert`,
so that it takes no name of others; hence the relative imports. PyTorch is imported only where a
pickle is read or a text is run through the model.
"""

import mlx_mla  # noqa: F401  (first, for what it does about Ctrl-C while modules are imported)
