"""Entry point ``trinv`` of the group ``sglang.srt.plugins``: read the settings, register one hook.

SGLang runs ``register`` in every process that it starts, before logging is configured, and swallows
any ``Exception`` from it. A wrong setting must stop the server all the same, so it leaves as a
``SystemExit``: SGLang catches only ``Exception``, Python prints the one line and exits with 1.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


def register() -> None:
    """Register the hook on SGLang's attention wrapper, unless SGLANG_TRINV=0.

    Raises:
        SystemExit: a SGLANG_TRINV variable is wrong; or, in strict mode, this SGLang is not in the
            table.
    """
    import sglang

    from sglang_trinv import __version__, status, targets
    from sglang_trinv.config import Config
    from sglang_trinv.errors import ConfigError, TargetMissing

    try:
        config = Config.from_env()
    except ConfigError as error:
        raise SystemExit(f"sglang_trinv: {error}") from None
    process = status.reset(config.run_dir)
    process.check["wanted"] = config.check
    process.update(version=__version__, release=sglang.__version__, method=config.method)
    if not config.enabled:
        process.update(state="off", reason="SGLANG_TRINV=0")
        return
    if config.strict:
        try:
            targets.find(sglang.__version__)
        except TargetMissing as error:
            raise SystemExit(f"sglang_trinv: {error} (SGLANG_TRINV_STRICT=1)") from None
    _hook(targets.ATTENTION_WRAPPER, config)
    process.update(state="registered", reason="no model has been loaded in this process")


def _hook(target: str, config: Any) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def install_then_build(original_fn: Any, runner: Any, full_attn_backend: Any) -> Any:
        # Imported here, in the scheduler alone: the other processes need neither Triton nor torch.
        from sglang_trinv import install

        install.install_once(runner, config)
        backend = original_fn(runner, full_attn_backend)
        install.announce(runner, backend)
        return backend

    HookRegistry.register(target, install_then_build, HookType.AROUND)
