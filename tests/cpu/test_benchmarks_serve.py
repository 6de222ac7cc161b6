"""`python -m benchmarks serve`: everything but the servers."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks import serve, serve_models, serve_profile, serve_report
from sglang_trinv.errors import TargetMissing
from sglang_trinv.serve.tiny_model import layout

ROOT = Path(__file__).parents[2]
PLAN = serve.Plan("qwen3.5-4b", ("triton", "intra"), requests=4)


def test_the_clients_command_line_is_sglangs() -> None:
    assert importlib.util.find_spec("sglang"), "SGLang is not installed"
    words = serve.words(PLAN, "http://x", Path("model"), 2048, 16, 1)
    assert words[words.index("--num-prompts") + 1] == "16"
    folder = Path(importlib.util.find_spec("sglang").origin).parent
    source = (folder / "benchmark" / "serving.py").read_text()
    for word in words:
        assert not word.startswith("--") or f'"{word}"' in source


@pytest.mark.parametrize("name", serve_models.SHAPES)
def test_models(name: str, tmp_path: Path) -> None:
    made = json.loads((serve_models.write(name, tmp_path / "m") / "config.json").read_text())
    text = made["text_config"]
    assert text["layer_types"].count("linear_attention") * 4 == text["num_hidden_layers"] * 3
    assert made["vision_config"]["out_hidden_size"] == text["hidden_size"]
    rotated = text["head_dim"] * text["rope_parameters"]["partial_rotary_factor"]
    assert sum(text["rope_parameters"]["mrope_section"]) * 2 == rotated
    assert text["max_position_embeddings"] > max(serve.LENGTHS)
    assert layout.config("conditional")["text_config"]["hidden_size"] == layout.HIDDEN  # untouched


def test_arms_differ_by_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.serve_config, "detect_device", lambda: "cuda")
    made = {arm: serve.arm_config(PLAN, arm, Path("m")) for arm in serve.ARMS}
    assert made["triton"][0].extra == made["intra"][0].extra == made["full"][0].extra
    assert made["triton"][1] == {}
    assert made["full"][1] == {"SGLANG_TRINV_STRICT": "1", "SGLANG_TRINV_GDN": "full"}
    different = set(made["flashinfer"][0].extra) ^ set(made["triton"][0].extra)
    assert different == {"flashinfer", "triton"}


def test_an_arm_that_cannot_start_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reason: a release that is not in the table is none of the server's errors."""
    stopped = []

    class FakeServer:
        def __init__(self, config: object, run_dir: object, environ: dict[str, str]) -> None:
            self.gdn = environ.get("SGLANG_TRINV_GDN")

        def start(self) -> None:
            pass

        def wait_healthy(self, timeout_s: float) -> float:
            if self.gdn == "intra":
                raise serve.ServeError("ended with status 1\nits log")
            return 1.0

        def stop(self) -> None:
            stopped.append(self.gdn)

    def check(config: object, environ: dict[str, str]) -> None:
        if environ.get("SGLANG_TRINV_GDN") == "full":
            raise TargetMissing("no such release")

    monkeypatch.setattr(serve, "Server", FakeServer)
    monkeypatch.setattr(serve.serve_config, "check", check)
    plan = serve.Plan("m", ("triton", "intra", "full"))
    with ExitStack() as stack:
        servers, absent = serve.start_arms(plan, Path("m"), stack)
        assert list(servers) == ["triton"]
        assert absent == {"intra": "ended with status 1", "full": "no such release"}
        assert stopped == ["intra"]


class FakeClient:
    """Answers with the seed as the time, so that a test sees who was asked what."""

    def __init__(self, bad: str = "") -> None:
        self.asked: list[tuple[str, int]] = []
        self.bad = bad

    def measure(self, words: list[str]) -> dict[str, object]:
        url = words[words.index("--base-url") + 1]
        seed = int(words[words.index("--seed") + 1])
        self.asked.append((url, seed))
        errors = ["refused"] if url == self.bad else [""]
        return {"ttfts": [seed / 1e3] * 4, "input_throughput": 100.0, "errors": errors}


def fake_servers(*arms: str) -> dict[str, object]:
    class Config:
        def __init__(self, url: str) -> None:
            self.url = url

    return {arm: type("Server", (), {"config": Config(arm)})() for arm in arms}


def test_turns_and_rows() -> None:
    plan = serve.Plan("m", ("triton", "intra"), lengths=(100,), concurrency=(1,), rounds=2)
    client = FakeClient()
    (rows,) = serve.measure(plan, Path("m"), fake_servers("triton", "intra"), client)
    assert [arm for arm, _ in client.asked] == [
        "triton", "intra", "intra", "triton", "triton", "intra",
    ]  # fmt: skip
    assert [seed for _, seed in client.asked] == [100, 100, 1100, 1100, 2100, 2100]
    for row, arm in zip(rows, ("triton", "intra"), strict=True):
        assert row == {
            "model": "m", "prompt_tokens": 100, "concurrency": 1, "arm": arm, "requests": 8,
            "ttft_ms": {"median": 1600.0, "p20": 1100.0, "p80": 2100.0},
            "prefill_tokens_per_s": 100,
        }  # fmt: skip


