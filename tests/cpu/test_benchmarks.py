"""The benchmarks' arithmetic, tables and plumbing; what only a GPU can tell is faked here."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import (
    cases,
    implementations,
    intra,
    methods,
    prefill,
    prefill_report,
    provenance,
    report,
    timing,
)
from benchmarks.cases import KDA, Case
from sglang_trinv_cpu_platform import bfloat16


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter on the CPU; every call takes as long as its name."""
    undo = bfloat16.install()
    build = cases.build

    def measure(prepare: dict, rounds: int) -> dict:
        for ready in prepare.values():
            ready()()
        times = timing.percentiles([float(n) for n in range(1, 1 + rounds)])
        return {name: {"device": times, "wall": times} for name in prepare}

    properties = SimpleNamespace(name="none", multi_processor_count=1, L2_cache_size=1)
    monkeypatch.setattr(intra, "build", lambda case: build(case, "cpu"))
    monkeypatch.setattr(intra, "chunk_indices", lambda lengths: None)
    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(timing, "peak_bytes", lambda call: 1 << 20)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: 4e12)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    yield
    undo()


SMALL = tuple(
    Case(op, lengths, 1 + (op == KDA), 2, 10)
    for op in ("solve_tril", "kkt_solve", "fwd_intra", KDA)
    for lengths in ((64,), (64, 128))
)


def stock(op: str, variant: str, x: cases.Inputs, *_: object) -> implementations.Results:
    """Wrong by 2^-8 everywhere."""
    right = implementations.truth(op, x)
    return {name: (t * (1 + 2**-8)).to(x.k.dtype) for name, t in right.items()}


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict]:
    monkeypatch.setattr(cases, "K", 16)
    monkeypatch.setattr(cases, "V", 16)
    monkeypatch.setattr(intra, "CASES", SMALL)
    monkeypatch.setattr(implementations, "find_peers", lambda *_: ("ours", "sglang"))
    for case in SMALL:
        monkeypatch.setitem(
            implementations._CALLS, (case.op, "sglang"), functools.partial(stock, case.op)
        )
    out = tmp_path / "intra-none.json"
    code = intra.main(out, None, None, None, 4, "", compile_first=False)
    return code, json.loads(out.read_text())


