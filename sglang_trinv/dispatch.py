"""Who answers a call: our kernel or SGLang's, decided from metadata alone, and counted.

No value of a tensor is read here, so the server never waits and a CUDA graph can be captured. Each
call that stock answers has a reason that is counted, logged once and, in strict mode, raised.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sglang_trinv import check, inject, ops, status
from sglang_trinv.config import LEAST_CAPABILITY, Config
from sglang_trinv.errors import UnsupportedCall
from sglang_trinv.reference import faults

logger = logging.getLogger(__name__)

_only_stock = False  # a scheduler runs its model in one thread


@dataclass(frozen=True)
class Choice:
    """Which implementation answers a call, and why not ours."""

    impl: str
    reason: str = ""


@functools.lru_cache(maxsize=1024)
def choose(
    *,
    dtype: torch.dtype,
    chunk_size: int,
    K: int,
    V: int,
    contiguous: bool,
    device: str,
    capability: tuple[int, int] | None,
) -> Choice:
    """Choose for one call of ``fwd_intra``; pure, so it is cached and tested without a GPU.

    Args:
        capability: of the CUDA device, None on another device.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return Choice("stock", f"dtype {str(dtype).removeprefix('torch.')} is not a 16-bit float")
    if chunk_size != 64:
        return Choice("stock", f"chunk_size {chunk_size} is not 64")
    if K % 16 or V % 16:
        return Choice("stock", f"head dims {K} and {V} are not multiples of 16")
    if not contiguous:
        return Choice("stock", "k, v, g or beta is not contiguous")
    if device not in ("cuda", "cpu"):
        return Choice("stock", f"device {device} is not cuda or cpu")
    if capability is not None and capability < LEAST_CAPABILITY:
        return Choice("stock", f"compute capability {capability} is below {LEAST_CAPABILITY}")
    return Choice("fwd_intra")


def fwd_intra(
    call: tuple[Any, ...],
    *,
    stock: Callable[..., Any],
    config: Config,
    return_A: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Answer one call of SGLang's ``chunk_gated_delta_rule_fwd_intra``.

    Args:
        call: (k, v, g, beta, cu_seqlens, chunk_size, chunk_indices).
        stock: SGLang's function.
        return_A: also compute the third result.
    Raises:
        UnsupportedCall: in strict mode, in place of a call that stock would answer.
    """
    if _only_stock:
        return stock(*call)
    k = call[0]
    choice = _choose(call)
    if choice.impl == "stock":
        return _fall_back(choice.reason, call, stock, config)

    def run() -> Any:
        if config.fault and faults.inverse(config.fault):
            result = faults.fwd_intra(config.fault, *call)
        else:
            result = ops.fwd_intra(*call, method=config.method, return_A=return_A)
        inject.after_call(config.fault, result[1])
        return result

    return answer("fwd_intra", run, k.device, call, stock, config)


def solve_tril(
    call: tuple[Any, ...],
    *,
    stock: Callable[..., Any],
    config: Config,
    chunk_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Answer one call of ``solve_tril``; the op itself refuses what it cannot invert.

    Args:
        call: (A, cu_seqlens, output_dtype).
        stock: the function replaced.
        chunk_indices: (sequence, chunk in it) of A's chunks, where the caller has them.
    Raises:
        UnsupportedCall: in strict mode, in place of a call that stock would answer.
    """
    A = call[0]

    def run() -> Any:
        refuse(A.device, config)
        Ai = ops.solve_tril(*call, chunk_indices=chunk_indices, method=config.method)
        inject.after_call(config.fault, Ai)  # u = Ai (beta v) is what the faults are named after
        return Ai

    return answer("solve_tril", run, A.device, call, stock, config)


def kda_intra(
    call: tuple[Any, ...], *, stock: Callable[..., Any], config: Config
) -> tuple[torch.Tensor | None, ...]:
    """Answer one call of ``chunk_kda_fwd_intra``; the op itself refuses what it cannot compute.

    Args:
        call: its twelve arguments in SGLang's order.
        stock: SGLang's function.
    Returns:
        (w, u, None, kg, Aqk, None): nobody reads Akk.
    Raises:
        UnsupportedCall: in strict mode, in place of a call that stock would answer.
    """
    k = call[1]

    def run() -> Any:
        refuse(k.device, config)
        result = ops.chunk_kda_fwd_intra(*call, method=config.method, return_A=False)
        inject.after_call(config.fault, result[1])
        return result

    return answer("kda_intra", run, k.device, call, stock, config)


def refuse(device: torch.device, config: Config) -> None:
    """What no op but ``fwd_intra`` answers, which has ``choose`` and the wrong inverses.

    Raises:
        UnsupportedCall: the GPU is too old, or a wrong inverse is asked for.
    """
    if device.type == "cuda" and capability_of(device.index) < LEAST_CAPABILITY:
        found = capability_of(device.index)
        raise UnsupportedCall(f"compute capability {found} is below {LEAST_CAPABILITY}")
    if config.fault and faults.inverse(config.fault):
        raise UnsupportedCall(f"SGLANG_TRINV_FAULT={config.fault} is for fwd_intra")


def answer(
    op: str,
    run: Callable[[], Any],
    device: torch.device,
    call: tuple[Any, ...],
    stock: Callable[..., Any],
    config: Config,
) -> Any:
    """``run()``, counted and checked; stock's answer, counted as well, where it cannot."""
    if _only_stock:
        return stock(*call)
    try:
        inject.before_call(config.fault)
        result = run()
        implementation = ops.implementation(device)
    except UnsupportedCall as error:
        return _fall_back(str(error), call, stock, config)
    except Exception as error:
        if config.strict:
            raise
        return _fall_back(f"{type(error).__name__}: {error}", call, stock, config)
    status.current().count_call(op, implementation)
    if config.check:
        check.first_calls(op, call, result, stock, config.check)
    return result


@contextlib.contextmanager
def only_stock() -> Iterator[None]:
    """SGLang's own kernels in every place, uncounted: what ours is held against."""
    global _only_stock
    before, _only_stock = _only_stock, True
    try:
        yield
    finally:
        _only_stock = before


def _choose(call: tuple[Any, ...]) -> Choice:
    k, v, g, beta, _, chunk_size, _ = call
    return choose(
        dtype=k.dtype,
        chunk_size=chunk_size,
        K=k.shape[-1],
        V=v.shape[-1],
        contiguous=all(x is None or x.is_contiguous() for x in (k, v, g, beta)),
        device=k.device.type,
        capability=capability_of(k.device.index) if k.is_cuda else None,
    )


@functools.cache
def capability_of(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _fall_back(
    reason: str, call: tuple[Any, ...], stock: Callable[..., Any], config: Config
) -> Any:
    reason = (reason.splitlines() or [""])[0][:200]
    if status.current().count_fallback(reason) == 1 and not config.strict:
        logger.warning("sglang_trinv: SGLang's own kernel answers: %s", reason)
    if config.strict:
        raise UnsupportedCall(f"sglang_trinv cannot answer this call: {reason}")
    return stock(*call)
