"""Put the adapters into SGLang, once per process, and say so where the user looks.

``install_once`` runs in the scheduler process, inside SGLang's ``attn_backend_wrapper``: logging is
configured, the device and the state pool exist, no CUDA graph has been captured. By default nothing
that goes wrong here stops the server: stock kernels serve and one warning says why. In strict mode
it exits by ``SystemExit``, which SGLang's ``except Exception`` does not swallow.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from sglang_trinv import __version__, ranks, status, targets
from sglang_trinv.config import LEAST_CAPABILITY, Config
from sglang_trinv.errors import TargetMissing, TrinvError

if TYPE_CHECKING:
    from sglang_trinv.hooks import Patch
    from sglang_trinv.warmup import Shape

logger = logging.getLogger(__name__)


class Refused(TrinvError):
    """This platform or model setup is outside what the package was made for."""


class Installer:
    """What was done in this process. SGLang calls once per runner, so twice must equal once."""

    def __init__(self) -> None:
        self.state = "registered"
        self.patch: Patch | None = None
        self.warm: set[Shape] = set()
        self.warmup_s = 0.0
        self.said: set[str] = set()
        self.compared = False
        self.lock = threading.Lock()

    def install_once(self, runner: Any, config: Config) -> str:
        """Install if this runner's model wants it; return the state (see status.STATES).

        Raises:
            SystemExit: in strict mode, if it cannot be installed.
        """
        return self.attempt(self._install, runner, config)

    def attempt(self, step: Callable[[Any, Config], None], runner: Any, config: Config) -> str:
        """``step(runner, config)``, unless one before it failed. Result and errors as above."""
        with self.lock:
            if self.state in ("refused", "failed"):
                return self.state
            try:
                step(runner, config)
            except (Refused, TargetMissing) as error:
                self._give_up("refused", str(error), config)
            except Exception as error:
                self._give_up("failed", f"{type(error).__name__}: {error}", config)
            return self.state

    def _install(self, runner: Any, config: Config) -> None:
        if config.gdn_mode == "off":
            return self._idle("SGLANG_TRINV_GDN=off")
        import sglang

        target = targets.find(sglang.__version__)
        gdn_config = targets.gdn_config_of(target, runner)
        if gdn_config is None:
            return self._idle("the model has no Gated DeltaNet layer")
        refusal = platform_refusal(str(runner.device))
        if refusal:
            raise Refused(refusal)
        if self.patch is not None and getattr(runner, "is_draft_worker", False):
            return None  # a draft model shares the target's pool and adapters
        # Here, so that a failing import of the kernels is handled like any other failure.
        from sglang_trinv import cache, hooks, inject, selfcheck, warmup

        return_A = _third_result_is_read(target)
        shape, layers = warmup.shape_of(runner, gdn_config)
        patched = self.patch
        stock, modules = (patched.stock, patched.modules) if patched else targets.resolve(target)
        if shape not in self.warm:
            start = time.perf_counter()
            cache.ensure_writable()
            inject.at_compile(config.fault)
            warmup.warm_up(shape, config.method, return_A, target.adapter)
            checked = selfcheck.run(target.adapter, shape, config.method, stock, config.fault)
            status.current().update(self_check=checked)
            self.warm.add(shape)
            self.warmup_s += time.perf_counter() - start
        if self.patch is None:
            patch = hooks.Patch(target, modules, stock)
            patch.apply(hooks.ADAPTERS[target.adapter](stock, config, return_A), config.fault)
            self.patch, status.current().hooks = patch, patch.describe
        if config.force and targets.force_triton_prefill(target, runner):
            self.say(logging.INFO, "SGLANG_TRINV_FORCE=1: GDN prefill backend set to triton")
        if config.fault:
            self.say(
                logging.WARNING, f"SGLANG_TRINV_FAULT={config.fault}: wrong results, for tests"
            )
        self.state = "installed"
        status.current().update(
            state="installed",
            reason="",
            layers={"gdn": layers, "kda": None},
            warmup_s=round(self.warmup_s, 3),
            **describe_device(shape.device),
        )
        return None

    def _idle(self, reason: str) -> None:
        if self.state != "installed":
            self.state = "idle"
            status.current().update(state="idle", reason=reason)
            self.say(logging.INFO, f"idle: {reason}")

    def _give_up(self, state: str, reason: str, config: Config) -> None:
        if self.patch is not None:
            self.patch.undo()
            self.patch = None
        self.state = state
        status.current().count_fallback(f"not installed: {reason}")
        status.current().update(state=state, reason=reason, on_hot_path=False)
        if config.strict:
            raise SystemExit(
                f"sglang_trinv: not installed: {reason}; the server stops because "
                "SGLANG_TRINV_STRICT=1"
            )
        self.say(logging.WARNING, f"not installed, SGLang's own kernels serve: {reason}")

    def announce(self, runner: Any, backend: Any) -> None:
        """Say what was installed and which prefill ``backend``, just built, will use."""
        if self.patch is None or getattr(runner, "is_draft_worker", False):
            return
        name = targets.prefill_backend_of(self.patch.target, backend)
        on_hot_path = name == "triton" and self.patch.live()
        process = status.current()
        process.update(prefill_backend=name, on_hot_path=on_hot_path)
        if not on_hot_path:
            self.say(logging.WARNING, off_hot_path(name))
            return
        fields = process.fields
        facts = [f"method {fields['method']}", fields["sm"] or fields["device"]]
        facts += sorted(str(shape) for shape in self.warm)
        self.say(
            logging.INFO,
            f"GDN intra-chunk inverse replaced ({', '.join(facts)}); prefill backend {name}",
        )

    def compare_ranks(self, config: Config) -> None:
        """Hold this rank against the others, once.

        Raises:
            SystemExit: in strict mode, on rank 0, if they differ.
        """
        if self.compared:
            return
        self.compared = True
        try:
            said = ranks.compare(config.strict)
        except ranks.RankMismatch as error:
            raise SystemExit(f"sglang_trinv: {error} (SGLANG_TRINV_STRICT=1)") from None
        except Exception as error:
            said = f"the ranks were not compared: {type(error).__name__}: {error}"
        if said:
            self.say(logging.WARNING, said)

    def say(self, level: int, text: str) -> None:
        """Log one line, once, from rank 0 of a tensor parallel group."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if text not in self.said and not (distributed and torch.distributed.get_rank()):
            logger.log(level, "sglang_trinv %s: %s", __version__, text)
        self.said.add(text)


