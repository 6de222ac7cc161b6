"""The run of the op before SGLang captures CUDA graphs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_trinv import warmup
from tests.cpu.fake_server import runner


def test_heads_come_from_the_state_pool() -> None:
    made = runner()
    shape, layers = warmup.shape_of(made, made.model_config.gdn)
    assert layers == 48
    assert shape == warmup.Shape(4, 12, 128, 128, torch.bfloat16, "cpu")


def test_config_without_head_counts() -> None:
    shape, _ = warmup.shape_of(runner(), SimpleNamespace())
    assert (shape.Hg, shape.H) == (12, 12)


def test_runs_what_sglang_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        warmup.ops, "fwd_intra", lambda *call, **kw: seen.append((call, kw)) or (*call[:2], None)
    )
    monkeypatch.setattr(warmup, "chunk_counts", lambda device: [1, 64])
    warmup.warm_up(warmup.Shape(1, 3, 128, 64, torch.float16, "cpu"), "mbh_tf32", True)
    assert [call[6].shape for call, _ in seen] == [(1, 2), (64, 2)]
    (k, v, g, beta, cu_seqlens, chunk_size, indices), options = seen[1]
    assert (k.dtype, g.dtype, beta.dtype) == (torch.float16, torch.float32, torch.float32)
    assert (k.shape, v.shape, g.shape) == ((1, 16, 1, 128), (1, 16, 3, 64), (1, 16, 3))
    assert cu_seqlens.dtype == indices.dtype == torch.int32
    assert chunk_size == 64
    assert options == {"method": "mbh_tf32", "return_A": True}


def test_many_launch_sizes_on_a_gpu_one_elsewhere() -> None:
    assert warmup.chunk_counts("cuda:0") == [2**i for i in range(13)]
    assert warmup.chunk_counts("cpu") == [1]


def test_the_real_op_runs_and_leaves_the_random_state_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = torch.get_rng_state()
    warmup.warm_up(warmup.Shape(1, 2, 32, 32, torch.bfloat16, "cpu"), "mbh_fp16")
    assert torch.equal(torch.get_rng_state(), before)
