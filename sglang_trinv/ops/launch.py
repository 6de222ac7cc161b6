"""Launch a kernel; from the second time on without Triton's own handling of its arguments."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

# Start before the kernel in front has ended, once all its programs have said so; the kernel itself
# waits for what it needs (programmatic dependent launch, from Hopper on).
EARLY = {"launch_pdl": True}
NO_HOOKS = (None, None, None)  # metadata for them, before and after a launch
_compiled: dict[Hashable, Any] = {}


@functools.cache
def capability(index: int) -> tuple[int, int]:
    """Compute capability of a device."""
    # ROCm's numbers mean something else, and its compiler knows no Gluon kernel for Hopper.
    return (0, 0) if torch.version.hip else torch.cuda.get_device_capability(index)


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
