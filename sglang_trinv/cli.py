"""The command line ``sglang-trinv``: serve, doctor, status; more in maintenance.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from sglang_trinv import __version__, maintenance, runs
from sglang_trinv.errors import TrinvError
from sglang_trinv.evals import cli as evals_cli
from sglang_trinv.serve import bundle_cli
from sglang_trinv.study import cli as study_cli

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class OneLineErrors(TyperGroup):
    """What the user did wrong is one line on stderr and exit code 1, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except TrinvError as error:
            message = str(error)
        except ValidationError as error:
            first = error.errors()[0]
            message = f"--{first['loc'][0]}: {first['msg']}; got {first['input']!r}"
        err.print(f"[red]error:[/] {escape(message)}")
        raise typer.Exit(1)


app = typer.Typer(
    name="sglang-trinv",
    cls=OneLineErrors,
    help="Gated DeltaNet prefill of SGLang with a faster triangular inverse.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.add_typer(bundle_cli.commands, name="bundle")
app.command()(maintenance.patch)
app.command()(maintenance.compat)
app.command(context_settings={"allow_extra_args": True})(maintenance.bench_one_batch)
app.command()(study_cli.study)


def _version(value: bool) -> None:
    if value:
        out.print(f"sglang-trinv {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": False})
def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="Folder or hub id. Default: the embedded tiny model.")
    ] = "",
    kernels: Annotated[str, typer.Option(help="ours, or stock: SGLang's own.")] = "ours",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 30000,
    preset: Annotated[
        str, typer.Option(help="Model and flags of SGLang's cookbook: qwen3.5-4b, ...")
    ] = "",
    without: Annotated[
        list[str] | None, typer.Option(help="A flag of the preset to leave out.")
    ] = None,
    ab: Annotated[
        bool, typer.Option("--ab", help="Also serve stock kernels, at the next port.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be run, and stop.")
    ] = False,
) -> None:
    """Serve a model through SGLang until Ctrl-C. SGLang's own flags go after `--`.

    Runs on the GPU if there is one, otherwise on the CPU platform, which `make` installs.
    """
    from sglang_trinv.serve import ab as both
    from sglang_trinv.serve import config as serve_config
    from sglang_trinv.serve import presets, tiny_model
    from sglang_trinv.serve.launch import stop_on_signals

    extra, device = tuple(context.args), serve_config.detect_device()
    if ab and kernels != "ours":
        raise TrinvError(f"--ab: serves both kernels; want no --kernels, got {kernels}")
    if preset:
        found = presets.find(preset)
        if device == "cpu" and not dry_run:
            raise TrinvError("--preset: want a GPU, found none (--dry-run shows the command)")
        device = "cuda"
        extra = presets.merge(found, extra, without or ())
        model = model or found.model
        err.print(f"Preset {preset}: {found.source}", markup=False)
    elif without:
        raise TrinvError("--without: want a --preset to leave flags out of")
    config = serve_config.ServeConfig(
        model=model or str(tiny_model.PATH),
        kernels=kernels,
        device=device,
        host=host,
        port=port,
        extra=extra,
    )
    configs = both.arms(config, serve_config.gpus()) if ab else (config,)
    if dry_run:
        return _show_commands(configs)
    for each in configs:
        serve_config.check(each, os.environ)
    serving = False
    try:
        with stop_on_signals(), both.servers(configs, lambda server: start(server, err)) as servers:
            for server in servers:
                _announce(server.verify(), server.config.url)
            serving = True
            if ab:
                both.wait(servers, lambda line: out.print(line, markup=False))
            servers[0].wait(lambda line: out.print(line, markup=False))
    except KeyboardInterrupt:
        err.print("Stopped.")
        raise typer.Exit(0 if serving else 130) from None


def _show_commands(configs: tuple[Any, ...]) -> None:
    from sglang_trinv.serve import command

    for config in configs:
        typer.echo(command.spell(config))


def start(server: Any, console: Console) -> None:
    """Wait until ``server`` is healthy, showing what SGLang says meanwhile."""
    from sglang_trinv.serve.progress import Progress

    config = server.config
    with Progress(
        console, f"Starting SGLang on the {config.device}, {config.kernels} kernels"
    ) as p:
        seconds = server.wait_healthy(progress=p.update)
    console.print(f"Ready after {seconds:.0f} s. Log: {server.log}", markup=False)


def _announce(verdict: Any, url: str) -> None:
    color = {"live": "green", "stock": "cyan"}.get(verdict.kind, "yellow")
    err.print(f"[{color}]{verdict.kind}[/]: {escape(verdict.message)}")
    err.print(f"Serving at {url}/v1 (Ctrl-C stops it)")


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for a bug report.")] = False,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Also run the kernels on hard inputs against float64.")
    ] = False,
) -> None:
    """Check this installation. The exit code is 1 if something is wrong."""
    from sglang_trinv.serve import doctor as examination

    checks = examination.examine(gpu)
    report = examination.report(checks)
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for check in checks:
            mark = "[green]ok[/]" if check.ok else "[red]PROBLEM[/]"
            table.add_row(mark, check.name, escape(check.detail))
        out.print(table)
    raise typer.Exit(0 if report["ok"] else 1)


@app.command()
def status(
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of the run. Default: the newest.")
    ] = None,
    url: Annotated[str, typer.Option(help="Ask this server, also on another host.")] = "",
    api_key: Annotated[
        str, typer.Option(envvar="OPENAI_API_KEY", help="The key of the server at --url.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what each process of a server does: state, hooks, calls. Exit code 1 if none lives."""
    from sglang_trinv.serve import remote, report

    if url and run_dir:
        raise TrinvError("status: want --url or --run-dir, got both")
    found: Any
    if url:
        found = remote.status(url, api_key)
        processes = found["processes"]
    else:
        processes = found = _of_this_host(run_dir)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        for line in report.processes(processes):
            out.print(line, markup=False)
    raise typer.Exit(0 if any(process["alive"] for process in processes) else 1)


def _of_this_host(run_dir: Path | None) -> list[dict[str, Any]]:
    from sglang_trinv.status import read_run_dir

    path = run_dir or runs.latest_run()
    if not path.is_dir():
        raise TrinvError(f"--run-dir: no folder {path}")
    found = read_run_dir(path)
    if not found:
        raise TrinvError(f"no process has written its status into {path}")
    err.print(f"Run {path}", markup=False)
    return found


evals_cli.add_to(app)