def test_what_is_thrown_away() -> None:
    plan = serve.Plan("m", ("intra",), lengths=(10, 20), concurrency=(1, 16), rounds=1, requests=16)
    client = FakeClient()
    cases = list(serve.measure(plan, Path("m"), fake_servers("intra"), client))
    assert [seed for _, seed in client.asked] == [10, 1010, 10, 1010, 20, 1020, 1020]
    assert [row["requests"] for (row,) in cases] == [4] * 4


def test_a_refused_request_leaves_no_figure() -> None:
    plan = serve.Plan("m", ("triton", "intra"), lengths=(100,), concurrency=(1,), rounds=1)
    (rows,) = serve.measure(plan, Path("m"), fake_servers("triton", "intra"), FakeClient("intra"))
    assert rows[1]["error"] == "refused"
    assert "ttft_ms" not in rows[1]


def found(**medians: float) -> dict[str, object]:
    rows = [
        {"model": "m", "prompt_tokens": 8192, "concurrency": 1, "arm": arm, "requests": 4,
         "ttft_ms": {"median": ms, "p20": ms, "p80": ms}, "prefill_tokens_per_s": 5}
        for arm, ms in medians.items()
    ]  # fmt: skip
    profile = {"kernels_ms": 10.0, "gdn_ms": 1.0, "longest": []}
    return {
        "rows": rows, "absent": {"m": {"full": "yet to come"}}, "profiled_tokens": 8192,
        "flags": {"m": ["--attention-backend", "triton"]}, "provenance": {"gpu": "GPU"},
        "profiles": {"m": {"triton": profile, "intra": {"error": "no trace"}}},
    }  # fmt: skip


def test_table_holds_ours_against_stock() -> None:
    measured = found(triton=100.0, flashinfer=90.0, intra=98.0, full=95.0)
    text = serve_report.table(measured)
    lines = {line.split(" | ")[3]: line for line in text.splitlines() if line.startswith("| m")}
    assert "| 0.980 (goal 0.985) | 1.089 | 5 |" in lines["intra"]
    assert "| 0.950 (goal 0.94, missed) | 1.056 |" in lines["full"]
    assert "Not served: m full: yet to come" in text
    assert "| m | triton | 10.00 | 1.00 | 10.0% |" in text
    assert "| m | intra | no trace |  |  |" in text
    assert serve_report.heading(measured) == "Servers: GPU, `--attention-backend triton`"


def test_as_many_requests_at_every_concurrency() -> None:
    plan = serve.Plan("m", ("triton",), rounds=3, requests=4)
    assert [plan.rounds_at(c) * plan.requests_at(c) for c in (1, 4, 16)] == [12, 12, 16]


def event(name: str, dur: float, cat: str = "kernel") -> dict[str, object]:
    return {"name": name, "dur": dur, "cat": cat}


def test_profile_sums_kernels_and_knows_gdns() -> None:
    names = (
        "chunk_gated_delta_rule_fwd_kernel_h_blockdim64", "l2norm_fwd_kernel", "state_kernel_sm90",
        "kernel_cutlass_kernel_flashinfergdn_kernelsdelta_rule_dsl_x",
    )  # fmt: skip
    other = [event("gemm", 5000.0), event("gemm", 1000.0), event("gemm", 9.0, "cpu_op")]
    found = serve_profile.summary({"traceEvents": [*(event(n, 500.0) for n in names), *other]})
    assert (found["kernels_ms"], found["gdn_ms"]) == (8.0, 2.0)
    assert found["longest"][0] == {"name": "gemm", "ms": 6.0, "calls": 2, "gdn": False}
    assert all(kernel["gdn"] for kernel in found["longest"][1:])


def test_gdn_is_every_kernel_of_ours() -> None:
    for path in (ROOT / "sglang_trinv" / "kernels").glob("*.py"):
        for name in re.findall(r"^def (\w*_kernel\w*)\(", path.read_text(), re.MULTILINE):
            assert serve_profile.GDN.search(name) or name.startswith("kda_intra_kernel")


def test_complaints() -> None:
    good = {"triton": 3, "triton-interpreter": 0, "fallbacks": 0}
    none = {"triton": 0, "triton-interpreter": 0, "fallbacks": 0}
    assert serve.complaints({"m": {"triton": none, "intra": good}}) == []
    said = serve.complaints({"m": {"triton": good, "intra": none, "full": good | {"fallbacks": 2}}})
    assert said == [
        "m triton: our kernels were called 3 times",
        "m intra: our kernels were never called",
        "m full: 2 calls fell back",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "x"], "--model: want one of tiny, qwen3.5-0.8b"),
        (["--arms", "triton,y"], "--arms: want some of triton,flashinfer,intra,full"),
        (["--lengths", "8k"], "--lengths: want numbers above 0, got 8k"),
        (["--rounds", "0"], "--rounds: want 1 or more, got 0"),
    ],
)
def test_bad_arguments(words: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "serve", *words],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert said in done.stderr
