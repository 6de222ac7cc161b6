"""Entry point ``trinv`` of the group ``sglang.srt.plugins``: read the settings, register one hook.

An SGLang without plugins is patched (patches/) to call ``wrap`` instead.

SGLang runs ``register`` in every process that it starts, before logging is configured, and swallows
any ``Exception`` from it. A wrong setting must stop the server all the same, so it leaves as a
``SystemExit``: SGLang catches only ``Exception``, Python prints the one line and exits with 1.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def register() -> None:
    """Register the hooks, unless SGLANG_TRINV=0: on SGLang's attention wrapper, and in the main
    process on what reads an HTTP server's command line.

    Raises:
        SystemExit: a SGLANG_TRINV variable is wrong; or, in strict mode, this SGLang is not in the
            table.
    """
    from sglang_trinv import targets

    config = _start()
    if config is not None:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        hook = functools.partial(_install_then_build, config=config)
        HookRegistry.register(targets.ATTENTION_WRAPPER, hook, HookType.AROUND)
        if multiprocessing.parent_process() is None:
            HookRegistry.register(targets.PREPARE_ARGUMENTS, _attach_routes, HookType.AFTER)


def wrap(attn_backend_wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """What a patched SGLang calls with its attention wrapper, when the module is imported.

    Returns:
        The function to use in its place; the same one if SGLANG_TRINV=0.
    Raises:
        SystemExit: as ``register``.
    """
    config = _start()
    if config is None:
        return attn_backend_wrapper

    @functools.wraps(attn_backend_wrapper)
    def wrapped(runner: Any, full_attn_backend: Any) -> Any:
        return _install_then_build(attn_backend_wrapper, runner, full_attn_backend, config=config)

    return wrapped


def _start() -> Any:
    """Read the settings and start this process's status; the Config, or None if switched off."""
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
        return None
    if config.strict:
        try:
            targets.find(sglang.__version__)
        except TargetMissing as error:
            raise SystemExit(f"sglang_trinv: {error} (SGLANG_TRINV_STRICT=1)") from None
    process.update(state="registered", reason="no model has been loaded in this process")
    return config


def _install_then_build(
    original_fn: Callable[..., Any], runner: Any, full_attn_backend: Any, *, config: Any
) -> Any:
    # Imported here, in the scheduler alone: the other processes need neither Triton nor torch.
    from sglang_trinv import install, install_full, install_kda

    install.install_once(runner, config)
    install_full.displace(runner, config)
    backend = original_fn(runner, full_attn_backend)
    install.announce(runner, backend)
    install_full.install_once(runner, backend, config)
    install_kda.install_once(runner, backend, config)
    install.compare_ranks(config)
    return backend


def _attach_routes(server_args: Any, *_: Any, **__: Any) -> None:
    """Add our routes to SGLang's application; a server without them is better than none."""
    try:
        from sglang_trinv import routes

        routes.attach(server_args)
    except Exception as error:
        logger.warning("sglang_trinv: no /trinv/status: %s: %s", type(error).__name__, error)
