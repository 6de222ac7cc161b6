"""Finished arms -> every comparison of a run and its overall verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sglang_trinv.evals import gate, probe, samples
from sglang_trinv.evals.errors import EvalError
from sglang_trinv.evals.gate import Judgement, Margins, Verdict
from sglang_trinv.evals.plan import (
    EXAMPLES,
    HARMLESS,
    MODES,
    OUR_METHODS,
    PLAIN,
    STUDIED,
    Arm,
    Plan,
    arms_of,
    read_plan,
)
from sglang_trinv.evals.probe import Probe
from sglang_trinv.evals.samples import Document
from sglang_trinv.evals.suites import SUITES, Suite

BASELINES = ("off", "flashinfer")
REPEAT_ALPHA = 0.005  # a server against itself: only what chance does not explain counts
# Settings of a server that have one of these in their name say what it computes.
COMPUTES = ("backend", "chunked", "cuda_graph", "deterministic", "dtype", "kv_cache", "mamba",
            "page_size", "quant", "radix", "speculative", "tp_size")  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """A finished arm."""

    arm: Arm
    record: dict[str, Any]
    documents: list[Document]
    probe: Probe | None  # None if a wrong inverse left the server unable to answer

    @classmethod
    def load(cls, arm: Arm, folder: Path) -> Answers:
        """Raises EvalError if the arm is not finished."""
        try:
            record = json.loads((folder / "arm.json").read_text())
        except (OSError, ValueError) as error:
            raise EvalError(f"{folder} is no finished arm: {error}") from None
        documents = samples.load(folder / "documents.jsonl")
        answers = None if record.get("failed") else Probe.load(folder / "probe.npz")
        return cls(arm, record, documents, answers)


@dataclass(frozen=True)
class Comparison:
    """Two arms and what is expected of them: "same", "worse", or nothing."""

    name: str
    baseline: Answers
    candidate: Answers
    judgement: Judgement
    expected: str = ""

    @property
    def as_expected(self) -> bool:
        verdict = self.judgement.verdict
        if self.expected == "worse":
            return verdict in (Verdict.REGRESSION, Verdict.INVALID)
        return self.expected != "same" or verdict == Verdict.EQUIVALENT


@dataclass
class Result:
    """The verdict on a run."""

    plan: Plan
    margins: Margins
    comparisons: list[Comparison]
    verdict: Verdict = Verdict.EQUIVALENT
    reasons: list[str] = field(default_factory=list)

    @property
    def main(self) -> Comparison | None:
        return next((c for c in self.comparisons if c.name == "main"), None)

    def named(self, name: str) -> Comparison | None:
        return next((c for c in self.comparisons if c.name == name), None)


def load_run(folder: Path) -> tuple[Plan, list[Answers]]:
    """A run folder's plan and its arms, all of which must be finished."""
    plan = read_plan(folder)
    return plan, [Answers.load(arm, folder / "arms" / arm.name) for arm in arms_of(plan.arms)]


def judge_run(plan: Plan, answers: list[Answers], margins: Margins) -> Result:
    """Make every comparison and draw the conclusion."""
    suite = SUITES[plan.suite]
    result = Result(plan, margins, [])
    first = {a.arm.kind: a for a in reversed(answers)}
    baseline = first.get("off") or first["flashinfer"]
    candidate = first.get("on")
    if candidate:
        result.comparisons.append(_compare("main", baseline, candidate, suite, margins))
        if baseline.arm.kind == "off" and "flashinfer" in first:
            result.comparisons.append(
                _compare("flashinfer", first["flashinfer"], candidate, suite, margins)
            )
    strict = replace(margins, alpha=REPEAT_ALPHA)
    for a in answers:
        if a.arm.repeat == 1:
            name = f"repeat {a.arm.kind}"
            result.comparisons.append(_compare(name, first[a.arm.kind], a, suite, strict))
        elif a.arm.kind not in PLAIN and not a.arm.repeat:
            compared = _compare(a.arm.kind, baseline, a, suite, margins, expected_of(a.arm.kind))
            result.comparisons.append(compared)
    conclude(result, answers)
    return result


def expected_of(kind: str) -> str:
    """What the gate must say of an arm that is neither "off" nor "on", "" for whatever it likes."""
    if kind in (*HARMLESS, *MODES, *OUR_METHODS):
        return "same"
    return "" if kind in EXAMPLES or STUDIED.fullmatch(kind) else "worse"


