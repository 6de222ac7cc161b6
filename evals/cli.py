"""The commands eval, compare and selftest. Importing this is cheap: each loads what it needs."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sglang_trinv.errors import TrinvError
from sglang_trinv.evals.errors import EvalError

if TYPE_CHECKING:
    from sglang_trinv.evals.gate import Margins
    from sglang_trinv.evals.plan import Plan

INVALID = 4
SELFTEST_ARMS = (
    "off,bf16_rounding,dropped_block,transposed_block,last_merge,no_merges,wrong_sign,zero_u"
)
# Tables need more than the 80 columns that a pipe is taken to have.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
err = Console(stderr=True, highlight=False, soft_wrap=True)

ModelOption = Annotated[str, typer.Option(help="Folder or hub id. Default: the embedded model.")]
SuiteOption = Annotated[str, typer.Option(help="quick, tiny or real.")]
TasksOption = Annotated[str, typer.Option(help="lm-eval tasks, by commas, instead of the suite's.")]
ArmsOption = Annotated[
    str,
    typer.Option(help="Servers, by commas: off, on, intra, full, flashinfer, a method or a fault."),
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", help="Run folder; the same one again resumes. Default: a new one."),
]
AccOption = Annotated[float, typer.Option(min=1e-6, max=1, help="Margin of the pooled accuracy.")]
LlOption = Annotated[
    float, typer.Option(min=1e-9, help="Margin of the log-likelihood per token, nats.")
]
KlOption = Annotated[float, typer.Option(min=1e-9, help="Limit of the mean KL divergence, nats.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Documents a task.")]
ParallelOption = Annotated[
    int | None, typer.Option(min=1, help="Servers at once. Default: as many as fit.")
]
ModelArgsOption = Annotated[
    str, typer.Option(help="NAME=VALUE,... for lm-eval's local-completions.")
]
CacheOption = Annotated[
    bool, typer.Option("--prefix-cache", help="Leave the prefix cache on; the probe uses it.")
]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What went wrong is one line on stderr and exit code 4, never a traceback."""
    try:
        yield
    except TrinvError as error:
        err.print(f"error: {error}", markup=False)
        raise typer.Exit(INVALID) from None
    except OSError as error:
        name = f": {error.filename}" if error.filename else ""
        err.print(f"error: {error.strerror or error}{name}", markup=False)
        raise typer.Exit(INVALID) from None
    except KeyboardInterrupt:
        err.print("Stopped. The same command with the same --out goes on where it was.")
        raise typer.Exit(130) from None


def evaluate(
    context: typer.Context,
    model: ModelOption = "",
    suite: SuiteOption = "tiny",
    tasks: TasksOption = "",
    arms: ArmsOption = "off,off,on,on",
    out_folder: OutOption = None,
    margin_acc: AccOption = 0.01,
    margin_ll: LlOption = 0.01,
    margin_kl: KlOption = 0.002,
    limit: LimitOption = None,
    parallel: ParallelOption = None,
    model_args: ModelArgsOption = "",
    prefix_cache: CacheOption = False,
    judge: Annotated[
        bool, typer.Option(help="--no-judge: only run the arms; `compare` judges them.")
    ] = True,
) -> None:
    """Show that our kernels leave a model's answers as they are. SGLang's own flags go after `--`.

    Exit codes: 0 EQUIVALENT, 1 REGRESSION, 3 INCONCLUSIVE, 4 INVALID or an error.
    """
    with one_line_errors():
        plan = make_plan(model, suite, tasks, arms, limit, model_args, prefix_cache,
                         tuple(context.args))  # fmt: skip
        folder = out_folder or Path(f"eval-{suite}-{time.strftime('%Y%m%d-%H%M%S')}")
        raise typer.Exit(
            execute(plan, folder, parallel, margins(margin_acc, margin_ll, margin_kl), judge)
        )


def selftest(
    context: typer.Context,
    model: ModelOption = "",
    suite: SuiteOption = "tiny",
    tasks: TasksOption = "",
    arms: ArmsOption = SELFTEST_ARMS,
    out_folder: OutOption = None,
    margin_acc: AccOption = 0.01,
    margin_ll: LlOption = 0.01,
    margin_kl: KlOption = 0.002,
    limit: LimitOption = None,
    parallel: ParallelOption = None,
    model_args: ModelArgsOption = "",
) -> None:
    """Show that a suite sees wrong inverses: they must be rejected, bfloat16 rounding must pass.

    Exit codes: 0 if so, 4 if not: then a verdict on this model and suite means nothing.
    """
    evaluate(context, model, suite, tasks, arms, out_folder, margin_acc, margin_ll, margin_kl,
             limit, parallel, model_args, False, True)  # fmt: skip


