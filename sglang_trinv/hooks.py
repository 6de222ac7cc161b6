"""Adapters: SGLang's exact signature in, a dispatch call out; and how they are put in place.

An adapter replaces a host function, never a ``@triton.jit`` object, and keeps what it replaces as
``__wrapped__``: ``is_ours`` finds it by that below another plugin's wrapper.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from sglang_trinv import dispatch
from sglang_trinv.config import Config
from sglang_trinv.errors import TrinvError
from sglang_trinv.targets import Target

MARK = "_sglang_trinv"


def fwd_intra_adapter(
    stock: Callable[..., Any], config: Config, return_A: bool = False
) -> Callable[..., Any]:
    """Wrap ``chunk_gated_delta_rule_fwd_intra``.

    Args:
        stock: SGLang's function, called when the kernel cannot answer a call.
        return_A: whether a caller reads the third result; SGLang's own does not, unless
            GDN_RECOMPUTE_SUPPRESS_LEVEL is 3 or more, so None is returned in its place.
    """

    @functools.wraps(stock)
    def chunk_gated_delta_rule_fwd_intra(
        k, v, g=None, beta=None, cu_seqlens=None, chunk_size=64, chunk_indices=None
    ):
        return dispatch.fwd_intra(
            (k, v, g, beta, cu_seqlens, chunk_size, chunk_indices),
            stock=stock,
            config=config,
            return_A=return_A,
        )

    setattr(chunk_gated_delta_rule_fwd_intra, MARK, True)
    return chunk_gated_delta_rule_fwd_intra


def solve_tril_adapter(
    stock: Callable[..., Any], config: Config, return_A: bool = False
) -> Callable[..., Any]:
    """Wrap ``solve_tril`` of SGLang 0.5.9, whose callers want all of its result.

    The chunk indices are the ones that SGLang's kernel before it, which made A, has just used:
    ``prepare_chunk_indices`` remembers them, so nothing waits for the lengths a second time.
    """
    prepare = importlib.import_module(stock.__module__).prepare_chunk_indices

    @functools.wraps(stock)
    def solve_tril(A, cu_seqlens=None, output_dtype=torch.float32):
        return dispatch.solve_tril(
            (A, cu_seqlens, output_dtype),
            stock=stock,
            config=config,
            chunk_indices=None if cu_seqlens is None else prepare(cu_seqlens, A.shape[-1]),
        )

    setattr(solve_tril, MARK, True)
    return solve_tril


def kda_intra_adapter(stock: Callable[..., Any], config: Config) -> Callable[..., Any]:
    """Wrap ``chunk_kda_fwd_intra``. SGLang drops Akk, so None is returned in its place."""

    @functools.wraps(stock)
    def chunk_kda_fwd_intra(
        q, k, v, gk=None, beta=None, scale=None, cu_seqlens=None, chunk_size=64,
        chunk_indices=None, safe_gate=False, fuse_recompute=False, fuse_diagonal=False,
    ):  # fmt: skip
        call = (
            q, k, v, gk, beta, scale, cu_seqlens, chunk_size, chunk_indices, safe_gate,
            fuse_recompute, fuse_diagonal,
        )  # fmt: skip
        return dispatch.kda_intra(call, stock=stock, config=config)

    setattr(chunk_kda_fwd_intra, MARK, True)
    return chunk_kda_fwd_intra


ADAPTERS = {
    "fwd_intra": fwd_intra_adapter,
    "solve_tril": solve_tril_adapter,
    "kda_intra": kda_intra_adapter,
}


def is_ours(function: Any) -> bool:
    """Whether a call of ``function`` reaches an adapter, also through other wrappers around it."""
    seen: set[int] = set()
    while function is not None and id(function) not in seen:
        if getattr(function, "__dict__", {}).get(MARK):
            return True
        seen.add(id(function))
        function = getattr(function, "__wrapped__", None)
    return False


class Patch:
    """One replaced function: set in the modules that hold it, looked up again, taken back."""

    def __init__(
        self, target: Target, modules: tuple[ModuleType, ...], stock: Callable[..., Any]
    ) -> None:
        self.target = target
        self.modules = modules
        self.stock = stock

    def apply(self, adapter: Callable[..., Any], fault: str = "") -> None:
        """Set ``adapter`` everywhere or nowhere."""
        try:
            for module in self.modules:
                setattr(module, self.target.function, adapter)
                if fault == "raise_at_install":
                    raise RuntimeError("SGLANG_TRINV_FAULT=raise_at_install")
            if not self.live():
                raise TrinvError(f"{self.target.dotted} was set but is not live")
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        for module in self.modules:
            setattr(module, self.target.function, self.stock)

    def live(self) -> bool:
        """Whether every holder reaches our adapter now."""
        return all(is_ours(getattr(m, self.target.function, None)) for m in self.modules)

    def describe(self) -> list[dict[str, Any]]:
        importers = [module.__name__ for module in self.modules[1:]]
        return [{"target": self.target.dotted, "importers": importers, "live": self.live()}]
