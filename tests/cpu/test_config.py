"""SGLANG_TRINV* variables: what each value means, and one message for each wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from sglang_trinv import config
from sglang_trinv.config import Config
from sglang_trinv.errors import ConfigError, TrinvError
from sglang_trinv.reference.methods import METHODS
from sglang_trinv.reference.precision import PRECISIONS

V = config.PREFIX


def test_defaults() -> None:
    assert Config.from_env({}) == Config(
        enabled=True, method="auto", gdn="auto", kda="auto", force=False, strict=False,
        check=0, run_dir=None, fault="",
    )  # fmt: skip


def test_every_variable_is_read() -> None:
    environ = {
        V: "0",
        f"{V}_METHOD": "mbh_bf16x3",
        f"{V}_GDN": "off",
        f"{V}_KDA": "off",
        f"{V}_FORCE": "1",
        f"{V}_STRICT": "1",
        f"{V}_CHECK": "12",
        f"{V}_RUN_DIR": "/tmp/run",
        f"{V}_FAULT": "zero_u",
    }
    assert set(environ) == set(config.VARIABLES)
    assert Config.from_env(environ) == Config(
        enabled=False, method="mbh_bf16x3", gdn="off", kda="off", force=True, strict=True,
        check=12, run_dir=Path("/tmp/run"), fault="zero_u",
    )  # fmt: skip


def test_reads_the_process_and_nothing_else(clean_env: pytest.MonkeyPatch) -> None:
    clean_env.setenv(f"{V}_CHECK", "7")
    clean_env.setenv("SGLANG_PLUGINS", "trinv")
    assert Config.from_env().check == 7


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        (V, "yes", "want 0 or 1"),
        (V, "", "want 0 or 1"),
        (V, "2", "want 0 or 1"),
        (f"{V}_FORCE", "true", "want 0 or 1"),
        (f"{V}_STRICT", " 1", "want 0 or 1"),
        (
            f"{V}_METHOD",
            "mch",
            "want auto, mbh_fp16, mbh_fp16x2, mbh_tf32, mbh_tf32x3 or mbh_bf16x3",
        ),
        (
            f"{V}_METHOD",
            "MBH_FP16",
            "want auto, mbh_fp16, mbh_fp16x2, mbh_tf32, mbh_tf32x3 or mbh_bf16x3",
        ),
        (f"{V}_METHOD", "", "want auto, mbh_fp16, mbh_fp16x2, mbh_tf32, mbh_tf32x3 or mbh_bf16x3"),
        (f"{V}_GDN", "on", "want auto, intra, full or off"),
        (f"{V}_KDA", "on", "want auto, intra or off"),
        (f"{V}_CHECK", "-1", "want a whole number, 0 or more"),
        (f"{V}_CHECK", "1.5", "want a whole number, 0 or more"),
        (f"{V}_CHECK", "", "want a whole number, 0 or more"),
        (f"{V}_RUN_DIR", "", "want the path of a folder"),
        (
            f"{V}_FAULT",
            "all",
            f"want nothing, or for tests one of {', '.join(config.FAULTS[1:])} or METHOD-PRECISION",
        ),
    ],
)
def test_bad_value(name: str, value: str, wanted: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.from_env({name: value})
    assert str(error.value) == f"{name}: {wanted}; got {value!r}"


def test_studied_inverses_are_those_of_the_reference() -> None:
    names = [f"{m}-{p}" for m in METHODS for p in PRECISIONS if p != "fp64"]
    assert all(Config.from_env({f"{V}_FAULT": name}).fault == name for name in names)
    for name in ("MBH", "MBH-", "MBH-fp64", "MBH-fp8", "XYZ-fp16", "MBH-fp16-fp16", "NS8-fp16"):
        with pytest.raises(ConfigError):
            Config.from_env({f"{V}_FAULT": name})


@pytest.mark.parametrize("name", [f"{V}_METHODS", f"{V}X", f"{V}_", f"{V}_method"])
def test_unknown_variable(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.from_env({name: "1"})
    assert str(error.value).startswith(f"{name}: no such variable; known are {V}, {V}_METHOD, ")


def test_several_mistakes_make_one_line() -> None:
    with pytest.raises(ConfigError) as error:
        Config.from_env({V: "on", f"{V}_CHECK": "x", f"{V}_NEW": "1"})
    message = str(error.value)
    assert "\n" not in message
    assert [part.split(":")[0] for part in message.split("; ") if ":" in part] == [
        V, f"{V}_CHECK", f"{V}_NEW",
    ]  # fmt: skip


def test_modes_resolve() -> None:
    assert Config().gdn_mode == "intra"
    assert Config(gdn="intra").gdn_mode == "intra"
    assert Config(gdn="full").gdn_mode == "intra"
    assert Config(gdn="off").gdn_mode == "off"


def test_frozen_and_closed() -> None:
    with pytest.raises(ValidationError):
        Config().check = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Config(chekc=3)  # type: ignore[call-arg]


def test_no_variable_starts_with_a_prefix_that_sglang_renames() -> None:
    assert not [name for name in config.VARIABLES if name.startswith("SGL_")]
    assert issubclass(ConfigError, TrinvError)


def test_methods_are_those_of_the_ops() -> None:
    from sglang_trinv import ops

    assert tuple(ops.METHODS) == config.METHODS
