"""Flags that SGLang's cookbook gives for a model, by name: ``serve --preset qwen3.5-4b``.

Each is the cookbook's command for bfloat16 weights on H200 with what its form has switched on at
first. A model whose command is not in the cookbook has no preset. Every flag can be replaced, by
the same flag after ``--``, or left out, by ``--without``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sglang_trinv.serve.config import ServeError, flag_value

COOKBOOK = "sgl-project/sglang docs_new/src/snippets/autoregressive"
Flag = tuple[str, str | None]  # None for a flag without a value

# Names that SGLang takes for one setting.
ALIASES = (
    ("--tp-size", "--tensor-parallel-size", "--tp"),
    ("--speculative-algorithm", "--speculative-algo"),
)


@dataclass(frozen=True)
class Preset:
    """What to serve, how, and who says so."""

    model: str
    flags: tuple[Flag, ...]
    source: str


def _qwen35(size: str, tp: int = 1, memory: str | None = "0.8") -> Preset:
    flags: list[Flag] = [("--tp-size", str(tp))] if tp > 1 else []
    flags += [
        ("--reasoning-parser", "qwen3"),
        ("--tool-call-parser", "qwen3_coder"),
        ("--speculative-algorithm", "NEXTN"),
        ("--speculative-num-steps", "3"),
        ("--speculative-eagle-topk", "1"),
        ("--speculative-num-draft-tokens", "4"),
        ("--mamba-radix-cache-strategy", "extra_buffer"),
        ("--enable-flashinfer-allreduce-fusion", None),
    ]
    if memory:
        flags.append(("--mem-fraction-static", memory))
    source = f"{COOKBOOK}/qwen35-deployment.jsx at 087e17d8: H200, BF16"
    return Preset(f"Qwen/Qwen3.5-{size}", tuple(flags), source)


PRESETS = {
    "qwen3.5-4b": _qwen35("4B"),
    "qwen3.5-9b": _qwen35("9B"),
    "qwen3.5-27b": _qwen35("27B"),
    "qwen3.5-35b-a3b": _qwen35("35B-A3B"),
    "qwen3.5-122b-a10b": _qwen35("122B-A10B", tp=4, memory=None),
    "qwen3.5-397b-a17b": _qwen35("397B-A17B", tp=8),
    "qwen3-next": Preset(
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        (("--tp-size", "2"),),
        f"{COOKBOOK}/qwen3-next-deployment.jsx at 0bb6346b: H200, BF16",
    ),
    "kimi-linear": Preset(
        "moonshotai/Kimi-Linear-48B-A3B-Instruct",
        (("--tp-size", "4"), ("--trust-remote-code", None)),
        f"{COOKBOOK}/kimi-linear-deployment.jsx at 2f5c42d7: given for MI300X, none for NVIDIA",
    ),
}


def find(name: str) -> Preset:
    """Return the preset of this name.

    Raises:
        ServeError: there is none.
    """
    if name not in PRESETS:
        raise ServeError(f"--preset: want one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def merge(preset: Preset, extra: tuple[str, ...], without: Iterable[str] = ()) -> tuple[str, ...]:
    """Flags for SGLang: the preset's that the user neither gave nor dropped, then the user's.

    Args:
        extra: the user's flags.
        without: names of flags of the preset that the user does not want.
    Raises:
        ServeError: a name in ``without`` is none of the preset's.
    """
    without = tuple(without)
    names = [name for name, _ in preset.flags]
    for name in without:
        if name not in names:
            raise ServeError(f"--without: want one of {', '.join(names)}, got {name!r}")
    kept: list[str] = []
    for name, value in preset.flags:
        if name in without or any(flag_value(extra, other) is not None for other in _same(name)):
            continue
        kept += [name] if value is None else [name, value]
    return (*kept, *extra)


def _same(name: str) -> tuple[str, ...]:
    return next((names for names in ALIASES if name in names), (name,))
