"""Run the op once for each shape that a model will use, before SGLang captures CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sglang_trinv import ops
from sglang_trinv.errors import TrinvError
from sglang_trinv.ops.chunks import PADDING_CHUNK


@dataclass(frozen=True)
class Shape:
    """Heads of this rank, head dims, dtype and device of a model's GDN layers."""

    Hg: int
    H: int
    K: int
    V: int
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        return f"K{self.K} V{self.V}, Hk{self.Hg}/Hv{self.H}"


def shape_of(runner: Any, gdn_config: Any) -> tuple[Shape, int]:
    """The shape of ``runner``'s GDN layers on this rank, and how many layers there are.

    The state pool, [layers, slots, value heads, V, K], is already cut for this rank, whatever the
    tensor and data parallel layout; the key heads keep their ratio to the value heads.
    """
    state = runner.req_to_token_pool.mamba_pool.mamba_cache.temporal
    layers, _, H, V, K = state.shape
    key_heads = getattr(gdn_config, "linear_num_key_heads", None)
    value_heads = getattr(gdn_config, "linear_num_value_heads", None)
    Hg = max(1, H * key_heads // value_heads) if key_heads and value_heads else H
    return Shape(Hg, H, K, V, runner.model_config.dtype, str(runner.device)), layers


def warm_up(shape: Shape, method: str, return_A: bool = False, adapter: str = "fwd_intra") -> None:
    """Run the op as SGLang will call it, with few chunks and many; the result must be finite.

    Args:
        adapter: of the target: "fwd_intra" or "solve_tril".
    Raises:
        TrinvError: a result is not finite. Whatever the op raises is passed on.
    """
    for chunks in chunk_counts(shape.device):
        _, _, g, _, cu_seqlens, _, chunk_indices = call = inputs(shape, chunks)
        if adapter == "solve_tril":
            A = g.new_zeros(1, g.shape[1], shape.H, 64)
            options = {"chunk_indices": chunk_indices, "method": method}
            results = (ops.solve_tril(A, cu_seqlens, shape.dtype, **options),)
        else:
            results = ops.fwd_intra(*call, method=method, return_A=return_A)[:2]
        if not all(x.isfinite().all() for x in results):
            raise TrinvError(f"warm-up of {shape} with {chunks} chunks gave a non-finite result")


def chunk_counts(device: str) -> list[int]:
    """Numbers of chunks to run with: the op may choose its launch configuration by them."""
    return [1 << i for i in range(13)] if torch.device(device).type == "cuda" else [1]


def inputs(shape: Shape, chunks: int) -> tuple[Any, ...]:
    """One short sequence in a grid of ``chunks`` chunks; the rest is padding, which is free."""
    T = 16
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    k = torch.nn.functional.normalize(random(1, T, shape.Hg, shape.K), dim=-1)
    v = random(1, T, shape.H, shape.V)
    g = -0.1 * random(1, T, shape.H).abs().cumsum(1)
    beta = random(1, T, shape.H).sigmoid()
    rows = [[0, 0]] + [[0, PADDING_CHUNK]] * (chunks - 1)
    return (
        k.to(shape.device, shape.dtype),
        v.to(shape.device, shape.dtype),
        g.to(shape.device),
        beta.to(shape.device),
        torch.tensor([0, T], dtype=torch.int32, device=shape.device),
        64,
        torch.tensor(rows, dtype=torch.int32, device=shape.device),
    )
