"""Faults on purpose, by SGLANG_TRINV_FAULT: what a server must survive. For tests alone."""

from __future__ import annotations

from typing import Any

from sglang_trinv import status

FAILING_CALL = 3  # the first call after the start that fails, counted from 1


def at_compile(fault: str) -> None:
    """Fail as a kernel does that the compiler refuses."""
    if fault == "compile_error":
        raise RuntimeError("SGLANG_TRINV_FAULT=compile_error")


def before_call(fault: str) -> None:
    """Fail as a kernel does that cannot be launched, at the third call of a process."""
    if fault == "raise_at_call" and _calls() == FAILING_CALL - 1:
        raise RuntimeError("SGLANG_TRINV_FAULT=raise_at_call")


def after_call(fault: str, u: Any) -> None:
    """Spoil the result ``u`` of a call, or an inverse in its place."""
    if fault == "zero_u":
        u.zero_()
    elif fault == "nan_u" and _calls() == FAILING_CALL - 1:
        u.fill_(float("nan"))


def at_self_check(fault: str, u: Any) -> None:
    """Spoil what the start-up self-check sees."""
    if fault == "wrong_at_start":
        u.mul_(1.5)


def _calls() -> int:
    """Calls that this process has answered or left to stock."""
    process = status.current()
    answered = sum(sum(counts.values()) for counts in process.calls.values())
    return answered + sum(process.fallbacks.values())
