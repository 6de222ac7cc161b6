"""Patch an SGLang that has no plugin system: check, apply, reverse.

Every file is known by its sha256 before and after (ledger.toml), so nothing is guessed: a file that
is neither is refused and nothing is written. All new contents are written beside the files first
and then moved into place, each in one step; a run that is cut off between two moves leaves files
of both kinds, which the next ``apply`` completes and the next ``reverse`` undoes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import re
import shutil
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sglang_trinv import targets
from sglang_trinv.errors import TrinvError

HERE = Path(__file__).parent
HUNK = re.compile(rb"@@ -(\d+)(?:,\d+)? \+(\d+)(?:,\d+)? @@")

State = Literal["applied", "not applied", "half applied"]


class PatchError(TrinvError):
    """Nothing was changed; the message says which file or folder is in the way."""


@dataclass(frozen=True)
class File:
    """One file of SGLang, relative to the site, with its sha256 before and after."""

    path: str
    before: str
    after: str


@dataclass(frozen=True)
class Patch:
    """One patch file and what it does to which releases."""

    name: str
    releases: tuple[str, ...]
    files: tuple[File, ...]


@dataclass(frozen=True)
class Site:
    """A folder that SGLang is installed in, and which SGLang that is."""

    path: Path
    release: str


def ledger() -> tuple[Patch, ...]:
    """The patches of ledger.toml."""
    content = tomllib.loads((HERE / "ledger.toml").read_text())
    return tuple(
        Patch(entry["name"], tuple(entry["releases"]), tuple(File(**f) for f in entry["files"]))
        for entry in content["patch"]
    )


def find_site(path: Path | None = None) -> Site:
    """SGLang in the folder ``path``; by default the one that this Python would import.

    Raises:
        PatchError: there is none.
    """
    where = [] if path is None else [str(path)]
    options = {"path": where} if where else {}
    found = next(iter(importlib.metadata.distributions(name="sglang", **options)), None)
    if found is None:
        wanted = "--site: want a folder that SGLang is installed in" if where else "want SGLang"
        raise PatchError(f"{wanted}, got {path or 'none in this Python'}")
    return Site(Path(str(found.locate_file(""))).resolve(), found.version)


def find_patch(site: Site) -> Patch | None:
    """The patch of the site's release; None if that release loads plugins.

    Raises:
        TargetMissing: the release is not in the table.
    """
    release = site.release.partition("+")[0]
    for patch in ledger():
        if release in patch.releases:
            return patch
    targets.find(site.release)
    return None


def check(site: Site, patch: Patch) -> State:
    """Compare every file with the ledger.

    Raises:
        PatchError: a file is missing or has another content, with both hashes.
    """
    patched = [_is_patched(site.path / file.path, file) for file in patch.files]
    if all(patched):
        return "applied"
    return "half applied" if any(patched) else "not applied"


def apply(site: Site, patch: Patch) -> bool:
    """Bring every file to its patched content; return whether anything was to be done.

    Raises:
        PatchError: a file is not as released, or the site cannot be written.
    """
    return _bring(site, patch, patched=True)


def reverse(site: Site, patch: Patch) -> bool:
    """Bring every file back to its released content; else as ``apply``."""
    return _bring(site, patch, patched=False)


def require_applied(site: Site) -> None:
    """Refuse a release without plugins that is not patched.

    Raises:
        PatchError: what to do about it.
    """
    patch = find_patch(site)
    if patch is not None and (state := check(site, patch)) != "applied":
        raise PatchError(
            f"SGLang {site.release} has no plugin system and the patch for it is {state}: "
            "run `sglang-trinv patch --apply`"
        )


def _bring(site: Site, patch: Patch, patched: bool) -> bool:
    todo = [f for f in patch.files if _is_patched(site.path / f.path, f) is not patched]
    drafts = [(_draft(site.path / file.path), site.path / file.path) for file in todo]
    try:
        for file, (draft, path) in zip(todo, drafts, strict=True):
            _write(draft, path, _changed(patch, file, path.read_bytes(), patched))
        for draft, path in drafts:
            os.replace(draft, path)
    except OSError as error:
        reason = error.strerror or error
        raise PatchError(f"cannot write {error.filename or site.path}: {reason}") from None
    finally:
        for file in patch.files:  # of this run, and of one that was killed
            with contextlib.suppress(OSError):
                _draft(site.path / file.path).unlink()
    return bool(todo)


def _is_patched(path: Path, file: File) -> bool:
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise PatchError(f"cannot read {path}: {error.strerror}") from None
    if found not in (file.before, file.after):
        raise PatchError(
            f"{path} is not as SGLang released it, nothing was changed: "
            f"want sha256 {file.before} (patched: {file.after}), got {found}"
        )
    return found == file.after


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.sglang-trinv")


def _write(draft: Path, path: Path, content: bytes) -> None:
    """A new file, so that an installer's cache that shares the old one by a hard link stays."""
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    shutil.copymode(path, draft)


def _changed(patch: Patch, file: File, content: bytes, forward: bool) -> bytes:
    diff = (HERE / patch.name).read_bytes()
    result = transform(content, hunks(diff, file.path), forward)
    found = hashlib.sha256(result).hexdigest()
    wanted = file.after if forward else file.before
    if found != wanted:
        raise PatchError(
            f"{patch.name} and ledger.toml differ, nothing was changed: {file.path}: "
            f"want sha256 {wanted}, got {found}"
        )
    return result


Hunk = tuple[int, int, list[bytes]]


def hunks(diff: bytes, path: str) -> Iterator[Hunk]:
    """Lines before it in the old and in the new file, and its lines with their signs, of each
    hunk about ``path``."""
    for part in re.split(rb"^--- ", diff, flags=re.M)[1:]:
        head, *lines = part.splitlines(keepends=True)
        if head.split()[0] != b"a/" + path.encode():
            continue
        starts = [i for i, line in enumerate(lines) if HUNK.match(line)]
        for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
            found = HUNK.match(lines[start])
            assert found
            yield int(found[1]) - 1, int(found[2]) - 1, lines[start + 1 : end]


def transform(content: bytes, parts: Iterable[Hunk], forward: bool) -> bytes:
    """``content`` with the hunks applied, or taken back; the caller compares the hash."""
    gone, come = (b"-", b"+") if forward else (b"+", b"-")
    source, result, done = content.splitlines(keepends=True), [], 0
    for old, new, lines in parts:
        start = old if forward else new
        result += source[done:start]
        result += [line[1:] for line in lines if line[:1] in (b" ", come)]
        done = start + sum(line[:1] in (b" ", gone) for line in lines)
    return b"".join(result + source[done:])
