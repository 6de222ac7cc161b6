"""The whole prefill compiled on a CUDA device, against float64 and SGLang's own chain."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sglang_trinv.kernels import configs
from sglang_trinv.kernels.configs import PrefillConfig
from sglang_trinv.ops import tiles_sm90
from sglang_trinv.ops.chunk_gated_delta_rule import chunk_gated_delta_rule
from tests.inputs import HARD_INPUTS, LENGTHS, SPLIT_METHODS
from tests.prefill_checks import (
    NEARER_KEYS,
    RANDOM,
    Call,
    check_prefill,
    prefill_call,
    run_prefill,
    stock_chain_emulated,
    strided,
)

pytestmark = pytest.mark.gpu
CONFIGS = {
    "triton": PrefillConfig(),
    "triton, 2 segments": PrefillConfig(segments=2),
    "alone": configs.ALONE,
    "beside": configs.BESIDE,
    "wide": configs.WIDE,
    "crowded": configs.CROWDED,
    "4 segments": replace(configs.SEGMENTED, segments=4),
}
RAGGED = [1, 700, 64, 63, 300, 128]


def made(case=RANDOM, lengths=(512,), **options) -> Call:
    options = {"Hg": 2, "ratio": 2, "K": 128, "V": 128, "device": "cuda", **options}
    return prefill_call(case, list(lengths), **options)


def stock(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """SGLang's chain where it is installed, else its emulation."""
    try:
        from sglang.kernels.ops.attention.fla.chunk import chunk_gated_delta_rule as chain
    except ImportError:
        return stock_chain_emulated(call)
    x, pool = call.x, call.pool.contiguous().clone()
    # Its kernels take no negative slot: those sequences get a slot of zeros at the end.
    pool = torch.cat([pool, torch.zeros_like(pool[:1])])
    indices = torch.where(call.indices < 0, len(pool) - 1, call.indices)
    o, _, _ = chain(
        q=x.q, k=x.k, v=x.v, g=x.g, beta=x.beta, initial_state=pool,
        initial_state_indices=indices, cu_seqlens=x.cu_seqlens, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    return o, pool[indices.long()]


def skip_unless_it_runs_here(config: PrefillConfig) -> None:
    if config.state == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Gluon kernels are for SM90")


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> PrefillConfig:
    skip_unless_it_runs_here(CONFIGS[request.param])
    return CONFIGS[request.param]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("name", HARD_INPUTS | NEARER_KEYS)
def test_hard_inputs(name: str, zeros: bool, config: PrefillConfig, record_property) -> None:
    call = made((HARD_INPUTS | NEARER_KEYS)[name], Hg=4, zeros=zeros)
    for output, (error, allowed) in check_prefill(call, stock(call), config=config).items():
        record_property(output, f"{error:.3e} of {allowed:.3e}")


@pytest.mark.parametrize("ratio", [1, 2, 3, 4])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
def test_ragged_batches(ratio: int, state: torch.dtype, config: PrefillConfig) -> None:
    call = made(lengths=RAGGED, ratio=ratio, state=state, skipped=1)
    check_prefill(call, stock(call), config=config)


@pytest.mark.parametrize("name", [name for name in LENGTHS if name != "0"])
def test_lengths(name: str, config: PrefillConfig) -> None:
    check_prefill(made(lengths=LENGTHS[name], dtype=torch.float16), config=config)


@pytest.mark.parametrize("method", SPLIT_METHODS)
@pytest.mark.parametrize("name", ["random", "cosine 0.98", "equal keys, beta 1"])
def test_split_operands(name: str, method: str, config: PrefillConfig) -> None:
    call = made(HARD_INPUTS[name], RAGGED)
    check_prefill(call, stock(call), config=config, method=method)


def test_bitwise_alone_packed_and_again(config: PrefillConfig) -> None:
    call = made(HARD_INPUTS["cosine 0.98"], RAGGED)
    twin = replace(call, pool=strided(call.pool))
    parts = [call.sequence(n) for n in range(call.N)]
    o, _ = run_prefill(call, config=config)
    assert torch.equal(o, run_prefill(twin, config=config)[0])
    assert torch.equal(call.pool, twin.pool)
    for n, part in enumerate(parts):
        bos, eos = call.x.cu_seqlens[n : n + 2].tolist()
        assert torch.equal(o[:, bos:eos], run_prefill(part, config=config)[0])
        slot = part.indices.long()
        assert torch.equal(call.pool[slot], part.pool[slot])


def test_cuts_of_deterministic_mode_have_the_same_bits() -> None:
    skip_unless_it_runs_here(configs.ALONE)
    call = made(HARD_INPUTS["cosine 0.98"], RAGGED)
    twin = replace(call, pool=strided(call.pool))
    o, _ = run_prefill(call, config=configs.ALONE)
    assert torch.equal(o, run_prefill(twin, config=configs.WIDE)[0])
    assert torch.equal(call.pool, twin.pool)


@pytest.mark.parametrize("skipped", [None, 0])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [700, 330, 64, 0])
def test_scores_beside_the_state_pass(n: int, state: torch.dtype, skipped: int | None) -> None:
    """The same bits as scores before it. Of 700 rows n are the sequence's."""
    skip_unless_it_runs_here(configs.BESIDE)
    call = made(HARD_INPUTS["cosine 0.98"], [700], state=state, skipped=skipped)
    call = replace(call, x=replace(call.x, cu_seqlens=call.x.cu_seqlens.new_tensor([0, n])))
    chunk = torch.tensor([(n - 1) // 64], device="cuda").int()
    found = []
    for config in (configs.ALONE, configs.BESIDE):
        twin = replace(call, pool=strided(call.pool))
        track = torch.zeros(1, 4, 128, 128, device="cuda")
        o, h = run_prefill(twin, track_state=track, track_chunk_idx=chunk, config=config)
        found.append((o[:, :n], h[:, : -(-n // 64)], track, twin.pool))
    for before, beside in zip(*found, strict=True):
        assert torch.equal(before, beside)
    assert skipped == 0 or n == 0 or not torch.equal(found[0][-1], call.pool)


@pytest.mark.parametrize("programs", [1, 3])
def test_a_few_programs_take_item_after_item(
    programs: int, config: PrefillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    if config.state != "sm90":
        pytest.skip("one program an item")
    lengths = [0, 0, *RAGGED, 0, 65, *[1] * 9, 129, 0]
    call = made(HARD_INPUTS["cosine 0.98"], lengths, skipped=4)
    chunks = sum(-(-n // 64) for n in lengths)  # h has more rows, and nothing in them
    twin = replace(call, pool=strided(call.pool))
    o, h = run_prefill(call, config=config)
    monkeypatch.setattr(tiles_sm90, "_multiprocessors", lambda index: programs)
    p, i = run_prefill(twin, config=config)
    assert torch.equal(o, p)
    assert torch.equal(h[:, :chunks], i[:, :chunks])
    assert torch.equal(call.pool, twin.pool)


def test_without_a_state(config: PrefillConfig) -> None:
    """As with a pool of zeros."""
    call = made(HARD_INPUTS["cosine 0.98"], RAGGED, zeros=True)
    x = call.x
    o, _ = run_prefill(call, config=config)
    p, _, _ = chunk_gated_delta_rule(
        x.q, x.k, x.v, x.g, x.beta, cu_seqlens=x.cu_seqlens, use_qk_l2norm_in_kernel=True,
        config=config,
    )  # fmt: skip
    assert torch.equal(o, p)


def test_a_neighbour_that_is_not_a_number(config: PrefillConfig) -> None:
    call = made(lengths=RAGGED)
    poisoned = replace(call, pool=strided(call.pool))
    o, _ = run_prefill(call, config=config)
    begin, end = call.x.cu_seqlens[1:3].tolist()
    for x in (poisoned.x.q, poisoned.x.k, poisoned.x.v):
        x[:, begin:end] = float("nan")
    p, _ = run_prefill(poisoned, config=config)
    assert p[:, begin:end].isnan().any()
    kept = [n for n in range(call.N) if n != 1]
    assert torch.equal(o[:, :begin], p[:, :begin])
    assert torch.equal(o[:, end:], p[:, end:])
    slots = call.indices[kept].long()
    assert torch.equal(call.pool[slots], poisoned.pool[slots])


def test_states_before_chunks(config: PrefillConfig) -> None:
    call = made(lengths=RAGGED)
    chunks = torch.tensor([0, 10, -1, 0, 3, 2], device="cuda").int()
    track, before = torch.full((6, 4, 128, 128), 7.0, device="cuda"), call.pool.clone()
    _, h = run_prefill(
        call, inplace_update=False, track_state=track, track_chunk_idx=chunks, config=config
    )
    assert torch.equal(call.pool, before)
    assert (track[2] == 7).all()
    assert (track[5] == 7).all()  # its two chunks are 0 and 1
    first = [0, 1, 12, 13, 14, 19]
    for n in (0, 1, 3, 4):
        assert torch.equal(track[n].bfloat16(), h[0, first[n] + int(chunks[n])])
    # The state before chunk 10 is the final state of the first 640 tokens.
    part = call.sequence(1)
    x = {name: getattr(part.x, name)[:, :640] for name in ("q", "k", "v", "g", "beta")}
    starts = torch.tensor([0, 640], device="cuda").int()
    part = replace(part, x=replace(part.x, **x, cu_seqlens=starts))
    run_prefill(part, config=replace(config, segments=1))
    if config.segments == 1:
        assert torch.equal(part.pool[part.indices.long()].float()[0], track[1])


def test_cuda_graph_and_no_synchronisation(config: PrefillConfig) -> None:
    check_graph(made(lengths=RAGGED), config)


def check_graph(call: Call, config: PrefillConfig) -> None:
    x, options = call.x, {"use_qk_l2norm_in_kernel": True, "return_h": False, "config": config}
    fixed = {"initial_state_indices": call.indices, "cu_seqlens": x.cu_seqlens, **options}
    tensors = (x.q, x.k, x.v, x.g, x.beta)
    chunk_gated_delta_rule(*tensors, initial_state=strided(call.pool), **fixed)  # compile first
    torch.cuda.synchronize()
    pool, mode = strided(call.pool), torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        chunk_gated_delta_rule(*tensors, initial_state=pool, **fixed)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    pool.copy_(call.pool)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _, _ = chunk_gated_delta_rule(*tensors, initial_state=pool, **fixed)
    x.k.copy_(x.k.flip(1))
    pool.copy_(call.pool)
    graph.replay()
    again = strided(call.pool)
    o, _, _ = chunk_gated_delta_rule(*tensors, initial_state=again, **fixed)
    assert torch.equal(captured, o)
    assert torch.equal(pool, again)


@pytest.mark.parametrize(
    ("lengths", "Hg", "ratio"), [([8192], 2, 2), ([24576, 8192], 1, 2), ([128] * 64, 2, 2)]
)
def test_server_sized_calls(lengths: list[int], Hg: int, ratio: int) -> None:
    call = made(HARD_INPUTS["cosine 0.5"], lengths, Hg=Hg, ratio=ratio)
    check_prefill(call, stock(call))


def test_workspace_is_no_larger_than_the_chains() -> None:
    call = made(lengths=[8192])
    chunk, states = run_prefill(call, return_h=False)
    del chunk, states
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    x = call.x
    chunk_gated_delta_rule(
        x.q, x.k, x.v, x.g, x.beta, initial_state=call.pool, initial_state_indices=call.indices,
        cu_seqlens=x.cu_seqlens, use_qk_l2norm_in_kernel=True, return_h=False,
    )  # fmt: skip
    T, H, V, K = 8192, 4, 128, 128
    # w, u and v_new, Ai, q and k normalised, o; h before each chunk.
    chain = 2 * T * (H * (K + 3 * V + 64) + 2 * 2 * K) + 2 * (T // 64) * H * V * K
    assert torch.cuda.max_memory_allocated() - before <= chain
