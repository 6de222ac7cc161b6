"""The study: its command, its files, its page in a real browser, and its numbers."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sglang_trinv import cli
from sglang_trinv.errors import TrinvError
from sglang_trinv.reference.chunk import inverse, naive_chunk_A
from sglang_trinv.reference.inputs import HARD_INPUTS
from sglang_trinv.reference.methods import invert

pd = pytest.importorskip("pandas")
for needed in ("jinja2", "matplotlib", "pyarrow"):
    pytest.importorskip(needed)

from sglang_trinv.study import cases, figures, measure, report, served  # noqa: E402
from sglang_trinv.study import cli as study_cli  # noqa: E402

runner = CliRunner()
BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
WORK = [(n, m, p) for n in (16, 64) for m in ("MBH16", "MCH", "FS16") for p in ("fp16", "fp32")]


@pytest.fixture(autouse=True)
def _alone(clean_env: pytest.MonkeyPatch) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves, with three methods in place of all."""
    out = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "work", lambda quick: WORK)
        patch.delenv("TRITON_INTERPRET", raising=False)  # the kernel has a test of its own
        result = runner.invoke(cli.app, ["study", "--quick", "--no-model", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert f"Report: {out / 'report.html'}" in result.stdout
    return out


def test_tables_hold_every_input_method_precision_and_size(folder: Path) -> None:
    study = pd.read_csv(folder / "study.csv")
    inputs = len(study[["family", "input"]].drop_duplicates())
    assert inputs >= 26
    assert len(study) == len(WORK) * inputs
    parquet = pd.read_parquet(folder / "study.parquet")
    assert list(parquet.columns) == list(study.columns)
    assert len(parquet) == len(study)
    summary = pd.read_csv(folder / "summary.csv")
    assert len(summary) == len(WORK) * study.family.nunique()
    hard = summary[(summary.family == "hard") & (summary.n == 64)].set_index(
        ["method", "precision"]
    )
    assert hard.rel_fro["MBH16", "fp16"] < 2e-3
    assert hard.rel_fro["MCH", "fp32"] > 1e6
    assert math.isinf(hard.rel_fro["MCH", "fp16"])
    assert (folder / "hard.png").read_bytes().startswith(b"\x89PNG")


def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    return found


def test_page_opens_in_a_browser(folder: Path, tmp_path: Path) -> None:
    """All figures are decoded, all tables are there, nothing is wider than the window."""
    page = (folder / "report.html").read_text()
    assert "http" not in re.sub(r"data:[^\"]*", "", page)  # one file, no links to others
    count = """<script>addEventListener('load', () => {
      const good = [...document.images].filter(i => i.naturalWidth > 100).length
      document.title = [good, document.images.length, document.querySelectorAll('td').length,
                        document.documentElement.scrollWidth - innerWidth].join(' ')})</script>"""
    copy = tmp_path / "page.html"
    copy.write_text(page + count)
    done = subprocess.run(
        [browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/p",
         "--window-size=900,900", "--virtual-time-budget=5000", "--dump-dom", copy.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr[-2000:]
    good, images, cells, overflow = map(int, title[1].split())
    assert good == images >= 5
    assert cells > 100
    assert overflow <= 0


REPORT = Path(__file__).parents[2] / "evals" / "results" / "h200-tiny" / "report.json"


def test_a_served_run_is_shown_against_the_error_of_its_inverses(tmp_path: Path) -> None:
    x = HARD_INPUTS["cosine 0.98"].build(128, K=64, H=2)
    found = {row["arm"]: row for row in served.rows(REPORT, [("keys", x)])}
    assert set(found) == {
        "on", "off", "bf16_rounding", "bf16_inverse", "mxr16", "no_merges", "last_merge",
        "dropped_block", "transposed_block", "wrong_sign",
    }  # fmt: skip
    assert (found["on"]["method"], found["on"]["precision"]) == ("MBH16", "fp16")
    assert found["on"]["inverse"] < found["bf16_inverse"]["inverse"] < found["mxr16"]["inverse"]
    assert 0 < found["on"]["kl"] < found["no_merges"]["kl"]
    compared = json.loads(REPORT.read_text())["comparisons"][0]
    assert found["on"]["accuracy"] == compared["accuracy"]["on"] / compared["accuracy"]["n"]
    assert found["no_merges"]["verdict"] == "REGRESSION"
    table = pd.DataFrame(found.values())
    assert figures.drift(table) is not None
    study = pd.DataFrame(measure.emulated(cases.build(16, None, []), "MBH16", "fp16"))
    page = report.write(tmp_path, {}, study, pd.DataFrame(), table, {}).read_text()
    assert page.count("<tr><td>") >= len(table)
    assert 'id="served"' in page


@pytest.mark.parametrize("text", ["", "[]", '{"comparisons": [{}]}'])
def test_a_file_that_is_no_report_is_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    x = HARD_INPUTS["random"].build(64, K=64)
    with pytest.raises(TrinvError, match="--served: .*r.json: want report.json of a run"):
        list(served.rows(tmp_path / "r.json", [("keys", x)]))


def test_errors_are_what_they_are_called() -> None:
    problem = cases.build(16, None, [])
    assert problem.A.shape == (len(problem.names), cases.CHUNKS * cases.HEADS, 16, 16)
    zero = measure.errors(problem, problem.X)
    assert max(max(zero[m]) for m in ("max_abs", "max_rel", "rel_fro")) == 0
    X = problem.X.clone()
    X[2, 1, 5, 3] += 0.5
    found = measure.errors(problem, X)
    assert found["max_abs"][2] == pytest.approx(0.5)
    assert found["rel_fro"][2] == pytest.approx(0.5 / problem.X[2, 1].norm().item())
    assert found["residual"][2] >= 0.5 / 4  # ||L e|| >= 0.5 as L has 1 on its diagonal
    assert found["layer"][2] > 0
    assert found["rel_fro"][3] == 0
    X[2, 1, 5, 3] = math.nan
    assert measure.errors(problem, X)["rel_fro"][2] == math.inf
    assert math.isnan(found["layer"][-1])  # the paper's matrices have no layer


def test_matrices_are_those_of_the_inputs() -> None:
    problem = cases.build(64, None, [])
    i = problem.names.index("cosine 0.98")
    x = HARD_INPUTS["cosine 0.98"].build(128, cases.HEADS, K=cases.K, V=cases.V).summed()
    A = naive_chunk_A(x.k, x.g, x.beta)[0].unflatten(0, (2, 64)).transpose(1, 2).flatten(0, 1)
    assert (problem.A[i] - A).abs().max() < 1e-6  # g is summed in float64 there
    exact = problem.output(inverse(problem.A))
    assert torch.equal(exact, problem.o)


def test_real_gates_are_read(tmp_path: Path) -> None:
    import numpy as np

    g = -np.linspace(0, 4, 4)[None, None] * np.ones((1, 300, 1))
    np.savez(tmp_path / "model.npz", g=g, beta=np.full_like(g, 0.5), cu_seqlens=[0, 20, 300])
    found = dict(cases.real_gates(tmp_path, 128))
    assert found["model, flattest heads"].g.max() == 0
    assert found["model, steepest heads"].g.min() == -4
    assert found["model, steepest heads"].k.shape == (1, 128, cases.HEADS, cases.K)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_kernel_is_measured_where_triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "HEADS", 1)
    monkeypatch.setattr(cases, "CHUNKS", 1)
    problem = cases.build(16, None, [])
    rows = list(measure.compiled(problem))
    fp16 = [r for r in rows if r["precision"] == "fp16"]
    emulated = list(measure.emulated(problem, "MBH16", "fp16"))
    assert len(fp16) == len(emulated) == len(problem.names)
    for ours, theirs in zip(fp16, emulated, strict=True):
        if math.isfinite(theirs["rel_fro"]):
            assert ours["rel_fro"] <= 1.2 * theirs["rel_fro"] + 1e-7, ours["input"]


def test_speed_scatter(tmp_path: Path) -> None:
    row = {"op": "fwd_intra", "lengths": [8192], "hk": 16, "hv": 32, "variant": ""}
    rows = [{**row, "impl": name, "median_us": t, "rel_err": e}
            for name, t, e in (("ours", 90, 2e-3), ("sglang", 200, 2e-3))]  # fmt: skip
    path = tmp_path / "intra.json"
    path.write_text(json.dumps({"rows": rows}))
    figure = figures.speed_scatter(path)
    assert sorted(t.get_text() for t in figure.axes[0].texts) == ["ours", "sglang"]
    path.write_text("{}")
    with pytest.raises(TrinvError, match=r"--speed: .* want the JSON"):
        figures.speed_scatter(path)
    assert figures.speed_scatter(None) is None


def test_the_model_feels_a_wrong_inverse() -> None:
    pytest.importorskip("transformers")
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    from sglang_trinv.study import model

    embedded = model.Model()
    captured = model.capture(embedded)
    assert len(captured) == 2 * len(embedded.layers) == 6
    docs = model.documents(8)

    def run(solve):
        return embedded.log_probabilities(docs.ids, model.partial(model.chunk_rule, solve))

    exact = run(inverse)
    # The same as transformers' own rule, but for float32.
    own = embedded.log_probabilities(
        docs.ids, lambda layer, *args, **rest: torch_chunk_gated_delta_rule(*args, **rest)
    )
    assert model.compare(docs, exact, own)["logprob_max"] < 1e-2
    same = model.compare(docs, exact, exact)
    assert same["logprob"] == 0
    assert same["accuracy"] > 0.8
    ours = model.compare(docs, exact, run(lambda A: invert(A, "MBH16", "fp16")))
    wrong = model.compare(docs, exact, run(lambda A: inverse(-A)))
    assert ours["accuracy"] == same["accuracy"]
    assert wrong["accuracy"] < 0.5
    assert ours["kl"] < 1e-4 < wrong["kl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device: want cpu or cuda, got 'tpu'"),
        (["--gates", "/nowhere"], "--gates: want a folder, got /nowhere"),
        (["--speed", "/nowhere"], "--speed: want a file, got /nowhere"),
        (["--served", "/nowhere"], "--served: want a file, got /nowhere"),
        (["--served", str(REPORT), "--no-model"], "--served: wants the embedded model's keys"),
        (["--out", "/dev/null"], "--out: want a folder, got /dev/null"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str) -> None:
    result = runner.invoke(cli.app, ["study", *arguments])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert message in result.stderr


def test_cuda_without_a_gpu_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = runner.invoke(cli.app, ["study", "--device", "cuda"])
    assert (result.exit_code, "torch finds no CUDA device" in result.stderr) == (1, True)


def test_gates_without_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrinvError, match="--gates: want a folder with NAME.npz files"):
        cases.real_gates(tmp_path, 32)
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    with pytest.raises(TrinvError, match=r"--gates: .*bad.npz: want g, beta and cu_seqlens"):
        cases.real_gates(tmp_path, 32)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        study_cli.importlib.util, "find_spec", lambda n: None if n == "pandas" else find(n)
    )
    result = runner.invoke(cli.app, ["study"])
    assert result.exit_code == 1
    assert "study: wants pandas: pip install 'sglang-trinv[study]'" in result.stderr


def test_numbers_of_the_page() -> None:
    assert [report.number(x) for x in (1.234e-3, math.inf, math.nan)] == ["1.2e-03", "inf", ""]
    assert [report.shade(x) for x in (1e-3, 1e-2, math.inf)] == ["good", "fair", "bad"]
