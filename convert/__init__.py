"""Convert foreign checkpoints to model folders, and multi-head attention to MLA.

`python -m convert SRC --out DIR`; see `__main__.py`. When installed, the package is
`mlx_mla.convert`, which avoids a generic top-level name; the imports are therefore relative.
PyTorch is imported only to read a pickle or to run a text through the model.
"""

import mlx_mla  # noqa: F401  (first, since it handles Ctrl-C during imports)
