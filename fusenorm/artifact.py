"""The artifact: one folder with the portable model, its ops libraries and what is known of them.

    NAME.fnorm/
      manifest.json                 everything below, described; sizes and sha256 of every file
      model.onnx                    the fused model; any onnxruntime runs it without the library
      model.onnx.data               its weights, only if they are too large for one protobuf
      lib/LEVEL/fusenorm_ops-DIGEST.so   the kernels for one CPU level; a process that has one
                                    loaded must not get it for another of the same name
      golden/inputs.npz, outputs.npz   one recorded run without the library

A folder is checked completely (`open_artifact`) before anything in it is parsed by another
library or loaded into the process. The checksums show damage, not who made it: the libraries are
native code, so load artifacts only from where you would load a program.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from fusenorm.errors import BadInput
from fusenorm.signature import Signature, Tensor

if TYPE_CHECKING:
    import onnx_ir as ir

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"
GOLDEN_INPUTS = "golden/inputs.npz"
GOLDEN_OUTPUTS = "golden/outputs.npz"

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
_PACKAGES = ("apache-tvm", "apache-tvm-ffi", "ml_dtypes", "numpy", "onnx", "onnx-ir", "onnxruntime")
_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}


class Built(Protocol):
    """What `fusenorm.lower.build_library` returns, as far as an artifact reads it."""

    @property
    def path(self) -> Path: ...
    @property
    def op_types(self) -> Sequence[str]: ...
    @property
    def level(self) -> str: ...
    @property
    def features(self) -> Sequence[str]: ...
    @property
    def glibc(self) -> str | None: ...


@dataclasses.dataclass(frozen=True)
class Library:
    """One ops library and the machine it needs.

    Attributes:
        level: name of its CPU level, also of its folder.
        machine: as `platform.machine()` says it.
        features: CPU features it uses, as /proc/cpuinfo spells them.
        glibc: least version of glibc, None if it needs none.
        op_types: the fused ops it implements.
        path: its file.
        content: its bytes when freshly built, so that the file need not outlive the build.
    """

    level: str
    machine: str
    features: tuple[str, ...]
    glibc: str | None
    op_types: tuple[str, ...]
    path: Path
    content: bytes = dataclasses.field(default=b"", repr=False)

    @classmethod
    def of(cls, built: Built) -> Self:
        """Describe a freshly built library.

        Raises:
            BadInput: the file is not an ELF object of a known machine.
        """
        content = Path(built.path).read_bytes()
        if content[:4] != b"\x7fELF" or len(content) < 20:
            raise BadInput("not an ELF library", file=built.path)
        (number,) = struct.unpack_from("<H", content, 18)
        if number not in _ELF_MACHINES:
            raise BadInput(f"built for an unknown machine ({number})", file=built.path)
        return cls(
            built.level,
            _ELF_MACHINES[number],
            tuple(sorted(built.features)),
            built.glibc,
            tuple(sorted(built.op_types)),
            Path(built.path),
            content,
        )

    def as_dict(self, path: str) -> dict[str, object]:
        return {
            "path": path,
            "level": self.level,
            "machine": self.machine,
            "features": list(self.features),
            "glibc": self.glibc,
            "op_types": list(self.op_types),
        }


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the model came from: the file's digest and what it declared."""

    sha256: str | None
    opset: int | None
    ir_version: int | None


