"""Our routes on an application like SGLang's, with SGLang's own key check where it is installed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from sglang_trinv import routes, status

KEY = "sesame"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Status files of a living scheduler, a dead one and the main process."""
    for role, pid, title in (
        ("scheduler", os.getpid(), "sglang::scheduler_TP0"),
        ("scheduler", 2**22 + 1, "sglang::scheduler_TP1"),
        ("main", os.getpid(), ""),
    ):
        process = status.ProcessStatus()
        process.fields.update(version="0.1.0", release="0.5.20", method="auto", state="installed")
        process.fields.update(on_hot_path=True, prefill_backend="triton")
        process.fields["self_check"] = {"worst_ratio": 0.25}
        process.hooks = lambda: [{"target": "x", "importers": [], "live": True}]
        for _ in range(7):
            process.count_call("fwd_intra", "triton")
        process.count_fallback('size 3 "is" odd')
        process.check.update(done=5, disagreements=2, tolerance=float("inf"))
        content = process.to_dict() | {"role": role, "pid": pid, "title": title}
        (tmp_path / f"{role}-{pid}.json").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def application(monkeypatch: pytest.MonkeyPatch, forget_sglang: None) -> FastAPI:
    made = FastAPI()
    module = ModuleType(routes.HTTP_SERVER)
    module.app = made
    parts = routes.HTTP_SERVER.split(".")
    for n in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:n]), ModuleType(".".join(parts[:n])))
    monkeypatch.setitem(sys.modules, routes.HTTP_SERVER, module)
    return made


@pytest.fixture
def client(application: FastAPI, run_dir: Path, process: object) -> Iterator[TestClient]:
    status.current().run_dir = run_dir
    routes.attach(SimpleNamespace(enable_metrics=False, api_key=None))
    with TestClient(application) as made:
        yield made


def series(text: str) -> dict[tuple[str, ...], float]:
    """{(name, label values in the order of their names): value} of our metrics."""
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_status(client: TestClient, run_dir: Path) -> None:
    answer = client.get("/trinv/status")
    assert answer.status_code == 200
    found = answer.json()
    assert found["live"] is True
    assert [p["alive"] for p in found["processes"]].count(True) == 2
    assert found["processes"][0]["check"]["tolerance"] is None  # JSON has no infinity
    assert str(run_dir) not in answer.text


def test_status_is_not_live_when_a_hook_is_gone(client: TestClient, run_dir: Path) -> None:
    path = run_dir / f"scheduler-{os.getpid()}.json"
    content = json.loads(path.read_text())
    content["hooks"][0]["live"] = False
    path.write_text(json.dumps(content))
    assert client.get("/trinv/status").json()["live"] is False
    path.unlink()
    assert client.get("/trinv/status").json()["live"] is False  # nobody reports


def test_metrics_are_the_counts_of_living_schedulers(client: TestClient) -> None:
    found = series(client.get("/trinv/metrics").text)
    assert found["sglang_trinv_calls_total", "triton", "fwd_intra", "scheduler_TP0"] == 7
    assert found["sglang_trinv_fallbacks_total", "scheduler_TP0", 'size 3 "is" odd'] == 1
    assert found["sglang_trinv_checks_total", "scheduler_TP0", "agreements"] == 3
    assert found["sglang_trinv_live", "scheduler_TP0"] == 1
    assert found["sglang_trinv_self_check_ratio", "scheduler_TP0"] == 0.25
    assert not [key for key in found if "scheduler_TP1" in key or "main" in key]


def test_no_metrics_without_the_flag(client: TestClient) -> None:
    assert client.get("/metrics").status_code == 404


@pytest.mark.parametrize(
    ("key", "authorization", "ours"),
    [
        (None, None, True),
        (KEY, None, False),
        (KEY, "Bearer wrong", False),
        (KEY, f"Basic {KEY}", False),
        (KEY, "Bearer ", False),
        (KEY, f"Bearer {KEY}", True),
        (KEY, f"bearer {KEY}", True),
    ],
)
def test_sglangs_metrics_hold_ours_for_who_has_the_key(
    application: FastAPI, run_dir: Path, process: object, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch, key: str | None, authorization: str | None, ours: bool,
) -> None:  # fmt: skip
    folder = str(tmp_path_factory.mktemp("prometheus"))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", folder)
    status.current().run_dir = run_dir
    routes.attach(SimpleNamespace(enable_metrics=True, api_key=key))
    headers = {"Authorization": authorization} if authorization else {}
    answer = TestClient(application).get("/metrics", headers=headers, follow_redirects=False)
    assert answer.status_code == 200
    assert ("sglang_trinv_calls_total" in answer.text) is ours


def test_a_run_folder_is_made_for_a_server_that_was_started_without_our_launcher(
    application: FastAPI, process: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("SGLANG_TRINV_RUN_DIR", "")  # restored after the test
    routes.attach(SimpleNamespace(enable_metrics=False, api_key=None))
    made = Path(os.environ["SGLANG_TRINV_RUN_DIR"])
    assert made.parent.parent == tmp_path
    assert [json.loads(file.read_text())["role"] for file in made.glob("*.json")] == ["main"]
