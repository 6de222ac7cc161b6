"""Layers of fla-core on CPU tensors, with fla's kernels and with ours: one JSON on stdout.

A program of its own, because Triton's interpreter has to be prepared before fla is imported:

    python -m tests.cpu.fla_layers
"""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sglang_trinv_cpu_platform import interpreter

T, H, K, V = 70, 2, 64, 32
COUNTED = ("solve_tril", "fwd_intra", "kda_intra", "dplr_inverse")


class LoopIndex(int):
    """What ``range`` gives inside a kernel: the interpreter hands out a plain int instead."""

    def to(self, dtype: object) -> LoopIndex:
        return self


def prepare() -> None:
    """Import fla so that its kernels run in the interpreter."""
    interpreter.install()
    import fla.utils

    fla.utils.IS_GATHER_SUPPORTED = False  # tl.gather under another name is not bound at a launch
    import fla.ops.delta_rule
    import fla.ops.gated_delta_rule
    import fla.ops.kda
    import fla.ops.rwkv7  # noqa: F401

    for name, module in list(sys.modules.items()):
        if name.startswith("fla."):
            vars(module).setdefault("range", lambda *a: map(LoopIndex, builtins.range(*a)))


def draw() -> dict[str, Tensor]:
    """Near-equal keys, beta near one, little decay: an inverse that matters."""
    gen = torch.Generator().manual_seed(0)
    mean = torch.randn(1, 1, H, K, generator=gen)
    k = normalize(mean + 0.3 * torch.randn(1, T, H, K, generator=gen), dim=-1)
    beta = 1 - 0.1 * torch.rand(1, T, H, generator=gen)
    return {
        "q": normalize(torch.randn(1, T, H, K, generator=gen), dim=-1).bfloat16(),
        "k": k.bfloat16(),
        "v": torch.randn(1, T, H, V, generator=gen).bfloat16(),
        "g": -0.01 * torch.rand(1, T, H, generator=gen),
        "gk": -0.01 * torch.rand(1, T, H, K, generator=gen),
        "beta": beta,
        "b": (k * beta[..., None]).bfloat16(),
        "do": torch.randn(1, T, H, V, generator=gen).bfloat16(),
    }


def layers() -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
    """What is run, by name."""
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.kda import chunk_kda
    from fla.ops.rwkv7 import chunk_rwkv7

    def gdn(chunk_size: int) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda x: chunk_gated_delta_rule(
            x["q"], x["k"], x["v"], x["g"], x["beta"], chunk_size=chunk_size
        )[0]

    def rwkv7(**options: Any) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda x: chunk_rwkv7(
            x["q"], x["gk"], x["k"], x["v"], -x["k"], x["b"], scale=K**-0.5, **options
        )[0]

    return {
        "gdn 64": gdn(64),
        "gdn 32": gdn(32),
        "gdn 16": gdn(16),
        "deltanet": lambda x: chunk_delta_rule(x["q"], x["k"], x["v"], x["beta"])[0],
        "kda": lambda x: chunk_kda(x["q"], x["k"], x["v"], x["gk"], x["beta"])[0],
        "rwkv7 16": rwkv7(chunk_size=16),
        "rwkv7 64": rwkv7(chunk_size=64),
        "rwkv7 64 safe gate": rwkv7(chunk_size=64, safe_gate=True, lower_bound=-1.0),
    }


def truth(name: str, x: dict[str, Tensor]) -> Tensor:
    """The recurrence in float64, plain enough for autograd: [1, T, H, V]."""
    q, k, v, beta = (x[n][0].double() for n in ("q", "k", "v", "beta"))
    decay = torch.ones(T, H, K, dtype=torch.float64)
    if name.startswith("gdn"):
        decay = x["g"][0].double().exp()[..., None].expand(T, H, K)
    elif not name.startswith("deltanet"):
        decay = x["gk"][0].double().exp()
    # RWKV-7 is given b, which was rounded once more, and reads the state before its decay.
    rwkv7 = name.startswith("rwkv7")
    write = x["b"][0].double() if rwkv7 else beta[..., None] * k
    state, rows = torch.zeros(H, K, V, dtype=torch.float64), []
    for t in builtins.range(T):
        before, state = state, decay[t][..., None] * state
        seen = torch.einsum("hk,hkv->hv", k[t], before if rwkv7 else state)
        gain = k[t][..., None] * v[t][:, None] if rwkv7 else write[t][..., None] * v[t][:, None]
        state = state - write[t][..., None] * seen[:, None] + gain
        rows.append(torch.einsum("hk,hkv->hv", q[t] * K**-0.5, state))
    return torch.stack(rows)[None]


def run(layer: Callable[[dict[str, Tensor]], Tensor], x: dict[str, Tensor]) -> dict[str, Tensor]:
    """o, and the gradient of k where the layer is differentiated."""
    leaf = {**x, "k": x["k"].clone().requires_grad_()}
    o = layer(leaf)
    o.backward(x["do"].to(o.dtype))
    return {"o": o.detach(), "dk": leaf["k"].grad}


def error(x: Tensor, true: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.double() - true) / torch.linalg.vector_norm(true))


def main() -> None:
    prepare()
    import sglang_trinv

    x, found = draw(), {}
    for name, layer in layers().items():
        with_gradient = not name.startswith("rwkv7")
        once = (lambda l: run(l, x)) if with_gradient else (lambda l: {"o": l(x).detach()})
        true = run(lambda leaf, name=name: truth(name, leaf), x)
        stock = once(layer)
        with sglang_trinv.patched(strict=True) as calls:
            before = {op: sum(calls[op].values()) for op in COUNTED if op in calls}
            ours = once(layer)
            done = {op: sum(calls[op].values()) - before.get(op, 0) for op in calls}
        found[name] = {
            "calls": {op: n for op, n in done.items() if n},
            "errors": {
                part: {
                    "ours": error(ours[part], true[part]),
                    "stock": error(stock[part], true[part]),
                    "rounding": error(true[part].to(ours[part].dtype), true[part]),
                }
                for part in ours
            },
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
