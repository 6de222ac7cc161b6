"""Each release's sources say what the table and the adapters assume. Nothing of SGLang is run."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path

from sglang_trinv import hooks, targets
from sglang_trinv.config import Config
from tests.sglang import syntax

Parse = Callable[[str], ast.Module]
REGISTRY = "sglang.srt.layers.attention.attention_registry"
GDN_BACKEND = "sglang.srt.layers.attention.linear.gdn_backend"
XPU = "sglang/srt/hardware_backend/xpu/kernels/fla/chunk_fwd.py"  # refused: not a CUDA device


def test_function_has_the_expected_signature(target: targets.Target, parsed: Parse) -> None:
    function = syntax.definition(parsed(target.holders[0]), target.function)
    expected = tuple(
        (name, syntax.NO_DEFAULT if default is targets.REQUIRED else default)
        for name, default in target.parameters
    )
    assert syntax.parameters(function) == expected


def test_adapter_has_the_same_signature(target: targets.Target) -> None:
    adapter = hooks.ADAPTERS[target.adapter](lambda: None, Config())
    del adapter.__wrapped__
    assert targets.parameters_of(adapter) == target.parameters
    assert adapter.__module__ == "tests.sglang.test_sources"  # functools.wraps: stock's identity


def test_only_the_listed_modules_hold_the_function(
    target: targets.Target, sources: Path, parsed: Parse
) -> None:
    holders = {name.replace(".", "/") + ".py" for name in target.holders}
    mentioning = {
        path.relative_to(sources).as_posix()
        for path in sources.rglob("*.py")
        if target.function in path.read_text()
    }
    assert mentioning - {XPU} == holders
    for importer in target.holders[1:]:
        bound = syntax.imported_from(parsed(importer), target.holders[0])
        assert bound[target.function] == target.function


def test_call_site_uses_keywords_and_only_w_and_u(target: targets.Target, parsed: Parse) -> None:
    chunk = parsed(target.holders[1])
    (call,) = syntax.calls(chunk, target.function)
    assert not call.args
    assert {keyword.arg for keyword in call.keywords} <= {name for name, _ in target.parameters}
    caller = syntax.definition(chunk, "chunk_gated_delta_rule_fwd")
    returns = [node for node in ast.walk(caller) if isinstance(node, ast.Return)]
    uses = [n for n in ast.walk(caller) if isinstance(n, ast.Name) and n.id == "A"]
    assert len(uses) == 1 + len(returns)  # bound once, and handed on
    forward = syntax.definition(chunk, "ChunkGatedDeltaRuleFunction.forward")
    names = [n for n in ast.walk(forward) if isinstance(n, ast.Name)]
    dropped = [n for n in names if n.id in ("A", "w", "v_new")]
    assert [type(n.ctx) for n in dropped] == [ast.Store] * 3


def test_suppress_level_says_whether_intermediates_leave(
    target: targets.Target, parsed: Parse
) -> None:
    text = ast.unparse(parsed(f"{target.fla}.utils"))
    assert "SUPPRESS_LEVEL = int(os.getenv('GDN_RECOMPUTE_SUPPRESS_LEVEL', '0'))" in text


def test_attention_wrapper_and_who_calls_it(sources: Path, parsed: Parse) -> None:
    module, name = targets.ATTENTION_WRAPPER.rsplit(".", 1)
    assert module == REGISTRY
    wrapper = syntax.definition(parsed(module), name)
    assert syntax.parameters(wrapper) == (
        ("runner", syntax.NO_DEFAULT),
        ("full_attn_backend", syntax.NO_DEFAULT),
    )
    callers = [
        path
        for path in sources.rglob("*.py")
        if f"{name}(" in path.read_text() and path.name != "attention_registry.py"
    ]
    assert callers
    for path in callers:  # bound by name at import: SGLang's registry rebinds it there too
        assert syntax.imported_from(ast.parse(path.read_text()), module)[name] == name


def test_nothing_between_the_hook_and_the_interpreter_swallows_system_exit(parsed: Parse) -> None:
    plugins = parsed("sglang/srt/plugins/__init__.py")
    for function in ("load_plugins", "load_plugins_by_group"):
        assert set(syntax.handlers(syntax.definition(plugins, function))) == {"Exception"}
    scheduler = syntax.definition(parsed("sglang.srt.managers.scheduler"), "run_scheduler_process")
    assert set(syntax.handlers(scheduler)) == {"Exception"}
    (load,) = syntax.calls(scheduler, "load_plugins")
    assert not list(syntax.enclosing_tries(scheduler, load))
    for name in ("sglang.cli.serve", "sglang.launch_server"):
        tree = parsed(name)
        (load,) = syntax.calls(tree, "load_plugins")
        assert not list(syntax.enclosing_tries(tree, load))


def test_main_process_ends_when_the_scheduler_exits(parsed: Parse) -> None:
    engine = parsed("sglang.srt.entrypoints.engine")
    wait = syntax.definition(engine, "_wait_for_scheduler_ready")
    (at_eof,) = (n for n in ast.walk(wait) if isinstance(n, ast.ExceptHandler))
    assert ast.unparse(at_eof.type) == "EOFError"
    assert [type(statement) for statement in at_eof.body] == [ast.Raise]


def test_where_the_gdn_config_comes_from(target: targets.Target, parsed: Parse) -> None:
    if "." in target.gdn_config:
        module, name = target.gdn_config.rsplit(".", 1)
        assert syntax.parameters(syntax.definition(parsed(module), name)) == (
            ("model_config", syntax.NO_DEFAULT),
        )
        assert name in syntax.imported_from(parsed(REGISTRY), module)
    else:
        runner = syntax.definition(parsed("sglang.srt.model_executor.model_runner"), "ModelRunner")
        function = syntax.definition(runner, target.gdn_config)
        assert [ast.unparse(d) for d in function.decorator_list] == ["property"]


def test_how_sglang_may_choose_flashinfer_itself(target: targets.Target, parsed: Parse) -> None:
    known = ("maybe_set_default_flashinfer_gdn_prefill", "flashinfer_gdn_prefill_default")
    backend, registry = parsed(GDN_BACKEND), parsed(REGISTRY)
    found = [name for name in known if syntax.definition(backend, name)]
    assert found == [name for name in (target.prefill_default,) if name]
    called = [name for name in known if syntax.calls(registry, name)]
    assert called == found


def test_backend_object_shows_the_prefill_kernel(parsed: Parse) -> None:
    hybrid = parsed("sglang.srt.layers.attention.hybrid_linear_attn_backend")
    init = syntax.definition(hybrid, "HybridLinearAttnBackend.__init__")
    assert "self.linear_attn_backend = linear_attn_backend" in ast.unparse(init)
    backend = parsed(GDN_BACKEND)
    init = ast.unparse(syntax.definition(backend, "GDNAttnBackend.__init__"))
    assert "self.kernel_dispatcher = GDNKernelDispatcher(" in init
    assert "req_to_token_pool.mamba_pool.mamba_cache" in init  # so the pool exists by then
    dispatcher = syntax.definition(backend, "GDNKernelDispatcher.__init__")
    made = {ast.unparse(c.func) for c in ast.walk(dispatcher) if isinstance(c, ast.Call)}
    assert {"TritonGDNKernel", "FlashInferGDNKernel"} <= made
    triton = parsed("sglang.srt.layers.attention.linear.kernels.gdn_triton")
    extend = syntax.definition(triton, "TritonGDNKernel.extend")
    assert len(syntax.calls(extend, "chunk_gated_delta_rule")) == 1


def test_the_table_names_every_release_once() -> None:
    assert len(set(targets.RELEASES)) == len(targets.RELEASES) == 16
    assert inspect.signature(targets.find).return_annotation == "Target"
