"""Matrix products that stay float64 whatever the server does to PyTorch's."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of [..., M, K] and [..., K, N], by ``aten::baddbmm``.

    With ``--enable-deterministic-inference`` SGLang puts kernels of its own in the place of
    ``aten::mm`` and ``aten::bmm`` on a GPU, which refuse float64 (sglang/srt/batch_invariant_ops).
    """
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    (M, K), N = a.shape[-2:], b.shape[-1]
    a3 = a.expand(*batch, M, K).reshape(math.prod(batch), M, K)
    b3 = b.expand(*batch, K, N).reshape(math.prod(batch), K, N)
    return torch.baddbmm(a.new_zeros(()), a3, b3, beta=0).view(*batch, M, N)
