"""Calls of the intra-chunk function, and a fake op and a fake stock kernel that answer them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sglang_trinv import dispatch
from sglang_trinv.config import Config
from sglang_trinv.reference.chunk import naive_fwd_intra


def intra_call(
    T: int = 70, dtype: torch.dtype = torch.bfloat16, Hg: int = 1, H: int = 2
) -> list[Any]:
    """Arguments as SGLang gives them: one packed batch of two sequences."""
    generator = torch.Generator().manual_seed(T)
    k = torch.nn.functional.normalize(torch.randn(1, T, Hg, 16, generator=generator), dim=-1)
    v = torch.randn(1, T, H, 32, generator=generator)
    g = -0.1 * torch.rand(1, T, H, generator=generator).cumsum(1)
    beta = torch.rand(1, T, H, generator=generator)
    cu_seqlens = torch.tensor([0, T // 3, T], dtype=torch.int32)
    return [k.to(dtype), v.to(dtype), g, beta, cu_seqlens, 64, None]


def rounded_truth(call: list[Any], scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, None]:
    """The float64 result, rounded: a kernel as good as one can be; ``scale`` makes it wrong."""
    w, u, _ = naive_fwd_intra(*call[:6])
    return (w * scale).to(call[0].dtype), (u * scale).to(call[0].dtype), None


def run(call: list[Any], stock: Callable[..., Any], **settings: Any) -> tuple[Any, ...]:
    return dispatch.fwd_intra(tuple(call), stock=stock, config=Config(**settings))
