"""What the status files of a server amount to."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest

from sglang_trinv.serve import demo, health, report
from sglang_trinv.serve.config import ServeConfig, ServeError, free_port


def status(**changed: Any) -> dict[str, Any]:
    """A scheduler that is as it should be on the CPU."""
    calls = {"triton": 0, "triton-interpreter": 6, "torch": 0}
    check = {"wanted": 4, "done": 4, "disagreements": 0, "worst": {"w": 0.001, "u": 0.002}}
    good = {
        "schema": 1,
        "pid": os.getpid(),
        "role": "scheduler",
        "alive": True,
        "state": "installed",
        "reason": "",
        "layers": {"gdn": 3, "kda": None},
        "prefill_backend": "triton",
        "on_hot_path": True,
        "hooks": [{"target": "a.b", "importers": [], "live": True}],
        "calls": {"fwd_intra": calls},
        "fallbacks": {},
        "check": check,
    }
    return good | changed


def counts(**calls: int) -> dict[str, dict[str, int]]:
    return {"fwd_intra": {"triton": 0, "triton-interpreter": 0, "torch": 0} | calls}


def judge(statuses, new_calls=3, device="cpu", kernels="ours"):
    return health.judge(statuses, ServeConfig(device=device, kernels=kernels), new_calls)


def test_live():
    assert judge([status()]).kind == "live"
    assert judge([status(calls=counts(triton=5))], device="cuda").kind == "live"


@pytest.mark.parametrize(
    ("statuses", "message"),
    [
        ([], "plugin was not loaded"),
        ([status(state="registered", reason="no model")], "state registered.*no model"),
        ([status(state="refused", reason="too old")], "state refused.*too old"),
        ([status(state="failed", reason="boom")], "state failed.*boom"),
        ([status(state="off")], "state off"),
        ([status(hooks=[{"target": "a.b", "live": False}])], r"hook not live.*a\.b"),
        ([status(hooks=[])], "hook not live"),
        ([status(calls=counts(torch=1))], "plain torch answered 1 calls"),
        ([status(), status(state="failed", reason="boom")], "boom"),
    ],
)
def test_errors(statuses, message):
    verdict = judge(statuses)
    assert verdict.kind == "error"
    assert re.search(message, verdict.message)


def test_calls_of_another_implementation_do_not_count():
    """The interpreter's calls on a CUDA machine are no proof; nor are calls before the request."""
    assert judge([status()], device="cuda", new_calls=0).kind == "error"
    assert judge([status()], new_calls=0).kind == "error"


def test_idle():
    verdict = judge([status(state="idle", reason="no GDN layer", hooks=[])], new_calls=0)
    assert verdict.kind == "idle"
    assert "no GDN layer" in verdict.message


def test_off_the_hot_path():
    found = status(on_hot_path=False, prefill_backend="flashinfer", calls=counts())
    verdict = judge([found], new_calls=0, device="cuda")
    assert verdict.kind == "off-path"
    assert "flashinfer" in verdict.message


def test_stock():
    assert judge([], kernels="stock").kind == "stock"
    assert judge([status(state="off", calls=counts())], kernels="stock").kind == "stock"
    assert judge([status()], kernels="stock").kind == "error"


def test_verify_waits_for_the_file(tmp_path, monkeypatch):
    """The counts are written up to a second after the request."""
    monkeypatch.setattr(health, "COUNT_DELAY_S", 5.0)
    looks = []
    monkeypatch.setattr(health.time, "sleep", lambda s: looks.append(s) or write(8))

    def write(n):
        found = status(calls=counts(**{"triton-interpreter": n}))
        (tmp_path / "scheduler-1.json").write_text(json.dumps(found))

    write(5)
    verdict = health.verify(ServeConfig(device="cpu"), tmp_path, request=lambda config: None)
    assert verdict.kind == "live"
    assert len(looks) == 1


def test_no_server():
    config = ServeConfig(device="cpu", port=free_port())
    assert not health.ready(config.url, timeout_s=1)
    with pytest.raises(ServeError, match="does not answer"):
        health.short_request(config)


def test_report():
    lines = "\n".join(report.processes([status(fallbacks={"dtype float32": 2})]))
    assert "fwd_intra 6 by triton-interpreter" in lines
    assert "hook live" in lines
    assert "2 answered by stock: dtype float32" in lines
    assert "4 of the first 4 calls" in lines
    lines = "\n".join(report.processes([status(hooks=[], on_hot_path=False, alive=False)]))
    assert "hook DEAD, not on the hot path" in lines
    assert "(gone)" in lines


def test_demo_is_content_only_with_our_kernel():
    assert demo.problems_of([status()], "triton-interpreter") == []
    check = status()["check"]
    for bad in (
        [],
        [status(calls=counts())],
        [status(calls=counts(torch=2, **{"triton-interpreter": 2}))],
        [status(fallbacks={"x": 1})],
        [status(check=check | {"done": 0})],
        [status(check=check | {"disagreements": 1})],
    ):
        assert demo.problems_of(bad, "triton-interpreter")
