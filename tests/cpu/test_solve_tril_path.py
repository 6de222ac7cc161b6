"""The path of SGLang 0.5.9: solve_tril alone, with SGLang's chunk indices, counted and checked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from sglang_trinv import dispatch, hooks, warmup
from sglang_trinv.config import Config
from sglang_trinv.errors import UnsupportedCall
from sglang_trinv.reference.chunk import naive_solve_tril
from sglang_trinv.status import ProcessStatus
from tests.inputs import HARD_INPUTS, chunk_indices_of, cu_seqlens_of
from tests.tolerance import rel_err

LENGTHS = [70, 1, 64]


@pytest.fixture
def A() -> torch.Tensor:
    """Near-equal keys, float32 [1, 135, 2, 64], as SGLang's kernel before it makes A."""
    from sglang_trinv.reference.chunk import naive_chunk_A

    x = HARD_INPUTS["cosine 0.98"].build(sum(LENGTHS), Hg=1, H=2, lengths=LENGTHS).summed()
    return naive_chunk_A(x.k, x.g, x.beta, x.cu_seqlens).float().contiguous()


@pytest.fixture
def stock() -> Callable[..., Any]:
    """A module that looks like SGLang's; its functions remember their calls."""
    module = ModuleType("fake_fla_solve_tril")
    module.calls = []

    def prepare_chunk_indices(cu_seqlens, chunk_size):
        module.calls.append("prepare_chunk_indices")
        return chunk_indices_of(cu_seqlens, chunk_size)

    def solve_tril(A, cu_seqlens=None, output_dtype=torch.float):
        module.calls.append("solve_tril")
        return naive_solve_tril(A, cu_seqlens).to(output_dtype)

    solve_tril.__module__ = module.__name__
    module.prepare_chunk_indices = prepare_chunk_indices
    sys.modules[module.__name__] = module
    yield solve_tril
    del sys.modules[module.__name__]


def adapted(stock: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    return hooks.ADAPTERS["solve_tril"](stock, Config(**settings))


def asked(stock: Callable[..., Any]) -> list[str]:
    return sys.modules[stock.__module__].calls


def test_the_op_answers_with_sglangs_chunk_indices(
    A: torch.Tensor, stock: Callable[..., Any], process: ProcessStatus
) -> None:
    cu_seqlens = cu_seqlens_of(LENGTHS)
    Ai = adapted(stock, strict=True)(A=A, cu_seqlens=cu_seqlens, output_dtype=torch.float16)
    truth = naive_solve_tril(A, cu_seqlens)
    assert Ai.dtype == torch.float16  # the interpreter cuts bfloat16 off instead of rounding it
    assert rel_err(Ai, truth) <= 1.2 * rel_err(truth.half(), truth)
    assert asked(stock) == ["prepare_chunk_indices"]
    assert process.calls["solve_tril"]["triton-interpreter"] == 1
    assert not process.fallbacks


def test_without_sequences_nothing_is_prepared(
    A: torch.Tensor, stock: Callable[..., Any], process: ProcessStatus
) -> None:
    Ai = adapted(stock, strict=True)(A)
    assert Ai.dtype == torch.float32
    assert rel_err(Ai, naive_solve_tril(A)) < 1e-5
    assert asked(stock) == []


def test_a_call_outside_the_contract_is_stocks(
    A: torch.Tensor, stock: Callable[..., Any], process: ProcessStatus
) -> None:
    Ai = adapted(stock)(A.double())
    assert asked(stock) == ["solve_tril"]
    assert torch.equal(Ai, naive_solve_tril(A).float())
    (reason,) = process.fallbacks
    assert reason.startswith("A: want dtype ")
    with pytest.raises(UnsupportedCall, match="A: want dtype "):
        adapted(stock, strict=True)(A.double())


@pytest.mark.parametrize(("fault", "agrees"), [("", True), ("zero_u", False)])
def test_the_first_calls_are_checked(
    A: torch.Tensor, stock: Callable[..., Any], process: ProcessStatus, fault: str, agrees: bool
) -> None:
    ours = adapted(stock, check=2, fault=fault)
    for _ in range(3):
        ours(A, cu_seqlens_of(LENGTHS), torch.float16)
    assert process.check["done"] == 2
    assert process.check["disagreements"] == (0 if agrees else 2)
    assert (process.check["worst_error"]["ours"]["Ai"] < 0.01) is agrees


def test_a_fault_of_another_op_is_not_silently_ignored(
    A: torch.Tensor, stock: Callable[..., Any], process: ProcessStatus
) -> None:
    with pytest.raises(UnsupportedCall, match="SGLANG_TRINV_FAULT=mxr16 is for fwd_intra"):
        adapted(stock, strict=True, fault="mxr16")(A)


def test_an_old_gpu_is_refused(
    A: torch.Tensor, stock: Callable[..., Any], process: ProcessStatus, monkeypatch: Any
) -> None:
    class OnTheGpu:
        is_cuda, device = True, torch.device("cuda", 0)

    monkeypatch.setattr(dispatch, "capability_of", lambda index: (7, 5))
    call = (OnTheGpu(), None, torch.float32)
    assert dispatch.solve_tril(call, stock=lambda *_: "stock", config=Config()) == "stock"
    assert list(process.fallbacks) == ["compute capability (7, 5) is below (8, 0)"]


def test_warm_up_runs_this_op(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def op(A, cu_seqlens, output_dtype, *, chunk_indices, method):
        seen.append((tuple(A.shape), A.dtype, output_dtype, tuple(chunk_indices.shape), method))
        return A

    monkeypatch.setattr(warmup.ops, "solve_tril", op)
    shape = warmup.Shape(1, 3, 128, 64, torch.bfloat16, "cpu")
    warmup.warm_up(shape, "mbh_fp16", adapter="solve_tril")
    assert seen == [((1, 16, 3, 64), torch.float32, torch.bfloat16, (1, 2), "mbh_fp16")]


def test_near_equal_keys_are_inverted_as_closely_as_by_float32_products(A: torch.Tensor) -> None:
    """Before the result is rounded: what "auto" adds must vanish beside rounding to bfloat16."""
    cu_seqlens = cu_seqlens_of(LENGTHS)
    truth = naive_solve_tril(A, cu_seqlens)
    floor = rel_err(truth.bfloat16(), truth)
    own = rel_err(dispatch.ops.solve_tril(A, cu_seqlens, method="mbh_fp16x2"), truth)
    assert (floor**2 + own**2) ** 0.5 <= 1.2 * floor
    coarse = rel_err(dispatch.ops.solve_tril(A, cu_seqlens, method="mbh_fp16"), truth)
    assert (floor**2 + coarse**2) ** 0.5 > 1.2 * floor
    auto = dispatch.ops.solve_tril(A, cu_seqlens, torch.bfloat16)
    assert torch.equal(
        auto, dispatch.ops.solve_tril(A, cu_seqlens, torch.bfloat16, method="mbh_fp16x2")
    )
