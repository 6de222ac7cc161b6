"""The wrong inverses of the self-test: each is as wrong as its name says."""

from __future__ import annotations

import pytest
import torch

from sglang_trinv.config import FAULTS, SERVER_FAULTS
from sglang_trinv.reference import faults
from sglang_trinv.reference.chunk import naive_fwd_intra
from tests.cpu import calls


@pytest.fixture(scope="module")
def A():
    torch.manual_seed(0)
    return torch.tril(0.4 * torch.randn(3, 64, 64), -1)


def error(A: torch.Tensor, fault: str) -> torch.Tensor:
    true = torch.linalg.inv(torch.eye(64).double() + A.double())
    return (faults.INVERSES[fault](A).double() - true).abs() / true.abs().amax((-1, -2))[
        :, None, None
    ]


def test_every_fault_can_be_set():
    assert set(faults.INVERSES) < set(FAULTS)
    assert set(FAULTS) - set(faults.INVERSES) == {"", "zero_u", *SERVER_FAULTS}


def test_rounding_is_small(A):
    A = A * 0.2
    assert error(A, "bf16_rounding").max() < 0.02
    assert 0 < error(A, "bf16_inverse").max() < 0.05
    assert error(A, "mxr16").max() < 0.01


@pytest.mark.parametrize(
    ("fault", "rows", "columns"),
    [
        ("dropped_block", slice(16, 32), slice(0, 16)),
        ("transposed_block", slice(48, 64), slice(32, 48)),
        ("no_merges", slice(16, 64), slice(0, 16)),
        ("last_merge", slice(32, 64), slice(0, 32)),
    ],
)
def test_only_the_named_part_is_wrong(A, fault, rows, columns):
    found = error(A * 0.2, fault)
    assert found[:, rows, columns].max() > 0.01
    if fault in ("dropped_block", "transposed_block"):
        found[:, rows, columns] = 0
        assert found.max() < 1e-5


def test_wrong_sign(A):
    assert error(A * 0.2, "wrong_sign").max() > 0.1


def test_the_rest_of_the_step_is_exact(monkeypatch):
    """With the true inverse in a fault's place, the result is the reference's."""
    eye = torch.eye(64).double()
    monkeypatch.setitem(faults.INVERSES, "no_merges",
                        lambda A: torch.linalg.inv(eye + A.double()).float())  # fmt: skip
    torch.manual_seed(1)
    k = torch.nn.functional.normalize(torch.randn(1, 100, 1, 32), dim=-1).bfloat16()
    v = torch.randn(1, 100, 3, 32).bfloat16()
    g, beta = -torch.rand(1, 100, 3).cumsum(1) * 0.01, torch.rand(1, 100, 3)
    cu_seqlens = torch.tensor([0, 70, 100])
    truth = naive_fwd_intra(k, v, g, beta, cu_seqlens)
    found = faults.fwd_intra("no_merges", k, v, g, beta, cu_seqlens)
    for x, y in zip(found, truth, strict=True):
        assert x.dtype == torch.bfloat16
        assert (x.double() - y).norm() <= 1.2 * (y.bfloat16().double() - y).norm()


@pytest.mark.parametrize("fault", ["no_merges", "bf16_rounding"])
def test_the_setting_puts_it_in_the_kernels_place(process, fault):
    """Counted as ours, never handed to stock, and as far from the truth as the fault is."""

    def stock(*_):
        raise AssertionError("stock was called")

    call = calls.intra_call(T=150)
    truth = naive_fwd_intra(*call[:6])[1]
    _, u, _ = calls.run(call, stock, fault=fault, strict=True)
    distance = float((u.double() - truth).norm() / truth.norm())
    assert distance > 0.1 if fault == "no_merges" else 0 < distance < 0.02
    assert sum(process.calls["fwd_intra"].values()) == 1
