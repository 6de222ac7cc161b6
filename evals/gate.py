"""Verdict on two arms from their answers to the same documents. Pure: no file, no server.

EQUIVALENT if every criterion holds; REGRESSION if one shows a loss; otherwise INCONCLUSIVE: too few
documents for the margins. INVALID if the answers cannot be compared or show nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from sglang_trinv.evals import probe as probes
from sglang_trinv.evals import statistics
from sglang_trinv.evals.errors import EvalError
from sglang_trinv.evals.probe import Probe
from sglang_trinv.evals.samples import Document, pair

Pairs = list[tuple[Document, Document]]


class Verdict(IntEnum):
    """The value is the exit code; 2 is the command line's own usage error."""

    EQUIVALENT = 0
    REGRESSION = 1
    INCONCLUSIVE = 3
    INVALID = 4


@dataclass(frozen=True)
class Margins:
    """What counts as the same.

    ``accuracy``: change of the pooled accuracy; ``loglikelihood``: nats per token; ``kl``: mean
    KL divergence of next-token distributions, nats (SGLang's own limit for Qwen3-Next in CI);
    ``decided``: share of clear greedy choices that may change; ``alpha``: level of every test.
    """

    accuracy: float = 0.01
    loglikelihood: float = 0.01
    kl: float = 0.002
    decided: float = 0.001
    alpha: float = 0.05


@dataclass
class Judgement:
    """A verdict, the reasons for it and every number behind it."""

    verdict: Verdict = Verdict.EQUIVALENT
    reasons: list[str] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    accuracy: dict[str, Any] = field(default_factory=dict)
    loglikelihood: dict[str, Any] = field(default_factory=dict)
    probe: dict[str, Any] = field(default_factory=dict)

    def say(self, verdict: Verdict, reason: str) -> None:
        """Add a reason; a regression outweighs what is inconclusive."""
        rank = (Verdict.EQUIVALENT, Verdict.INCONCLUSIVE, Verdict.REGRESSION, Verdict.INVALID)
        self.verdict = max(self.verdict, verdict, key=rank.index)
        self.reasons.append(reason)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict.name}


def judge(
    off: list[Document],
    on: list[Document],
    off_probe: Probe | None,
    on_probe: Probe | None,
    margins: Margins,
    bounds_accuracy: bool = True,
    floors: Mapping[str, float] | None = None,
) -> Judgement:
    """Judge ``on`` against ``off``."""
    found = Judgement()
    try:
        pairs = pair(off, on)
        if off_probe is not None and on_probe is not None:
            probes.check_same(off_probe, on_probe)
    except EvalError as error:
        found.say(Verdict.INVALID, str(error))
        return found
    found.tasks = [_task(name, of, margins) for name, of in _by_task(pairs).items()]
    _floors(found, floors or {})
    _accuracy(found, pairs, margins, bounds_accuracy)
    _loglikelihood(found, pairs, margins)
    if off_probe is not None and on_probe is not None:
        _probe(found, off_probe, on_probe, margins)
    if not found.loglikelihood and not found.accuracy:
        found.say(Verdict.INVALID, "no document can be judged")
    return found


def _by_task(pairs: Pairs) -> dict[str, Pairs]:
    found: dict[str, Pairs] = {}
    for a, b in pairs:
        found.setdefault(a.task, []).append((a, b))
    return found


