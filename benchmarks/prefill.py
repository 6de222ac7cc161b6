"""`python -m benchmarks prefill`: the whole GDN prefill layer as SGLang calls it, on one GPU.

Ours, SGLang's Triton chain and FlashInfer through the steps of SGLang's own adapter, in turns in
one process; q and k unnormalised, the state pool in place, lengths that nobody has seen before.
"""

from __future__ import annotations

import importlib
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import output, prefill_report, timing
from benchmarks.provenance import provenance
from sglang_trinv.ops.chunk_gated_delta_rule import chunk_gated_delta_rule
from sglang_trinv.reference.chunk import naive_chunk_forward
from sglang_trinv.reference.recurrence import l2norm, naive_gated_delta_rule

OP = "chunk_gated_delta_rule"
D = 128  # width of keys and values
FLA = "sglang.kernels.ops.attention.fla"
# lengths, key heads, value heads, goal in us
CASES = (
    ((2048,), 16, 32, 110),
    ((8192,), 16, 32, 200),
    ((32768,), 16, 32, 690),
    ((8192,), 16, 64, 330),
    ((32768,), 16, 16, 440),
    ((8192,), 2, 4, 120),
    ((32768,), 2, 4, 190),
    ((131072,), 4, 8, 800),
    ((2048,) * 16, 16, 32, 450),
    ((512,) * 16, 16, 32, 170),
    ((128,) * 64, 16, 32, 220),
    ((24576, 8192), 16, 64, 1000),
    ((1024,) * 8, 16, 64, 255),
    ((8192,), 16, 48, 300),
    ((8192,), 4, 8, 130),
)
# What a server also asks: parts of prompts, prefix hits, heads of a rank under tensor parallelism.
SHORT = tuple(
    ((T,), hk, hv, None)
    for hk, hv in ((16, 32), (16, 64), (16, 48), (16, 16), (8, 16), (8, 32), (4, 8), (2, 4))
    for T in (1, 64, 256, 1024)
)
ALLOWED = 1.1  # times the error of SGLang's Triton chain
DEVICE = "cuda"
JUDGED = (300, 212)  # tokens, of the sequences by which errors are judged
HARD = ("random", "near-equal keys", "equal keys")


@dataclass(frozen=True)
class Call:
    """Arguments of one prefill."""

    q: torch.Tensor  # bfloat16 [1, T, hk, D]
    k: torch.Tensor
    v: torch.Tensor  # bfloat16 [1, T, hv, D]
    g: torch.Tensor  # float32 [1, T, hv], not summed
    beta: torch.Tensor
    pool: torch.Tensor  # float32 [N, hv, D, D]
    indices: torch.Tensor  # int32 [N]
    cu_seqlens: torch.Tensor  # int32 [N + 1]


Layer = Callable[[Call], torch.Tensor]


def build(lengths: tuple[int, ...], hk: int, hv: int, keys: str = "random") -> Call:
    """Draw a call; ``keys`` is one of ``HARD``."""
    gen = torch.Generator(DEVICE).manual_seed(0)
    T, N = sum(lengths), len(lengths)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(1, T, *shape, generator=gen, device=DEVICE)

    k = random(hk, D)
    beta = random(hv).sigmoid()
    g = -torch.nn.functional.softplus(random(hv) - 3)
    if keys != "random":
        k = k[:, :1] + (0.02 if keys == "near-equal keys" else 0.0) * k
        beta, g = torch.full_like(beta, 0.995), 1e-3 * g
    k = k * (0.5 + random(hk, 1).abs())  # lengths that the layer has to normalise
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    return Call(
        random(hk, D).bfloat16(), k.bfloat16(), random(hv, D).bfloat16(), g, beta,
        torch.zeros(N, hv, D, D, device=DEVICE), torch.arange(N, device=DEVICE).int(), ends.int(),
    )  # fmt: skip


def ours(x: Call, method: str = "auto") -> torch.Tensor:
    return chunk_gated_delta_rule(
        x.q, x.k, x.v, x.g, x.beta, initial_state=x.pool, initial_state_indices=x.indices,
        cu_seqlens=x.cu_seqlens, use_qk_l2norm_in_kernel=True, return_h=False, method=method,
    )[0]  # fmt: skip


def sglang_triton(x: Call) -> torch.Tensor:
    layer = importlib.import_module(f"{FLA}.chunk").chunk_gated_delta_rule
    return layer(
        q=x.q, k=x.k, v=x.v, g=x.g, beta=x.beta, initial_state=x.pool,
        initial_state_indices=x.indices, cu_seqlens=x.cu_seqlens, use_qk_l2norm_in_kernel=True,
    )[0]  # fmt: skip


