"""SGLang's own chunk_gated_delta_rule with its kernels and with ours, on CPU tensors.

    python -m sglang_trinv.compat.chain SOURCES RELEASE ROW [FAULT]

SOURCES holds the folder ``sglang`` of the release, which is not installed: only its kernel modules
are imported. ROW is a release of the table whose row is to be tried. Triton runs in its
interpreter, on the driver of the distribution sglang-trinv-cpu-platform. Prints one JSON object;
the exit code is 1 if ours is further from float64 than SGLang's kernels allow.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch

SLACK = 1.2  # times the larger of stock's own error and the rounding of the truth
LENGTHS = (70, 1, 64)
HEADS = (1, 2, 64, 32)  # Hg, H, K, V: different K and V tell a transposed state apart


def main() -> int:
    """Run the chain twice and compare; return the exit code."""
    sources, release, row, *fault = sys.argv[1:]
    os.environ["TRITON_INTERPRET"] = "1"
    from sglang_trinv_cpu_platform import interpreter

    interpreter.install()
    import_sglang_from(Path(sources), release)
    from sglang_trinv import hooks, status, targets
    from sglang_trinv.config import Config

    target = targets.find(row)
    stock_function, modules = targets.resolve(target)
    chunk = importlib.import_module(f"{target.fla}.chunk")
    call = inputs()
    stock = run(chunk.chunk_gated_delta_rule, call)
    config = Config(strict=True, fault=fault[0] if fault else "")
    patch = hooks.Patch(target, modules, stock_function)
    patch.apply(hooks.ADAPTERS[target.adapter](stock_function, config))
    ours = run(chunk.chunk_gated_delta_rule, call)
    result = {
        "release": release,
        "calls": dict(status.current().calls[target.adapter]),
        **compare(truth(call), stock, ours),
    }
    print(json.dumps(result))
    fine = [result["calls"].get("triton-interpreter", 0) == 1]
    fine += [result[name]["ours"] <= result[name]["allowed"] for name in ("o", "state")]
    return 0 if all(fine) else 1


def import_sglang_from(folder: Path, release: str) -> types.ModuleType:
    """Put unpacked sources under the name ``sglang``.

    ``sglang/__init__.py`` itself is not run (it imports the whole server), and the few things that
    the kernels import from SGLang's utilities are set here.
    """
    package = types.ModuleType("sglang")
    package.__path__ = [str(folder / "sglang")]
    package.__version__ = release
    common = types.ModuleType("sglang.srt.utils.common")
    common.torch_release = tuple(int(x) for x in torch.__version__.split("+")[0].split("."))
    common.rank0_log = lambda message: None
    utils = types.ModuleType("sglang.srt.utils")
    utils.__path__ = []
    utils.common = common
    sys.modules |= {"sglang": package, utils.__name__: utils, common.__name__: common}
    importlib.invalidate_caches()
    return package


def inputs() -> dict[str, Any]:
    """Near-equal keys, beta near one and little decay: an inverse that matters."""
    Hg, H, K, V = HEADS
    T, gen = sum(LENGTHS), torch.Generator().manual_seed(0)
    mean = torch.randn(1, 1, Hg, K, generator=gen)
    k = mean + 0.3 * torch.randn(1, T, Hg, K, generator=gen)
    q = torch.randn(1, T, Hg, K, generator=gen)
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1)]
    return {
        "q": torch.nn.functional.normalize(q, dim=-1).bfloat16(),
        "k": torch.nn.functional.normalize(k, dim=-1).bfloat16(),
        "v": torch.randn(1, T, H, V, generator=gen).bfloat16(),
        "g": -0.01 * torch.rand(1, T, H, generator=gen),
        "beta": 1 - 0.1 * torch.rand(1, T, H, generator=gen),
        "cu_seqlens": torch.tensor(starts, dtype=torch.int32),
    }


def run(function: Any, call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """o [1, T, H, V] and the states [N, H, V, K] after each sequence."""
    _, H, K, V = HEADS
    N = len(LENGTHS)
    documented = "[N, H, V, K]" in (function.__doc__ or "")  # the layout changed in 0.5.10
    state = torch.zeros(N, H, V, K) if documented else torch.zeros(N, H, K, V)
    indices = torch.arange(N, dtype=torch.int32)
    o, *_ = function(**call, initial_state=state, initial_state_indices=indices)
    return o, state if documented else state.mT


def truth(call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same token by token in float64."""
    from sglang_trinv.reference.recurrence import naive_gated_delta_rule

    return naive_gated_delta_rule(**call)


def compare(true: Any, stock: Any, ours: Any) -> dict[str, dict[str, float]]:
    """Relative Frobenius errors of o and the states, and what is allowed for ours."""
    found = {}
    for name, t, s, x in zip(("o", "state"), true, stock, ours, strict=True):
        rounding = error(t.to(x.dtype), t)
        of_stock = error(s, t)
        allowed = SLACK * max(of_stock, rounding)
        found[name] = {"ours": error(x, t), "stock": of_stock, "allowed": allowed}
    return found


def error(x: torch.Tensor, true: torch.Tensor) -> float:
    """Relative Frobenius distance; NaN, which is below nothing, if x has one."""
    return float(torch.linalg.vector_norm(x.double() - true) / torch.linalg.vector_norm(true))


if __name__ == "__main__":
    sys.exit(main())
