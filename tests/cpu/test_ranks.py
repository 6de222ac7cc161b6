"""What ranks tell each other, and how a difference is said."""

from __future__ import annotations

import multiprocessing
import socket
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from sglang_trinv import ranks, status


def report(rank: int, **changes: Any) -> dict[str, Any]:
    return {
        "rank": rank, "title": f"sglang::scheduler_TP{rank}", "version": "0.1.0",
        "release": "0.5.20", "method": "auto", "state": "installed", "prefill_backend": "triton",
        **changes,
    }  # fmt: skip


def test_equal_ranks() -> None:
    assert ranks.mismatch([report(0), report(1)]) == ""
    assert ranks.mismatch([]) == ""


@pytest.mark.parametrize("field", ranks.COMPARED)
def test_the_first_difference_is_named(field: str) -> None:
    said = ranks.mismatch([report(0), report(1), report(2, **{field: "other"})])
    assert said.startswith(f"{field} differs between ranks: ")
    assert said.endswith("in scheduler_TP0, scheduler_TP1; other in scheduler_TP2")


def test_a_silent_rank_comes_first() -> None:
    silent = {"rank": 2, "state": "silent", "reason": ranks.MISSING}
    said = ranks.mismatch([report(0), report(1, version="0.2"), silent])
    assert said == f"rank 2 {ranks.MISSING}"


def test_exchange_waits_once_for_all_that_are_silent() -> None:
    store = dist.HashStore()
    assert ranks.exchange(store, 2, 4, report(2)) == []
    found = ranks.exchange(store, 0, 4, report(0), timeout_s=0.2)
    assert [r["state"] for r in found] == ["installed", "silent", "installed", "silent"]


def test_one_process_has_nobody_to_compare_with(process: object) -> None:
    assert ranks.compare(strict=True) == ""


def _rank(rank: int, port: int, methods: list[str], strict: bool, results: Any) -> None:
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    status.reset().update(method=methods[rank], state="installed")
    try:
        said = ranks.compare(strict)
        results.put((rank, said, status.current().fields["ranks"], ""))
    except ranks.RankMismatch as error:
        results.put((rank, "", [], str(error)))
    dist.barrier()
    dist.destroy_process_group()


def run_two(methods: list[str], strict: bool) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [
        context.Process(target=_rank, args=(i, port, methods, strict, results)) for i in range(2)
    ]
    for worker in workers:
        worker.start()
    found = sorted(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(60)
    return found


@pytest.mark.parametrize("strict", [False, True])
def test_two_processes_of_one_world(strict: bool) -> None:
    (_, said, seen, error), (_, nothing, _, _) = run_two(["mbh_fp16", "mbh_tf32"], strict)
    wanted = "method differs between ranks: mbh_fp16 in rank 0; mbh_tf32 in rank 1"
    assert (error if strict else said) == wanted
    assert nothing == ""
    if not strict:
        assert [r["method"] for r in seen] == ["mbh_fp16", "mbh_tf32"]


def test_two_equal_processes_in_strict_mode() -> None:
    (_, said, seen, error), _ = run_two(["auto", "auto"], strict=True)
    assert (said, error, len(seen)) == ("", "", 2)