def flashinfer(x: Call) -> torch.Tensor:
    """The steps of FlashInferGDNKernel.extend of SGLang 0.5.23 on SM90."""
    prepare = importlib.import_module(f"{FLA}.l2norm").gdn_prefill_qkv_prepare_fwd
    prefill = importlib.import_module("flashinfer.gdn_prefill").chunk_gated_delta_rule
    q, k, v = prepare(x.q[0], x.k[0], x.v[0])
    index = torch.where(x.indices >= 0, x.indices, x.pool.shape[0] - 1).to(torch.int64)
    state = x.pool[index].to(torch.float32)
    o, final = prefill(
        q=q, k=k, v=v, g=torch.exp(x.g[0]), beta=x.beta[0], scale=None, initial_state=state,
        output_final_state=True, cu_seqlens=x.cu_seqlens.to(torch.int64),
        use_qk_l2norm_in_kernel=False, output_state=torch.empty_like(state),
    )  # fmt: skip
    x.pool.index_copy_(0, index, final)
    return o[None]


def main(
    out: Path, cases: tuple[Any, ...], sglang: str | None, release: str | None,
    with_flashinfer: bool, rounds: int,
) -> int:  # fmt: skip
    """Measure every case, print a line each and write ``out``; returns the exit code."""
    layers = {"ours": ours, **peers(sglang, with_flashinfer)}
    errors = {keys: accuracy(keys, layers) for keys in HARD}
    for keys, found in errors.items():
        print(f"{keys:16}", found, flush=True)
    rows = [row for case in cases for row in measure(*case, layers, rounds)]
    calls = prefill_report.calls(rows)
    ratios = {n: [prefill_report.ratio(call, "wall", n) for call in calls] for n in layers}
    means = {n: round(statistics.geometric_mean(r), 3) for n, r in ratios.items() if n != "ours"}
    print("geometric mean of the speed-up over", means)
    found = {
        "provenance": {**provenance(sglang, release), "rounds": rounds},
        "errors": errors, "rows": rows, "geometric_mean_speedup": means,
        "copy_bytes_per_s": round(timing.copy_bandwidth()),
    }  # fmt: skip
    output.write(out, found)
    if set(prefill_report.PEERS) <= set(layers):
        prefill_report.plot(found, out.with_suffix(".png"))
    stock = {keys: e.get("sglang") for keys, e in errors.items()}
    return int(
        any(s and errors[k]["ours"][i] > ALLOWED * s[i] for k, s in stock.items() for i in (0, 1))
    )


def peers(sglang: str | None, with_flashinfer: bool) -> dict[str, Layer]:
    """What ours is held against; ``sglang`` is a folder that holds the package."""
    found: dict[str, Layer] = {}
    if sglang:
        sys.path.insert(0, sglang)
        found["sglang"] = sglang_triton
    if with_flashinfer:
        found["flashinfer"] = flashinfer
    return found


def accuracy(keys: str, layers: dict[str, Layer]) -> dict[str, list[float]]:
    """Relative Frobenius error of (output, final state) of each layer."""
    x = build(JUDGED, 2, 4, keys)
    truth = naive_gated_delta_rule(
        x.q, x.k, x.v, x.g, x.beta, cu_seqlens=x.cu_seqlens, use_qk_l2norm=True
    )
    return {name: [*_errors(x, layer, truth).values()] for name, layer in layers.items()}


def measure(
    lengths: tuple[int, ...], hk: int, hv: int, goal: int | None, layers: dict[str, Layer],
    rounds: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each layer: correctness first, then memory and time."""
    x = build(lengths, hk, hv)
    # Chunk by chunk in float64: token by token it takes seconds for long sequences.
    q, k = l2norm(x.q.double()), l2norm(x.k.double())
    truth = naive_chunk_forward(q, k, x.v, x.g.double(), x.beta, cu_seqlens=x.cu_seqlens)
    errors = {n: _errors(x, layer, truth) for n, layer in layers.items()}
    del q, k, truth
    peak = {n: timing.peak_bytes(partial(layer, x)) for n, layer in layers.items()}
    times = timing.measure({n: partial(fresh, layer, x) for n, layer in layers.items()}, rounds)
    rows = [
        {
            "op": OP, "lengths": list(lengths), "hk": hk, "hv": hv, "dtype": "bfloat16", "impl": n,
            **times[n]["device"], "wall": times[n]["wall"], "rel_err": max(errors[n].values()),
            "rel_errs": errors[n], "peak_bytes": peak[n],
            "least_bytes": 4 * sum(lengths) * (hk + hv) * D, "at_most_us": goal,
        }
        for n in layers
    ]  # fmt: skip
    shown = {r["impl"]: (r["median_us"], r["wall"]["median_us"], r["rel_err"]) for r in rows}
    print(
        f"{prefill_report.title(rows[0]):16} {hk}/{hv} (device us, wall us, error): {shown}, "
        f"goal {goal}",
        flush=True,
    )
    return rows


def _errors(x: Call, layer: Layer, truth: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Relative Frobenius errors of the output and the final states, from states of zeros."""
    x.pool.zero_()
    got = layer(x), x.pool
    return {n: output.rel_err(a, b) for n, a, b in zip(("o", "state"), got, truth, strict=True)}


def fresh(layer: Layer, x: Call) -> Callable[[], torch.Tensor]:
    """The call with metadata that no cache has seen, and a state that does not grow."""
    x.pool.zero_()
    return partial(layer, Call(**{**vars(x), "cu_seqlens": x.cu_seqlens.clone()}))
