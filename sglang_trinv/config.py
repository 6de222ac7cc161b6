"""Configuration: the only reader of ``SGLANG_TRINV*`` variables, strict, read once per process.

Plain pydantic, which SGLang itself needs, rather than pydantic-settings: a settings class ignores
environment variables that it does not know, and here an unknown one must stop the start.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sglang_trinv.errors import ConfigError

PREFIX = "SGLANG_TRINV"
METHODS = ("auto", "mbh_fp16", "mbh_fp16x2", "mbh_tf32", "mbh_tf32x3", "mbh_bf16x3")
# For tests: a step that fails on purpose, or an inverse of reference/faults.py for the kernel's.
SERVER_FAULTS = ("raise_at_install", "compile_error", "wrong_at_start", "raise_at_call", "nan_u")
FAULTS = (
    "", *SERVER_FAULTS, "zero_u", "bf16_rounding", "bf16_inverse", "mxr16", "doubling",
    "no_merges", "last_merge", "dropped_block", "transposed_block", "wrong_sign",
)  # fmt: skip
# METHOD-PRECISION: that inverse of reference/methods.py, emulated, for the study of what a model
# tolerates.
STUDIED = re.compile(
    "(VCS|MCS|MCH|MBH|MBH16|MXR16|MXR8|MXR4|NS[3-7]|NS_scaled|Neumann(3|7|15|31)|FS16|FS8)"
    "-(fp16|bf16|tf32|tf32rz|fp32|bf16x3|tf32x3)"
)
LEAST_CAPABILITY = (8, 0)  # of an NVIDIA GPU: the first with bf16 and tf32 products


def _flag(raw: Any) -> Any:
    """0 or 1 and nothing else: pydantic alone would also take "yes", "off", "t"."""
    if isinstance(raw, bool):
        return raw
    if raw not in ("0", "1"):
        raise ValueError("want 0 or 1")
    return raw == "1"


def _count(raw: Any) -> Any:
    if isinstance(raw, str):
        if not re.fullmatch(r"[0-9]{1,9}", raw):
            raise ValueError("want a whole number, 0 or more")
        return int(raw)
    return raw


def _folder(raw: Any) -> Any:
    if raw == "":
        raise ValueError("want the path of a folder")
    return raw


def _fault(raw: Any) -> Any:
    if raw not in FAULTS and not STUDIED.fullmatch(str(raw)):
        known = ", ".join(FAULTS[1:])
        raise ValueError(f"want nothing, or for tests one of {known} or METHOD-PRECISION")
    return raw


Flag = Annotated[bool, BeforeValidator(_flag)]


class Config(BaseModel):
    """What the user asked for. Frozen; field names are this package's, aliases the variables'."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    enabled: Flag = Field(True, alias=f"{PREFIX}")
    method: Literal["auto", "mbh_fp16", "mbh_fp16x2", "mbh_tf32", "mbh_tf32x3", "mbh_bf16x3"] = (
        Field("auto", alias=f"{PREFIX}_METHOD")
    )
    gdn: Literal["auto", "intra", "full", "off"] = Field("auto", alias=f"{PREFIX}_GDN")
    kda: Literal["auto", "intra", "off"] = Field("auto", alias=f"{PREFIX}_KDA")
    force: Flag = Field(False, alias=f"{PREFIX}_FORCE")
    strict: Flag = Field(False, alias=f"{PREFIX}_STRICT")
    check: Annotated[int, BeforeValidator(_count), Field(ge=0)] = Field(0, alias=f"{PREFIX}_CHECK")
    run_dir: Annotated[Path | None, BeforeValidator(_folder)] = Field(
        None, alias=f"{PREFIX}_RUN_DIR"
    )
    fault: Annotated[str, BeforeValidator(_fault)] = Field("", alias=f"{PREFIX}_FAULT")

    @property
    def gdn_mode(self) -> Literal["intra", "off"]:
        """Whether the intra-chunk step is replaced: also under the whole prefill, which falls back
        to SGLang's chain."""
        return "off" if self.gdn == "off" else "intra"

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Config:
        """Read every ``SGLANG_TRINV*`` variable of ``environ`` (default: this process's).

        Raises:
            ConfigError: one line that names each bad variable, what was wanted and what came.
        """
        source = os.environ if environ is None else environ
        given = {name: value for name, value in source.items() if name.startswith(PREFIX)}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(e) for e in error.errors())) from None


VARIABLES = tuple(str(field.alias) for field in Config.model_fields.values())


def _explain(error: Any) -> str:
    """One bad variable in words."""
    name = str(error["loc"][0]) if error["loc"] else PREFIX
    if error["type"] == "extra_forbidden":
        return f"{name}: no such variable; known are {', '.join(VARIABLES)}"
    if error["type"] == "literal_error":
        want = "want " + str(error["ctx"]["expected"]).replace("'", "")
    else:
        want = str(error["msg"]).removeprefix("Value error, ")
    return f"{name}: {want}; got {error['input']!r}"
