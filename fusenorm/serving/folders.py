"""What a server may read while it is written: whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from fusenorm.artifact import MANIFEST, Stored, open_artifact
from fusenorm.artifact.place import fresh_folder
from fusenorm.errors import BadInput

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def plain_name(name: str) -> str:
    """A name that is safe as a folder's and in a URL.

    Raises:
        BadInput: it is not.
    """
    if not _NAME.fullmatch(name):
        raise BadInput(f"'{name}' is no name for a model: letters, digits, '.', '_' and '-' are")
    return name


def write_model(stored: Stored, repo: Path, name: str, version: int, file: str, text: str) -> Path:
    """Write a model of a repository: its version's folder first, then the file that names it.

    Args:
        stored: copied to REPO/NAME/VERSION.
        repo: the repository.
        name: the model's folder there, a plain name.
        version: an existing one is replaced in one step.
        file: name of the config.
        text: its content.

    Returns:
        REPO/NAME.

    Raises:
        BadInput: the artifact changed meanwhile, or something else is in its place.
    """
    folder = repo / name
    folder.mkdir(parents=True, exist_ok=True)
    _install(stored, folder / str(version))
    write_text(folder / file, text)
    return folder


def _install(stored: Stored, target: Path) -> None:
    """Copy an artifact; the copy is checked before it takes the place of an older one.

    Raises:
        BadInput: the artifact changed meanwhile, or something else is at target.
    """
    with fresh_folder(target, MANIFEST, "a fusenorm artifact") as stage:
        shutil.copytree(stored.path, stage, dirs_exist_ok=True)
        open_artifact(stage)


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    stage = Path(name)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        stage.chmod(0o644)
        os.replace(stage, path)
    finally:
        stage.unlink(missing_ok=True)
