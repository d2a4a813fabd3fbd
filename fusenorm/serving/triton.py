"""What Triton loads: a model repository entry for the fusenorm backend or for onnxruntime's own.

REPO/NAME/config.pbtxt
REPO/NAME/VERSION/            the artifact as it is
BACKENDS/fusenorm/model.py    the backend, once per server
BACKENDS/fusenorm/fusenorm/   what of this package it needs: no installation on the server

The server's Python needs onnxruntime; no other package.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import fusenorm
from fusenorm.artifact import Library, Stored
from fusenorm.artifact.place import fresh_folder
from fusenorm.errors import BadInput
from fusenorm.runtime.host import Host, choose
from fusenorm.serving.folders import plain_name, write_model
from fusenorm.serving.model import Served
from fusenorm.serving.protocol import datatype, dims
from fusenorm.signature import Tensor

BACKEND = "fusenorm"
CONFIG = "config.pbtxt"
# The part of this package that runs in the server: it needs onnxruntime and nothing else.
BUNDLED = (
    *("__init__.py", "errors.py", "signature.py", "difference.py"),
    *("artifact", "runtime", "serving"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """A config.pbtxt.

    Attributes:
        name: the model's name.
        backend: fusenorm or onnxruntime.
        inputs: the model's.
        outputs: the model's.
        max_batch_size: most rows of one batch; 0 where requests are not stacked.
        library: absolute path of the ops library on the server, for onnxruntime.
        metrics: the backend puts the session's figures into the server's metrics.
    """

    name: str
    backend: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    max_batch_size: int
    library: PurePosixPath | None = None
    metrics: bool = False

    def __str__(self) -> str:
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        yield f"name: {_quote(self.name)}"
        yield f"backend: {_quote(self.backend)}"
        yield f"max_batch_size: {self.max_batch_size}"
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            for tensor in tensors:
                yield f"{kind} {{"
                yield from (f"  {line}" for line in self._tensor(tensor, ragged=kind == "input"))
                yield "}"
        if self.max_batch_size:
            yield "dynamic_batching { }"
        yield "instance_group { count: 1 kind: KIND_CPU }"
        if self.metrics:
            yield 'parameters { key: "metrics" value { string_value: "true" } }'
        if self.library is not None:
            yield f"model_operations {{ op_library_filename: {_quote(str(self.library))} }}"

    def _tensor(self, tensor: Tensor, *, ragged: bool) -> Iterator[str]:
        yield f"name: {_quote(tensor.name)}"
        yield f"data_type: TYPE_{datatype(tensor)}"
        sizes = dims(tensor)[1:] if self.max_batch_size else dims(tensor)
        yield f"dims: [ {', '.join(str(size) for size in sizes or [1])} ]"
        if not sizes:
            yield "reshape { shape: [ ] }"
        if ragged and self.max_batch_size and self.backend == BACKEND and -1 in sizes:
            yield "allow_ragged_batch: true"


def deploy(
    artifact: Path,
    repo: Path,
    *,
    name: str | None = None,
    version: int = 1,
    max_batch_size: int | None = None,
    metrics: bool = False,
) -> Path:
    """Write a repository entry for the fusenorm backend.

    Args:
        artifact: the artifact folder.
        repo: the model repository.
        name: the model's name there; None: the artifact's.
        version: of the model; an existing one is replaced in one step.
        max_batch_size: None: 32 if the model's rows are independent, else 0.
        metrics: put the session's figures into the server's metrics. With them Triton's stub ends
            in SIGSEGV when it is shut down (2.51; after its work, so no request is lost).

    Returns:
        The model's folder, REPO/NAME.

    Raises:
        BadInput: the artifact is damaged, cannot be served or cannot be batched.
    """
    served = Served(artifact)
    rows = served.batch_size(max_batch_size)
    name = plain_name(name or served.stored.name)
    config = Config(name, BACKEND, *_ports(served.stored), rows, metrics=metrics)
    return write_model(served.stored, repo, name, version, CONFIG, str(config))


def deploy_onnxruntime(
    artifact: Path,
    repo: Path,
    server_path: PurePosixPath,
    *,
    name: str | None = None,
    version: int = 1,
    max_batch_size: int | None = None,
    variant: str | None = None,
) -> Path:
    """Write a repository entry for Triton's own onnxruntime backend.

    Args:
        artifact: the artifact folder.
        repo: the model repository, here.
        server_path: the same folder's absolute path on the server.
        name: as for `deploy`.
        version: as for `deploy`.
        max_batch_size: as for `deploy`.
        variant: of the library, such as x86-64-v3; None: the best this machine runs.

    Returns:
        The model's folder, REPO/NAME.

    Raises:
        BadInput: the artifact is damaged, cannot be served or holds no such library.
    """
    if not server_path.is_absolute():
        raise BadInput(f"--server-path is '{server_path}': give the repository's absolute path")
    served = Served(artifact)
    rows = served.batch_size(max_batch_size)
    name = plain_name(name or served.stored.name)
    text = onnxruntime_config(served.stored, name, version, server_path, variant, rows)
    return write_model(served.stored, repo, name, version, CONFIG, text)


def onnxruntime_config(
    stored: Stored,
    name: str,
    version: int,
    server_path: PurePosixPath,
    variant: str | None,
    max_batch_size: int,
) -> str:
    """The config.pbtxt `deploy_onnxruntime` writes; for its arguments see there."""
    library = None
    if stored.libraries:
        chosen = _library(stored, variant).path.relative_to(stored.path).as_posix()
        library = server_path / name / str(version) / chosen
    config = Config(name, "onnxruntime", *_ports(stored), max_batch_size, library)
    opset = stored.manifest["source"]["opset"]
    return f"# Needs onnxruntime 1.17 or newer (its C API 17) that reads opset {opset}.\n{config}"


def write_backend(backends: Path) -> Path:
    """Write the backend itself, replacing an older one in one step.

    Args:
        backends: the server's backend directory.

    Returns:
        BACKENDS/fusenorm.

    Raises:
        BadInput: something else is there.
    """
    package = Path(fusenorm.__file__).parent
    folder = backends / BACKEND
    with fresh_folder(folder, "model.py", "a Triton backend in Python") as stage:
        shutil.copyfile(package / "serving" / "triton_backend.py", stage / "model.py")
        for part in BUNDLED:
            source, copy = package / part, stage / "fusenorm" / part
            copy.parent.mkdir(exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, copy)
    return folder


def _library(stored: Stored, variant: str | None) -> Library:
    if variant is None:
        return choose(stored.libraries, Host.detect(), stored.path)
    for library in stored.libraries:
        if library.variant == variant:
            return library
    known = ", ".join(library.variant for library in stored.libraries)
    raise BadInput(f"holds no library for {variant}: {known}", file=stored.path)


def _ports(stored: Stored) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return stored.signature.inputs, stored.signature.outputs


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