def compare(
    run: Annotated[Path, typer.Argument(help="Run folder: the baseline is taken from it.")],
    other: Annotated[
        Path | None, typer.Argument(help="Run folder of the candidate. Default: the same run.")
    ] = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Report folder. Default: the last run folder.")
    ] = None,
    margin_acc: AccOption = 0.01,
    margin_ll: LlOption = 0.01,
    margin_kl: KlOption = 0.002,
) -> None:
    """Judge finished runs again. Exit codes as for `eval`."""
    from sglang_trinv.evals import judge, report

    with one_line_errors():
        chosen = margins(margin_acc, margin_ll, margin_kl)
        if other is None:
            plan, answers = judge.load_run(run)
            result = judge.judge_run(plan, answers, chosen)
        else:
            if out_folder is None:
                raise EvalError("--out: want a folder for the report on two runs")
            result = judge.compare_runs(run, other, chosen)
            main = result.main
            assert main is not None
            answers = [main.baseline, main.candidate]
        target = out_folder or run
        target.mkdir(parents=True, exist_ok=True)
        report.write(result, answers, target, out)
        raise typer.Exit(int(result.verdict))


def margins(accuracy: float, loglikelihood: float, kl: float) -> Margins:
    from sglang_trinv.evals.gate import Margins

    return Margins(accuracy=accuracy, loglikelihood=loglikelihood, kl=kl)


def make_plan(
    model: str, suite: str, tasks: str, arms: str, limit: int | None, model_args: str,
    prefix_cache: bool, flags: tuple[str, ...],
) -> Plan:  # fmt: skip
    """Check what the user asked for, before any server starts.

    Raises:
        EvalError | ServeError: the first thing that is wrong.
    """
    from sglang_trinv import __version__
    from sglang_trinv.evals import harness
    from sglang_trinv.evals.plan import (
        Plan,
        fingerprint,
        parse_arms,
        parse_model_args,
        settings,
    )  # fmt: skip
    from sglang_trinv.evals.suites import SUITES
    from sglang_trinv.serve import config as serve_config
    from sglang_trinv.serve import tiny_model

    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")  # lm-eval in this process; its own logs all

    if suite not in SUITES:
        raise EvalError(f"--suite: want {', '.join(SUITES)}, got {suite!r}")
    kinds, arguments = parse_arms(arms), parse_model_args(model_args)
    model = model or str(tiny_model.PATH)
    if any(sign in model for sign in ",="):
        raise EvalError(f"--model: lm-eval cannot take a comma or = in a path, got {model!r}")
    serve_config.check_model(model)
    names = tuple(filter(None, (t.strip() for t in tasks.split(",")))) or SUITES[suite].tasks
    if not SUITES[suite].offline and not harness.hub_answers():
        err.print("The Hugging Face hub cannot be reached: tasks need data that are here already.")
    harness.check_tasks(names)
    if not SUITES[suite].offline:
        good, bad = harness.reachable(names, {"tokenizer": model, **SUITES[suite].metadata})
        for task, why in bad.items():
            err.print(f"left out, its data cannot be had here: {task}: {why}", markup=False)
        if not good:
            raise EvalError(f"suite {suite}: no task's data can be had from here")
        names = tuple(good)
    return Plan(
        suite=suite, tasks=names, model=model, fingerprint=fingerprint(model),
        device=serve_config.detect_device(), arms=kinds, limit=limit or SUITES[suite].limit,
        model_args=arguments, prefix_cache=prefix_cache, flags=flags, settings=settings(os.environ),
        sglang=serve_config.check_release("ours"), sglang_trinv=__version__,
        lm_eval=importlib.metadata.version("lm-eval"),
    )  # fmt: skip


def execute(plan: Plan, folder: Path, parallel: int | None, chosen: Margins, judged: bool) -> int:
    """Run the plan's arms in ``folder``, judge and report; return the exit code."""
    from sglang_trinv.evals import plan as plans
    from sglang_trinv.evals import run
    from sglang_trinv.serve.launch import stop_on_signals

    out.print(f"Run folder: {folder}", markup=False)
    with plans.opened(folder, plan), stop_on_signals():
        run.run_arms(plan, folder, parallel, err)
        if not judged:
            return 0
        from sglang_trinv.evals import judge, report

        plan, answers = judge.load_run(folder)
        result = judge.judge_run(plan, answers, chosen)
        report.write(result, answers, folder, out)
        return int(result.verdict)


def add_to(app: Any) -> None:
    """Add the commands to ``app``."""
    extra = {"allow_extra_args": True, "ignore_unknown_options": False}
    app.command("eval", context_settings=extra)(evaluate)
    app.command("compare")(compare)
    app.command("selftest", context_settings=extra)(selftest)
