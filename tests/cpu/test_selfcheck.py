"""The start-up self-check: passes the right kernel, and no inverse that is wrong."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_trinv import selfcheck
from sglang_trinv.reference import faults
from sglang_trinv.reference.chunk import naive_fwd_intra, naive_kkt_solve, naive_solve_tril
from sglang_trinv.reference.kda import naive_kda_intra
from sglang_trinv.selfcheck import KINDS, SelfCheckFailed
from sglang_trinv.warmup import Shape
from tests.inputs import Inputs
from tests.prefill_checks import Call, stock_chain_emulated

ROOT = Path(__file__).parents[2]
# float16: without the CPU platform the interpreter truncates to bfloat16 where a GPU rounds
SHAPE = Shape(1, 1, 64, 64, torch.float16, "cpu")


def stock(k, v, g, beta, cu_seqlens, chunk_size, chunk_indices):
    """As SGLang's: the inverse is stored in 16 bits, and so are the factors that it multiplies."""
    Ai = naive_kkt_solve(k, g, beta, cu_seqlens).to(k.dtype).double()
    w, u = torch.zeros_like(v).double(), torch.zeros_like(v).double()
    ends = cu_seqlens.tolist()
    for begin, end in zip(ends, ends[1:], strict=False):
        for i in range(begin, end, chunk_size):
            rows = slice(i, min(i + chunk_size, end))
            b_Ai = Ai[:, rows, :, : rows.stop - rows.start].transpose(1, 2)
            kb = (k * (beta * g.exp())[..., None])[:, rows].to(k.dtype).double().transpose(1, 2)
            vb = (v * beta[..., None])[:, rows].to(k.dtype).double().transpose(1, 2)
            w[:, rows] = (b_Ai @ kb).transpose(1, 2)
            u[:, rows] = (b_Ai @ vb).transpose(1, 2)
    return w.to(k.dtype), u.to(k.dtype), None


