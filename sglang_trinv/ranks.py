"""Do all ranks of a server run the same thing? Each rank says what it runs; rank 0 compares.

The ranks of one torch.distributed world, on one host or several, exchange their reports through
its key-value store. That is no collective call: a rank without the plugin, which is one of the
mistakes to be found, costs a timeout and not a hang.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Protocol

from sglang_trinv import status
from sglang_trinv.errors import TrinvError

COMPARED = ("version", "release", "method", "state", "prefill_backend")
REPORTED = ("rank", "world", "title", "sm", "reason", *COMPARED)
TIMEOUT_S = 60.0  # ranks come here together: they have just loaded one model
MISSING = "does not report: the plugin is not loaded or switched off there"


class RankMismatch(TrinvError):
    """The ranks of a server do not run the same version, release or method."""


class Store(Protocol):
    """What is used of torch.distributed's store."""

    def set(self, key: str, value: str) -> None: ...  # noqa: D102
    def get(self, key: str) -> bytes: ...  # noqa: D102
    def wait(self, keys: list[str], timeout: timedelta) -> None: ...  # noqa: D102


def report(process: dict[str, Any]) -> dict[str, Any]:
    """What one rank tells the others, out of its status."""
    return {"host": socket.gethostname(), **{name: process.get(name) for name in REPORTED}}


def exchange(
    store: Store, rank: int, world: int, own: dict[str, Any], timeout_s: float = TIMEOUT_S
) -> list[dict[str, Any]]:
    """Publish this rank's report; on rank 0 return all, a rank that is silent with state "silent".

    Returns:
        One report a rank, in their order; an empty list on the other ranks.
    """
    store.set(_key(rank), json.dumps(own))
    if rank:
        return []
    found = [own]
    for other in range(1, world):
        try:
            store.wait([_key(other)], timedelta(seconds=timeout_s))
            found.append(json.loads(store.get(_key(other))))
        except Exception:  # the store's timeout has another type in every torch
            found.append({"rank": other, "state": "silent", "reason": MISSING})
            timeout_s = min(timeout_s, 1.0)  # it has waited for all of them
    return found


def _key(rank: int) -> str:
    return f"sglang_trinv/{rank}"


def mismatch(reports: Iterable[dict[str, Any]]) -> str:
    """One line that names the first thing in which the ranks differ, or ""."""
    reports = list(reports)
    silent = [str(r["rank"]) for r in reports if r["state"] == "silent"]
    if silent:
        return f"rank {', '.join(silent)} {MISSING}"
    for field in COMPARED:
        values: dict[str, list[str]] = {}
        for r in reports:
            values.setdefault(str(r.get(field)), []).append(_name(r))
        if len(values) > 1:
            said = "; ".join(f"{value} in {', '.join(who)}" for value, who in values.items())
            return f"{field} differs between ranks: {said}"
    return ""


def _name(report: dict[str, Any]) -> str:
    title = str(report.get("title") or "").removeprefix("sglang::")
    return title or f"rank {report.get('rank')}"


def compare(strict: bool, timeout_s: float = TIMEOUT_S) -> str:
    """Exchange reports with the other ranks of this process's world, if there are any.

    Puts what rank 0 found into its status.

    Returns:
        What differs, on rank 0; otherwise "".
    Raises:
        RankMismatch: in strict mode, on rank 0, if something differs.
    """
    import torch.distributed

    process = status.current()
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return ""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    process.update(rank=rank, world=world)
    if world == 1:
        return ""
    store = torch.distributed.distributed_c10d._get_default_store()
    found = exchange(store, rank, world, report(process.to_dict()), timeout_s)
    said = mismatch(found)
    if found:
        process.update(ranks=found, mismatch=said)
    if said and strict:
        raise RankMismatch(said)
    return said
