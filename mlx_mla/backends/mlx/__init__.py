"""The MLX backend, on Metal, CUDA or the CPU.

Importing this package loads a fast BLAS for MLX, which has to come before the first import of mlx.
"""

from mlx_mla.backends.blas import load_openblas

load_openblas()
