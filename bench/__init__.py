"""Benchmarks: `python -m bench NAME --help`."""

import mlx_mla.backends.mlx  # noqa: F401  (loads the BLAS before any benchmark imports mlx)
