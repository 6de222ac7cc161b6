"""A Triton cache that is read-only or on a full disk."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from sglang_trinv import cache

UNWRITABLE = Path("/proc/self/nothing")  # also for root, who may write where a mode forbids it


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "triton"))
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))


def test_a_good_cache_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert cache.ensure_writable() == ""
    assert os.environ[cache.VARIABLE] == str(tmp_path / "triton")
    assert list((tmp_path / "triton").iterdir()) == []
    assert not caplog.messages


def test_unwritable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from triton.runtime.cache import FileCacheManager

    monkeypatch.setenv(cache.VARIABLE, str(UNWRITABLE))
    with pytest.raises(OSError, match="nothing"):
        FileCacheManager("key")  # what would happen without us
    assert "cannot be written" in cache.ensure_writable()
    assert os.environ[cache.VARIABLE].startswith(str(tmp_path))
    (message,) = caplog.messages
    assert message.startswith(f"sglang_trinv: the Triton cache {UNWRITABLE} cannot be written (")
    assert FileCacheManager("key").put("x", "name")


def test_full_disk(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    full = []

    def allocate(descriptor: int, offset: int, size: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if "/triton/" in path or full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache.os, "posix_fallocate", allocate)
    assert "No space left on device" in cache.ensure_writable()
    assert cache.unwritable(Path(os.environ[cache.VARIABLE])) == ""
    full.append(True)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert cache.ensure_writable().endswith("and neither can a temporary folder")
    assert not caplog.messages
