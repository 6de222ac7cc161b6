"""Documents and probes made up for the gate. Without lm-eval no test here is collected."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from sglang_trinv.evals.probe import TOP, Probe
from sglang_trinv.evals.samples import Document

MISSING = [n for n in ("lm_eval", "statsmodels") if importlib.util.find_spec(n) is None]
if MISSING:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header() -> str:
    if MISSING:
        return f"tests/evals NOT RUN, missing: {', '.join(MISSING)} (scripts/setup_env.py test)"
    return "lm-eval is installed"


def documents(
    correct: np.ndarray, loglikelihood: np.ndarray | None = None, task: str = "gdn_overwrite"
) -> list[Document]:
    """One answer of one token a document."""
    values = np.zeros(len(correct)) if loglikelihood is None else loglikelihood
    return [
        Document(task, i, f"hash {i}", bool(right), float(value), 1, f"text {i}")
        for i, (right, value) in enumerate(zip(correct, values, strict=True))
    ]


def probe(noise: float = 0.0, documents: int = 30, length: int = 70, seed: int = 0) -> Probe:
    """Distributions over 300 tokens, the same for every call up to ``noise`` in the logits."""
    base = np.random.default_rng(1).normal(size=(documents * length, 300)) * 3
    logits = base + noise * np.random.default_rng(seed).normal(size=base.shape)
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-logprobs, 1)[:, :TOP]
    return Probe(
        np.repeat(np.arange(documents), length), np.tile(np.arange(1, length + 1), documents),
        logprobs[:, 7], ids, np.take_along_axis(logprobs, ids, 1),
        ids[:, 0].reshape(documents, length)[:, :8], np.zeros(documents, int),
    )  # fmt: skip


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
