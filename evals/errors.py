"""Errors of the evaluation. One line for the user; the exit code is 4, INVALID."""

from __future__ import annotations

from sglang_trinv.errors import TrinvError


class EvalError(TrinvError):
    """The evaluation cannot be run, or what it left cannot be judged."""
