"""Small questions to a syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from sglang_trinv.targets import REQUIRED


def definition(tree: ast.AST, name: str) -> ast.FunctionDef | ast.ClassDef | None:
    """The function or class ``name`` anywhere in ``tree``; "Class.method" for a method."""
    first, _, rest = name.partition(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == first:
            return definition(node, rest) if rest else node
    return None


def parameters(function: ast.FunctionDef) -> tuple[tuple[str, Any], ...]:
    """Names and defaults as in ``targets.parameters_of``: values, or else the source's words."""
    given = function.args
    plain = [*given.posonlyargs, *given.args]
    missing = len(plain) - len(given.defaults)
    defaults = [REQUIRED] * missing + [_default(node) for node in given.defaults]
    found = list(zip((argument.arg for argument in plain), defaults, strict=True))
    found += [(f"*{given.vararg.arg}", REQUIRED)] if given.vararg else []
    for argument, node in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        found.append((argument.arg, REQUIRED if node is None else _default(node)))
    found += [(f"**{given.kwarg.arg}", REQUIRED)] if given.kwarg else []
    return tuple(found)


def _default(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        text = ast.unparse(node)
        return "torch.float32" if text == "torch.float" else text  # one dtype, two names


def calls(tree: ast.AST, name: str) -> list[ast.Call]:
    """Calls of the bare name ``name``."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]


def handlers(tree: ast.AST) -> list[str]:
    """What each ``except`` clause catches; "everything" for a bare one."""
    return [
        ast.unparse(node.type) if node.type else "everything"
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
    ]


def imported_from(tree: ast.AST, module: str) -> dict[str, str]:
    """Names bound at module level by ``from module import name``: local name -> name."""
    assert isinstance(tree, ast.Module)
    return {
        alias.asname or alias.name: alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module == module
        for alias in node.names
    }


def enclosing_tries(tree: ast.AST, node: ast.AST) -> Iterator[ast.Try]:
    """The ``try`` statements whose body (not handlers) holds ``node``."""
    for candidate in ast.walk(tree):
        if isinstance(candidate, ast.Try) and any(
            inner is node for statement in candidate.body for inner in ast.walk(statement)
        ):
            yield candidate