def compare_runs(one: Path, two: Path, margins: Margins) -> Result:
    """The baseline of one run against the candidate of another.

    Raises:
        EvalError: a run is not finished, or they asked other things.
    """
    plan, answers = load_run(one)
    other, more = load_run(two)
    for name in ("suite", "tasks", "fingerprint", "limit", "prefix_cache"):
        if getattr(plan, name) != getattr(other, name):
            raise EvalError(
                f"{name}: {one} has {getattr(plan, name)!r}, {two} has {getattr(other, name)!r}"
            )
    baseline = next((a for a in answers if a.arm.kind in BASELINES), answers[0])
    candidate = next((a for a in more if a.arm.kind not in BASELINES), more[0])
    suite = SUITES[plan.suite]
    result = Result(plan, margins, [_compare("main", baseline, candidate, suite, margins)])
    conclude(result, [baseline, candidate])
    return result


def _compare(
    name: str, one: Answers, two: Answers, suite: Suite, margins: Margins, expected: str = ""
) -> Comparison:
    if failed := two.record.get("failed"):
        return Comparison(name, one, two, Judgement(Verdict.INVALID, [failed]), expected)
    judgement = gate.judge(
        one.documents, two.documents, one.probe, two.probe, margins,
        suite.bounds_accuracy, suite.floors,
    )  # fmt: skip
    for reason in provenance(one.record, two.record):
        judgement.say(Verdict.INVALID, reason)
    return Comparison(name, one, two, judgement, expected)


def provenance(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """Why two arms' records forbid a comparison."""
    found = []
    for record in (one, two):
        name = f"the {record['kind']} arm"
        if record["kernels"] == "ours":
            if not record["calls"]:
                found.append(f"{name}: our kernels were not called")
            if record["fallbacks"]:
                found.append(f"{name}: stock answered {record['fallbacks']} calls")
        elif record["calls"]:
            found.append(f"{name}: our kernels were called {record['calls']} times")
    allowed = "linear_attn_prefill_backend" if one["backend"] != two["backend"] else ""
    before, now = one["server"], two["server"]
    for key in sorted(before.keys() & now.keys()):
        counts = any(part in key for part in COMPUTES) and key != allowed
        if counts and before[key] != now[key]:
            found.append(f"the servers differ by more than the kernels: {key} is "
                         f"{before[key]!r} and {now[key]!r}")  # fmt: skip
    for package, release in one["versions"].items():
        if two["versions"].get(package) != release:
            found.append(f"{package} is {release} and {two['versions'].get(package)}")
    return found


def conclude(result: Result, answers: list[Answers]) -> None:
    """The overall verdict: the main comparison's, unless the run itself proves unfit."""
    main = result.main
    if main:
        result.verdict, result.reasons = main.judgement.verdict, list(main.judgement.reasons)
    for comparison in result.comparisons:
        judgement = comparison.judgement
        if comparison.name.startswith("repeat"):
            if judgement.verdict in (Verdict.REGRESSION, Verdict.INVALID):
                _invalid(result, f"{comparison.name}: a server differs from itself: "
                                 f"{judgement.reasons[0]}")  # fmt: skip
        elif not comparison.as_expected:
            want = {"worse": "rejects it", "same": "passes it"}[comparison.expected]
            said = f": {judgement.reasons[0]}" if judgement.reasons else ""
            _invalid(result, f"self-test: no run is worth anything unless the gate {want}, but "
                             f"{comparison.name} is {judgement.verdict.name}{said}")  # fmt: skip
    if not main and not result.comparisons:
        _invalid(result, "nothing was compared")


def _invalid(result: Result, reason: str) -> None:
    result.verdict = Verdict.INVALID
    result.reasons.append(reason)


def noise_by_row(result: Result) -> dict[str, list[float | None]]:
    """Mean |change of the log-likelihood| by position mod 64 of the main and the repeat pairs."""
    found = {}
    for comparison in result.comparisons:
        a, b = comparison.baseline.probe, comparison.candidate.probe
        if a is not None and b is not None and comparison.judgement.probe:
            rows = probe.by_row(a, b).tolist()
            found[comparison.name] = [None if row != row else row for row in rows]
    return found
