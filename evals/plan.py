"""What a run will do, fixed before it starts, and the folder that holds it.

A run folder has one ``plan.json``. An arm of it counts once its ``arm.json`` is there, which is
written last; anything less is run again from the start, so no arm mixes two servers.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from sglang_trinv.config import FAULTS, METHODS, SERVER_FAULTS, STUDIED
from sglang_trinv.evals.errors import EvalError

PLAIN = ("off", "flashinfer", "on")
HARMLESS = ("bf16_rounding",)  # the gate must pass it
MODES = ("intra", "full")  # of SGLANG_TRINV_GDN; the arm "on" has the user's, or "auto"
EXAMPLES = ("bf16_inverse", "mxr16")  # the gate may think what it likes
OUR_METHODS = METHODS[1:]  # the arm "on" has "auto"
KINDS = PLAIN + MODES + OUR_METHODS + tuple(f for f in FAULTS if f not in ("", *SERVER_FAULTS))
SETTINGS = ("SGLANG_TRINV_GDN", "SGLANG_TRINV_KDA", "SGLANG_TRINV_METHOD")
LEAST_FREE_BYTES = 256 << 20
# lm-eval ignores a model argument that it does not know, so only these are let through.
MODEL_ARGS = ("max_gen_toks", "max_length", "max_retries", "num_concurrent", "revision",
              "seed", "timeout", "trust_remote_code")  # fmt: skip


class Plan(BaseModel):
    """Everything that decides what a run measures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    suite: str
    tasks: tuple[str, ...]
    model: str
    fingerprint: str
    device: Literal["cpu", "cuda"]
    arms: tuple[str, ...]
    limit: int | None
    model_args: dict[str, str]
    prefix_cache: bool
    flags: tuple[str, ...]
    settings: dict[str, str]  # SGLANG_TRINV_* variables of our arms
    sglang: str
    sglang_trinv: str
    lm_eval: str


class Arm(BaseModel):
    """One server and what it is asked. ``kind`` is a name in ``KINDS``, or METHOD-PRECISION."""

    model_config = ConfigDict(frozen=True)

    index: int
    kind: str
    repeat: int  # 0 for the first arm of its kind

    @property
    def name(self) -> str:
        return f"{self.index}-{self.kind}"

    @property
    def kernels(self) -> Literal["ours", "stock"]:
        return "stock" if self.kind in ("off", "flashinfer") else "ours"

    @property
    def backend(self) -> str:
        """GDN prefill backend, pinned in every arm."""
        return "flashinfer" if self.kind == "flashinfer" else "triton"

    def environ(self, settings: Mapping[str, str]) -> dict[str, str]:
        """Variables beyond SGLANG_TRINV; a wrong inverse is one of the intra-chunk step."""
        if self.kernels == "stock":
            return {}
        found = {**settings, "SGLANG_TRINV_STRICT": "1"}
        if self.kind in MODES:
            found["SGLANG_TRINV_GDN"] = self.kind
        elif self.kind in OUR_METHODS:
            found["SGLANG_TRINV_METHOD"] = self.kind
        elif self.kind != "on":
            found |= {"SGLANG_TRINV_GDN": "intra", "SGLANG_TRINV_FAULT": self.kind}
        return found


def settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The caller's settings of our kernels: they are part of what is measured."""
    return {name: environ[name] for name in SETTINGS if name in environ}


def parse_arms(text: str) -> tuple[str, ...]:
    """``off,off,on,on`` -> kinds.

    Raises:
        EvalError: an unknown kind, or nothing to compare.
    """
    kinds = tuple(part.strip() for part in text.split(","))
    for kind in kinds:
        if kind not in KINDS and not STUDIED.fullmatch(kind):
            raise EvalError(f"--arms: want {', '.join(KINDS)} or METHOD-PRECISION, got {kind!r}")
    if not set(kinds) & {"off", "flashinfer"} or not set(kinds) - {"off", "flashinfer"}:
        raise EvalError(f"--arms: want a baseline (off) and a candidate (on), got {text!r}")
    return kinds


def parse_model_args(text: str) -> dict[str, str]:
    """``num_concurrent=4,timeout=600`` -> arguments of lm-eval's local-completions.

    Raises:
        EvalError: a name that lm-eval would ignore, or no value.
    """
    found = {}
    for part in filter(None, text.split(",")):
        name, separator, value = part.partition("=")
        if name not in MODEL_ARGS:
            raise EvalError(f"--model-args: want {', '.join(MODEL_ARGS)}, got {name!r}")
        if not separator or not value:
            raise EvalError(f"--model-args: want NAME=VALUE, got {part!r}")
        found[name] = value
    return found


def arms_of(kinds: tuple[str, ...]) -> list[Arm]:
    """The arms of a run."""
    return [Arm(index=i, kind=kind, repeat=kinds[:i].count(kind)) for i, kind in enumerate(kinds)]


def fingerprint(model: str) -> str:
    """Hash of a model folder's small files and of its weights' names and sizes; a hub id itself."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return model
    total = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        size = path.stat().st_size
        total.update(f"{path.name} {size}\n".encode())
        if size < 64 << 20 and path.suffix in (".json", ".jinja", ".safetensors", ".txt"):
            total.update(path.read_bytes())
    return total.hexdigest()[:16]


@contextmanager
def opened(folder: Path, plan: Plan) -> Iterator[Path]:
    """Take ``folder`` for this run alone; write the plan, or check that it is the same one.

    Raises:
        EvalError: another process runs there, another plan is there, or something else is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES:
        raise EvalError(
            f"--out: want {LEAST_FREE_BYTES >> 20} MiB free in {folder}, got {free >> 20} MiB"
        )
    path = folder / "plan.json"
    if not path.is_file() and any(p.name != "lock" for p in folder.iterdir()):
        raise EvalError(f"--out: want a new folder or one of this run, {folder} holds other files")
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EvalError(f"--out: another run is writing into {folder}") from None
        if path.is_file():
            _same(read_plan(folder), plan, folder)
        else:
            write_json(path, plan.model_dump())
        yield folder


def read_plan(folder: Path) -> Plan:
    """The plan of a run folder.

    Raises:
        EvalError: there is none, or it is not one.
    """
    path = folder / "plan.json"
    if not path.is_file():
        raise EvalError(f"{folder} is no run folder: it has no plan.json")
    try:
        return Plan.model_validate_json(path.read_text())
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise EvalError(f"{path} cannot be read: {first}") from None


def _same(old: Plan, new: Plan, folder: Path) -> None:
    before, now = old.model_dump(), new.model_dump()
    for name in before:
        if before[name] != now[name]:
            raise EvalError(
                f"--out: {folder} holds a run with {name} {before[name]!r}, this one has "
                f"{now[name]!r}; choose another folder"
            )


def write_json(path: Path, content: Any) -> None:
    """Replace ``path`` atomically."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(content, indent=1, allow_nan=False) + "\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