def _right(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    answered = [(a.correct, b.correct) for a, b in pairs if a.correct is not None]
    both = np.array(answered, bool).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _changes(pairs: Pairs) -> np.ndarray:
    """Per-token log-likelihood, on less off, of every document that has one."""
    kept = [(a, b) for a, b in pairs if a.loglikelihood is not None]
    return np.array([b.per_token - a.per_token for a, b in kept])


def _task(name: str, pairs: Pairs, margins: Margins) -> dict[str, Any]:
    row: dict[str, Any] = {"task": name, "n": len(pairs)}
    off, on = _right(pairs)
    if len(off):
        flips = statistics.Flips.of(off, on)
        row |= {**asdict(flips), "n": len(pairs), "p_worse": flips.p_worse,
                "off": float(off.mean()), "on": float(on.mean())}  # fmt: skip
        row["accuracy"] = asdict(
            statistics.accuracy_bound(off, on, margins.accuracy, margins.alpha)
        )
    if len(change := _changes(pairs)):
        row |= {"ll_change": float(change.mean()), "ll_abs": float(np.abs(change).mean()),
                "ll_abs_max": float(np.abs(change).max())}  # fmt: skip
    if any(a.generated is not None for a, _ in pairs):
        row["same_text"] = sum(a.generated == b.generated for a, b in pairs) / len(pairs)
    return row


def _floors(found: Judgement, floors: Mapping[str, float]) -> None:
    for row in found.tasks:
        floor = floors.get(row["task"])
        if floor is not None and not row.get("off", 1.0) >= floor:
            found.say(
                Verdict.INVALID,
                f"{row['task']}: the baseline answers {row['off']:.3f} right, below {floor}: "
                "this model is blind to losses here",
            )


def _accuracy(found: Judgement, pairs: Pairs, margins: Margins, bounds: bool) -> None:
    off, on = _right(pairs)
    if not len(off):
        return
    flips = statistics.Flips.of(off, on)
    bound = statistics.accuracy_bound(off, on, margins.accuracy, margins.alpha)
    rate = (flips.lost + flips.won) / flips.n
    needed = statistics.documents_needed(rate, margins.accuracy, margins.alpha)
    found.accuracy = {
        **asdict(flips), **asdict(bound), "p_worse": flips.p_worse, "judged": bounds,
        "needed": needed,
    }  # fmt: skip
    if flips.p_worse < margins.alpha:
        found.say(
            Verdict.REGRESSION,
            f"accuracy: {flips.lost} answers lost, {flips.won} won (p = {flips.p_worse:.2g})",
        )
    rows = [row for row in found.tasks if "p_worse" in row]
    rejected, adjusted = statistics.holm([row["p_worse"] for row in rows], margins.alpha)
    for row, bad, p in zip(rows, rejected, adjusted, strict=True):
        row["p_worse_holm"] = p
        if bad:
            found.say(
                Verdict.REGRESSION,
                f"{row['task']}: {row['lost']} answers lost, {row['won']} won "
                f"(p = {p:.2g} after Holm)",
            )
    if bounds and not bound.within:
        found.say(
            Verdict.INCONCLUSIVE,
            f"accuracy: change between {bound.low:+.4f} and {bound.high:+.4f}, wider than "
            f"+-{margins.accuracy}; about {needed} documents are needed, {flips.n} were asked",
        )


def _loglikelihood(found: Judgement, pairs: Pairs, margins: Margins) -> None:
    change = _changes(pairs)
    if not len(change):
        return
    limit = margins.loglikelihood
    bound = statistics.mean_bound(change, limit, margins.alpha)
    low, high = statistics.bootstrap_mean(np.abs(change), margins.alpha)
    found.loglikelihood = {
        "n": len(change), **asdict(bound), "abs": float(np.abs(change).mean()), "abs_low": low,
        "abs_high": high, "p_below": statistics.p_below(change, -limit),
    }  # fmt: skip
    by_task = {name: _changes(of) for name, of in _by_task(pairs).items()}
    by_task = {name: of for name, of in by_task.items() if len(of)}
    p_values = [statistics.p_below(of, -limit) for of in by_task.values()]
    rejected, adjusted = statistics.holm(p_values, margins.alpha)
    for name, of, bad, p in zip(by_task, by_task.values(), rejected, adjusted, strict=True):
        if bad:
            found.say(
                Verdict.REGRESSION,
                f"{name}: log-likelihood per token {of.mean():+.4f}, below -{limit} "
                f"(p = {p:.2g} after Holm)",
            )
    if found.loglikelihood["p_below"] < margins.alpha:
        found.say(
            Verdict.REGRESSION, f"log-likelihood per token {bound.value:+.4f}, below -{limit}"
        )
    elif not bound.within:
        found.say(
            Verdict.INCONCLUSIVE,
            f"log-likelihood per token: change between {bound.low:+.4f} and {bound.high:+.4f}, "
            f"not within +-{limit}",
        )


def _probe(found: Judgement, off: Probe, on: Probe, margins: Margins) -> None:
    each = probes.divergence(off, on)
    of_document = np.bincount(off.document, each) / np.maximum(np.bincount(off.document), 1)
    of_document = of_document[np.bincount(off.document) > 0]
    low, high = statistics.bootstrap_mean(of_document, margins.alpha)
    changed, decided = probes.decided_changes(off, on)
    same = probes.agreement(off, on)
    found.probe = {
        "documents": len(of_document), "positions": len(each), "kl": float(of_document.mean()),
        "kl_low": low, "kl_high": high, "kl_max": float(each.max(initial=0.0)),
        "decided": decided, "decided_changed": changed,
        "greedy_tokens": int(off.greedy.shape[1]), "greedy_same": float(same.mean()),
        "greedy_identical": float((same == off.greedy.shape[1]).mean()),
        "cached": int(min(off.cached.sum(), on.cached.sum())),
    }  # fmt: skip
    if low >= margins.kl:
        found.say(Verdict.REGRESSION, f"KL divergence {of_document.mean():.4f}, not below "
                                      f"{margins.kl}")  # fmt: skip
    elif high >= margins.kl:
        found.say(Verdict.INCONCLUSIVE, f"KL divergence up to {high:.4f}, not below {margins.kl}")
    if decided and changed / decided > margins.decided:
        found.say(
            Verdict.REGRESSION,
            f"{changed} of {decided} greedy choices changed that lead by {probes.LEAD} nats",
        )
