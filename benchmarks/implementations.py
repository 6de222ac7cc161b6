"""The implementations under one roof: ours, and SGLang's and fla's where their sources are found.

Every entry takes the inputs, cu_seqlens and chunk_indices of a batch (None, None for one sequence;
chunk_indices None: the implementation prepares them itself) and returns {name: result}.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import KDA, Inputs
from sglang_trinv import ops
from sglang_trinv.reference.chunk import naive_fwd_intra, naive_kkt_solve, naive_solve_tril
from sglang_trinv.reference.kda import naive_kda_intra

Results = dict[str, torch.Tensor]
Call = Callable[[Inputs, Any, Any], Results]
SGLANG = "sglang.kernels.ops.attention.fla"
SGLANG_MODULES = tuple(
    f"{SGLANG}.{name}" for name in ("chunk_fwd", "wy_fast", "solve_tril", "chunk_intra", "kda")
)
FLA_MODULES = (
    "fla.ops.gated_delta_rule.chunk_fwd",
    "fla.ops.gated_delta_rule.wy_fast",
    "fla.ops.utils.solve_tril",
    "fla.ops.kda.chunk_intra",
    "fla.ops.kda.wy_fast",
)


def find_peers(sglang: str | None, fla: str | None) -> tuple[str, ...]:
    """Make the peers' sources importable; return the implementations that there are.

    Args:
        sglang, fla: folders that hold the packages ``sglang`` and ``fla``; None: not measured.
    """
    os.environ["FLA_CACHE_RESULTS"] = "0"  # tuned in this process, not in one that only compiles
    for folder in (sglang, fla):
        if folder and folder not in sys.path:
            sys.path.insert(0, folder)
    for module in (*(SGLANG_MODULES if sglang else ()), *(FLA_MODULES if fla else ())):
        importlib.import_module(module)
    return ("ours", *(["sglang"] if sglang else []), *(["fla"] if fla else []))


def implementations(op: str, names: tuple[str, ...]) -> dict[tuple[str, str], Call]:
    """{(implementation, variant): call} of one op; a variant is a choice that the caller makes."""
    variants = {"ours": ("fused", "unfused"), "sglang": ("fused", "unfused"), "fla": ("",)}
    return {
        (name, variant): functools.partial(_CALLS[op, name], variant)
        for name in names
        for variant in (variants[name] if op == KDA else ("",))
    }


def truth(op: str, x: Inputs) -> Results:
    """The float64 results."""
    if op == "solve_tril":
        return {"Ai": naive_solve_tril(x.A, x.cu_seqlens)}
    if op == "kkt_solve":
        return {"Ai": naive_kkt_solve(x.k, x.g, x.beta, x.cu_seqlens)}
    if op == "fwd_intra":
        w, u, _ = naive_fwd_intra(x.k, x.v, x.g, x.beta, x.cu_seqlens)
        return {"w": w, "u": u}
    w, u, kg, Aqk, Akk = naive_kda_intra(x.q, x.k, x.v, x.g, x.beta, None, x.cu_seqlens)
    return {"w": w, "u": u, "kg": kg, "Aqk": Aqk, "Akk": Akk}


def lower(results: Results) -> Results:
    """Without what stands above the diagonals of Ai and Aqk, which nobody reads, not all write."""
    return {name: _lower(x) if name in ("Ai", "Aqk") else x for name, x in results.items()}


def _lower(x: torch.Tensor) -> torch.Tensor:
    B, T, H, BT = x.shape
    row = torch.arange(T, device=x.device) % BT  # every length here is a multiple of BT
    return torch.where(torch.arange(BT, device=x.device) <= row[:, None, None], x, 0)


def _ours(op: str) -> Call:
    def solve_tril(variant, x, cu_seqlens, chunk_indices):
        Ai = ops.solve_tril(x.A, cu_seqlens, x.k.dtype, chunk_indices=chunk_indices)
        return {"Ai": Ai}

    def kkt_solve(variant, x, cu_seqlens, chunk_indices):
        return {"Ai": ops.kkt_solve(x.k, x.g, x.beta, cu_seqlens, 64, chunk_indices)}

    def fwd_intra(variant, x, cu_seqlens, chunk_indices):
        w, u, _ = ops.fwd_intra(x.k, x.v, x.g, x.beta, cu_seqlens, 64, chunk_indices)
        return {"w": w, "u": u}

    def kda(variant, x, cu_seqlens, chunk_indices):
        return _kda(ops.chunk_kda_fwd_intra, variant, x, cu_seqlens, chunk_indices)

    return {"solve_tril": solve_tril, "kkt_solve": kkt_solve, "fwd_intra": fwd_intra, KDA: kda}[op]


def _kda(function, variant, x, cu_seqlens, chunk_indices):
    fuse = variant == "fused"
    w, u, _, kg, Aqk, Akk = function(
        x.q, x.k, x.v, x.g, x.beta, x.k.shape[-1] ** -0.5, cu_seqlens,
        chunk_indices=chunk_indices, fuse_recompute=fuse, fuse_diagonal=fuse,
    )  # fmt: skip
    return {"w": w, "u": u, "kg": kg, "Aqk": Aqk, **({} if Akk is None else {"Akk": Akk})}


def _sglang(op: str) -> Call:
    def solve_tril(variant, x, cu_seqlens, chunk_indices):
        function = importlib.import_module(f"{SGLANG}.solve_tril").solve_tril
        return {"Ai": function(x.A, cu_seqlens, output_dtype=x.k.dtype)}

    def kkt_solve(variant, x, cu_seqlens, chunk_indices):
        module = importlib.import_module(f"{SGLANG}.chunk_fwd")
        return _kkt(module, "Hg", x, x.g, cu_seqlens, chunk_indices)

    def fwd_intra(variant, x, cu_seqlens, chunk_indices):
        function = importlib.import_module(f"{SGLANG}.chunk_fwd").chunk_gated_delta_rule_fwd_intra
        w, u, _ = function(
            x.k, x.v, x.g, x.beta, cu_seqlens=cu_seqlens, chunk_indices=chunk_indices
        )
        return {"w": w, "u": u}

    def kda(variant, x, cu_seqlens, chunk_indices):
        function = importlib.import_module(f"{SGLANG}.chunk_intra").chunk_kda_fwd_intra
        return _kda(function, variant, x, cu_seqlens, chunk_indices)

    return {"solve_tril": solve_tril, "kkt_solve": kkt_solve, "fwd_intra": fwd_intra, KDA: kda}[op]


def _fla(op: str) -> Call:
    def solve_tril(variant, x, cu_seqlens, chunk_indices):
        function = importlib.import_module("fla.ops.utils.solve_tril").solve_tril
        return {"Ai": function(x.A, cu_seqlens, chunk_indices, output_dtype=x.k.dtype)}

    def kkt_solve(variant, x, cu_seqlens, chunk_indices):
        module = importlib.import_module("fla.ops.gated_delta_rule.chunk_fwd")
        return _kkt(module, "HV", x, x.g_log2, cu_seqlens, chunk_indices)

    def fwd_intra(variant, x, cu_seqlens, chunk_indices):
        module = importlib.import_module("fla.ops.gated_delta_rule.chunk_fwd")
        w, u, _ = module.chunk_gated_delta_rule_fwd_intra(
            x.k, x.v, x.g_log2, x.beta, cu_seqlens=cu_seqlens, chunk_indices=chunk_indices
        )
        return {"w": w, "u": u}

    def kda(variant, x, cu_seqlens, chunk_indices):
        function = importlib.import_module("fla.ops.kda.chunk_intra").chunk_kda_fwd_intra
        w, u, _, kg, Aqk, Akk = function(
            x.q, x.k, x.v, x.g, x.beta, x.k.shape[-1] ** -0.5, cu_seqlens,
            chunk_indices=chunk_indices,
        )  # fmt: skip
        return {"w": w, "u": u, "kg": kg, "Aqk": Aqk, "Akk": Akk}

    return {"solve_tril": solve_tril, "kkt_solve": kkt_solve, "fwd_intra": fwd_intra, KDA: kda}[op]


def _kkt(module, gva, x, g, cu_seqlens, chunk_indices):
    """The first of the two kernels of SGLang's and fla's fwd_intra, as they launch it.

    ``gva`` names the constant by which the two tell the other number of heads; fla's gates ``g``
    are to the base 2.
    """
    B, T, Hg, K = x.k.shape
    H = x.beta.shape[-1]
    if chunk_indices is None and cu_seqlens is not None:
        chunk_indices = module.prepare_chunk_indices(cu_seqlens, 64)
    NT = -(-T // 64) if cu_seqlens is None else len(chunk_indices)
    A = torch.zeros(B, T, H, 64, device=x.k.device, dtype=x.k.dtype)
    heads = {"H": H, "Hg": Hg} if gva == "Hg" else {"H": Hg, "HV": H}
    module.chunk_gated_delta_rule_fwd_kkt_solve_kernel[(NT, B * H)](
        k=x.k, g=g, beta=x.beta, A=A, cu_seqlens=cu_seqlens, chunk_indices=chunk_indices, T=T,
        K=K, BT=64, BC=16, **heads,
    )  # fmt: skip
    return {"Ai": A}


_OPS = ("solve_tril", "kkt_solve", "fwd_intra", KDA)
_CALLS: dict[tuple[str, str], Any] = {
    (op, name): make(op)
    for name, make in (("ours", _ours), ("sglang", _sglang), ("fla", _fla))
    for op in _OPS
}
