"""Where a model says its weights are: found in every place a tensor can be, refused outside."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper

from fusenorm.artifact import open_artifact
from fusenorm.artifact.external import external_locations
from fusenorm.errors import BadInput
from tests.runtime.test_artifact import edit


def outside(location: str, *, twice: str | None = None) -> TensorProto:
    """A tensor whose values are in a file."""
    tensor = TensorProto(name="w", dims=[2], data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    for value in (location, twice):
        if value is not None:
            tensor.external_data.add(key="location", value=value)
    tensor.external_data.add(key="offset", value="0")
    return tensor


def attribute(**fields: object) -> AttributeProto:
    return AttributeProto(name="a", **fields)


def sparse(location: str) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(
        values=outside(f"{location}/values"), indices=outside(f"{location}/indices")
    )


def graph(**fields: object) -> onnx.GraphProto:
    return onnx.GraphProto(name="g", **fields)


def test_every_place_a_tensor_can_be() -> None:
    inner = graph(initializer=[outside("subgraph")])
    attributes = [
        attribute(t=outside("t")),
        attribute(tensors=[outside("tensors")]),
        attribute(g=inner),
        attribute(graphs=[graph(initializer=[outside("graphs")])]),
        attribute(sparse_tensor=sparse("sparse")),
        attribute(sparse_tensors=[sparse("sparses")]),
    ]
    node = onnx.NodeProto(op_type="X", attribute=attributes)
    function = onnx.FunctionProto(
        name="f",
        node=[onnx.NodeProto(op_type="Y", attribute=[attribute(t=outside("function"))])],
        attribute_proto=[attribute(t=outside("default"))],
    )
    training = onnx.TrainingInfoProto(
        initialization=graph(initializer=[outside("initialization")]),
        algorithm=graph(initializer=[outside("algorithm")]),
    )
    model = onnx.ModelProto(
        graph=graph(
            node=[node],
            initializer=[outside("initializer", twice="second")],
            sparse_initializer=[sparse("sparse_initializer")],
        ),
        functions=[function],
        training_info=[training],
    )
    expected = {
        *("initializer", "second", "t", "tensors", "subgraph", "graphs", "function", "default"),
        *("initialization", "algorithm"),
        *(f"{name}/{part}" for name in ("sparse", "sparses") for part in ("values", "indices")),
        *("sparse_initializer/values", "sparse_initializer/indices"),
    }
    assert external_locations(model.SerializeToString()) == expected


def test_models_without_any(llama: Path) -> None:
    assert external_locations(llama.read_bytes()) == set()
    assert external_locations(onnx.ModelProto(doc_string="location").SerializeToString()) == set()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-1], "cut short"),
        (lambda text: text + b"\x03", "wire type 3"),
        (lambda text: text + b"\xff" * 11, "more than ten bytes"),
        (lambda text: text + b"\x80", "cut short"),
    ],
)
def test_what_is_no_message(damage, message: str) -> None:
    model = onnx.ModelProto(graph=graph(initializer=[outside("weights")]))
    with pytest.raises(ValueError, match=message):
        external_locations(damage(model.SerializeToString()))


@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../weights", "lib/../../weights", "*/_ORT_MEM_ADDR_/*", "manifest.json", ""],
)
def test_weights_that_are_not_listed_are_refused(artifact, tmp_path, location: str) -> None:
    folder = artifact.save(tmp_path / "hostile.fnorm")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    add = helper.make_node("Add", ["x", "w"], ["y"])
    model = helper.make_model(helper.make_graph([add], "g", [x], [y], [outside(location)]))
    relist(folder, model.SerializeToString())
    with pytest.raises(BadInput, match=r"external data is at .*, which is not listed"):
        open_artifact(folder)


def test_a_model_that_is_none(artifact, tmp_path) -> None:
    folder = artifact.save(tmp_path / "hostile.fnorm")
    relist(folder, b"location of nothing")
    with pytest.raises(BadInput, match=r"model\.onnx: not an ONNX model"):
        open_artifact(folder)


def relist(folder: Path, content: bytes) -> None:
    """Another model, with its size and digest in the manifest: what a stranger can do."""
    (folder / "model.onnx").write_bytes(content)

    def change(manifest: dict) -> None:
        entry = next(entry for entry in manifest["files"] if entry["path"] == "model.onnx")
        entry.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())

    edit(folder, change)
