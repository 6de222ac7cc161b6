"""The commands around an SGLang release: patch, compat, bench-one-batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sglang_trinv import targets
from sglang_trinv.errors import TrinvError


def patch(
    check: Annotated[
        bool, typer.Option("--check", help="Say what is there; change nothing.")
    ] = False,
    apply: Annotated[bool, typer.Option("--apply", help="Patch, or finish a patch.")] = False,
    reverse: Annotated[bool, typer.Option("--reverse", help="Take the patch back.")] = False,
    site: Annotated[
        Path | None,
        typer.Option(help="Folder that SGLang is installed in. Default: this Python's."),
    ] = None,
) -> None:
    """Let an SGLang without plugins (0.5.9 to 0.5.10.post1) call this package.

    Refuses files that are not as SGLang released them. Restart the server afterwards.
    """
    from sglang_trinv.patches import apply as patcher

    if check + apply + reverse != 1:
        raise TrinvError("patch: want one of --check, --apply and --reverse")
    place = patcher.find_site(site)
    found = patcher.find_patch(place)
    if found is None:
        text = f"SGLang {place.release} loads sglang-trinv as a plugin: no patch is needed"
        if not check:
            raise TrinvError(text)
        return typer.echo(text)
    changed = False
    if not check:
        changed = (patcher.apply if apply else patcher.reverse)(place, found)
    state = patcher.check(place, found)
    note = "" if check or changed else " already"
    typer.echo(f"SGLang {place.release} in {place.path}: {found.name} is{note} {state}")
    if apply:
        typer.echo(targets.kda_refusal(place.release))
    return None


def bench_one_batch(context: typer.Context) -> None:
    """SGLang's bench_one_batch, which by itself loads no plugin. SGLang's flags go after `--`."""
    from sglang_trinv import bench_one_batch as program

    program.main(context.args)


def compat(
    release: Annotated[
        list[str] | None,
        typer.Option(help="A release, also one that is not in the table, or a folder with sglang."),
    ] = None,
    newer: Annotated[
        bool, typer.Option("--newer", help="List releases that are not in the table; 1 if any.")
    ] = False,
    chain: Annotated[bool, typer.Option(help="Run SGLang's kernel chain on the CPU.")] = True,
    write: Annotated[
        Path | None, typer.Option(help="Markdown file whose table is to be replaced.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Where downloads are kept.")] = None,
) -> None:
    """Hold SGLang releases, by default all of the table, against what this package assumes.

    Their wheels are downloaded with pip, not installed. The exit code is 1 if one differs.
    """
    from sglang_trinv.compat import report as reports
    from sglang_trinv.compat import sources

    if newer:
        found = sources.not_in_table()
        typer.echo("\n".join(found) or f"none: the newest in the table is {targets.RELEASES[-1]}")
        raise typer.Exit(1 if found else 0)
    done = []
    for name in release or targets.RELEASES:
        number, folder = sources.find(name, cache or sources.cache_folder())
        done.append(reports.examine(number, folder, chain))
        if not as_json:
            typer.echo("\n".join(reports.lines(done[-1])))
    if as_json:
        typer.echo(json.dumps([each.as_dict() for each in done], indent=1))
    if write:
        reports.write(write, done)
    raise typer.Exit(0 if all(each.ok for each in done) else 1)
