"""Importing this module loads OpenBLAS for MLX; it must come before the first import of mlx."""

from mlx_mla.blas import load_openblas

load_openblas()
