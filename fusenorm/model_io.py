"""Reading and writing ONNX files: every way a file can be bad is one clear line."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import google.protobuf.message
import onnx
import onnx_ir as ir

from fusenorm.errors import BadInput

# Above this the weights of a file go to one of their own (protobuf ends at 2 GiB).
EXTERNAL_DATA_BYTES = 1 << 30
SMALL_BYTES = 1 << 8  # shapes and scalars stay inside, where shape inference reads them
DATA_SUFFIX = ".data"
_FICLONE = 0x40049409  # linux/fs.h
# Operators onnxruntime has in the standard domain at every opset, where its optimizer writes them.
# ONNX has the first from opset 17 on, the second never.
RUNTIME_OPERATORS = frozenset({"LayerNormalization", "SimplifiedLayerNormalization"})


def load_model(path: str | os.PathLike[str]) -> ir.Model:
    """Read a model; weights stored outside stay there and are mapped, not read.

    Raises:
        BadInput: the file is missing, cut short, not ONNX, newer than this onnx package knows,
            cyclic, or its external data is missing or lies outside the model's folder; or its
            name is none onnxruntime can open.
    """
    file = Path(path)
    try:
        str(file).encode()
    except UnicodeEncodeError as error:
        raise BadInput("the name is not UTF-8: rename it", file=file) from error
    if file.is_dir():
        raise BadInput("is a folder, not a model", file=file)
    if not file.is_file():
        raise BadInput("no such file", file=file)
    try:
        proto = onnx.load(file, load_external_data=False)
    except google.protobuf.message.DecodeError as error:
        raise BadInput("not an ONNX model, or cut short", file=file) from error
    if not proto.opset_import or not proto.HasField("graph"):
        raise BadInput("not an ONNX model: it has no graph or no opset", file=file)
    check_versions(proto, file)
    if proto.graph.sparse_initializer:
        raise BadInput("sparse initializers are not supported", file=file)
    _check_external_paths(proto, file)
    model = parse_model(proto, file)
    for value in _initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = folder = file.parent.resolve()
            real = Path(tensor.path).resolve()
            if not real.is_relative_to(folder):  # onnx_ir follows no such link
                value.const_value = tensor = _elsewhere(tensor, real.name, real.parent)
            _check_external_size(tensor, file)
    sort_graphs(model, file)
    return model


def parse_model(proto: onnx.ModelProto, file: object = None) -> ir.Model:
    """The model as onnx_ir reads it.

    Raises:
        BadInput: it cannot be read.
    """
    try:
        return ir.serde.deserialize_model(proto)
    except (ValueError, KeyError, ir.serde.SerdeError) as error:
        raise BadInput(f"malformed graph: {error}", file=file) from error


def check_versions(proto: onnx.ModelProto, file: object = None) -> None:
    """Refuse opsets and IR versions newer than the installed onnx package.

    Raises:
        BadInput: naming both versions.
    """
    newest = onnx.defs.onnx_opset_version()
    for opset in proto.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > newest:
            raise BadInput(
                f"opset {opset.version} is newer than {newest}, the newest onnx "
                f"{onnx.__version__} knows; export with --opset {newest} or update onnx",
                file=file,
            )
    if proto.ir_version > onnx.IR_VERSION:
        raise BadInput(
            f"IR version {proto.ir_version} is newer than {onnx.IR_VERSION}, the newest onnx "
            f"{onnx.__version__} knows",
            file=file,
        )


def sort_graphs(model: ir.Model, file: object = None) -> None:
    """Bring every graph into topological order.

    Raises:
        BadInput: a graph has a cycle.
    """
    try:
        model.graph.sort()
    except ValueError as error:
        raise BadInput("the graph has a cycle", file=file) from error


def check_operators(model: ir.Model, file: object = None) -> None:
    """Refuse standard-domain operators the standard does not have.

    Raises:
        BadInput: naming the node and its operator.
    """
    opset = model.opset_imports.get("", 0)
    for node in model.graph.all_nodes():
        if node.domain != "" or (node.domain, node.op_type, node.overload) in model.functions:
            continue
        if node.op_type in RUNTIME_OPERATORS:
            continue
        if not onnx.defs.has(node.op_type, opset, ""):
            raise BadInput(
                f"operator {node.op_type} is not in ONNX opset {opset}",
                file=file,
                node=node.name or node.outputs[0].name,
            )


def _initializers(model: ir.Model) -> list[ir.Value]:
    return [value for graph in model.graphs() for value in graph.initializers.values()]


def _check_external_paths(proto: onnx.ModelProto, file: Path) -> None:
    """External data must exist, in the model's folder or, as caches have it, where its link leads.

    That is what onnxruntime demands, too.
    """
    root = file.parent.resolve()
    roots = (root, file.resolve().parent)
    for tensor in onnx.external_data_helper._get_all_tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = next((e.value for e in tensor.external_data if e.key == "location"), "")
        target = Path(os.path.normpath(root / location))
        if not location or Path(location).is_absolute() or not target.is_relative_to(root):
            raise BadInput(
                f"external data of {tensor.name} points outside the model's folder: {location!r}",
                file=file,
            )
        if not target.is_file():
            raise BadInput(f"external data file {location} of {tensor.name} is missing", file=file)
        if not any(target.resolve().is_relative_to(folder) for folder in roots):
            raise BadInput(
                f"external data file {location} of {tensor.name} is a link out of the model's "
                "folder: copy it there",
                file=file,
            )


def _check_external_size(tensor: ir.ExternalTensor, file: Path) -> None:
    end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
    size = os.path.getsize(tensor.path)
    if end > size:
        raise BadInput(
            f"external data file {tensor.location} is cut short: {tensor.name} needs {end} bytes, "
            f"it has {size}",
            file=file,
        )


def weight_bytes(model: ir.Model) -> int:
    """Size of all initializers together."""
    return sum(tensor.nbytes for tensor in _tensors(model).values())


def save_model(
    model: ir.Model, path: str | os.PathLike[str], most: int = EXTERNAL_DATA_BYTES
) -> list[Path]:
    """Write a model, whole or not at all.

    Weights in memory go inside, above `most` bytes to NAME.data beside it. Files of weights in or
    below the model's folder stay where they are, and the model refers to them; others are cloned
    or copied to NAME.data, NAME.data.1 ... No file that weights are read from is written to.

    Returns:
        The files written.

    Raises:
        BadInput: the folder does not exist or cannot be written.
    """
    file = Path(path)
    if not file.parent.is_dir():
        raise BadInput(f"no such folder: {file.parent}", file=file)
    try:
        stage = Path(tempfile.mkdtemp(prefix=f".{file.name}.", dir=file.parent))
    except OSError as error:
        raise BadInput(f"cannot write here: {error.strerror}", file=file.parent) from error
    try:
        try:
            with _weights_for(model, file, stage, most):
                ir.save(model, stage / file.name)
        except OSError as error:
            raise BadInput(f"cannot be written: {error.strerror}", file=file) from error
        written = sorted(stage.iterdir(), key=lambda part: part.name == file.name)
        for part in written:
            os.replace(part, file.parent / part.name)
    finally:
        shutil.rmtree(stage)
    return [file.parent / part.name for part in written]


@contextlib.contextmanager
def _weights_for(model: ir.Model, file: Path, stage: Path, most: int) -> Iterator[None]:
    """Let the model refer to its weights as seen from `file`; those to be written are in `stage`.

    Args:
        model: its initializers are as before afterwards.
        file: where the model will be.
        stage: what is put here goes beside it.
        most: bytes of weights that may go inside.
    """
    before = _tensors(model)
    moved = {v: tensor for v, tensor in before.items() if not isinstance(tensor, ir.ExternalTensor)}
    write = sum(tensor.nbytes for tensor in moved.values()) > most
    home = file.parent.resolve()
    files: dict[Path, dict[ir.Value, ir.ExternalTensor]] = {}
    for value, tensor in before.items():
        if isinstance(tensor, ir.ExternalTensor):
            path = Path(tensor.path)
            files.setdefault(path.resolve(), {})[value] = tensor
    names = (name for name in _data_names(file) if (home / name).resolve() not in files)
    try:
        for source, stored in files.items():
            if source.is_relative_to(home):
                location = source.relative_to(home).as_posix()
            elif 2 * sum(tensor.nbytes for tensor in stored.values()) >= source.stat().st_size:
                location = next(names)
                _duplicate(source, stage / location)
            else:  # most of the file is not needed
                moved |= stored
                write = True
                continue
            for value, tensor in stored.items():
                value.const_value = _elsewhere(tensor, location)
        if write:
            large = {v: tensor for v, tensor in moved.items() if tensor.nbytes > SMALL_BYTES}
            written = ir.external_data.convert_tensors_to_external(
                list(large.values()), stage, next(names)
            )
            for value, tensor in zip(large, written, strict=True):
                value.const_value = tensor
        yield
    finally:
        for value, original in before.items():
            value.const_value = original


def _tensors(model: ir.Model) -> dict[ir.Value, ir.TensorProtocol]:
    """The initializers that have a value, and it."""
    pairs = ((value, value.const_value) for value in _initializers(model))
    return {value: tensor for value, tensor in pairs if tensor is not None}


def _data_names(file: Path) -> Iterator[str]:
    """NAME.data, NAME.data.1, NAME.data.2 ..."""
    yield file.name + DATA_SUFFIX
    yield from (f"{file.name}{DATA_SUFFIX}.{index}" for index in itertools.count(1))


def _elsewhere(
    tensor: ir.ExternalTensor, location: str, folder: str | os.PathLike[str] = ""
) -> ir.ExternalTensor:
    """The same tensor in a file of the same content."""
    return ir.ExternalTensor(
        location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name or "",
        base_dir=folder,
    )


def _duplicate(source: Path, target: Path) -> None:
    """Clone a file where the file system can, else copy it; holes stay holes."""
    with open(source, "rb") as read, open(target, "xb") as write:
        try:
            fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
            return
        except OSError:
            size = os.fstat(read.fileno()).st_size
        write.truncate(size)
        end = 0
        while end < size:
            try:
                start = os.lseek(read.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return  # a hole up to the end
            end = os.lseek(read.fileno(), start, os.SEEK_HOLE)
            os.lseek(write.fileno(), start, os.SEEK_SET)
            while start < end:
                start += os.sendfile(write.fileno(), read.fileno(), start, end - start)
