"""Put the whole GDN prefill into SGLang, after SGLang has built its attention backend."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from sglang_trinv import dispatch, prefill, selfcheck, status, targets, targets_full, warmup
from sglang_trinv.config import Config
from sglang_trinv.errors import TrinvError
from sglang_trinv.install import Installer, Refused, platform_refusal


class FullInstaller(Installer):
    """What was done for the whole prefill in this process; the intra-chunk step stays as it is."""

    displaced = ""  # what SGLang would have chosen itself

    def displace(self, runner: Any, config: Config) -> str:
        """Before SGLang builds its backend: choose Triton's, whose place ours takes, where SGLang
        would choose FlashInfer and ours is faster in calls of every length. A flag of the user is
        left alone. Result and errors as ``install_once``."""
        return self.attempt(self._displace, runner, config)

    def _displace(self, runner: Any, config: Config) -> None:
        target, shape = _wanted(runner, config)
        if shape is None or not _measured_faster("flashinfer", shape, tokens=1):
            return
        if targets.defaults_to_flashinfer(target, runner):
            self._prepare(runner, shape, config)
            targets.force_triton_prefill(target, runner)
            self.displaced = "flashinfer"

    def install_for(self, runner: Any, backend: Any, config: Config) -> str:
        """Take over ``backend``'s prefill where that is wanted; return the state. Errors as
        ``install_once``."""
        self.backend = backend
        return self.install_once(runner, config)

    def _install(self, runner: Any, config: Config) -> None:
        target, shape = _wanted(runner, config)
        if shape is None:
            return
        stocks = self.displaced or targets.prefill_backend_of(target, self.backend)
        if config.gdn == "auto" and not _measured_faster(stocks, shape):
            return
        refusal = self._refusal(runner, stocks)
        if refusal:
            raise Refused(f"whole prefill: {refusal}")
        linear = self.backend.linear_attn_backend
        dispatcher = linear.kernel_dispatcher
        made = prefill.kernel_class(targets_full.triton_gdn_kernel())(
            linear, config, stocks, targets_full.deterministic(target, runner)
        )
        self._prepare(runner, shape, config)
        dispatcher.extend_kernel = made
        self.state = "installed"
        self._tell(dispatcher, made, stocks, shape)

    def _prepare(self, runner: Any, shape: warmup.Shape, config: Config) -> None:
        """Compile and check the kernels, once a shape."""
        if shape in self.warm:
            return
        start = time.perf_counter()
        warm_up(shape, runner.req_to_token_pool.mamba_pool.mamba_cache.temporal, config.method)
        with dispatch.only_stock():  # the chain's intra-chunk step is already ours
            self.checked = selfcheck.run(
                prefill.OP, shape, config.method, targets_full.stocks_chain(), config.fault
            )
        self.warm.add(shape)
        self.warmup_s += time.perf_counter() - start

    def _refusal(self, runner: Any, stocks: str) -> str:
        refusal = platform_refusal(str(runner.device))
        if refusal or stocks == "triton" or stocks == self.displaced:
            return refusal
        return (
            f"SGLang's GDN prefill backend is {stocks}, which is displaced only where it is "
            "SGLang's own choice and ours was measured to be faster; use "
            "--linear-attn-prefill-backend triton"
            + (" or SGLANG_TRINV_FORCE=1" if stocks == "flashinfer" else "")
        )

    def _tell(self, dispatcher: Any, made: Any, stocks: str, shape: warmup.Shape) -> None:
        process = status.current()
        others = process.hooks

        def hooks() -> list[dict[str, Any]]:
            live = dispatcher.extend_kernel is made
            name = "GDNKernelDispatcher.extend_kernel"
            return [*others(), {"target": name, "importers": [], "live": live}]

        if not getattr(dispatcher, "_sglang_trinv", False):
            process.hooks, dispatcher._sglang_trinv = hooks, True
        seconds = process.fields["warmup_s"] + self.warmup_s
        process.update(
            state="installed", reason="", on_hot_path=True, warmup_s=round(seconds, 3),
            self_check_full=self.checked,
        )  # fmt: skip
        self.say(
            logging.INFO, f"whole GDN prefill replaced ({shape}); in place of SGLang's {stocks}"
        )

    def _give_up(self, state: str, reason: str, config: Config) -> None:
        """As the base class, but the intra-chunk step stays and so does the process's state."""
        self.state = state
        status.current().count_fallback(f"not installed: {reason}")
        if config.strict:
            raise SystemExit(
                f"sglang_trinv: not installed: {reason}; the server stops because "
                "SGLANG_TRINV_STRICT=1"
            )
        self.say(logging.WARNING, f"not installed: {reason}")


def _wanted(runner: Any, config: Config) -> tuple[Any, warmup.Shape | None]:
    """(row of the release, shape of the layers); None for a runner whose prefill is not ours."""
    if config.gdn not in ("auto", "full") or getattr(runner, "is_draft_worker", False):
        return None, None
    import sglang

    target = targets.find(sglang.__version__)
    gdn_config = targets.gdn_config_of(target, runner)
    return target, None if gdn_config is None else warmup.shape_of(runner, gdn_config)[0]


def _measured_faster(stocks: str, shape: warmup.Shape, tokens: int | None = None) -> bool:
    """Whether the table has a row for this GPU, these heads and calls of this or of some length."""
    if torch.device(shape.device).type != "cuda":
        return False
    capability = dispatch.capability_of(torch.cuda.current_device())
    return prefill.wins(capability, stocks, (shape.Hg, shape.H), tokens)


def warm_up(shape: warmup.Shape, pool: torch.Tensor, method: str) -> None:
    """Compile every form that a server's calls may take; each o must be finite.

    Raises:
        TrinvError: a result is not finite. Whatever the op raises is passed on.
    """
    from sglang_trinv import ops
    from sglang_trinv.kernels import configs

    k, v, g, beta, starts, _, _ = warmup.inputs(shape, 1)
    state = pool[0, :1].clone().zero_()
    slot, chunk = starts[:1], starts[:1] - 1
    hopper = k.is_cuda and torch.cuda.get_device_capability(k.device) == (9, 0)
    forms = configs.prefill_forms(hopper and shape.K == shape.V == 128)
    calls = [(c, tracks, 1) for c in forms for tracks in (False, True)]
    if k.is_cuda:  # so many programs that the inverse is cut in its other way
        calls.append((forms[0], True, 64 * configs.FEW_PROGRAMS // shape.Hg // k.shape[1] + 1))
    for config, tracks, times in calls:
        track = torch.zeros_like(state, dtype=torch.float32) if tracks else None
        tensors = [x.repeat(1, times, *[1] * (x.dim() - 2)) for x in (k, k, v, g, beta)]
        o, _, _ = ops.chunk_gated_delta_rule(
            *tensors, initial_state=state.zero_(), initial_state_indices=slot,
            cu_seqlens=starts * times, use_qk_l2norm_in_kernel=True, method=method,
            return_h=not tracks, track_state=track, track_chunk_idx=chunk if tracks else None,
            config=config,
        )  # fmt: skip
        if not o.isfinite().all():
            raise TrinvError(f"warm-up of the whole prefill with {shape} is not finite")


_installer = FullInstaller()


def displace(runner: Any, config: Config) -> str:
    """``FullInstaller.displace`` of this process."""
    return _installer.displace(runner, config)


def install_once(runner: Any, backend: Any, config: Config) -> str:
    """``FullInstaller.install_for`` of this process."""
    return _installer.install_for(runner, backend, config)
