"""Which GDN prefill SGLang would choose by itself, and why.

The rules of ``flashinfer_gdn_prefill_default`` in SGLang's ``linear/gdn_backend.py`` and of its
predecessor in 0.5.16, for a Qwen GDN model (head dims 128) and SGLang's default flags. Pure: what
the server really chose is in ``sglang-trinv status``.
"""

from __future__ import annotations

from dataclasses import dataclass

from packaging.version import Version

FIRST_ON_SM100 = Version("0.5.16")
FIRST_ON_SM90 = Version("0.5.19")
MAX_CHUNK = {9: 32768, 10: 8192}
# Default chunked_prefill_size by GPU memory in GB (sglang/srt/arg_groups/memory_hook.py)
DEFAULT_CHUNKS = ((20, 2048), (60, 4096), (160, 8192))
LARGEST_DEFAULT_CHUNK = 16384


@dataclass(frozen=True)
class Machine:
    """What the choice depends on."""

    release: str
    capability: tuple[int, int] | None
    memory_gb: float = 80.0
    cuda: tuple[int, int] | None = None
    flashinfer: bool = True
    state_dtype: str = "float32"  # mamba_ssm_dtype of the Qwen configs
    hip: bool = False


def default_chunk(memory_gb: float) -> int:
    """SGLang's default ``--chunked-prefill-size``."""
    return next(
        (chunk for limit, chunk in DEFAULT_CHUNKS if memory_gb < limit), LARGEST_DEFAULT_CHUNK
    )


def predict(machine: Machine) -> tuple[str, str]:
    """Return ("triton" | "flashinfer", reason)."""
    release = Version(Version(machine.release).public)
    if machine.capability is None:
        return "triton", "no GPU: the CPU platform runs the Triton kernels in the interpreter"
    major = machine.capability[0]
    sm = f"sm{major}{machine.capability[1]}"
    if machine.hip:
        return "triton", "ROCm"
    if major not in MAX_CHUNK:
        return "triton", f"{sm}: SGLang chooses FlashInfer only on sm90 and sm100"
    first = FIRST_ON_SM90 if major == 9 else FIRST_ON_SM100
    if release < first:
        return "triton", f"{sm}: before SGLang {first} FlashInfer is never the default"
    if not machine.flashinfer:
        return "triton", "FlashInfer is not installed"
    want = "float32" if major == 9 else "bfloat16"
    if machine.state_dtype != want:
        return "triton", f"{sm} needs a {want} state, the default is {machine.state_dtype}"
    if major == 10 and (machine.cuda is None or machine.cuda < (13, 0)):
        return "triton", f"{sm} needs CUDA 13"
    chunk = default_chunk(machine.memory_gb)
    if chunk > MAX_CHUNK[major]:
        return (
            "triton",
            f"{sm} needs a prefill chunk up to {MAX_CHUNK[major]}, the default is {chunk}",
        )
    return "flashinfer", f"{sm}, {want} state, prefill chunk {chunk}: all conditions hold"
