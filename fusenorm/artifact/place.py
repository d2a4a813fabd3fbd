"""Put a finished folder in place: whole or not at all, replacing an older one in one step."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fusenorm.artifact.manifest import DIGEST
from fusenorm.errors import BadInput


@contextmanager
def fresh_folder(folder: str | os.PathLike[str], marker: str, kind: str) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends, unless it raises.

    Args:
        folder: where to; its parents are made. An older one is replaced if it holds `marker`.
        marker: the file that tells a folder of this kind.
        kind: what such a folder is, for the error.

    Raises:
        BadInput: something else is there, it would lie in an artifact, which then would not be
            whole, or it cannot be written.
    """
    target = Path(os.path.abspath(folder))
    for parent in target.parents:
        if (parent / DIGEST).is_file():
            raise BadInput(f"lies in the artifact {parent}: choose another place", file=folder)
    if target.is_symlink() or (target.exists() and not _holds(target, marker)):
        raise BadInput(f"exists and is not {kind}: choose another -o", file=folder)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise BadInput(f"cannot be written: {error.strerror}", file=folder) from error
    try:
        yield stage
        stage.chmod(0o755)
        _put_in_place(stage, target, marker)
    except shutil.Error as error:  # of every file that could not be copied
        raise BadInput(f"cannot be written: {error.args[0][0][-1]}", file=folder) from error
    except OSError as error:
        raise BadInput(f"cannot be written: {error.strerror or error}", file=folder) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _put_in_place(stage: Path, target: Path, marker: str) -> None:
    """Rename a finished folder to target; an older target, told by `marker`, goes away.

    Raises:
        BadInput: something else is at target, or it cannot be written.
    """
    try:
        try:
            stage.rename(target)  # fails on a folder that is not empty
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not _holds(target, marker):
                raise
            if not _exchange(stage, target):
                _replace_in_two_steps(stage, target)
    except OSError as error:
        raise BadInput(f"cannot be written: {error.strerror}", file=target) from error


def _holds(folder: Path, marker: str) -> bool:
    return folder.is_dir() and (folder / marker).is_file()


def _replace_in_two_steps(stage: Path, target: Path) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    target.rename(aside)
    try:
        stage.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where the system cannot (older glibc, some mounts)."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    at_cwd, exchange = -100, 2
    return bool(renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0)
