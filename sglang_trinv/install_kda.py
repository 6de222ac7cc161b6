"""Put KDA's adapter into SGLang: as ``install``, but after SGLang has built its backend.

Which models have KDA layers, each release's config says in its own way; the backend that SGLang
builds for them says it in one.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from sglang_trinv import status, targets, targets_kda
from sglang_trinv.config import Config
from sglang_trinv.errors import TrinvError
from sglang_trinv.install import Installer, Refused, describe_device, platform_refusal


class KdaInstaller(Installer):
    """What was done for KDA in this process."""

    def install_for(self, runner: Any, backend: Any, config: Config) -> str:
        """Install if ``backend`` runs KDA; return the state. Errors as ``install_once``."""
        self.backend = backend
        return self.install_once(runner, config)

    def _install(self, runner: Any, config: Config) -> None:
        prefill = targets_kda.prefill_backend_of(self.backend)
        if config.kda == "off" or prefill is None:
            return
        if config.kda == "auto" and not faster_here(runner, config.method):
            return
        import sglang

        target = targets_kda.find(sglang.__version__)
        refusal = platform_refusal(str(runner.device))
        if refusal:
            raise Refused(refusal)
        from sglang_trinv import cache, hooks, inject, selfcheck, warmup

        patched = self.patch
        stock, modules = (patched.stock, patched.modules) if patched else targets.resolve(target)
        shape, layers = warmup.shape_of(runner, None)
        if shape not in self.warm:
            start = time.perf_counter()
            cache.ensure_writable()
            inject.at_compile(config.fault)
            warm_up(shape, config.method)
            checked = selfcheck.run(target.adapter, shape, config.method, stock, config.fault)
            status.current().update(self_check=checked)
            self.warm.add(shape)
            self.warmup_s += time.perf_counter() - start
        if self.patch is None:
            patch = hooks.Patch(target, modules, stock)
            patch.apply(hooks.ADAPTERS[target.adapter](stock, config), config.fault)
            self.patch, status.current().hooks = patch, patch.describe
        self.state = "installed"
        on_hot_path = prefill == "triton" and self.patch.live()
        status.current().update(
            state="installed",
            reason="",
            layers={"gdn": None, "kda": layers},
            warmup_s=round(self.warmup_s, 3),
            prefill_backend=prefill,
            on_hot_path=on_hot_path,
            **describe_device(shape.device),
        )
        if on_hot_path:
            text = f"KDA intra-chunk step replaced (method {config.method}, {shape})"
            self.say(logging.INFO, f"{text}; prefill backend {prefill}")
        else:
            self.say(
                logging.WARNING,
                f"installed but not on the hot path: SGLang's KDA prefill backend is {prefill}; "
                "use --linear-attn-prefill-backend triton",
            )


def faster_here(runner: Any, method: str) -> bool:
    """Whether the step is ahead of SGLang's for these layers: those of the kernel for Hopper.

    The measurements are in benchmarks/results/intra-h200.json.
    """
    from sglang_trinv import warmup
    from sglang_trinv.ops.launch import capability
    from sglang_trinv.ops.methods import dot_precision

    shape, _ = warmup.shape_of(runner, None)
    device = torch.device(shape.device)
    return (
        device.type == "cuda"
        and capability(torch.cuda.current_device()) == (9, 0)
        and shape.K == shape.V == 128
        and dot_precision(method, device, shape.dtype) == "fp16"
    )


def warm_up(shape: Any, method: str) -> None:
    """Run the op as SGLang will call it, for few chunks and for many; results must be finite.

    Raises:
        TrinvError: a result is not finite. Whatever the op raises is passed on.
    """
    from sglang_trinv import ops, warmup

    k, v, g, beta, cu_seqlens, _, chunk_indices = warmup.inputs(shape, 1)
    k = k.repeat_interleave(shape.H // k.shape[2], 2).contiguous()
    gk = g[..., None].expand_as(k).contiguous()
    for fuse in (True, False):
        results = ops.chunk_kda_fwd_intra(
            k, k, v, gk, beta, None, cu_seqlens, 64, chunk_indices,
            fuse_recompute=fuse, fuse_diagonal=fuse, method=method, return_A=False,
        )  # fmt: skip
        if not all(torch.isfinite(results[i]).all() for i in (0, 1, 3)):
            raise TrinvError(f"warm-up of KDA with {shape} gave a non-finite result")


_installer = KdaInstaller()


def install_once(runner: Any, backend: Any, config: Config) -> str:
    """``KdaInstaller.install_for`` of this process."""
    return _installer.install_for(runner, backend, config)
