"""What is measured: tasks, requests at once, the probe, and what the baseline must reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang_trinv.evals import tasks as our_tasks


@dataclass(frozen=True)
class Suite:
    """A set of tasks and the way to ask them.

    ``floors`` are accuracies that the baseline must reach: below, the model knows too little for a
    loss to be seen, so the run is INVALID. ``bounds_accuracy``: whether there are documents enough
    to bound the accuracy's change; otherwise the verdict rests on log-likelihoods and KL.
    """

    name: str
    tasks: tuple[str, ...]
    bounds_accuracy: bool
    max_length: int
    concurrency: Mapping[str, int]  # by device
    probe_documents: int
    probe_new_tokens: int
    probe_characters: int  # longer documents are not probed
    floors: Mapping[str, float] = field(default_factory=dict)
    offline: bool = True
    chat: bool = False
    limit: int | None = None
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            name="quick",
            tasks=("gdn_quick",),
            bounds_accuracy=False,
            max_length=512,
            concurrency={"cpu": 2, "cuda": 8},
            probe_documents=5,
            probe_new_tokens=4,
            probe_characters=64,
        ),
        Suite(
            name="tiny",
            tasks=("gdn_regression",),
            bounds_accuracy=True,
            max_length=32768,
            concurrency={"cpu": 2, "cuda": 16},
            probe_documents=200,
            probe_new_tokens=16,
            probe_characters=600,
            floors={
                "gdn_overwrite": 0.7, "gdn_boundary": 0.9, "gdn_mqar": 0.7, "gdn_correlated": 0.9,
                "gdn_niah": 0.9,
            },
        ),
        Suite(
            # The chat template as SGLang's recipes for Qwen apply it, thinking left as the template
            # has it, so answers get room; greedy, since pairs are compared. History is the subject
            # in which arXiv 2605.21325's code base shows a loss.
            name="real",
            tasks=(
                "gsm8k", "mmlu_high_school_world_history", "mmlu_abstract_algebra",
                "mmlu_college_computer_science", "mmlu_professional_law", "mmlu_anatomy",
                "mmlu_econometrics", "wikitext", "niah_single_1", "niah_multikey_2",
            ),
            bounds_accuracy=True,
            max_length=32768,
            concurrency={"cpu": 1, "cuda": 32},
            probe_documents=100,
            probe_new_tokens=64,
            probe_characters=8000,
            offline=False,
            chat=True,
            gen_kwargs={"max_gen_toks": 4096, "temperature": 0},
            metadata={"max_seq_lengths": [4096, 16384]},
        ),
    )
}  # fmt: skip


def own_tasks() -> set[str]:
    """Names of this package's tasks and groups."""
    found = set()
    for path in our_tasks.PATH.glob("*.yaml"):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("task", "group") and not value.strip().startswith("["):
                found.add(value.strip())
    return found
