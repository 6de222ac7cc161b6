"""Registers, spills, shared memory and compile time: portable kernels everywhere, Hopper's there.

No GPU is needed: Triton compiles ahead of time. Registers and spills come from NVIDIA's own
``cuobjdump``, which Triton's package carries.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

from sglang_trinv.kernels import (
    fwd_intra,
    fwd_intra_sm90,
    inverse_sm90,
    kda_intra,
    kda_intra_sm90,
    prefill_prepare,
    prefill_segments,
    prefill_state,
    solve_tril,
    solve_tril_sm90,
)
from sglang_trinv.kernels.configs import PrefillConfig, fwd_intra_config, kda_intra_config
from sglang_trinv.ops.tiles_sm90 import KDA_REGS, TILE, TRIL_REGS, WARP_REGS

ARCHITECTURES: tuple[int | str, ...] = (80, 89, 90, 100, 120, "gfx942")
HALF = (
    "q", "k", "v", "v_rows", "w", "u", "kg", "Ai", "Aqk", "Akk", "inverses", "out", "scores", "o",
    "h",
)  # fmt: skip
FLOAT = ("A", "g", "gk", "beta", "factors", "state", "starts", "ends", "track")
SCALAR = ("scale", "unit")
TILES = f"tensordesc<bf16[64, 64],{TILE!r}>"
STRIDE = ("s_q", "s_k", "s_v", "s_state")
INDEX = ("marks", "cu_seqlens", "chunk_indices", "state_indices", "track_chunks")
SHAPE = {"H": 32, "Hg": 16, "K": 128, "V": 128, "BK": 128, "BDK": 64, "BDV": 64}
FLAGS = {"HAS_G": True, "VARLEN": True, "IO": tl.bfloat16}


def _step(stores: str, method: str, group: int) -> tuple[str, str, dict, dict]:
    constants = {
        **SHAPE, **FLAGS, "GROUP": group, "DOT": method, "STAGES": fwd_intra_config(method).stages,
        "STORE_A": stores == "A", "STORE_WU": stores == "wu",
    }  # fmt: skip
    return "fwd_intra", "fwd_intra_kernel", constants, {}


def _kda(fuse: bool, method: str) -> tuple[str, str, dict, dict]:
    config = kda_intra_config(method)
    constants = {
        "H": 32, "K": 128, "V": 128, "BK": config.block_k, "BDK": config.block_d,
        "BDV": config.block_d, "DOT": method, "IO": tl.bfloat16, "STAGES": config.stages,
        "VARLEN": True, "STORE_A": not fuse, "ZERO_UPPER": fuse,
    }  # fmt: skip
    return "kda_intra", "kda_intra_kernel", constants, {}


def _tril(n: int, method: str) -> tuple[str, str, dict, dict]:
    constants = {"H": 32, "BT": n, "DOT": method, "VARLEN": True}
    return "solve_tril", "solve_tril_kernel", constants, {}


HEADS = {"H": 32, "Hg": 16, "K": 128, "V": 128}
PREFILL = {"IO": tl.bfloat16, "VARLEN": True}


def _prepare(function: str, **more: Any) -> tuple[str, str, dict, dict]:
    shape = {"H": 32, "Hg": 16, "K": 128, "GROUP": 2, "BN": 64, "NORM": True}
    warps = 1 if function == "inverse_kernel" else 8 if more.get("BESIDE") else 4
    return "prefill_prepare", function, {**shape, **PREFILL, **more}, {"num_warps": warps}


def _state() -> tuple[str, str, dict, dict]:
    flags = ("HAS_STATE", "HAS_INDICES", "HAS_STARTS", "WRITE_STATE", "STORE_H", "TRACK")
    cut = PrefillConfig()
    constants = {
        **HEADS, **PREFILL, "BV": cut.block_v, "BN": 64, "STAGES": cut.stages,
        **{n: n != "HAS_STARTS" for n in flags},
    }  # fmt: skip
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    return "prefill_state", "state_kernel", constants, options


def _segments(function: str, warps: int, **constants: Any) -> tuple[str, str, dict, dict]:
    return "prefill_segments", function, constants, {"num_warps": warps, "num_stages": 2}


def _hopper(module: str, absent: str, maxnreg: int, **more: Any) -> tuple[str, str, dict, dict]:
    function = f"{module.removesuffix('_sm90')}_kernel_sm90"
    constants = {"H": 32, "VARLEN": True, **dict.fromkeys(absent.split()), **more}
    tiles = ("k", "v", *(f"{n}_desc" for n in ("w", "u", "A", "Ai", "out")))
    return module, function, constants, {"num_warps": 1, "maxnreg": maxnreg, "tiles": tiles}


def _hopper_kda(fuse: bool) -> tuple[str, str, dict, dict]:
    constants = {"H": 32, "VARLEN": True, "ZERO_UPPER": fuse, **({"Akk": None} if fuse else {})}
    options = {"num_warps": 4, "maxnreg": KDA_REGS}
    return "kda_intra_sm90", "kda_intra_kernel_sm90", constants, options


KERNELS = {
    "kkt_solve fp16": _step("A", "fp16", 2),
    "kkt_solve bf16x3": _step("A", "bf16x3", 2),
    "fwd_intra fp16": _step("wu", "fp16", 1),
    "fwd_intra bf16x3": _step("wu", "bf16x3", 1),
    "kda_intra fused fp16": _kda(True, "fp16"),
    "kda_intra unfused fp16": _kda(False, "fp16"),
    "kda_intra fused bf16x3": _kda(True, "bf16x3"),
    "solve_tril 64 fp16": _tril(64, "fp16"),
    "solve_tril 64 bf16x3": _tril(64, "bf16x3"),
    "solve_tril 64 tf32x3": _tril(64, "tf32x3"),
    "solve_tril 32 fp16": _tril(32, "fp16"),
    "solve_tril 16 fp16": _tril(16, "fp16"),
    "prefill inverse fp16": _prepare("inverse_kernel", BK=128, DOT="fp16"),
    "prefill scores": _prepare("scores_kernel", marks=None, BESIDE=False),
    "prefill state": _state(),
    "prefill transfer": _segments("transfer_kernel", 4, **HEADS, **PREFILL, BV=64, STAGES=2),
    "prefill combine": _segments(
        "combine_kernel", 8, H=32, K=128, V=128, BV=16, DOT="tf32x3", VARLEN=True, HAS_STATE=True,
        HAS_INDICES=True, EARLY=False,
    ),
}  # fmt: skip
HOPPER = {
    "kkt_solve fp16, Hopper": _hopper(
        "inverse_sm90", "factors marks", WARP_REGS, Hg=16, NORM=False, BESIDE=False
    ),
    "fwd_intra fp16, Hopper": _hopper("fwd_intra_sm90", "A_desc Ai", WARP_REGS, Hg=16, FEW=True),
    "fwd_intra fp16 and Ai, Hopper": _hopper("fwd_intra_sm90", "", WARP_REGS, Hg=16, FEW=False),
    "kda_intra fused fp16, Hopper": _hopper_kda(True),
    "kda_intra unfused fp16, Hopper": _hopper_kda(False),
    "solve_tril 64 fp16, Hopper": _hopper("solve_tril_sm90", "", TRIL_REGS, DOT="fp16"),
    "solve_tril 64 fp16x2, Hopper": _hopper("solve_tril_sm90", "", TRIL_REGS, DOT="fp16x2"),
    "prefill inverse fp16, Hopper": _hopper(
        "inverse_sm90", "out", WARP_REGS, Hg=16, NORM=True, BESIDE=True
    ),
    "prefill scores, Hopper": _prepare("scores_kernel", BESIDE=True),
}
MODULES = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        fwd_intra, fwd_intra_sm90, inverse_sm90, kda_intra, kda_intra_sm90, prefill_prepare,
        prefill_segments, prefill_state, solve_tril, solve_tril_sm90,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What the compiler made of one kernel."""

    kernel: str
    arch: str
    registers: int | None
    stack_bytes: int | None
    shared_bytes: int
    binary_bytes: int
    compile_s: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def names(arch: int | str) -> tuple[str, ...]:
    """What there is for an sm number or a gfx name."""
    return (*KERNELS, *(HOPPER if arch == 90 else ()))


