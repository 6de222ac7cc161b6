"""``/trinv/status`` and ``/trinv/metrics`` on SGLang's own HTTP application, and our part of its
``/metrics``.

``attach`` runs in the main process, after SGLang has read its command line and before it serves.
With ``--tokenizer-worker-num`` above 1 other processes serve, which load no plugin: there these
routes do not exist. SGLang guards every route with its API key but ``/metrics``, which it leaves
open for scrapers; so with a key our series are in ``/metrics`` only for those who show it.

prometheus_client is imported at the first request: it decides at its import how it counts, and
SGLang names the folder for that only after ``attach``.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel
from starlette.routing import Mount

from sglang_trinv import ranks, runs, status
from sglang_trinv.config import PREFIX

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

HTTP_SERVER = "sglang.srt.entrypoints.http_server"
SERVER_SCHEMA = 1

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]


def attach(server_args: Any) -> None:
    """Add the routes for a server with these arguments."""
    run_dir = _run_dir()
    application = importlib.import_module(HTTP_SERVER).app
    application.include_router(router(run_dir))
    if getattr(server_args, "enable_metrics", False):
        application.router.routes.insert(0, _metrics_route(run_dir, server_args.api_key))


def _run_dir() -> Path:
    """Folder of this run; one is made for a server that our launcher did not start."""
    process = status.current()
    if process.run_dir is None:
        process.run_dir = runs.new_run_dir()
        os.environ[f"{PREFIX}_RUN_DIR"] = str(process.run_dir)  # schedulers inherit it
        process.update()
    return process.run_dir


class ServerStatus(BaseModel):
    """What the processes of this server on this host report.

    Attributes:
        live: every scheduler has our hook live and on the hot path.
        mismatch: what differs between ranks, or "".
        processes: the status file of each process.
    """

    server_schema: int = SERVER_SCHEMA
    live: bool
    mismatch: str
    processes: list[dict[str, Any]]


def server_status(run_dir: Path) -> ServerStatus:
    """Read the status files of a run."""
    found = [_plain(process) for process in status.read_run_dir(run_dir)]
    schedulers = _schedulers(found)
    told = [p["mismatch"] for p in schedulers if p.get("mismatch")]
    return ServerStatus(
        live=bool(schedulers) and all(_live(p) for p in schedulers),
        mismatch=told[0] if told else ranks.mismatch(schedulers),
        processes=[{k: v for k, v in p.items() if k != "file"} for p in found],
    )


def _schedulers(processes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [p for p in processes if p["role"] == "scheduler" and p["alive"]]


def _live(process: dict[str, Any]) -> bool:
    hooks = process["hooks"]
    return bool(process["on_hot_path"] and hooks and all(hook["live"] for hook in hooks))


def _plain(value: Any) -> Any:
    """``value`` with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def router(run_dir: Path) -> APIRouter:
    """A router with both routes."""
    found = APIRouter(prefix="/trinv", tags=["sglang_trinv"])

    @found.get("/status")
    def trinv_status() -> ServerStatus:
        """What sglang_trinv does in each process of this server."""
        return server_status(run_dir)

    @found.get("/metrics", response_class=PlainTextResponse)
    def trinv_metrics() -> Response:
        """The same counts for Prometheus."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return Response(generate_latest(_registry(run_dir)), media_type=CONTENT_TYPE_LATEST)

    return found


def _registry(run_dir: Path) -> CollectorRegistry:
    from prometheus_client import CollectorRegistry

    from sglang_trinv.metrics import StatusCollector

    registry = CollectorRegistry()
    registry.register(StatusCollector(lambda: _schedulers(status.read_run_dir(run_dir))))
    return registry


def _metrics_route(run_dir: Path, api_key: str | None) -> Mount:
    """SGLang's ``/metrics``, with our series for whoever shows the key. Goes before SGLang's."""
    route = Mount("/metrics", _Metrics(run_dir, api_key))
    route.path_regex = re.compile("^/metrics(?P<path>.*)$")  # as SGLang does: no redirect
    return route


class _Metrics:
    """ASGI application: the series of SGLang's processes, and ours for those who may see them."""

    def __init__(self, run_dir: Path, api_key: str | None) -> None:
        self.run_dir = run_dir
        self.api_key = api_key
        self.apps: dict[bool, Asgi] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self._app(self.allowed(scope))(scope, receive, send)

    def allowed(self, scope: Scope) -> bool:
        """Whether the server has no key, or the request carries it."""
        if not self.api_key:
            return True
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        return kind.lower() == b"bearer" and secrets.compare_digest(key, self.api_key.encode())

    def _app(self, with_ours: bool) -> Asgi:
        if with_ours not in self.apps:
            from prometheus_client import CollectorRegistry, make_asgi_app, multiprocess

            registry = _registry(self.run_dir) if with_ours else CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
            self.apps[with_ours] = make_asgi_app(registry=registry)
        return self.apps[with_ours]
