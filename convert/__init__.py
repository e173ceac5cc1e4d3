"""Foreign checkpoints into model folders, and multi-head attention into latent attention.

`python -m convert SRC --out DIR`; see `convert.__main__`.
"""
