"""Launch a kernel; from the second time on without Triton's own handling of its arguments."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from triton import knobs
from triton.runtime import driver

NO_HOOKS = (None, None, None)  # metadata for them, before and after a launch
_compiled: dict[Hashable, Any] = {}


def launch(
    kernel: Any, key: Hashable, grid: tuple[int, int, int], args: tuple[Any, ...], **options: Any
) -> None:
    """``kernel[grid](*args, **options)``.

    Args:
        key: all that Triton specialises a kernel for: dtypes, constants, which pointers are None,
            whether pointers and strides are multiples of 16, options and the device's number.
        args: every parameter in order, constants as well.
    """
    compiled = _compiled.get((kernel.__name__, key))
    if compiled is not None:
        if _somebody_listens():
            compiled[grid](*args)
            return
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, *NO_HOOKS, *args)
        return
    compiled = kernel[grid](*args, **options)
    if compiled is not None:  # the interpreter returns nothing
        _compiled[kernel.__name__, key] = compiled


def _somebody_listens() -> bool:
    """Whether a profiler has hooked itself to launches; Triton's own way calls it."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)
