"""The SGLang releases that the package knows, and what each calls the things that it touches.

Releases before ``FIRST_WITH_PLUGINS`` call the plugin by a patch (patches/), the others load it.
This table is the only place with release numbers. Every row is tested against the sources in that
release's wheel (tests/sglang); a release that is not listed is refused, because a guess that is
wrong would be found by a user's answers.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from packaging.version import InvalidVersion, Version

from sglang_trinv.errors import TargetMissing

FIRST_WITH_PLUGINS = "0.5.11"
FIRST_WITH_KDA_INTRA = "0.5.10"
FIRST_WITH_RIGHT_KDA = "0.5.17"

# The one function that the plugin hooks: SGLang calls it once per runner, before any CUDA graph.
ATTENTION_WRAPPER = "sglang.srt.layers.attention.attention_registry.attn_backend_wrapper"

# Called in the main process of an HTTP server alone, before it imports its application.
PREPARE_ARGUMENTS = "sglang.srt.server_args.prepare_server_args"

REQUIRED = inspect.Parameter.empty
FWD_INTRA_PARAMETERS: tuple[tuple[str, Any], ...] = (
    ("k", REQUIRED),
    ("v", REQUIRED),
    ("g", None),
    ("beta", None),
    ("cu_seqlens", None),
    ("chunk_size", 64),
    ("chunk_indices", None),
)
SOLVE_TRIL_PARAMETERS: tuple[tuple[str, Any], ...] = (
    ("A", REQUIRED),
    ("cu_seqlens", None),
    ("output_dtype", "torch.float32"),
)


@dataclass(frozen=True)
class Target:
    """What a group of releases calls the GDN intra-chunk function and the choices around it.

    Attributes:
        releases: the releases, all of them tested.
        fla: package that holds SGLang's flash-linear-attention kernels.
        gdn_config: dotted function of the model's config, or the runner's attribute (no dot), that
            gives the GDN part of the model's config, None for a model without.
        prefill_default: function of ``linear.gdn_backend`` by which SGLang itself may choose
            FlashInfer, "" where it never does.
        prefill_flag: where ``--linear-attn-prefill-backend`` can still be changed when the backend
            is built: an attribute of ``server_args``, its ``override``, or the context's; "none"
            where SGLang has only its Triton kernels.
        module: where the function is replaced: the module that defines it, or, to leave its other
            users alone, the one that calls it.
        parameters: names and defaults; a default that is no plain value by its ``repr``.
    """

    releases: tuple[str, ...]
    fla: str
    gdn_config: str
    prefill_default: str
    prefill_flag: Literal["none", "attribute", "server_args", "context"]
    module: str = "chunk_fwd"
    function: str = "chunk_gated_delta_rule_fwd_intra"
    importers: tuple[str, ...] = ("chunk",)
    parameters: tuple[tuple[str, Any], ...] = FWD_INTRA_PARAMETERS
    adapter: str = "fwd_intra"

    @property
    def dotted(self) -> str:
        return f"{self.fla}.{self.module}.{self.function}"

    @property
    def holders(self) -> tuple[str, ...]:
        """Modules that hold the function by name: the defining one first."""
        return tuple(f"{self.fla}.{name}" for name in (self.module, *self.importers))


_SRT_FLA = "sglang.srt.layers.attention.fla"
_KERNELS_FLA = "sglang.kernels.ops.attention.fla"
_HYBRID_ARCH = "sglang.srt.configs.hybrid_arch.hybrid_gdn_config"

TARGETS = (
    Target(
        # fla.kda binds solve_tril too and keeps SGLang's: KDA is not what was tested here.
        releases=("0.5.9",),
        fla=_SRT_FLA,
        gdn_config="hybrid_gdn_config",
        prefill_default="",
        prefill_flag="none",
        module="chunk",
        function="solve_tril",
        importers=(),
        parameters=SOLVE_TRIL_PARAMETERS,
        adapter="solve_tril",
    ),
    Target(
        releases=(
            "0.5.10",
            "0.5.10.post1",
            "0.5.11",
            "0.5.12",
            "0.5.12.post1",
            "0.5.13",
            "0.5.13.post1",
            "0.5.14",
            "0.5.15",
            "0.5.15.post1",
        ),
        fla=_SRT_FLA,
        gdn_config="hybrid_gdn_config",
        prefill_default="",
        prefill_flag="attribute",
    ),
    Target(
        releases=("0.5.16",),
        fla=_KERNELS_FLA,
        gdn_config=_HYBRID_ARCH,
        prefill_default="maybe_set_default_flashinfer_gdn_prefill",
        prefill_flag="server_args",
    ),
    Target(
        # server_args is read-only from here on, and the backend still reads the flag from it.
        releases=("0.5.17",),
        fla=_KERNELS_FLA,
        gdn_config=_HYBRID_ARCH,
        prefill_default="flashinfer_gdn_prefill_default",
        prefill_flag="server_args",
    ),
    Target(
        releases=("0.5.18", "0.5.19", "0.5.20", "0.5.21", "0.5.22", "0.5.23"),
        fla=_KERNELS_FLA,
        gdn_config=_HYBRID_ARCH,
        prefill_default="flashinfer_gdn_prefill_default",
        prefill_flag="context",
    ),
)

RELEASES = tuple(release for target in TARGETS for release in target.releases)
PATCHED = tuple(r for r in RELEASES if Version(r) < Version(FIRST_WITH_PLUGINS))


def find(release: str) -> Target:
    """Return the row of ``release``; a local part ("+cu130") does not count.

    Raises:
        TargetMissing: the release is not in the table.
    """
    supported = f"supported are {RELEASES[0]} to {RELEASES[-1]}"
    try:
        public = Version(Version(release).public)
    except InvalidVersion:
        raise TargetMissing(f"SGLang {release!r} is not a release number; {supported}") from None
    for target in TARGETS:
        if any(public == Version(known) for known in target.releases):
            return target
    raise TargetMissing(f"SGLang {release} is not in the table of sglang_trinv; {supported}")


def kda_refusal(release: str) -> str:
    """Why KDA layers of ``release`` keep SGLang's kernels, or "" where nothing forbids ours."""
    public = Version(Version(release).public)
    if public >= Version(FIRST_WITH_RIGHT_KDA):
        return ""
    if public < Version(FIRST_WITH_KDA_INTRA):
        return f"KDA is refused: SGLang {release} has no chunk_kda_fwd_intra that could be replaced"
    return (
        f"KDA is refused: SGLang {release} hands gates in natural logarithms to kernels that take "
        f"them in base 2; right from {FIRST_WITH_RIGHT_KDA} on (sglang pull request 31904)"
    )


