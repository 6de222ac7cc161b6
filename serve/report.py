"""What the processes of a server report, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def processes(statuses: list[dict[str, Any]]) -> Iterator[str]:
    """A few lines for every process: state, hook, calls, fallbacks, check."""
    for status in statuses:
        gone = "" if status["alive"] else " (gone)"
        yield f"{status['role']} {status['pid']}{gone}: {_state(status)}"
        if status["state"] == "installed":
            yield f"  {_layers(status)}, prefill {status['prefill_backend']}, {_hook(status)}"
            yield f"  calls: {calls(status)}"
        if status.get("self_check"):
            yield f"  {self_check(status['self_check'])}"
        for reason, count in status["fallbacks"].items():
            yield f"  {count} answered by stock: {reason}"
        if status["check"]["wanted"] and status["state"] == "installed":
            yield f"  check: {check(status)}"
        for rank in status.get("ranks") or ():
            yield f"  rank {rank['rank']}: {_rank(rank)}"
        if status.get("mismatch"):
            yield f"  RANKS DIFFER: {status['mismatch']}"


def calls(status: dict[str, Any]) -> str:
    """``fwd_intra 12 by triton`` for every op and implementation that was called."""
    found = [
        f"{op} {count} by {implementation}"
        for op, counts in status["calls"].items()
        for implementation, count in counts.items()
        if count
    ]
    return ", ".join(found) or "none"


def check(status: dict[str, Any]) -> str:
    """How far our results were from SGLang's own kernel on the same inputs."""
    check = status["check"]
    worst = ", ".join(f"{name} {value:.1e}" for name, value in check["worst"].items())
    return (
        f"{check['done']} of the first {check['wanted']} calls compared with SGLang's kernel, "
        f"{check['disagreements']} disagree; largest relative distance: {worst}"
    )


def self_check(found: dict[str, Any]) -> str:
    """The start-up self-check in one line."""
    kinds = ", ".join(f"{case['kind']} {case['ratio']:.2f}" for case in found["cases"])
    return (
        f"self-check of {found['shape']}, method {found['method']}, in {found['seconds']:.1f} s; "
        f"errors in units of what is allowed: {kinds}"
    )


def _rank(rank: dict[str, Any]) -> str:
    if rank["state"] == "silent":
        return str(rank["reason"])
    words = ("host", "title", "sm", "version", "release", "method", "state", "prefill_backend")
    return ", ".join(str(rank[word]) for word in words if rank.get(word))


def _state(status: dict[str, Any]) -> str:
    reason = status["reason"]
    return f"{status['state']} ({reason})" if reason else status["state"]


def _layers(status: dict[str, Any]) -> str:
    found = [f"{count} {kind}" for kind, count in status["layers"].items() if count]
    return f"{', '.join(found) or 'no'} layers"


def _hook(status: dict[str, Any]) -> str:
    live = bool(status["hooks"]) and all(hook["live"] for hook in status["hooks"])
    path = "" if status["on_hot_path"] else ", not on the hot path"
    return ("hook live" if live else "hook DEAD") + path