def compile_kernel(name: str, arch: int | str, **changed: Any) -> Resources:
    """Compile the kernel called ``name``, one of ``names(arch)``, with constants ``changed``."""
    module, function, constants, options = (KERNELS | HOPPER)[name]
    constants = {**constants, **changed}
    options = {"num_warps": 1, "num_stages": 1, **(options if isinstance(arch, int) else {})}
    tiles = options.pop("tiles", ())
    kernel = getattr(MODULES[module], function)
    source = _compilable(kernel)
    cuda = isinstance(arch, int)
    if not cuda and constants.get("DOT") == "tf32x3":  # as the op: AMD's compiler does not know it
        constants = {**constants, "DOT": "ieee"}
    target = GPUTarget("cuda", arch, 32) if cuda else GPUTarget("hip", arch, 64)
    signature = {n: TILES if n in tiles else _type(n, constants) for n in source.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    language = GluonASTSource if module.endswith("_sm90") else ASTSource
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(source.arg_names)
        if signature[n].startswith("*") or n in STRIDE
    }
    places = {(source.arg_names.index(n),): value for n, value in constants.items()}
    start = time.perf_counter()
    made = triton.compile(
        language(fn=source, signature=signature, constexprs=places, attrs=aligned),
        target=target,
        options=options,
    )
    seconds = time.perf_counter() - start
    binary = made.asm["cubin" if cuda else "hsaco"]
    registers, stack = _usage(binary) if cuda else (None, None)
    return Resources(
        name, f"sm_{arch}" if cuda else str(arch), registers, stack, made.metadata.shared,
        len(binary), round(seconds, 1),
    )  # fmt: skip


def _compilable(kernel: Any) -> JITFunction:
    if isinstance(kernel, JITFunction):
        return kernel
    raise RuntimeError("kernels were imported under TRITON_INTERPRET=1 and cannot be compiled")


def _type(name: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in INDEX:
        return "*i32"
    if name in SCALAR:
        return "fp32"
    return "*bf16" if name in HALF else "*fp32" if name in FLOAT else "i32"


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, stack bytes a thread): stack is where spilled registers go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run(
            [os.fspath(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump: no register line in {shown.stdout[-200:]!r}")
    return int(found[1]), int(found[2])
