"""Plans, and run folders as finished arms leave them."""

from __future__ import annotations

import json

from sglang_trinv.evals import samples
from sglang_trinv.evals.plan import Plan, arms_of, opened
from sglang_trinv.serve import tiny_model
from tests.evals.conftest import documents, probe

FIELDS = {
    "suite": "quick", "tasks": ("gdn_quick",), "model": str(tiny_model.PATH), "fingerprint": "f",
    "device": "cpu", "arms": ("off", "on"), "limit": None, "model_args": {}, "prefix_cache": False,
    "flags": (), "settings": {}, "sglang": "0.5.20", "sglang_trinv": "0.1.0", "lm_eval": "0.4.13",
}  # fmt: skip


def make_plan(**changes) -> Plan:
    return Plan(**{**FIELDS, **changes})


def leave(plan, arm, folder, *_, correct=(True, False) * 20, record=None) -> None:
    """What a finished arm leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    samples.save(folder / "documents.jsonl", documents(correct, [-0.1] * len(correct)))
    probe().save(folder / "probe.npz")
    ours = arm.kernels == "ours"
    content = {
        "kind": arm.kind, "repeat": arm.repeat, "kernels": arm.kernels, "backend": arm.backend,
        "concurrency": 2, "environ": arm.environ({}), "argv": ["--port", "1"], "calls": 9 * ours,
        "fallbacks": 0, "status": [], "server": {"attention_backend": "x"}, "ready_s": 1.0,
        "seconds": 2.0, "versions": {"sglang": "0.5.20"}, **(record or {}),
    }  # fmt: skip
    (folder / "arm.json").write_text(json.dumps(content))


def finished_run(folder, arms=("off", "on"), record=None, **changes):
    made = make_plan(arms=arms, **changes)
    with opened(folder, made):
        for arm in arms_of(made.arms):
            leave(made, arm, folder / "arms" / arm.name, record=record)
