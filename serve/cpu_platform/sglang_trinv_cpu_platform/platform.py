"""The platform that SGLANG_PLATFORM=trinv_cpu selects.

On an out-of-tree platform SGLang's fused ops take ``forward_native`` (plain torch), while the Gated
DeltaNet layers keep calling their Triton kernels. SGLANG_USE_CPU_ENGINE must stay unset: with it
SGLang wants a CPU build of its own kernel library instead.
"""

from __future__ import annotations

import os

import psutil
import torch
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

NAME = "trinv_cpu"


def activate() -> str | None:
    """Entry point: prepare Triton and name the platform class, or None unless selected."""
    if os.environ.get("SGLANG_PLATFORM") != NAME:
        return None
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") != "0":
        raise RuntimeError("SGLANG_USE_CPU_ENGINE: want it unset with SGLANG_PLATFORM=trinv_cpu")
    from sglang_trinv_cpu_platform import interpreter

    interpreter.install()
    return f"{__name__}:CpuPlatform"


class CpuPlatform(SRTPlatform):
    """One CPU "device" that owns the machine's memory."""

    _enum = PlatformEnum.OOT  # not CPU: is_cpu() would ask for SGLang's CPU kernel library
    device_name = "cpu"
    device_type = "cpu"

    def init_backend(self) -> None:
        """Runs in the worker, before the model is built."""
        from sglang.kernels.ops.attention.fla import layernorm_gated

        layernorm_gated._get_sm_count = lambda device: 1  # asks torch.cuda; only a tiling hint

    def get_device(self, device_id: int = 0) -> str:
        """The torch device string."""
        return "cpu"

    def set_device(self, device: torch.device) -> None:
        """There is only one."""

    def get_device_name(self, device_id: int = 0) -> str:
        """Shown in logs."""
        return NAME

    def get_device_uuid(self, device_id: int = 0) -> str:
        """Names files of the weight cache."""
        return f"{NAME}-0"

    def get_device_total_memory(self, device_id: int = 0) -> int:
        """Bytes of memory of the machine."""
        return psutil.virtual_memory().total

    def get_current_memory_usage(self, device: torch.device | None = None) -> float:
        """Bytes in use, by anybody: SGLang subtracts it from the total."""
        memory = psutil.virtual_memory()
        return float(memory.total - memory.available)

    def get_available_memory(self, device_id: int = 0) -> tuple[int, int]:
        """Free and total bytes."""
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def get_default_attention_backend(self) -> str:
        """Full attention in plain torch."""
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        """SGLang's own pool is plain torch."""
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        """SGLang's own allocator for pages of one token."""
        return _token_allocator()

    def get_torch_profiler_activity_str(self) -> str:
        """What /start_profile records."""
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        """What /start_profile records."""
        return torch.profiler.ProfilerActivity.CPU


def _token_allocator() -> type:
    """SGLang's token allocator, with the ``page_size`` that an out-of-tree platform is handed."""
    from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator

    class TokenAllocator(TokenToKVPoolAllocator):
        def __init__(self, size: int, page_size: int, **kwargs: object) -> None:
            if page_size != 1:
                raise ValueError(f"--page-size: want 1 on {NAME}, got {page_size}")
            super().__init__(size, **kwargs)

    return TokenAllocator