def test_a_run_without_peers(
    no_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    code, found = run(tmp_path, monkeypatch)
    assert code == 0
    rows = found["rows"]
    assert {(row["op"], row["variant"]) for row in rows} == {
        ("solve_tril", ""), ("kkt_solve", ""), ("fwd_intra", ""), (KDA, "fused"), (KDA, "unfused"),
    }  # fmt: skip
    assert {row["accurate"] for row in rows if row["impl"] == "ours"} == {True}
    assert {row["accurate"] for row in rows if row["impl"] == "sglang"} == {None}
    assert (rows[0]["median_us"], rows[0]["p20_us"], rows[0]["p80_us"]) == (2.5, 1.6, 3.4)
    assert {"commit", "versions", "gpu", "argv"} <= set(found["provenance"])
    assert "too inaccurate" not in capsys.readouterr().out.lower()
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (tmp_path / "intra-none.json").rename(folder / "intra-none.json")
    text = report.performance(folder)
    assert "From `benchmarks/results/intra-none.json`: " in text
    assert text.count("\n| ") == 1 + len(rows)


def test_designs_stand_in_the_order_of_their_times() -> None:
    def row(design: str, us: float, T: int = 8192, op: str = "kkt_solve") -> dict[str, Any]:
        return {
            "op": op, "design": design, "lengths": [T], "hk": 16, "hv": 32, "median_us": us
        }  # fmt: skip

    rows = [row("dense", 9), row("blocks", 5), row("blocks", 4), row("blocks", 3, T=64)]
    assert report.designs([*rows, row("other", 1, op="prefill")]).splitlines() == [
        "| kkt_solve | 1 x 8192, 16/32 | 1 x 64, 16/32 |",
        "|---|---|---|",
        "| blocks | 4.0 | 3.0 |",
        "| dense | 9.0 |  |",
    ]


def test_a_wrong_result_is_shown_and_fails(
    no_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    right = implementations.ops.kkt_solve
    monkeypatch.setattr(implementations.ops, "kkt_solve", lambda *a: right(*a) * 1.01)
    code, found = run(tmp_path, monkeypatch)
    assert code == 1
    wrong = {row["op"] for row in found["rows"] if row["accurate"] is False}
    assert wrong == {"kkt_solve"}
    assert "TOO INACCURATE" in capsys.readouterr().out


@pytest.fixture
def layer(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole layer in the interpreter; its peers answer as ours does, a little off."""

    def off(x: prefill.Call) -> torch.Tensor:
        return (prefill.ours(x).float() * (1 + 2**-8)).bfloat16()

    peers = {"sglang": off, "flashinfer": off}
    monkeypatch.setattr(prefill, "DEVICE", "cpu")
    monkeypatch.setattr(prefill, "JUDGED", (70,))
    monkeypatch.setattr(prefill, "HARD", ("near-equal keys",))
    monkeypatch.setattr(prefill, "peers", lambda *_: peers)


def test_the_whole_layer(
    layer: None, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "benchmarks" / "results" / "prefill-none.json"
    small = (((64,), 1, 2, None), ((3, 70), 1, 1, 2))
    assert prefill.main(out, small, None, None, True, 4) == 0
    found = json.loads(out.read_text())
    shape = [(r["lengths"], r["hk"], r["hv"], r["impl"]) for r in found["rows"]]
    assert shape == [
        (list(lengths), hk, hv, impl)
        for lengths, hk, hv, _ in small
        for impl in ("ours", "sglang", "flashinfer")
    ]
    fields = {"op", "dtype", "median_us", "p20_us", "p80_us", "rel_err", "wall", "peak_bytes"}
    assert all(fields <= r.keys() and 0 < r["rel_err"] < 0.02 for r in found["rows"])
    assert set(found["geometric_mean_speedup"].values()) == {1.0}
    monkeypatch.setattr(prefill_report.prefill, "wins", lambda *a: a[1] == "flashinfer")
    table = report.performance(out.parent)
    assert "| 1 x 64 | 1/2 | 2 [2, 3] |" in table
    assert "Triton 2, ours 2" in table
    assert "2 (missed) |" in table
    assert "Faster than FlashInfer, in the geometric mean, 1.00 times" in table
    assert "goal None" in capsys.readouterr().out


def test_a_wrong_layer_fails(layer: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = prefill.ours
    monkeypatch.setattr(prefill, "ours", lambda x: right(x) * 1.05)
    monkeypatch.setattr(prefill, "peers", lambda *_: {"sglang": right, "flashinfer": right})
    assert prefill.main(tmp_path / "a.json", (((64,), 1, 1, None),), None, None, True, 4) == 1


def test_methods_side_by_side(layer: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "benchmarks" / "results" / "methods-none.json"
    monkeypatch.setattr(methods, "LENGTHS", (64,))
    monkeypatch.setattr(methods, "HK", 1)
    monkeypatch.setattr(methods, "HV", 1)
    monkeypatch.setattr(methods, "METHODS", {"auto": "", "mbh_fp16": "fp16"})
    assert methods.main(out, None, None, True, 4) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [r["method"] or r["impl"] for r in rows] == ["mbh_fp16", "sglang", "flashinfer"]
    assert all(0 < r["rel_err"] < 0.1 for r in rows)
    assert "| mbh_fp16 | 2 [2, 3] |" in report.performance(out.parent)


def test_least_bytes_and_titles() -> None:
    """Against the floors of the goals: 237 MB for fwd_intra of 8192 tokens with 16/32 heads."""
    case = Case("fwd_intra", (8192,), 16, 32)
    assert case.least_bytes == 8192 * (2 * 128 * (16 + 32 + 32 + 32) + 8 * 32)
    assert Case("kkt_solve", (8192,), 16, 32).least_bytes == 8192 * (2 * 128 * 16 + 32 * (8 + 128))
    assert Case("solve_tril", (8192,), 16, 32).least_bytes == 8192 * 32 * 64 * 6
    assert case.title == "8192, 16/32"
    assert Case("fwd_intra", (128,) * 64, 16, 32).title == "64 x 128, 16/32"
    assert Case("fwd_intra", (24576, 8192), 16, 32).title == "[24576, 8192], 16/32"
    assert Case("fwd_intra", (128,) * 64, 1, 1).shortened(64).lengths == (64, 64)


def test_the_cases_are_those_of_the_goals() -> None:
    assert len(cases.CASES) == len(set(cases.CASES)) == 17
    assert all(case.at_most_us for case in cases.CASES)


def test_speed_up_is_over_sglangs_row_of_the_same_case() -> None:
    def row(impl: str, variant: str, us: float, hv: int = 32) -> dict:
        return {
            "op": KDA, "lengths": [64], "hk": hv, "hv": hv, "impl": impl, "variant": variant,
            "metadata": "none", "median_us": us, "p20_us": us, "p80_us": us, "rel_err": 1e-3,
            "wall": {"median_us": us}, "peak_bytes": 0, "least_bytes": 4e6, "at_most_us": 20,
        }  # fmt: skip

    rows = [
        row("ours", "fused", 10), row("sglang", "fused", 30), row("sglang", "unfused", 40),
        row("fla", "", 20), row("ours", "fused", 30, hv=4), row("sglang", "fused", 60, hv=4),
    ]  # fmt: skip
    found = {"provenance": {"copy_bytes_per_s": 4e12}, "rows": rows}
    lines = report.table(found).splitlines()[2:]
    assert [line.split(" | ")[7] for line in lines] == [
        "3.00",
        "1.00",
        "1.00",
        "2.00",
        "2.00",
        "1.00",
    ]
    assert [line.split(" | ")[8] for line in lines] == ["1"] * 6
    assert lines[0].endswith("| 20 |")
    assert lines[4].endswith("| 20 (missed) |")
    assert lines[1].endswith("|  |")


def test_commit_comes_from_git_or_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    (tmp_path / "COMMIT").write_text("abc\n")
    assert provenance.commit() == "abc"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["intra"], "want a CUDA GPU, found none"),
        (["nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_wrong_command_lines_end_with_one_message(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
