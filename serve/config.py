"""What to serve and where: ServeConfig and its checks."""

from __future__ import annotations

import errno
import importlib.metadata
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sglang_trinv import targets
from sglang_trinv.config import Config
from sglang_trinv.errors import TrinvError
from sglang_trinv.patches import apply as patcher
from sglang_trinv.serve import tiny_model

Device = Literal["cuda", "cpu"]
Kernels = Literal["ours", "stock"]

PLATFORM = "trinv_cpu"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class ServeError(TrinvError):
    """A server cannot be started, or does not do what was asked. One line for the user."""


class ServeConfig(BaseModel):
    """One server. ``extra`` are SGLang's own flags; they win over the flags set here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = str(tiny_model.PATH)
    kernels: Kernels = "ours"
    device: Device
    host: str = "127.0.0.1"
    port: int = Field(30000, ge=1, le=65535)
    extra: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """Address for a client on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def api_key(self) -> str | None:
        """The key that the user gave the server, if any."""
        return flag_value(self.extra, "--api-key")


def flag_value(flags: tuple[str, ...], name: str) -> str | None:
    """Value of ``name`` in ``flags``, both as ``--flag value`` and ``--flag=value``; last wins."""
    found = None
    for i, flag in enumerate(flags):
        if flag.startswith(f"{name}="):
            found = flag.split("=", 1)[1]
        elif flag == name:
            found = flags[i + 1] if i + 1 < len(flags) else ""
    return found


def detect_device() -> Device:
    """The GPU if torch sees one, otherwise the CPU platform."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def gpus() -> int:
    """How many GPUs torch sees."""
    import torch

    return torch.cuda.device_count()


def fixed_pools(tokens: int, states: int, share: float) -> tuple[str, ...]:
    """SGLang's flags for one of several servers on a GPU: pools of a fixed size, and a share of its
    memory that is large enough not to limit them while the other servers start."""
    return (
        "--mem-fraction-static", str(share), "--max-total-tokens", str(tokens),
        "--max-mamba-cache-size", str(states),
    )  # fmt: skip


def check(config: ServeConfig, environ: Mapping[str, str]) -> None:
    """Refuse what is known to fail, before a minute of start-up.

    Raises:
        ServeError | ConfigError | TargetMissing: the first thing that is wrong, in one line.
    """
    Config.from_env(environ)
    check_release(config.kernels)
    if config.device == "cpu" and PLATFORM not in platforms():
        raise ServeError(
            "no GPU, and the distribution sglang-trinv-cpu-platform is not installed: "
            "run `make serve` in a clone, or serve on a machine with a GPU"
        )
    check_model(config.model)
    check_flags(config.extra)
    check_port(config.host, config.port)


def check_release(kernels: Kernels = "ours") -> str:
    """Return the installed SGLang's release; with our kernels it must be in the table."""
    try:
        release = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        first, last = targets.RELEASES[0], targets.RELEASES[-1]
        raise ServeError(
            f"sglang is not installed: want a release from {first} to {last}"
        ) from None
    if kernels == "ours":
        targets.find(release)
        if release in targets.PATCHED:
            patcher.require_applied(patcher.find_site())
    return release


def platforms() -> set[str]:
    """Names of the installed out-of-tree platforms."""
    return {p.name for p in importlib.metadata.entry_points(group="sglang.srt.platforms")}


def check_model(model: str) -> None:
    """A folder with config.json, or something that can be a hub id."""
    path = Path(model).expanduser()
    if model and path.is_dir():
        if not (path / "config.json").is_file():
            raise ServeError(f"--model: no config.json in {model}")
    elif not HUB_ID.fullmatch(model):
        raise ServeError(f"--model: want a model folder or a hub id OWNER/NAME, got {model!r}")


def check_flags(extra: tuple[str, ...]) -> None:
    """Flags that ``serve`` has an option for must come as that option: it needs their value."""
    for flag, option in {
        "--model-path": "--model",
        "--model": "--model",
        "--host": "--host",
        "--port": "--port",
    }.items():
        if flag_value(extra, flag) is not None:
            raise ServeError(f"{flag} after `--`: use the option {option} before `--`")


def check_port(host: str, port: int) -> None:
    """The address can be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServeError(f"--port: {port} on {host} is in use") from None
            raise ServeError(f"--host: cannot listen on {host}:{port}: {error.strerror}") from None


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