def resolve(target: Target) -> tuple[Callable[..., Any], tuple[ModuleType, ...]]:
    """Import ``target`` and check that it is what the table says.

    Returns:
        The function as it is now, and the modules that hold it, the defining one first.
    Raises:
        TargetMissing: a module or the function is missing, an importer holds another function, or
            the signature differs.
    """
    modules = []
    for name in target.holders:
        try:
            modules.append(importlib.import_module(name))
        except ImportError as error:
            raise TargetMissing(f"cannot import {name}: {error}") from error
    function = getattr(modules[0], target.function, None)
    if not callable(function):
        raise TargetMissing(f"{target.dotted} does not exist")
    for module in modules[1:]:
        if getattr(module, target.function, None) is not function:
            raise TargetMissing(f"{module.__name__} does not use {target.dotted}")
    found = parameters_of(function)
    if found != target.parameters:
        raise TargetMissing(
            f"signature of {target.dotted}: want {spell(target.parameters)}, got {spell(found)}"
        )
    return function, tuple(modules)


def parameters_of(function: Callable[..., Any]) -> tuple[tuple[str, Any], ...]:
    """Names and defaults of ``function``; ``*`` and ``**`` are part of the name."""
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return tuple(
        (marks.get(p.kind, "") + p.name, _plain(p.default))
        for p in inspect.signature(function).parameters.values()
    )


def _plain(default: Any) -> Any:
    """A default that the table can hold without importing torch."""
    plain = default is REQUIRED or isinstance(default, int | float | str | None)
    return default if plain else repr(default)


def spell(parameters: tuple[tuple[str, Any], ...]) -> str:
    """``parameters`` as they stand in a signature."""
    words = (name if value is REQUIRED else f"{name}={value!r}" for name, value in parameters)
    return f"({', '.join(words)})"


def gdn_config_of(target: Target, runner: Any) -> Any:
    """The GDN part of ``runner``'s model config; None if the model has no GDN layer."""
    if "." not in target.gdn_config:
        return getattr(runner, target.gdn_config)
    module, name = target.gdn_config.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)(runner.model_config)


def force_triton_prefill(target: Target, runner: Any) -> bool:
    """Do what ``--linear-attn-prefill-backend triton`` does, if FlashInfer is or may become it.

    Must run before SGLang builds the linear attention backend. A choice other than FlashInfer
    (cutedsl, say) is left alone.

    Returns:
        Whether the flag was set.
    """
    if target.prefill_flag == "none":
        return False
    if target.prefill_flag == "context":
        context = importlib.import_module("sglang.srt.runtime_context")
        flags, override = context.get_exec().mamba, context.get_context().override
    else:
        flags = runner.server_args
        override = getattr(flags, "override", None)
    chosen, base = flags.linear_attn_prefill_backend, flags.linear_attn_backend
    may_default = chosen is None and base == "triton" and bool(target.prefill_default)
    if (chosen or base) != "flashinfer" and not may_default:
        return False
    if target.prefill_flag == "attribute":
        flags.linear_attn_prefill_backend = "triton"
    else:
        override("sglang_trinv.force", linear_attn_prefill_backend="triton")
    return True


def defaults_to_flashinfer(target: Target, runner: Any) -> bool:
    """Whether SGLang, left alone, gives this runner FlashInfer's GDN prefill by its own choice.

    Asks SGLang's own function, before the backend is built; one that acts instead of answering
    (and chooses FlashInfer on SM100 alone) is not asked.
    """
    if target.prefill_default.startswith("maybe_set") or not target.prefill_default:
        return False
    name = "sglang.srt.layers.attention.linear.gdn_backend"
    return getattr(importlib.import_module(name), target.prefill_default)(runner) == "flashinfer"


def prefill_backend_of(target: Target, backend: Any) -> str:
    """Name of the kernels that ``backend`` (what the attention wrapper returned) prefills GDN with.

    Read from the object that SGLang will call, so flags, defaults and fallbacks are all in it:
    "triton", "flashinfer", "cutedsl", or "unknown".
    """
    linear = getattr(backend, "linear_attn_backend", None)
    if target.prefill_flag == "none":
        return "triton" if type(linear).__name__ == "GDNAttnBackend" else "unknown"
    kernel = getattr(getattr(linear, "kernel_dispatcher", None), "extend_kernel", None)
    name = type(kernel).__name__
    return name.removesuffix("GDNKernel").lower() if name.endswith("GDNKernel") else "unknown"
