"""Exceptions of the package. Each message is one line: the argument, what was wanted, what came."""

from __future__ import annotations


class TrinvError(Exception):
    """Base of every exception that this package raises on purpose."""


class UnsupportedCall(TrinvError):
    """An op got a shape, dtype, device or option outside its contract."""


class TargetMissing(TrinvError):
    """This SGLang is not in the table, or the function to replace is not as the table says."""


class ConfigError(TrinvError):
    """A ``SGLANG_TRINV*`` variable has a value that the package does not know."""
