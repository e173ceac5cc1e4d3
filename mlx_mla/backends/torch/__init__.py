"""The PyTorch backend, on MPS, CUDA or the CPU; the same files as `backends/mlx`."""
