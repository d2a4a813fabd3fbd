"""Reading and writing ONNX files: every way a file can be bad is one clear line."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import google.protobuf.message
import onnx
import onnx_ir as ir

from fusenorm.errors import BadInput

# Above this the weights go to a file of their own (protobuf ends at 2 GiB).
EXTERNAL_DATA_BYTES = 1 << 30
DATA_SUFFIX = ".data"
# Operators onnxruntime keeps in the standard domain although ONNX does not have them.
RUNTIME_OPERATORS = frozenset({"SimplifiedLayerNormalization"})


def load_model(path: str | os.PathLike[str]) -> ir.Model:
    """Read a model; weights stored outside stay there and are mapped, not read.

    Raises:
        BadInput: the file is missing, cut short, not ONNX, newer than this onnx package knows,
            cyclic, or its external data is missing or lies outside the model's folder.
    """
    file = Path(path)
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
    try:
        model = ir.serde.deserialize_model(proto)
    except (ValueError, KeyError, ir.serde.SerdeError) as error:
        raise BadInput(f"malformed graph: {error}", file=file) from error
    for value in _initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = file.parent.resolve()
            _check_external_size(tensor, file)
    sort_graphs(model, file)
    return model


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
    """External data must lie in the model's folder and exist."""
    root = file.parent.resolve()
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
        if not target.is_file() or not target.resolve().is_relative_to(root):
            raise BadInput(f"external data file {location} of {tensor.name} is missing", file=file)


def _check_external_size(tensor: ir.ExternalTensor, file: Path) -> None:
    end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
    size = os.path.getsize(tensor.path)
    if end > size:
        raise BadInput(
            f"external data file {tensor.location} is cut short: {tensor.name} needs {end} bytes, "
            f"it has {size}",
            file=file,
        )


def check_no_overwrite(model: ir.Model, file: Path) -> None:
    """Refuse a destination whose data file is the one the model's own weights are read from.

    Raises:
        BadInput: naming the file.
    """
    data = (file.parent / (file.name + DATA_SUFFIX)).resolve()
    for value in _initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and Path(tensor.path).resolve() == data:
            raise BadInput(
                f"{data.name} holds the weights of the model being read: choose another name",
                file=file,
            )


def save_model(model: ir.Model, path: str | os.PathLike[str]) -> list[Path]:
    """Write a model, whole or not at all; large weights go to NAME.data beside it.

    Returns:
        The files written.

    Raises:
        BadInput: the folder does not exist or cannot be written.
    """
    file = Path(path)
    if not file.parent.is_dir():
        raise BadInput(f"no such folder: {file.parent}", file=file)
    weight_bytes = sum(
        value.const_value.nbytes for value in _initializers(model) if value.const_value is not None
    )
    outside = any(isinstance(v.const_value, ir.ExternalTensor) for v in _initializers(model))
    data = file.name + DATA_SUFFIX if weight_bytes > EXTERNAL_DATA_BYTES or outside else None
    check_no_overwrite(model, file)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{file.name}.", dir=file.parent))
    except OSError as error:
        raise BadInput(f"cannot write here: {error.strerror}", file=file.parent) from error
    try:
        try:
            ir.save(model, folder / file.name, external_data=data)
        except OSError as error:
            raise BadInput(f"cannot be written: {error.strerror}", file=file) from error
        written = sorted(folder.iterdir(), key=lambda part: part.name == file.name)
        for part in written:
            os.replace(part, file.parent / part.name)
    finally:
        shutil.rmtree(folder)
    return [file.parent / part.name for part in written]