@dataclasses.dataclass(frozen=True)
class Golden:
    """One recorded run: input and output arrays by name."""

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A compiled model, ready to be saved.

    Attributes:
        name: what to call it, usually the source file's stem.
        model: the fused model with its function bodies.
        report: `Report.as_dict()`; times in it are left out of the manifest.
        libraries: best level first; none if nothing was fused.
        target: the target asked for.
        options: the options it was made with.
        source: the model file it was made from.
        golden: a recorded run to check it with.
    """

    name: str
    model: ir.Model
    report: Mapping[str, object]
    libraries: Sequence[Library] = ()
    target: str = "cpu"
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    source: Source = Source(None, None, None)
    golden: Golden | None = None

    def save(
        self, folder: str | os.PathLike[str], *, check: Callable[[Path], object] | None = None
    ) -> Path:
        """Write the folder: whole or not at all, replacing an older artifact in one step.

        The same artifact gives the same bytes.

        Args:
            folder: where to; must not exist, or be an artifact.
            check: called with the finished folder under a temporary name; if it raises, nothing
                is put in place.

        Returns:
            The folder.

        Raises:
            BadInput: the folder holds something else or cannot be written.
        """
        target = Path(os.path.abspath(folder))
        if target.is_symlink() or (target.exists() and not _is_artifact(target)):
            raise BadInput("exists and is not a fusenorm artifact: choose another -o", file=folder)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        except OSError as error:
            raise BadInput(f"cannot be written: {error.strerror}", file=folder) from error
        try:
            try:
                self._write(stage)
            except OSError as error:
                raise BadInput(f"cannot be written: {error.strerror}", file=folder) from error
            if check is not None:
                check(stage)
            stage.chmod(0o755)
            _put_in_place(stage, target)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        return Path(folder)

    def _write(self, folder: Path) -> None:
        from fusenorm.model_io import save_model  # not for those who only load

        save_model(self.model, folder / MODEL)
        libraries = []
        for library in self.libraries:
            digest = hashlib.sha256(library.content).hexdigest()[:12]
            path = f"lib/{library.level}/fusenorm_ops-{digest}.so"
            (folder / path).parent.mkdir(parents=True)
            (folder / path).write_bytes(library.content)
            libraries.append(library.as_dict(path))
        if self.golden is not None:
            (folder / "golden").mkdir()
            write_npz(folder / GOLDEN_INPUTS, self.golden.inputs)
            write_npz(folder / GOLDEN_OUTPUTS, self.golden.outputs)
        manifest = {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "versions": _versions(),
            "source": dataclasses.asdict(self.source),
            "target": self.target,
            "libraries": libraries,
            "signature": Signature.of_model(self.model).as_dict(),
            "report": self.report,
            "options": self.options,
            "golden": self.golden is not None,
            "files": [_describe(folder, path) for path in _files(folder)],
        }
        text = json.dumps(_plain(manifest), indent=2, sort_keys=True, ensure_ascii=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Stored:
    """A checked artifact folder.

    Attributes:
        path: the folder.
        manifest: manifest.json as parsed.
        signature: the model's inputs and outputs.
        libraries: in the manifest's order, best first.
    """

    path: Path
    manifest: Mapping[str, Any]
    signature: Signature
    libraries: tuple[Library, ...]

    @property
    def model(self) -> Path:
        """The portable model."""
        return self.path / MODEL

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    def golden(self) -> Golden | None:
        """The recorded run, None if there is none."""
        if not self.manifest["golden"]:
            return None
        return Golden(
            read_npz(self.path / GOLDEN_INPUTS, self.signature.inputs),
            read_npz(self.path / GOLDEN_OUTPUTS, self.signature.outputs),
        )


def open_artifact(folder: str | os.PathLike[str]) -> Stored:
    """Check a folder against its manifest; nothing of it is executed or loaded.

    Order: manifest (JSON only), its paths, the folder's files, sizes, sha256.

    Raises:
        BadInput: names the file that is missing, extra, changed or not allowed.
    """
    path = Path(folder)
    for _ in range(_RETRIES):
        before = _identity(path)
        try:
            stored = _open(path)
        except BadInput:
            if _identity(path) == before:
                raise
        else:
            if _identity(path) == before:
                return stored
    raise BadInput("is being replaced over and over: try again", file=folder)


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells one folder from another that took its place."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _open(path: Path) -> Stored:
    manifest = _read_manifest(path)
    try:
        for key, kind in _MANIFEST_TYPES.items():
            if not isinstance(manifest[key], kind):
                raise TypeError(f"{key} is {type(manifest[key]).__name__}")
        entries = {str(entry["path"]): entry for entry in manifest["files"]}
        signature = Signature.from_dict(manifest["signature"])
        for tensor in (*signature.inputs, *signature.outputs):
            _ = tensor.numpy if tensor.dtype not in (None, "", "string") else None
        libraries = tuple(_stored_library(path, entry) for entry in manifest["libraries"])
        required = [MODEL, *(entry["path"] for entry in manifest["libraries"])]
        required += [GOLDEN_INPUTS, GOLDEN_OUTPUTS] if manifest["golden"] else []
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
    return Stored(path, manifest, signature, libraries)


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as .npz; the same arrays give the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getvalue())


# What a damaged archive or array header makes numpy and zipfile raise.
_NPZ_ERRORS = (
    AttributeError,
    EOFError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_npz(path: str | os.PathLike[str], tensors: Sequence[Tensor] = ()) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz; pickled objects are refused.

    Args:
        path: the file.
        tensors: types numpy's format cannot name (bfloat16 ...) are restored from these.

    Raises:
        BadInput: the file is missing or no .npz of plain arrays.
    """
    try:
        # Opened here, since np.load leaves a file it cannot read open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
            for tensor in tensors:
                array = arrays.get(tensor.name)
                if array is not None and array.dtype.kind == "V" and tensor.dtype:
                    arrays[tensor.name] = array.view(tensor.numpy)
    except _NPZ_ERRORS as error:
        raise BadInput(f"not an .npz of plain arrays ({error})", file=path) from error
    return arrays


