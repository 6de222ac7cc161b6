"""The same kernels under flash-linear-attention (fla-core), for as long as a ``with`` lasts.

    with sglang_trinv.patched():
        o, state = fla.ops.gated_delta_rule.chunk_gated_delta_rule(q, k, v, g, beta)

What is replaced, in fla-core 0.6.0 (docs/fla.md has the numbers):

- ``ops.utils.solve_tril`` wherever it is imported: DeltaNet, Gated DeltaNet with chunks of 16 and
  32, gated DeltaProduct, Comba, PaTH, gated Oja
- ``chunk_gated_delta_rule_fwd_intra``: Gated DeltaNet with chunks of 64
- ``chunk_kda_fwd_intra``: Kimi Delta Attention with chunks of 64
- the inverse in DPLR's ``prepare_wy_repr_fwd``: RWKV-7

A call outside our kernels' contract is answered by fla's own function and counted.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sglang_trinv import dispatch, ops, status, targets
from sglang_trinv.config import Config
from sglang_trinv.errors import TargetMissing, TrinvError, UnsupportedCall

logger = logging.getLogger(__name__)

MARK = "_sglang_trinv_patched"
LN2 = math.log(2.0)
# The base of fla's gates has changed between releases without a change of signature: no guessing.
FLA_RELEASES = ("0.6.0",)


@dataclass(frozen=True)
class Site:
    """One function of fla: where it is defined, its parameters, and what makes ours from it."""

    module: str
    function: str
    parameters: str
    adapter: Callable[[Callable[..., Any], Config], Callable[..., Any]]


def solve_tril(stock: Callable[..., Any], config: Config) -> Callable[..., Any]:
    """Ours for ``solve_tril(A, cu_seqlens, chunk_indices, output_dtype)``."""

    @functools.wraps(stock)
    def adapter(A, cu_seqlens=None, chunk_indices=None, output_dtype=torch.float):
        return dispatch.solve_tril(
            (A.contiguous(), cu_seqlens, A.dtype if output_dtype is None else output_dtype),
            stock=lambda *_: stock(A, cu_seqlens, chunk_indices, output_dtype),
            config=config,
            chunk_indices=chunk_indices,
        )

    return adapter


def gdn_intra(stock: Callable[..., Any], config: Config) -> Callable[..., Any]:
    """Ours for ``chunk_gated_delta_rule_fwd_intra``, whose gates are in base 2 in fla."""

    @functools.wraps(stock)
    def adapter(k, v, g=None, beta=None, cu_seqlens=None, chunk_size=64, chunk_indices=None):
        if chunk_size != 64:  # calls solve_tril, which is ours
            return stock(k, v, g, beta, cu_seqlens, chunk_size, chunk_indices)
        natural = None if g is None else g.float() * LN2
        call = (k, v, natural, beta, cu_seqlens, chunk_size, chunk_indices)
        return dispatch.fwd_intra(
            call,
            stock=lambda *_: stock(k, v, g, beta, cu_seqlens, chunk_size, chunk_indices),
            config=config,
            return_A=True,  # the backward pass reads it
        )

    return adapter


def kda_intra(stock: Callable[..., Any], config: Config) -> Callable[..., Any]:
    """Ours for ``chunk_kda_fwd_intra``; its gates are in base 2 on both sides."""

    @functools.wraps(stock)
    def adapter(
        q, k, v, gk=None, beta=None, scale=None, cu_seqlens=None, chunk_size=64,
        chunk_indices=None, safe_gate=False, lower_bound=None, disable_recompute=False,
        use_graph=False,
    ):  # fmt: skip
        call = (
            q, k, v, gk, beta, scale, cu_seqlens, chunk_size, chunk_indices, safe_gate,
            lower_bound, disable_recompute, use_graph,
        )  # fmt: skip

        def run() -> Any:
            if disable_recompute:
                raise UnsupportedCall("disable_recompute: want False, got True")
            return ops.chunk_kda_fwd_intra(*call[:9], method=config.method, return_A=True)

        return dispatch.answer("kda_intra", run, v.device, call, stock, config)

    return adapter


def dplr_inverse(stock: Callable[..., Any], config: Config) -> Callable[..., Any]:
    """Our inverse of I - A_ab in DPLR's ``prepare_wy_repr_fwd``; w and u stay fla's."""
    wu_fwd = importlib.import_module(stock.__module__).wu_fwd

    @functools.wraps(stock)
    def adapter(ag, v, A_ak, A_ab, cu_seqlens, chunk_size=64, chunk_indices=None, safe_gate=False):
        call = (ag, v, A_ak, A_ab, cu_seqlens, chunk_size, chunk_indices, safe_gate)

        def run() -> Any:
            Ai = ops.solve_tril(
                -A_ab,
                cu_seqlens,
                A_ab.dtype,
                chunk_indices=chunk_indices,
                method=config.method,
            )
            return *wu_fwd(ag, v, A_ak, Ai, cu_seqlens, chunk_size, chunk_indices), Ai

        return dispatch.answer("dplr_inverse", run, v.device, call, stock, config)

    return adapter


SITES = (
    Site(
        "fla.ops.utils.solve_tril", "solve_tril",
        "(A, cu_seqlens=None, chunk_indices=None, output_dtype='torch.float32')", solve_tril,
    ),
    Site(
        "fla.ops.gated_delta_rule.chunk_fwd", "chunk_gated_delta_rule_fwd_intra",
        "(k, v, g=None, beta=None, cu_seqlens=None, chunk_size=64, chunk_indices=None)", gdn_intra,
    ),
    Site(
        "fla.ops.kda.chunk_intra", "chunk_kda_fwd_intra",
        "(q, k, v, gk=None, beta=None, scale=None, cu_seqlens=None, chunk_size=64, "
        "chunk_indices=None, safe_gate=False, lower_bound=None, disable_recompute=False, "
        "use_graph=False)", kda_intra,
    ),
    Site(
        "fla.ops.generalized_delta_rule.dplr.wy_fast_fwd", "prepare_wy_repr_fwd",
        "(ag, v, A_ak, A_ab, cu_seqlens, chunk_size=64, chunk_indices=None, safe_gate=False)",
        dplr_inverse,
    ),
)  # fmt: skip


@contextmanager
def patched(method: str = "auto", strict: bool = False) -> Iterator[dict[str, Counter[str]]]:
    """Replace fla's functions by ours in every module that holds them; put them back on any exit.

    Modules of fla that are first imported inside the ``with`` are included, and put back as well.
    One thread, one ``with`` at a time: the modules are the whole process's.

    Args:
        method (str): one of ``ops.METHODS``.
        strict (bool): raise where fla's own function would have to answer a call.
    Yields:
        {op: calls by implementation} of this process, counted on.
    Raises:
        TargetMissing: this fla-core is not one of ``FLA_RELEASES``, or not as expected.
        TrinvError: already patched.
    """
    config = Config(method=method, strict=strict)
    found = [(site, _resolve(site)) for site in _checked_sites()]
    replaced: list[tuple[Callable[..., Any], Callable[..., Any]]] = []
    try:
        for site, stock in found:
            adapter = site.adapter(stock, config)
            setattr(adapter, MARK, True)
            replaced.append((stock, adapter))
            _swap(stock, adapter)
        logger.info("sglang_trinv: %d functions of fla-core replaced", len(replaced))
        yield status.current().calls
    finally:
        for stock, adapter in replaced:
            _swap(adapter, stock)


def _checked_sites() -> tuple[Site, ...]:
    try:
        release = importlib.metadata.version("fla-core")
    except importlib.metadata.PackageNotFoundError:
        raise TargetMissing("fla-core is not installed") from None
    if release not in FLA_RELEASES:
        raise TargetMissing(f"fla-core: want {' or '.join(FLA_RELEASES)}, got {release}")
    return SITES


def _resolve(site: Site) -> Callable[..., Any]:
    # By sys.modules: fla.ops.utils has a function of the name of its module solve_tril.
    importlib.import_module(site.module)
    function = getattr(sys.modules[site.module], site.function, None)
    if function is None:
        raise TargetMissing(f"{site.module}.{site.function} does not exist")
    if getattr(function, MARK, False):
        raise TrinvError(f"{site.module}.{site.function} is already patched")
    found = targets.spell(targets.parameters_of(function))
    if found != site.parameters:
        raise TargetMissing(
            f"signature of {site.module}.{site.function}: want {site.parameters}, got {found}"
        )
    return function


def _swap(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Set every module-level name of fla that is ``old`` to ``new``."""
    for name, module in list(sys.modules.items()):
        if name == "fla" or name.startswith("fla."):
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)
