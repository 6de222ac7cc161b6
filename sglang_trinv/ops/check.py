"""Checks at the ops' edge: each failure names the argument, what was wanted and what came."""

from __future__ import annotations

import torch

from sglang_trinv.errors import UnsupportedCall

HALF = (torch.bfloat16, torch.float16)
FLOATS = (*HALF, torch.float32)


def want(ok: bool, name: str, wanted: str, got: object) -> None:
    if not ok:
        raise UnsupportedCall(f"{name}: want {wanted}, got {got}")


def check_tensor(
    name: str, x: object, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:  # fmt: skip
    """``x`` is a contiguous tensor of ``shape`` (None: any), one of ``dtypes``, on ``device``."""
    good = (
        isinstance(x, torch.Tensor)
        and _fits(x.shape, shape)
        and x.dtype in dtypes
        and x.is_contiguous()
        and (device is None or x.device == device)
        and x.device.type in ("cuda", "cpu")
    )
    if not good:  # the words are made only here: this runs before every launch
        _explain(name, x, shape, dtypes, device)


def _fits(size: torch.Size, shape: tuple[int | None, ...]) -> bool:
    if len(size) != len(shape):
        return False
    for n, s in zip(size, shape, strict=True):  # noqa: SIM110, a generator costs twice the time
        if s is not None and s != n:
            return False
    return True


def _explain(
    name: str, x: object, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...],
    device: torch.device | None,
) -> None:  # fmt: skip
    want(isinstance(x, torch.Tensor), name, "a tensor", type(x).__name__)
    shown = "[" + ", ".join("*" if s is None else str(s) for s in shape) + "]"
    want(_fits(x.shape, shape), name, f"shape {shown}", f"shape {list(x.shape)}")
    names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    want(x.dtype in dtypes, name, f"dtype {names}", f"dtype {str(x.dtype).removeprefix('torch.')}")
    want(x.is_contiguous(), name, "a contiguous tensor", f"strides {x.stride()}")
    want(device is None or x.device == device, name, f"a tensor on {device}", f"one on {x.device}")
    want(x.device.type in ("cuda", "cpu"), name, "a tensor on cuda or cpu", f"one on {x.device}")


def check_varlen(
    B: int,
    cu_seqlens: torch.Tensor | None,
    chunk_indices: torch.Tensor | None,
    device: torch.device,
) -> None:
    """The two index tensors fit together and the batch; their values are not looked at."""
    if cu_seqlens is None:
        want(chunk_indices is None, "chunk_indices", "None without cu_seqlens", "a tensor")
        return
    check_tensor("cu_seqlens", cu_seqlens, (None,), (torch.int32, torch.int64), device)
    want(cu_seqlens.numel() >= 1, "cu_seqlens", "at least one element", "none")
    want(B == 1, "cu_seqlens", "None for a batch of more than one row", f"a tensor with B = {B}")
    if chunk_indices is not None:
        check_tensor("chunk_indices", chunk_indices, (None, 2), (torch.int32, torch.int64), device)
