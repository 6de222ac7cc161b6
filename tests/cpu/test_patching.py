"""``patched()`` on fla-core: which calls reach our kernels, how close they come, the way back."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

from sglang_trinv import patching
from sglang_trinv.errors import TargetMissing

SLACK = 1.2
OPS = {
    "gdn 64": "fwd_intra",
    "gdn 32": "solve_tril",
    "gdn 16": "solve_tril",
    "deltanet": "solve_tril",
    "kda": "kda_intra",
    "rwkv7 16": "dplr_inverse",
    "rwkv7 64": "dplr_inverse",
    "rwkv7 64 safe gate": "dplr_inverse",
}
DIFFERENTIATED = ("gdn 64", "gdn 32", "gdn 16", "deltanet", "kda")

# Holds before, inside and after; a module first imported inside; an exception; twice.
SWAPS = """
import json, sys
from tests.cpu.fla_layers import prepare
prepare()
from sglang_trinv import TrinvError, patched, patching

def holders():
    return sorted(
        f"{name}.{key}" for name, module in sys.modules.items() if name.startswith("fla")
        for key, value in vars(module).items() if getattr(value, patching.MARK, False)
    )

out = {"before": holders()}
sys.modules.pop("fla.ops.comba.chunk", None)
try:
    with patched():
        out["inside"] = holders()
        import fla.ops.comba.chunk
        out["later import"] = holders()
        try:
            with patched():
                pass
        except TrinvError as error:
            out["twice"] = str(error)
        out["still"] = holders() == out["later import"]
        raise KeyError("of the user")
except KeyError:
    out["after"] = holders()
print(json.dumps(out))
"""


def program(*arguments: str) -> dict:
    """What a program in a process of its own printed last."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def fla() -> str:
    for name in ("fla-core", "sglang-trinv-cpu-platform"):
        try:
            release = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed here")
        if name == "fla-core" and release not in patching.FLA_RELEASES:
            pytest.skip(f"fla-core {release} is not one of {patching.FLA_RELEASES}")
    return importlib.metadata.version("fla-core")


@pytest.fixture(scope="module")
def layers(fla: str) -> dict:
    return program("-m", "tests.cpu.fla_layers")


@pytest.mark.parametrize("layer", OPS)
def test_layer_calls_our_kernel(layers: dict, layer: str) -> None:
    assert layers[layer]["calls"] == {OPS[layer]: 1}


@pytest.mark.parametrize("part", ["o", "dk"])
@pytest.mark.parametrize("layer", OPS)
def test_layer_is_as_close_to_float64_as_with_flas_kernels(
    layers: dict, layer: str, part: str
) -> None:
    errors = layers[layer]["errors"]
    assert set(errors) == ({"o", "dk"} if layer in DIFFERENTIATED else {"o"})
    if part in errors:
        found = errors[part]
        assert 0 < found["ours"] <= SLACK * max(found["stock"], found["rounding"])


def test_safe_gates_products_of_powers_lose_what_ours_keeps(layers: dict) -> None:
    """On near-equal keys fla's fp16 powers of A are 20 times further off (docs/fla.md)."""
    errors = layers["rwkv7 64 safe gate"]["errors"]["o"]
    assert errors["stock"] > 10 * errors["ours"]


@pytest.fixture(scope="module")
def swaps(fla: str) -> dict:
    return program("-c", SWAPS)


def test_every_holder_is_replaced_and_put_back(swaps: dict) -> None:
    assert swaps["before"] == swaps["after"] == []
    assert {
        "fla.ops.utils.solve_tril",
        "fla.ops.utils.solve_tril.solve_tril",
        "fla.ops.delta_rule.wy_fast.solve_tril",
        "fla.ops.gated_delta_rule.chunk.chunk_gated_delta_rule_fwd_intra",
        "fla.ops.gated_delta_rule.chunk_fwd.solve_tril",
        "fla.ops.kda.chunk_fwd.chunk_kda_fwd_intra",
        "fla.ops.generalized_delta_rule.dplr.chunk.prepare_wy_repr_fwd",
    } <= set(swaps["inside"])


def test_what_is_imported_inside_is_put_back_too(swaps: dict) -> None:
    assert "fla.ops.comba.chunk.solve_tril" not in swaps["inside"]
    assert "fla.ops.comba.chunk.solve_tril" in swaps["later import"]


def test_twice_is_refused_and_changes_nothing(swaps: dict) -> None:
    assert swaps["twice"].endswith("solve_tril is already patched")
    assert swaps["still"]


def test_another_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching.importlib.metadata, "version", lambda name: "0.5.0")
    with pytest.raises(TargetMissing, match=r"fla-core: want 0.6.0, got 0.5.0"), patching.patched():
        pass


def test_without_fla(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(patching.importlib.metadata, "version", version)
    with pytest.raises(TargetMissing, match="fla-core is not installed"), patching.patched():
        pass


def test_a_wrong_method_is_refused_before_anything_is_touched() -> None:
    with pytest.raises(Exception, match="method"), patching.patched(method="fastest"):
        pass
