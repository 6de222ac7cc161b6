"""``sglang-trinv bundle pack | unpack``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from sglang_trinv.serve import bundle, bundle_unpack
from sglang_trinv.serve.config import ServeError

commands = typer.Typer(help="Carry the package to a host without a network.", no_args_is_help=True)


@commands.command()
def pack(
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    python: Annotated[str, typer.Option(help="The host's Python.")] = bundle.PYTHON,
    add: Annotated[
        list[str] | None, typer.Option(help="A requirement to put in, without what it needs.")
    ] = None,
    part_mib: Annotated[int, typer.Option(min=1, help="Largest part.")] = bundle.PART_MIB,
) -> None:
    """Write the package's wheel and what it needs into parts, with a script that unpacks them."""
    if not re.fullmatch(r"3\.\d+", python):
        raise ServeError(f"--python: want 3.N, got {python!r}")
    manifest = bundle.pack(out, python, add=tuple(add or ()), part_mib=part_mib)
    size = sum(part["bytes"] for part in manifest["parts"])
    typer.echo(f"{len(manifest['wheels'])} wheels, {size / 2**20:.1f} MiB in {out}")
    typer.echo(f"On the host: python{python} {out.name}/unpack.py [--target DIR]")


@commands.command()
def unpack(
    folder: Annotated[Path, typer.Argument(help="The bundle.")],
    target: Annotated[Path | None, typer.Option(help="Folder to install into.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Also for another Python.")] = False,
) -> None:
    """Check a bundle and install it with pip, without a network."""
    try:
        wheels = bundle_unpack.unpack(folder, target, force)
    except bundle_unpack.BundleError as error:
        raise ServeError(str(error)) from None
    typer.echo(f"{len(wheels)} wheels installed")
