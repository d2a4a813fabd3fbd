"""Open an artifact folder: everything in it is checked against its manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from fusenorm.artifact.external import external_locations
from fusenorm.artifact.golden import Golden, read_npz
from fusenorm.artifact.library import Library
from fusenorm.artifact.manifest import DIGEST, MANIFEST, read_manifest, read_regular, sha256
from fusenorm.artifact.signing import signed_digest
from fusenorm.errors import BadInput
from fusenorm.signature import Signature

MODEL = "model.onnx"
GOLDEN_INPUTS = "golden/inputs.npz"
GOLDEN_OUTPUTS = "golden/outputs.npz"

MOST_FILES = 10_000
_RETRIES = 20  # a folder may be replaced while it is read
_MANIFEST_TYPES: dict[str, type] = {
    "name": str,
    "target": str,
    "versions": dict,
    "source": dict,
    "report": dict,
    "libraries": list,
    "files": list,
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A checked artifact folder.

    Attributes:
        path: the folder.
        manifest: manifest.json as parsed.
        signature: the model's inputs and outputs.
        libraries: in the manifest's order, best first.
        identity: of the folder that was checked.
    """

    path: Path
    manifest: Mapping[str, Any]
    signature: Signature
    libraries: tuple[Library, ...]
    identity: tuple[int, ...]

    @property
    def in_place(self) -> bool:
        """Whether the folder that was checked is still there, not another in its place."""
        return _identity(self.path) == self.identity

    @property
    def model(self) -> Path:
        """The portable model."""
        return self.path / MODEL

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def files(self) -> dict[str, Mapping[str, Any]]:
        """The manifest's entries (path, size, sha256) by path."""
        return {entry["path"]: entry for entry in self.manifest["files"]}

    def golden(self) -> Golden | None:
        """The recorded run, None if there is none.

        Raises:
            BadInput: its files were changed since the artifact was opened, or hold no arrays.
        """
        recorded = self.manifest["golden"]
        if recorded is None:
            return None
        inputs, outputs = self.path / GOLDEN_INPUTS, self.path / GOLDEN_OUTPUTS
        return Golden(
            read_npz(inputs, self.signature.inputs, self.read(inputs)),
            read_npz(outputs, self.signature.outputs, self.read(outputs)),
            float(recorded["tolerance"]),
        )

    def read(self, file: Path) -> bytes:
        """The bytes of a file of the artifact: those the manifest has the digest of.

        Raises:
            BadInput: they are others by now.
        """
        entry = self.files[file.relative_to(self.path).as_posix()]
        content = read_regular(file, int(entry["size"]))
        _check_digest(hashlib.sha256(content).hexdigest(), entry, file)
        return content


def open_artifact(
    folder: str | os.PathLike[str], *, require_signature: str | os.PathLike[str] | None = None
) -> Stored:
    """Check a folder against its manifest; nothing of it is executed or loaded.

    Order: signature, manifest (size, digest, JSON), its paths, the folder's files, sizes, sha256,
    where the model's weights are.

    Args:
        folder: the artifact.
        require_signature: a public key file; the artifact must be signed with its private key.

    Raises:
        BadInput: names the file that is missing, extra, changed, not allowed or not signed.
    """
    path = Path(folder)
    for _ in range(_RETRIES):
        before = _identity(path)
        try:
            stored = _open(path, before, require_signature)
        except BadInput:
            if _identity(path) == before:
                raise
        else:
            if stored.in_place:
                return stored
    raise BadInput("is being replaced over and over: try again", file=folder)


def _identity(folder: Path) -> tuple[int, ...]:
    """What tells one folder from another that took its place; nothing if there is none."""
    try:
        status = folder.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _open(path: Path, identity: tuple[int, ...], key: str | os.PathLike[str] | None) -> Stored:
    signed = None if key is None else signed_digest(path, Path(key), MANIFEST)
    manifest = read_manifest(path, signed)
    try:
        for key, kind in _MANIFEST_TYPES.items():
            if not isinstance(manifest[key], kind):
                raise TypeError(f"{key} is {type(manifest[key]).__name__}")
        entries = {str(entry["path"]): entry for entry in manifest["files"]}
        signature = Signature.from_dict(manifest["signature"])
        for tensor in (*signature.inputs, *signature.outputs):
            _ = tensor.numpy if tensor.dtype not in (None, "", "string") else None
        libraries = tuple(Library.from_dict(entry, path) for entry in manifest["libraries"])
        required = [MODEL, *(entry["path"] for entry in manifest["libraries"])]
        if manifest["golden"] is not None:
            float(manifest["golden"]["tolerance"])
            required += [GOLDEN_INPUTS, GOLDEN_OUTPUTS]
        for name in (*entries, *required):
            _check_path(name, path)
        for name in required:
            if name not in entries:
                raise BadInput(f"'{name}' is not listed under files", file=path / MANIFEST)
        _check_files(path, entries)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(
            f"malformed manifest ({type(error).__name__}: {error})", file=path / MANIFEST
        ) from error
    stored = Stored(path, manifest, signature, libraries, identity)
    _check_weights(stored)
    return stored


def _check_path(name: str, folder: Path) -> None:
    """Refuse anything but a plain relative path in its one normal spelling."""
    pure = PurePosixPath(name)
    escapes = pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name
    if escapes or str(pure) != name or name in ("", ".", MANIFEST, DIGEST):
        raise BadInput(f"path '{name}' is not allowed", file=folder / MANIFEST)


def _check_files(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    found = {path.as_posix() for path in regular_files(folder)} - {MANIFEST, DIGEST}
    for name in sorted(entries.keys() - found):
        raise BadInput("is missing: copy the artifact again", file=folder / name)
    for name in sorted(found - entries.keys()):
        raise BadInput(f"is not listed in {MANIFEST}: remove it", file=folder / name)
    for name, entry in entries.items():
        path = folder / name
        size = path.stat().st_size
        if size != entry["size"]:
            raise BadInput(f"has {size} bytes, not {entry['size']}: it was changed", file=path)
    for name, entry in entries.items():
        _check_digest(sha256(folder / name), entry, folder / name)


def _check_digest(digest: str, entry: Mapping[str, Any], path: Path) -> None:
    if digest != entry["sha256"]:
        raise BadInput(
            f"sha256 is {digest[:12]}…, not {str(entry['sha256'])[:12]}…: it was changed", file=path
        )


def _check_weights(stored: Stored) -> None:
    """Weights outside the model must be files the manifest lists."""
    try:
        locations = external_locations(stored.read(stored.model))
    except ValueError as error:
        raise BadInput(f"not an ONNX model ({error})", file=stored.model) from error
    for location in sorted(locations):
        if location not in stored.files:
            raise BadInput(
                f"external data is at {location!r}, which is not listed in {MANIFEST}",
                file=stored.model,
            )


def regular_files(folder: Path) -> list[Path]:
    """Relative paths of the regular files below a folder, sorted.

    Raises:
        BadInput: something there is neither a regular file nor a folder, or there is too much.
    """
    found = []
    seen = 0
    for root, folders, names in os.walk(folder):
        seen += len(folders) + len(names)
        if seen > MOST_FILES:
            raise BadInput(f"holds more than {MOST_FILES} files", file=folder)
        for name in (*folders, *names):
            path = Path(root, name)
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                found.append(path.relative_to(folder))
            elif not stat.S_ISDIR(mode):
                raise BadInput("only regular files are allowed in an artifact", file=path)
    return sorted(found)
