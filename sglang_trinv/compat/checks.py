"""What the table and the adapters assume about a release, looked up in its sources; nothing is run.

Each check takes a ``Release`` and returns what it found, in a few words; what is not as assumed is
raised as ``Differs``.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sglang_trinv import targets
from sglang_trinv.compat import syntax
from sglang_trinv.errors import TrinvError
from sglang_trinv.patches import apply as patcher
from sglang_trinv.targets import Target

REGISTRY = "sglang.srt.layers.attention.attention_registry"
ATTENTION = "sglang.srt.layers.attention"
GDN_BACKEND = f"{ATTENTION}.linear.gdn_backend"
HYBRID = f"{ATTENTION}.hybrid_linear_attn_backend"
# Other users of the function's name: XPU is refused as no CUDA device, the KDA module of 0.5.9 and
# the files that it shares with dead code keep SGLang's solve_tril.
NOT_OURS = {
    "chunk_gated_delta_rule_fwd_intra": {
        "sglang/srt/hardware_backend/xpu/kernels/fla/chunk_fwd.py"
    },
    "solve_tril": {f"{ATTENTION.replace('.', '/')}/fla/{n}.py" for n in ("kda", "solve_tril")},
}
PREFILL_DEFAULTS = ("maybe_set_default_flashinfer_gdn_prefill", "flashinfer_gdn_prefill_default")


class Differs(TrinvError):
    """The sources are not as the table says."""


@dataclass(frozen=True)
class Release:
    """Sources of one release and the row of the table that they are held against."""

    number: str
    sources: Path
    target: Target

    def parse(self, name: str) -> ast.Module:
        """Syntax tree of a dotted module."""
        return _parse(self.sources / (name.replace(".", "/") + ".py"))

    def mentioning(self, word: str) -> set[str]:
        """Python files that mention the name ``word``."""
        name = re.compile(rf"\b{word}\b")
        found = (p for p in self.sources.rglob("*.py") if name.search(_text(p)))
        return {path.relative_to(self.sources).as_posix() for path in found}


@functools.lru_cache(maxsize=256)
def _parse(path: Path) -> ast.Module:
    return ast.parse(_text(path))


@functools.lru_cache(maxsize=2048)
def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise Differs(f"{path.name}: {error.strerror}") from None


def want(ok: object, message: str) -> None:
    """Raise ``Differs`` unless ``ok``."""
    if not ok:
        raise Differs(message)


def definition(tree: ast.AST, name: str) -> ast.AST:
    """The function or class ``name``; it must be there."""
    node = syntax.definition(tree, name)
    want(node is not None, f"{name} is not defined where it was")
    return node


def function(release: Release) -> str:
    """It is defined with the parameters of the table."""
    target = release.target
    tree, module = release.parse(target.holders[0]), target.holders[0]
    bound = syntax.definition(tree, target.function)
    if bound is None:  # replaced in the module that calls it
        module = f"{target.fla}.{target.function}"
        want(target.function in syntax.imported_from(tree, module), f"{target.dotted}: not there")
        bound = definition(release.parse(module), target.function)
    found = syntax.parameters(bound)
    want(
        found == target.parameters,
        f"signature of {module}.{target.function}: want "
        f"{targets.spell(target.parameters)}, got {targets.spell(found)}",
    )
    return f"{module}.{target.function}"


def importers(release: Release) -> str:
    """Nobody but the listed modules holds it; the listed ones bind it by name."""
    target = release.target
    holders = {name.replace(".", "/") + ".py" for name in target.holders}
    others = release.mentioning(target.function) - holders - NOT_OURS[target.function]
    want(not others, f"{', '.join(sorted(others))}: also uses {target.function}")
    for name in target.holders[1:]:
        bound = syntax.imported_from(release.parse(name), target.holders[0])
        want(bound.get(target.function), f"{name}: does not import it from {target.holders[0]}")
    return ", ".join(name.rpartition(".")[2] for name in target.holders)


def call_site(release: Release) -> str:
    """It is called once, with known keywords, and of its results only w and u (or Ai) are used."""
    target, chunk = release.target, release.parse(f"{release.target.fla}.chunk")
    calls = syntax.calls(chunk, target.function)
    want(len(calls) == 1, f"want one call of {target.function}, got {len(calls)}")
    keywords = {keyword.arg for keyword in calls[0].keywords}
    known = {name for name, _ in target.parameters}
    want(not calls[0].args and keywords <= known, f"called with {sorted(map(str, keywords))}")
    forward = definition(chunk, "ChunkGatedDeltaRuleFunction.forward")
    names = [
        n for n in ast.walk(forward) if isinstance(n, ast.Name) and n.id in ("A", "w", "v_new")
    ]
    want(all(isinstance(n.ctx, ast.Store) for n in names), "A, w or v_new is used afterwards")
    caller = definition(chunk, "chunk_gated_delta_rule_fwd")
    uses = [n for n in ast.walk(caller) if isinstance(n, ast.Name) and n.id == "A"]
    returns = [node for node in ast.walk(caller) if isinstance(node, ast.Return)]
    wanted = 1 + len(returns)  # bound once, and handed on
    if target.adapter == "fwd_intra":
        want(len(uses) == wanted, "the third result is used before it is handed on")
        text = ast.unparse(release.parse(f"{target.fla}.utils"))
        level = "SUPPRESS_LEVEL = int(os.getenv('GDN_RECOMPUTE_SUPPRESS_LEVEL', '0'))"
        want(level in text, f"{target.fla}.utils: want {level}")
    return "one call, by keywords"


def wrapper(release: Release) -> str:
    """The attention wrapper takes (runner, full_attn_backend) and its callers import it by name."""
    module, name = targets.ATTENTION_WRAPPER.rsplit(".", 1)
    found = syntax.parameters(definition(release.parse(module), name))
    wanted = (("runner", targets.REQUIRED), ("full_attn_backend", targets.REQUIRED))
    want(found == wanted, f"signature of {name}: got {targets.spell(found)}")
    own = REGISTRY.replace(".", "/") + ".py"
    trees = {path: _parse(release.sources / path) for path in release.mentioning(name) - {own}}
    callers = {path: tree for path, tree in trees.items() if syntax.calls(tree, name)}
    want(callers, f"nobody calls {name}")
    for path, tree in callers.items():  # bound at import: SGLang's registry rebinds it there too
        bound = syntax.imported_from(tree, module)
        want(bound.get(name) == name, f"{path}: does not import {name} by name")
    return ", ".join(sorted(Path(path).stem for path in callers))


def entry(release: Release) -> str:
    """How SGLang comes to call us: by loading plugins, or by a patch whose hashes fit."""
    if not (release.sources / "sglang/srt/plugins").is_dir():
        return _patch(release)
    plugins = release.parse("sglang.srt.plugins.__init__")
    for name in ("load_plugins", "load_plugins_by_group"):
        caught = set(syntax.handlers(definition(plugins, name)))
        want(caught == {"Exception"}, f"{name} catches {', '.join(sorted(caught))}")
    managers = "sglang.srt.managers"
    scheduler = definition(release.parse(f"{managers}.scheduler"), "run_scheduler_process")
    caught = set(syntax.handlers(scheduler))
    want(caught == {"Exception"}, f"run_scheduler_process catches {', '.join(sorted(caught))}")
    for tree, name in (
        (scheduler, "run_scheduler_process"),
        (release.parse("sglang.cli.serve"), "sglang serve"),
        (release.parse("sglang.launch_server"), "launch_server"),
    ):
        found = syntax.calls(tree, "load_plugins")
        want(len(found) == 1, f"{name}: want one call of load_plugins, got {len(found)}")
        want(not list(syntax.enclosing_tries(tree, found[0])), f"{name}: load_plugins in a try")
    engine = release.parse("sglang.srt.entrypoints.engine")
    want(syntax.calls(definition(engine, "Engine.__init__"), "load_plugins"), "Engine: no plugins")
    wait = definition(engine, "_wait_for_scheduler_ready")
    at_eof = [n for n in ast.walk(wait) if isinstance(n, ast.ExceptHandler)]
    ends = any(isinstance(s, ast.Raise) for n in at_eof for s in n.body)
    want(ends, "the main process does not end when the scheduler exits")
    return "plugin"


def _patch(release: Release) -> str:
    site = patcher.Site(release.sources, release.number)
    found = patcher.find_patch(site)
    want(found, "no plugin system, and no patch")
    want(patcher.check(site, found) == "not applied", "the sources are patched")
    return "patch"


def gdn_config(release: Release) -> str:
    """Where the GDN part of a model's config comes from."""
    name = release.target.gdn_config
    if "." not in name:
        runner = release.parse("sglang.srt.model_executor.model_runner")
        found = definition(definition(runner, "ModelRunner"), name)
        decorators = [ast.unparse(d) for d in found.decorator_list]
        want(decorators == ["property"], f"ModelRunner.{name} is no property")
        return f"ModelRunner.{name}"
    module, function_name = name.rsplit(".", 1)
    found = syntax.parameters(definition(release.parse(module), function_name))
    want(found == (("model_config", targets.REQUIRED),), f"signature of {name}")
    bound = syntax.imported_from(release.parse(REGISTRY), module)
    want(function_name in bound, f"{REGISTRY} does not use {name}")
    return name