def sha256(path: Path) -> str:
    """The hexadecimal digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_artifact(path: Path) -> bool:
    return path.is_dir() and (path / MANIFEST).is_file()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BadInput("no such artifact folder", file=folder)
    if path.is_symlink() or not path.is_file():
        raise BadInput(f"not a fusenorm artifact: no {MANIFEST}", file=folder)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"not JSON ({error})", file=path) from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise BadInput(
            f"format_version is {version}: this fusenorm reads {FORMAT_VERSION}", file=path
        )
    return dict(manifest)


def _stored_library(folder: Path, entry: Mapping[str, Any]) -> Library:
    glibc = entry["glibc"]
    return Library(
        str(entry["level"]),
        str(entry["machine"]),
        tuple(str(name) for name in entry["features"]),
        None if glibc is None else str(glibc),
        tuple(str(name) for name in entry["op_types"]),
        folder / str(entry["path"]),
    )


def _check_path(name: str, folder: Path) -> None:
    """Refuse anything but a plain relative path in its one normal spelling."""
    pure = PurePosixPath(name)
    escapes = pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name
    if escapes or str(pure) != name or name in ("", ".", MANIFEST):
        raise BadInput(f"path '{name}' is not allowed", file=folder / MANIFEST)


def _check_files(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    found = {path.as_posix() for path in _files(folder)} - {MANIFEST}
    for name in sorted(entries.keys() - found):
        raise BadInput("is missing: copy the artifact again", file=folder / name)
    for name in sorted(found - entries.keys()):
        raise BadInput(f"is not listed in {MANIFEST}: remove it", file=folder / name)
    for name, entry in entries.items():
        path = folder / name
        size = path.stat().st_size
        if size != entry["size"]:
            raise BadInput(f"has {size} bytes, not {entry['size']}: it was changed", file=path)
        digest = sha256(path)
        if digest != entry["sha256"]:
            raise BadInput(
                f"sha256 is {digest[:12]}…, not {str(entry['sha256'])[:12]}…: it was changed",
                file=path,
            )


def _files(folder: Path) -> list[Path]:
    """Relative paths of the regular files below a folder, sorted.

    Raises:
        BadInput: something there is neither a regular file nor a folder.
    """
    found = []
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(root, name)
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                found.append(path.relative_to(folder))
            elif not stat.S_ISDIR(mode):
                raise BadInput("only regular files are allowed in an artifact", file=path)
    return sorted(found)


def _describe(folder: Path, path: Path) -> dict[str, object]:
    full = folder / path
    return {"path": path.as_posix(), "size": full.stat().st_size, "sha256": sha256(full)}


def _versions() -> dict[str, str]:
    import fusenorm

    versions = {"fusenorm": fusenorm.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


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


def _put_in_place(stage: Path, target: Path) -> None:
    """Rename stage to target; an older target ends up where stage was."""
    try:
        try:
            stage.rename(target)  # fails on a folder that is not empty
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not _is_artifact(target):
                raise
            if not _exchange(stage, target):
                _replace_in_two_steps(stage, target)
    except OSError as error:
        raise BadInput(f"cannot be written: {error.strerror}", file=target) from error


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
