"""Make Triton's interpreter usable by SGLang's kernels without any GPU driver."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from sglang_trinv_cpu_platform import bfloat16

# Builtins that fla/op.py stores under names of its own when it is imported.
ALIASED = ("exp", "exp2", "log", "log2")


class InterpreterDriver(DriverBase):
    """A Triton driver without a device: what the autotuner and fla/utils.py ask for, no more."""

    @classmethod
    def is_active(cls) -> bool:
        """Never chosen by discovery; ``install`` sets it by hand."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Nothing is compiled, so no type is ever translated."""
        raise NotImplementedError("the interpreter compiles nothing")

    def get_current_target(self) -> GPUTarget:
        """The backend name becomes ``torch.<name>`` in fla/utils.py."""
        return GPUTarget("cpu", 0, 0)

    def get_current_device(self) -> int:
        """There is one."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """Equal times for every candidate, which is not run: the autotuner takes the first."""

        def benchmark(kernel_call: Callable, *, quantiles: Any = None, **_: Any) -> list[float]:
            return [0.0] * len(quantiles or [0.5])

        return benchmark


class _Device(contextlib.nullcontext):
    """Stand-in for ``torch.cuda.device``: a context that changes nothing."""

    def __init__(self, index: int | None = None) -> None:
        super().__init__(index)


def install() -> None:
    """Set the driver, bfloat16 arithmetic and the two names that FLA needs. Idempotent."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError(
            "TRITON_INTERPRET: want 1 with the platform trinv_cpu, "
            f"got {os.environ.get('TRITON_INTERPRET')!r}"
        )
    if isinstance(triton.runtime.driver._active, InterpreterDriver):
        return
    triton.runtime.driver.set_active(InterpreterDriver())
    bfloat16.install()
    _bind_language_once_per_launch()
    if not hasattr(torch.cpu, "device"):
        torch.cpu.device = _Device  # fla/utils.py:input_guard enters torch.<backend>.device(index)
    for name in ALIASED:
        function = _late_bound(getattr(tl, name))
        setattr(tl, name, function)
        setattr(tl.math, name, function)


def _late_bound(builtin: Callable) -> Callable:
    """Pass the semantics by hand: at a launch the interpreter binds only the names on ``tl``."""
    from triton.runtime.interpreter import interpreter_semantic

    def call(*args: Any, **kwargs: Any) -> Any:
        return builtin(*args, **{**kwargs, "_semantic": interpreter_semantic})

    return call


def _bind_language_once_per_launch() -> None:
    """Save a third of the time: the interpreter binds all of ``tl`` at every device function call.

    Within a launch the second time changes nothing; the modules that a function sees, ``tl`` or
    ``tl.core``, decide what is bound.
    """
    from triton.runtime import interpreter

    bind, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    bound: set[tuple[bool, bool]] = set()

    def bind_once(fn: Any) -> Any:
        seen = fn.__globals__.values()
        modules = (any(x is tl for x in seen), any(x is tl.core for x in seen))
        if modules in bound:
            return interpreter._LangPatchScope()
        bound.add(modules)
        return bind(fn)

    def launch_and_forget(self: Any, *args: Any, **kwargs: Any) -> None:
        bound.clear()
        try:
            launch(self, *args, **kwargs)
        finally:
            bound.clear()

    interpreter._patch_lang = bind_once
    interpreter.GridExecutor.__call__ = launch_and_forget
