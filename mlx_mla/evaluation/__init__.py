"""Evaluation on standard benchmarks."""
