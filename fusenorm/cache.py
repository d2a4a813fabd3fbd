"""The user's cache folder, and the libraries kept in it.

    ~/.cache/fusenorm/libraries/KEY.json             {"sha256": digest of the library}
    ~/.cache/fusenorm/libraries/fusenorm_ops-DIGEST.so

A library is opened only if its content has the digest its name says. XDG_CACHE_HOME moves it all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from fusenorm.artifact import sha256
from fusenorm.errors import BadInput


def folder() -> Path:
    """Where fusenorm keeps what it need not find out twice; may not exist yet.

    Raises:
        BadInput: the user has no home folder.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise BadInput(f"no place for a cache ({error}): set XDG_CACHE_HOME") from error
    return Path(base, "fusenorm")


def library(key: str, build: Callable[[Path], object]) -> Path:
    """The library kept under `key`; `build` writes it to the path it is given if there is none.

    Args:
        key: a file name that stands for everything the library's content depends on.
        build: called at most once.

    Raises:
        BadInput: the cache cannot be written, or others may write to it.
    """
    base = folder() / "libraries"
    entry = base / f"{key}.json"
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(base)
        kept = _kept(entry)
        if kept:
            return kept
        fresh = base / f".{key}.{os.getpid()}.so"
        build(fresh)
        digest = sha256(fresh)
        path = base / f"fusenorm_ops-{digest}.so"
        fresh.replace(path)
        note = entry.with_suffix(f".{os.getpid()}")
        note.write_text(json.dumps({"sha256": digest}), encoding="utf-8")
        note.replace(entry)
    except OSError as error:
        raise BadInput(
            f"cannot be used as a cache ({error}): set XDG_CACHE_HOME to a folder of yours",
            file=base,
        ) from error
    return path


def _kept(entry: Path) -> Path | None:
    """The library an entry names, None if there is none or it was changed."""
    try:
        digest = json.loads(entry.read_text(encoding="utf-8"))["sha256"]
        path = entry.with_name(f"fusenorm_ops-{digest}.so")
        return path if sha256(path) == digest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_private(base: Path) -> None:
    status = base.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise BadInput("others may write to it: set XDG_CACHE_HOME to a folder of yours", file=base)
