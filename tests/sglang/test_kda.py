"""KDA's row of the table and its adapter against the sources of every release that has one."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sglang_trinv import dispatch, hooks, status, targets, targets_kda
from sglang_trinv.compat import syntax
from sglang_trinv.config import Config

Parse = Callable[[str], ast.Module]
pytestmark = [
    pytest.mark.parametrize("release", targets_kda.RELEASES),
    pytest.mark.filterwarnings("ignore:Triton is not supported on current platform"),
]


@pytest.fixture
def parsed(sources: Path) -> Parse:
    """Parse a dotted module of the release."""
    return lambda name: ast.parse((sources / f"{name.replace('.', '/')}.py").read_text())


@pytest.fixture
def without_norms(installed_release: str, target: targets.Target) -> None:
    """The gated norms, which kda.py imports, need much of the server."""
    fake = ModuleType("fused_norm_gate")
    fake.layer_norm_gated_fwd = None
    sys.modules[f"{target.fla}.fused_norm_gate"] = fake


@pytest.fixture
def target(release: str) -> targets.Target:
    return targets_kda.find(release)


def test_signature_and_holders(
    release: str, target: targets.Target, sources: Path, parsed: Parse
) -> None:
    function = syntax.definition(parsed(target.holders[0]), target.function)
    assert syntax.parameters(function) == target.parameters
    bound = syntax.imported_from(parsed(target.holders[1]), target.holders[0])
    assert bound[target.function] == target.function
    root = sources / target.fla.replace(".", "/")
    mentioning = {p.stem for p in root.rglob("*.py") if f"{target.function}(" in p.read_text()}
    assert mentioning == {target.module, *target.importers}


def test_the_caller_uses_keywords_and_drops_akk(
    release: str, target: targets.Target, parsed: Parse
) -> None:
    tree = parsed(target.holders[1])
    (call,) = syntax.calls(tree, target.function)
    assert not call.args
    assert {keyword.arg for keyword in call.keywords} <= {name for name, _ in target.parameters}
    (kept,) = (
        node.targets[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and node.value is call
    )
    assert ast.unparse(kept) == "(w, u, _, kg, Aqk, _)"


def test_sglang_hands_gates_in_base_2(release: str, target: targets.Target, parsed: Parse) -> None:
    text = ast.unparse(parsed(target.holders[1]))
    assert "RCP_LN2" in text
    assert "exp2(" in ast.unparse(parsed(target.holders[0]))


def test_resolves_and_is_replaced_where_sglang_calls_it(
    installed_release: str,
    target: targets.Target,
    without_norms: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stock, modules = targets.resolve(target)
    assert [module.__name__ for module in modules] == list(target.holders)
    patch = hooks.Patch(target, modules, stock)
    monkeypatch.setattr(
        dispatch.ops, "chunk_kda_fwd_intra", lambda q, k, v, *_, **__: (k, v, None, k, q, None)
    )
    adapter = hooks.kda_intra_adapter(stock, Config())
    patch.apply(adapter)
    assert patch.live()
    assert targets.parameters_of(adapter) == target.parameters
    x = torch.zeros(1, 4, 1, 16).bfloat16()
    assert modules[1].chunk_kda_fwd_intra(q=x, k=x, v=x, safe_gate=True)[5] is None
    assert sum(status.current().calls["kda_intra"].values()) == 1
    patch.undo()
    assert modules[1].chunk_kda_fwd_intra is stock
