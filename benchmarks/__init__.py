"""Measurements: `python -m benchmarks intra` (GPU), `python -m benchmarks resources` (anywhere)."""
