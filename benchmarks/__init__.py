"""Measurements: `python -m benchmarks intra` on a GPU, `python -m benchmarks resources` anywhere."""