def prefill(release: Release) -> str:
    """How SGLang chooses the prefill kernel, and that the built backend shows the choice."""
    target = release.target
    init = ast.unparse(definition(release.parse(HYBRID), "HybridLinearAttnBackend.__init__"))
    want("self.linear_attn_backend = linear_attn_backend" in init, "linear_attn_backend moved")
    if target.prefill_flag == "none":
        backend = definition(release.parse(HYBRID), "GDNAttnBackend.forward_extend")
        want(syntax.calls(backend, "chunk_gated_delta_rule"), "GDNAttnBackend calls something else")
        return "Triton only"
    backend, registry = release.parse(GDN_BACKEND), release.parse(REGISTRY)
    wanted = [target.prefill_default] if target.prefill_default else []
    found = [name for name in PREFILL_DEFAULTS if syntax.definition(backend, name)]
    called = [name for name in PREFILL_DEFAULTS if syntax.calls(registry, name)]
    want(found == called == wanted, f"default of the prefill: want {wanted}, got {found}, {called}")
    init = ast.unparse(definition(backend, "GDNAttnBackend.__init__"))
    want("self.kernel_dispatcher = GDNKernelDispatcher(" in init, "kernel_dispatcher moved")
    want("req_to_token_pool.mamba_pool.mamba_cache" in init, "the state pool moved")
    made = definition(backend, "GDNKernelDispatcher.__init__")
    names = {ast.unparse(c.func) for c in ast.walk(made) if isinstance(c, ast.Call)}
    want("TritonGDNKernel" in names, "GDNKernelDispatcher makes no TritonGDNKernel")
    triton = release.parse(f"{ATTENTION}.linear.kernels.gdn_triton")
    extend = definition(triton, "TritonGDNKernel.extend")
    want(len(syntax.calls(extend, "chunk_gated_delta_rule")) == 1, "extend calls something else")
    return "FlashInfer by default" if target.prefill_default else "Triton by default"


CHECKS: dict[str, Callable[[Release], str]] = {
    check.__name__: check
    for check in (entry, wrapper, function, importers, call_site, gdn_config, prefill)
}
