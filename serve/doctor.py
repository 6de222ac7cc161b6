"""Would it work here? Versions, release, hook target, device, prefill choice, method."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

from sglang_trinv import __version__, runs, targets
from sglang_trinv.config import Config
from sglang_trinv.errors import TrinvError
from sglang_trinv.serve import config as serve_config
from sglang_trinv.serve import prefill_choice
from sglang_trinv.serve.command import CPU_ENV, CPU_ENV_DEFAULTS
from sglang_trinv.serve.report import self_check
from sglang_trinv.status import read_run_dir

PACKAGES = ("torch", "triton", "sglang", "transformers", "flashinfer-python")
PROBE_TIMEOUT_S = 300.0
SETTINGS = ("SGLANG_TRINV", "SGLANG_PLUGINS", "SGLANG_PLATFORM", "TRITON_")
# In a process of its own: importing SGLang takes seconds, and a broken install must not end doctor.
PROBE = """
import sglang
from sglang_trinv import targets
targets.resolve(targets.find(sglang.__version__))
module, name = targets.ATTENTION_WRAPPER.rsplit(".", 1)
import importlib
assert callable(getattr(importlib.import_module(module), name))
"""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool
    detail: str


def examine(gpu: bool = False) -> list[Check]:
    """Run every check; one that fails does not stop the rest.

    Args:
        gpu: also run the kernels on this GPU and compare them with float64.
    """
    checks = [
        _run("versions", _versions),
        _run("configuration", _configuration),
        _run("sglang release", _release),
        _run("plugin entry point", _entry_point),
        _run("hook target", _hook_target),
        _run("device", _device),
        _run("gdn prefill by default", _prefill),
    ]
    if gpu:
        checks.append(_run("numeric self-check", _numeric))
    return checks


def report(checks: list[Check]) -> dict[str, object]:
    """The JSON form, with what a bug report needs and no secret.

    ``settings`` are the variables that change what runs, ``processes`` the status of the newest
    run on this machine, if there was one.
    """
    settings = {n: v for n, v in os.environ.items() if n.startswith(SETTINGS)}
    try:
        processes = read_run_dir(runs.latest_run())
    except TrinvError:
        processes = []
    return {
        "ok": all(check.ok for check in checks),
        "checks": [asdict(check) for check in checks],
        "settings": settings,
        "processes": processes,
    }


def _numeric() -> str:
    if serve_config.detect_device() == "cpu":
        raise TrinvError("--gpu: want a CUDA GPU, found none")
    done = _python("-m", "sglang_trinv.serve.gpu_check", env=dict(os.environ))
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = [json.loads(line) for line in lines]
    bad = [f"{each['shape']}: {each['error']}" for each in found if "error" in each]
    if bad or done.returncode or not found:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise TrinvError("; ".join(bad) or last)
    return "; ".join(self_check(each) for each in found)


def _run(name: str, examine_one: Callable[[], str]) -> Check:
    try:
        return Check(name, True, examine_one())
    except TrinvError as error:
        return Check(name, False, str(error))
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {error}".splitlines()[0])


def _versions() -> str:
    ours = [f"Python {platform.python_version()}", f"sglang-trinv {__version__}"]
    others = [f"{name} {version}" for name in PACKAGES if (version := _version(name))]
    return ", ".join(ours + others)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _configuration() -> str:
    config = Config.from_env()
    if not config.enabled:
        return "off (SGLANG_TRINV=0): SGLang's own kernels serve"
    return f"method {config.method}, gdn {config.gdn} ({config.gdn_mode}), kda {config.kda}"


def _release() -> str:
    release = serve_config.check_release()
    return f"{release} is supported ({targets.RELEASES[0]} to {targets.RELEASES[-1]})"


def _entry_point() -> str:
    points = importlib.metadata.entry_points(group="sglang.srt.plugins", name="trinv")
    if not points:
        raise TrinvError("no plugin `trinv` in the group sglang.srt.plugins: install sglang-trinv")
    allowed = os.environ.get("SGLANG_PLUGINS", "")
    if allowed and "trinv" not in (name.strip() for name in allowed.split(",")):
        raise TrinvError(f"SGLANG_PLUGINS: want trinv in the list or no list, got {allowed!r}")
    return next(iter(points)).value


def _hook_target() -> str:
    target = targets.find(serve_config.check_release())
    env = dict(os.environ)
    if serve_config.detect_device() == "cpu":
        _need_cpu_platform()
        env = {**CPU_ENV_DEFAULTS, **env, **CPU_ENV}
    done = _python("-c", PROBE, env=env)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise TrinvError(lines[-1].removeprefix("sglang_trinv.errors.TargetMissing: "))
    return f"{target.dotted}: found, signature as expected"


def _python(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=PROBE_TIMEOUT_S,
    )


def _device() -> str:
    if serve_config.detect_device() == "cpu":
        _need_cpu_platform()
        return f"no GPU; the platform {serve_config.PLATFORM} runs Triton in its interpreter"
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    major, minor = torch.cuda.get_device_capability()
    if torch.version.hip:
        raise TrinvError(f"{names[0]}: ROCm is not validated yet")
    if (major, minor) < (8, 0):
        raise TrinvError(f"{names[0]}: compute capability {major}.{minor} is below 8.0")
    return f"{len(names)} x {names[0]}, sm{major}{minor}, CUDA {torch.version.cuda}"


def _need_cpu_platform() -> None:
    if serve_config.PLATFORM not in serve_config.platforms():
        raise TrinvError("no GPU, and sglang-trinv-cpu-platform is not installed")


def _prefill() -> str:
    import torch

    release = serve_config.check_release()
    machine = prefill_choice.Machine(release, None)
    if torch.cuda.is_available():
        machine = prefill_choice.Machine(
            release,
            torch.cuda.get_device_capability(),
            memory_gb=torch.cuda.get_device_properties(0).total_memory / 2**30,
            cuda=_numbers(torch.version.cuda),
            flashinfer=importlib.util.find_spec("flashinfer") is not None,
            hip=torch.version.hip is not None,
        )
    name, reason = prefill_choice.predict(machine)
    if name == "triton":
        return f"triton ({reason})"
    return f"{name} ({reason}); {_whose(name, machine.capability, Config.from_env())}"


def _whose(name: str, capability: tuple[int, int] | None, config: Config) -> str:
    """Who answers where SGLang would choose ``name``, which is not its Triton chain."""
    if config.force:
        return "SGLANG_TRINV_FORCE=1 displaces it"
    from sglang_trinv import prefill  # needs torch

    how = "only with --linear-attn-prefill-backend triton or SGLANG_TRINV_FORCE=1"
    heads = prefill.displaced(capability, name) if capability else []
    if not heads or config.gdn not in ("auto", "full"):
        return f"our kernels are called {how}"
    spelled = ", ".join(f"{hk}/{hv}" for hk, hv in heads)
    return (
        f"ours takes its place with {spelled} key/value heads a GPU, 128 channels each; "
        f"with others it is called {how}"
    )


def _numbers(version: str | None) -> tuple[int, int] | None:
    parts = (version or "").split(".")
    return (int(parts[0]), int(parts[1])) if len(parts) > 1 else None
