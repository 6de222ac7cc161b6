"""The prediction of SGLang's default GDN prefill, against the table of known setups."""

from __future__ import annotations

import pytest

from sglang_trinv.serve.prefill_choice import Machine, default_chunk, predict

NEW = "0.5.23"


@pytest.mark.parametrize(
    ("machine", "name", "reason"),
    [
        (Machine(NEW, None), "triton", "no GPU"),
        (Machine(NEW, (8, 0)), "triton", "sm80"),
        (Machine(NEW, (8, 9), memory_gb=24), "triton", "sm89"),
        (Machine(NEW, (9, 0)), "flashinfer", "float32 state"),
        (Machine(NEW, (9, 0), memory_gb=141), "flashinfer", "chunk 8192"),
        (Machine(NEW, (9, 0), state_dtype="bfloat16"), "triton", "needs a float32 state"),
        (Machine(NEW, (9, 0), flashinfer=False), "triton", "not installed"),
        (Machine("0.5.18", (9, 0)), "triton", "before SGLang 0.5.19"),
        (Machine("0.5.19+cu130", (9, 0)), "flashinfer", "all conditions"),
        (Machine("0.5.15", (10, 0)), "triton", "before SGLang 0.5.16"),
        (Machine(NEW, (10, 0), memory_gb=180), "triton", "needs a bfloat16 state"),
        (
            Machine(NEW, (10, 0), memory_gb=180, state_dtype="bfloat16", cuda=(13, 0)),
            "triton",
            "chunk up to 8192, the default is 16384",
        ),
        (
            Machine(NEW, (10, 0), memory_gb=100, state_dtype="bfloat16", cuda=(13, 0)),
            "flashinfer",
            "all conditions",
        ),
        (
            Machine(NEW, (10, 0), memory_gb=100, state_dtype="bfloat16", cuda=(12, 9)),
            "triton",
            "CUDA 13",
        ),
        (Machine(NEW, (12, 0)), "triton", "only on sm90 and sm100"),
        (Machine(NEW, (9, 4), hip=True), "triton", "ROCm"),
    ],
)
def test_predict(machine, name, reason):
    found = predict(machine)
    assert found[0] == name
    assert reason in found[1]


@pytest.mark.parametrize(
    ("memory", "chunk"), [(16, 2048), (24, 4096), (80, 8192), (141, 8192), (180, 16384)]
)
def test_default_chunk(memory, chunk):
    assert default_chunk(memory) == chunk
