"""Imports point one way, and importing the package costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sglang_trinv

ROOT = Path(sglang_trinv.__file__).parent

# A module may import only what stands above it.
LAYERS = (
    ("errors",),
    ("config", "status", "targets", "kernels", "reference"),
    ("ops", "cache", "runs", "ranks", "inject", "targets_kda", "targets_full"),
    ("check", "warmup", "metrics"),
    ("dispatch", "selfcheck", "routes"),
    ("hooks", "prefill"),
    ("install",),
    ("install_kda", "install_full"),
    ("plugin", "patching", "bench_one_batch", "compat", "study"),
    ("maintenance",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Folders of the repository that ship inside the package but use only what anybody may use.
OUTSIDE = ("serve", "evals", "patches")
PUBLIC_TO_THEM = {
    "config", "errors", "status", "targets", "reference", "ops", "cli", "runs", "selfcheck",
    "warmup", "prefill",
}  # fmt: skip


def imports(source: str) -> set[str]:
    """First-level modules of the package that ``source`` imports at run time, at any depth."""
    tree = ast.parse(source)
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "sglang_trinv":
                found |= {alias.name for alias in node.names}
            elif (node.module or "").startswith("sglang_trinv."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("sglang_trinv.")
            }
    return {name for name in found if name in RANK or name in OUTSIDE}


def files() -> list[Path]:
    return [
        path
        for path in sorted(ROOT.rglob("*.py"))
        if path != ROOT / "__init__.py" and path.relative_to(ROOT).parts[0] not in OUTSIDE
    ]


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert layer in RANK, f"{layer} has no place in LAYERS"
    found = imports(path.read_text()) - {layer}
    if layer in ("cli", "maintenance", "compat", "study"):  # the ways into serve/ and patches/
        found -= set(OUTSIDE)
    assert {name for name in found if RANK.get(name, 99) >= RANK[layer]} == set()


@pytest.mark.parametrize("folder", OUTSIDE)
def test_the_rest_uses_only_public_modules(folder: str) -> None:
    place = ROOT.parent / folder if (ROOT.parent / folder).is_dir() else ROOT / folder
    for path in place.rglob("*.py") if place.is_dir() else ():
        if "build" not in path.relative_to(place).parts:
            assert imports(path.read_text()) <= PUBLIC_TO_THEM | set(OUTSIDE), path


def test_the_test_sees_an_upward_import() -> None:
    assert imports("from sglang_trinv.plugin import register") == {"plugin"}
    assert imports("def f():\n    from sglang_trinv import hooks, __version__") == {"hooks"}
    assert imports("import sglang_trinv.ops.methods") == {"ops"}
    assert imports("if TYPE_CHECKING:\n    from sglang_trinv.hooks import Patch") == set()


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("sglang_trinv", ("torch", "triton", "pydantic", "sglang")),
        ("sglang_trinv.plugin", ("torch", "triton", "pydantic", "sglang")),
        ("sglang_trinv.config", ("torch", "triton", "sglang")),
        ("sglang_trinv.status", ("torch", "triton", "sglang")),
        ("sglang_trinv.targets", ("torch", "triton", "sglang")),
        ("sglang_trinv.install", ("triton", "sglang")),
    ],
)
def test_importing_is_light(module: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*(n for n in {forbidden} if n in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT.parent, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.split() == []


def test_public_names_are_found_lazily() -> None:
    assert set(sglang_trinv.__all__) <= set(dir(sglang_trinv))
    for name in sglang_trinv.__all__:
        assert getattr(sglang_trinv, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'fast'"):
        sglang_trinv.fast  # noqa: B018
