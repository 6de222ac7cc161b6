"""The embedded model: Qwen3.5 architecture, one token a byte, about a million weights.

``config.json``, ``tokenizer*.json`` and ``generation_config.json`` come from ``layout.py``;
``model.safetensors`` is what ``evals/train_tiny.py`` trained; ``evals/training/train_log.json`` is
the log.
"""

from __future__ import annotations

from pathlib import Path

PATH = Path(__file__).resolve().parent
"""Folder that SGLang and transformers load the text model from."""
