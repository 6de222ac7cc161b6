"""Schemathesis: our routes do what the OpenAPI document of the server says, whatever is asked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings

from sglang_trinv import routes, status

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")


OPERATIONS = ["GET /trinv/status", "GET /trinv/metrics"]


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("run")
    content = status.ProcessStatus().to_dict() | {"role": "scheduler"}
    (folder / f"scheduler-{os.getpid()}.json").write_text(json.dumps(content))
    application = FastAPI()
    application.include_router(routes.router(folder))
    return schemathesis.openapi.from_asgi("/openapi.json", application)


def test_these_are_all(schema) -> None:
    assert [found.ok().label for found in schema.get_all_operations()] == OPERATIONS


# Not through schemathesis' pytest plugin: 4.32.5 does not run under pytest 9.2.
@pytest.mark.parametrize("label", OPERATIONS)
def test_every_answer_conforms(schema, label: str) -> None:
    operation = schema[label.split()[1]][label.split()[0]]
    asked = []

    @given(case=operation.as_strategy())
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    def ask(case) -> None:
        asked.append(case)
        case.call_and_validate()

    ask()
    assert asked


def test_a_wrong_answer_would_be_seen(tmp_path: Path) -> None:
    """A status file without its fields makes the route fail, and the check say so."""
    broken = {"schema": status.SCHEMA, "role": "scheduler", "pid": os.getpid()}
    (tmp_path / "x.json").write_text(json.dumps(broken))
    application = FastAPI()
    application.include_router(routes.router(tmp_path))
    schema = schemathesis.openapi.from_asgi("/openapi.json", application)
    case = schema["/trinv/status"]["GET"].Case()
    with pytest.raises(KeyError):
        case.call_and_validate()