def answer_with(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def op(*call: Any, method: str) -> Any:
        return faults.fwd_intra(fault, *call)

    monkeypatch.setattr(selfcheck.ops, "fwd_intra", op)


@pytest.mark.parametrize("method", ["auto", "mbh_tf32x3"])
def test_the_kernel_passes(method: str) -> None:
    found = selfcheck.run("fwd_intra", SHAPE, method, stock)
    assert [case["kind"] for case in found["cases"]] == [kind.name for kind in KINDS]
    assert 0 < found["worst_ratio"] <= 1
    assert found["shape"] == str(SHAPE)
    assert found["method"] == method


@pytest.mark.parametrize("fault", [f for f in faults.INVERSES if f != "bf16_rounding"])
def test_a_wrong_inverse_does_not(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    answer_with(monkeypatch, fault)
    with pytest.raises(SelfCheckFailed, match=r"self-check: error of [wu] on .* allowed is"):
        selfcheck.run("fwd_intra", SHAPE, "auto", stock)


def test_nor_a_result_that_is_spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SelfCheckFailed, match="error of u"):
        selfcheck.run("fwd_intra", SHAPE, "auto", stock, fault="wrong_at_start")
    monkeypatch.setattr(
        selfcheck.ops, "fwd_intra", lambda *c, method: (c[1] * math.nan, c[1], None)
    )
    with pytest.raises(SelfCheckFailed, match="error of w on .* is nan"):
        selfcheck.run("fwd_intra", SHAPE, "auto", stock)


def test_a_stock_kernel_that_fails_sets_no_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the result must be as good as rounding the truth, times the slack."""

    def broken(*call: Any) -> Any:
        w, u, _ = stock(*call)
        return w * math.nan, u, None

    def rounded(*call: Any, method: str) -> Any:
        w, u, _ = naive_fwd_intra(*call[:5])
        return w.to(call[0].dtype), u.to(call[0].dtype), None

    monkeypatch.setattr(selfcheck.ops, "fwd_intra", rounded)
    assert selfcheck.run("fwd_intra", SHAPE, "auto", broken)["worst_ratio"] <= 1
    answer_with(monkeypatch, "no_merges")
    with pytest.raises(SelfCheckFailed):
        selfcheck.run("fwd_intra", SHAPE, "auto", broken)


def test_solve_tril() -> None:
    def theirs(A, cu_seqlens, dtype):
        return naive_solve_tril(A, cu_seqlens).to(dtype)

    found = selfcheck.run("solve_tril", SHAPE, "auto", theirs)
    assert found["worst_ratio"] <= 1
    with pytest.raises(SelfCheckFailed, match="error of Ai"):
        selfcheck.run("solve_tril", SHAPE, "auto", theirs, fault="wrong_at_start")


def test_prefill() -> None:
    def theirs(q, k, v, g, beta, initial_state, cu_seqlens, initial_state_indices, **_):
        x = Inputs(q, k, v, g, beta, cu_seqlens)
        o, states = stock_chain_emulated(Call(x, initial_state, initial_state_indices))
        initial_state.copy_(states)
        return o, None, None

    found = selfcheck.run("chunk_gated_delta_rule", SHAPE, "auto", theirs)
    assert found["worst_ratio"] <= 1
    assert set(found["cases"][0]["ours"]) == {"o", "state"}
    with pytest.raises(SelfCheckFailed, match="error of o"):
        selfcheck.run("chunk_gated_delta_rule", SHAPE, "auto", theirs, fault="wrong_at_start")


def test_kda() -> None:
    def theirs(q, k, v, gk, beta, scale, cu_seqlens, *_):
        w, u, kg, Aqk, _ = naive_kda_intra(q, k, v, gk, beta, scale, cu_seqlens)
        return w.to(k.dtype), u.to(k.dtype), None, kg.to(k.dtype), Aqk.to(k.dtype), None

    shape = replace(SHAPE, K=32, V=32)
    for fault, low, high in (("", 0, 0.01), ("wrong_at_start", 0.3, 1)):
        found = selfcheck._kda_intra(shape, "mbh_tf32x3", theirs, fault)
        errors = [c.ours for result in found for c in result.comparisons if c.name == "u"]
        assert len(errors) == len(KINDS)
        assert all(low <= error <= high for error in errors)


def test_random_state_and_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU checks every head, a CPU one; neither touches the model's random numbers."""
    seen = []
    monkeypatch.setitem(
        selfcheck.RUN, "fwd_intra", lambda shape, *_: seen.append(shape) or [_Good()]
    )
    before = torch.get_rng_state()
    for device in ("cpu", "cuda:0"):
        selfcheck.run("fwd_intra", Shape(2, 6, 64, 64, torch.bfloat16, device), "auto", stock)
    assert [(shape.Hg, shape.H) for shape in seen] == [(1, 1), (2, 6)]
    selfcheck.fwd_intra_call(SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


class _Good:
    kind, ratio, comparisons = "x", 0.5, ()


# What SGLang's batch_invariant_ops do on a GPU with --enable-deterministic-inference.
REFUSING = """
import torch
from torch import library
lib = vars(library)["Library"]("aten", "IMPL")
def refuse(a, b, out=None):
    raise ValueError(f"Unsupported dtype {a.dtype} for bmm_batch_invariant")
for name in ("aten::mm", "aten::bmm"):
    lib.impl(name, refuse, "CPU")
try:
    torch.ones(2, 3, 3).double() @ torch.ones(2, 3, 3).double()
    raise SystemExit("the products of this PyTorch cannot be replaced")
except ValueError:
    pass
from sglang_trinv import selfcheck
from sglang_trinv.ops.torch_path import fwd_intra_torch, kda_intra_torch, solve_tril_torch
from sglang_trinv.reference.recurrence import naive_gated_delta_rule
from sglang_trinv.warmup import Shape
def prefill(q, k, v, g, beta, initial_state, cu_seqlens, **rest):
    o, state = naive_gated_delta_rule(
        q, k, v, g, beta, None, initial_state, cu_seqlens, use_qk_l2norm=True)
    initial_state.copy_(state)
    return o.to(v.dtype), initial_state
stock = {
    "fwd_intra": lambda *call: fwd_intra_torch(*call[:5], return_A=False),
    "solve_tril": solve_tril_torch,
    "kda_intra": lambda *call: kda_intra_torch(*call[:7], return_A=False),
    "chunk_gated_delta_rule": prefill,
}
assert set(stock) == set(selfcheck.RUN)
selfcheck.SLACK = 1e6  # these stand-ins round once; whether the kernels are right is not asked here
for adapter, kernel in stock.items():
    shape = Shape(1, 1, 64, 64, torch.float16, "cpu")
    print(adapter, selfcheck.run(adapter, shape, "auto", kernel)["worst_ratio"])
"""


def test_where_the_products_of_pytorch_are_replaced() -> None:
    """The truth is float64 in deterministic mode too."""
    done = subprocess.run(
        [sys.executable, "-c", REFUSING], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == len(selfcheck.RUN)
