"""manifest.json: written in one way only, read within limits, its own digest beside it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusenorm.errors import BadInput

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DIGEST = f"{MANIFEST}.sha256"
MOST_BYTES = 64 << 20
MOST_DEPTH = 32


def write_manifest(folder: Path, manifest: Mapping[str, object]) -> None:
    """Write manifest.json and its digest; measured times are left out."""
    text = json.dumps(_plain(manifest), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    content = text.encode()
    (folder / MANIFEST).write_bytes(content)
    (folder / DIGEST).write_bytes(_digest_file(content))


def read_manifest(folder: Path, signed: str | None = None) -> dict[str, Any]:
    """The manifest of a folder: its size and digest are checked before it is parsed.

    Args:
        folder: the artifact.
        signed: the digest it was signed with, if that was asked for.

    Raises:
        BadInput: there is none, it was changed, or it is not JSON within the limits.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BadInput("no such artifact folder", file=folder)
    if path.is_symlink() or not path.is_file():
        raise BadInput(f"not a fusenorm artifact: no {MANIFEST}", file=folder)
    content = read_regular(path, MOST_BYTES)
    if not (folder / DIGEST).is_file():
        raise BadInput("is missing: copy the artifact again", file=folder / DIGEST)
    if read_regular(folder / DIGEST, 1 << 10) != _digest_file(content):
        raise BadInput(f"does not have the sha256 in {DIGEST}: it was changed", file=path)
    if signed is not None and hashlib.sha256(content).hexdigest() != signed:
        raise BadInput("is not the one that was signed", file=path)
    try:
        manifest = json.loads(
            content, object_pairs_hook=_no_repetition, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise BadInput(f"not JSON ({error})", file=path) from error
    if _depth(manifest) > MOST_DEPTH:
        raise BadInput(f"is nested deeper than {MOST_DEPTH}", file=path)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise BadInput(
            f"format_version is {version}: this fusenorm reads {FORMAT_VERSION}", file=path
        )
    return dict(manifest)


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file, not through a link.

    Raises:
        BadInput: it is something else, cannot be read, or has more than `most` bytes.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        with open(os.open(path, flags), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadInput("only regular files are allowed in an artifact", file=path)
            content = file.read(most + 1)
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}", file=path) from error
    if len(content) > most:
        raise BadInput(f"has more than {most} bytes", file=path)
    return content


def sha256(path: Path) -> str:
    """The hexadecimal digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_file(content: bytes) -> bytes:
    """The line `sha256sum manifest.json` prints."""
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n".encode()


def _no_repetition(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ: of equal ones, every reader would take another."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _depth(value: object) -> int:
    """How deep lists and objects are nested."""
    depth, layer = 0, [value]
    while layer:
        depth += 1
        layer = [
            item
            for outer in layer
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth


def _plain(value: object) -> object:
    """A value as JSON has it, without measured times: they differ from run to run."""
    match value:
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items() if key != "seconds"}
        case str() | bool() | int() | None:
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case np.generic():
            return _plain(value.item())
        case set() | frozenset():
            return sorted(str(item) for item in value)
        case Sequence():
            return [_plain(item) for item in value]
        case _:
            return str(value)
