"""A compiled model in memory, and writing it as an artifact folder."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from fusenorm.artifact.golden import Golden, write_npz
from fusenorm.artifact.library import Library
from fusenorm.artifact.manifest import FORMAT_VERSION, MANIFEST, sha256, write_manifest
from fusenorm.artifact.place import fresh_folder
from fusenorm.artifact.read import GOLDEN_INPUTS, GOLDEN_OUTPUTS, MODEL, regular_files
from fusenorm.signature import Signature

if TYPE_CHECKING:
    import onnx_ir as ir

# Weights above this are put beside the model, where onnxruntime maps them instead of reading.
EXTERNAL_DATA_BYTES = 16 << 20
_PACKAGES = ("apache-tvm", "apache-tvm-ffi", "ml_dtypes", "numpy", "onnx", "onnx-ir", "onnxruntime")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the model came from: the file's digest and what it declared."""

    sha256: str | None
    opset: int | None
    ir_version: int | None


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
        with fresh_folder(folder, MANIFEST, "a fusenorm artifact") as stage:
            self._write(stage)
            if check is not None:
                check(stage)
        return Path(folder)

    def _write(self, folder: Path) -> None:
        from fusenorm.model_io import save_model  # not for those who only load

        save_model(self.model, folder / MODEL, EXTERNAL_DATA_BYTES)
        libraries = []
        for library in self.libraries:
            digest = hashlib.sha256(library.content).hexdigest()[:12]
            path = f"lib/{library.variant}/fusenorm_ops-{digest}.so"
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
            "golden": None if self.golden is None else {"tolerance": self.golden.tolerance},
            "files": [_describe(folder, path) for path in regular_files(folder)],
        }
        write_manifest(folder, manifest)


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