def platform_refusal(device: str) -> str:
    """Why the kernels cannot run on ``device``, or ""."""
    kind = device.partition(":")[0]
    if kind == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return "" if interpreted else "a CPU needs Triton's interpreter (TRITON_INTERPRET=1)"
    if kind != "cuda":
        return f"device {kind} is not supported, cuda is"
    if torch.version.hip:
        return "ROCm is not validated yet"
    capability = torch.cuda.get_device_capability(torch.device(device))
    if capability < LEAST_CAPABILITY:
        return f"compute capability {capability} is below {LEAST_CAPABILITY}"
    return ""


def off_hot_path(prefill_backend: str) -> str:
    """What to tell a user whose prefill does not call the replaced function."""
    return (
        f"installed but not on the hot path: SGLang's GDN prefill backend is {prefill_backend}; "
        "use --linear-attn-prefill-backend triton"
        + (" or SGLANG_TRINV_FORCE=1" if prefill_backend == "flashinfer" else "")
    )


def describe_device(device: str) -> dict[str, str | None]:
    """The ``device`` and ``sm`` fields of the status."""
    if torch.device(device).type != "cuda":
        return {"device": "cpu, Triton interpreter", "sm": None}
    major, minor = torch.cuda.get_device_capability(torch.device(device))
    return {"device": torch.cuda.get_device_name(torch.device(device)), "sm": f"sm{major}{minor}"}


def _third_result_is_read(target: targets.Target) -> bool:
    """GDN_RECOMPUTE_SUPPRESS_LEVEL of 3 or more hands intermediate results to the caller."""
    return importlib.import_module(f"{target.fla}.utils").SUPPRESS_LEVEL >= 3


_installer = Installer()


def install_once(runner: Any, config: Config) -> str:
    """``Installer.install_once`` of this process."""
    return _installer.install_once(runner, config)


def announce(runner: Any, backend: Any) -> None:
    """``Installer.announce`` of this process."""
    _installer.announce(runner, backend)


def compare_ranks(config: Config) -> None:
    """``Installer.compare_ranks`` of this process."""
    _installer.compare_ranks(config)
