"""Bad files: one clear line each, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import fusenorm
from fusenorm.errors import BadInput
from fusenorm.model_io import check_operators, load_model, save_model
from tests.graphs import model

WEIGHT = np.arange(128, dtype=np.float32).reshape(8, 16)  # large enough to be stored outside


def _external(folder: Path, location: str = "weights.bin") -> Path:
    proto = model("y = MatMul(x, w)", outputs="float[b,s,16] y", constants={"w": WEIGHT})
    tensor = proto.graph.initializer[0]
    (folder / "weights.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(WEIGHT.nbytes))):
        tensor.external_data.add(key=key, value=value)
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def _refused(path: Path, *words: str) -> None:
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(BadInput) as caught:
        fusenorm.optimize(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    for word in words:
        assert word in text
    assert sorted(path.parent.rglob("*")) == before


def test_missing_file(tmp_path: Path) -> None:
    _refused(tmp_path / "none.onnx", "no such file")


@pytest.mark.parametrize("content", [b"", b"hello, this is no model", b"\x00" * 4096])
def test_not_onnx(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "text.onnx"
    path.write_bytes(content)
    _refused(path, "not an ONNX model")


def test_truncated(tmp_path: Path) -> None:
    whole = model("y = MatMul(x, w)", constants={"w": WEIGHT}).SerializeToString()
    for part in (0.3, 0.6, 0.99):
        path = tmp_path / "cut.onnx"
        path.write_bytes(whole[: int(part * len(whole))])
        _refused(path, "not an ONNX model")


def _set_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 999


def _make_cycle(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[1] = "b"


def _read_nothing(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "ghost"


def _unknown_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].op_type, proto.graph.node[1].name = "Frobnicate", "node_7"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_set_opset, ["opset 999 is newer than"]),
        (_make_cycle, ["cycle"]),
        (_read_nothing, ["ghost"]),
        (_unknown_operator, ["node_7", "Frobnicate"]),
    ],
)
def test_damaged_graphs(
    tmp_path: Path, damage: Callable[[onnx.ModelProto], None], words: list[str]
) -> None:
    proto = model("a = Add(x, x)\nb = Relu(a)\ny = Relu(b)")
    damage(proto)
    path = tmp_path / "damaged.onnx"
    path.write_bytes(proto.SerializeToString())
    _refused(path, *words)


def test_unsorted_graph_is_sorted(tmp_path: Path) -> None:
    proto = model("a = Add(x, x)\ny = Relu(a)")
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))
    path = tmp_path / "unsorted.onnx"
    path.write_bytes(proto.SerializeToString())
    assert [node.op_type for node in load_model(path).graph] == ["Add", "Relu"]


def test_external_data_is_mapped_and_saved_whole(tmp_path: Path) -> None:
    path = _external(tmp_path)
    loaded = load_model(path)
    weight = loaded.graph.initializers["w"].const_value
    assert isinstance(weight, ir.ExternalTensor)
    np.testing.assert_array_equal(weight.numpy(), WEIGHT)
    (tmp_path / "out").mkdir()
    written = save_model(loaded, tmp_path / "out" / "copy.onnx")
    assert sorted(p.name for p in written) == ["copy.onnx", "copy.onnx.data"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["copy.onnx", "copy.onnx.data"]
    again = load_model(tmp_path / "out" / "copy.onnx")
    np.testing.assert_array_equal(again.graph.initializers["w"].const_value.numpy(), WEIGHT)


def test_missing_external_data(tmp_path: Path) -> None:
    path = _external(tmp_path)
    (tmp_path / "weights.bin").unlink()
    _refused(path, "weights.bin", "missing")


def test_truncated_external_data(tmp_path: Path) -> None:
    path = _external(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"\0" * 100)
    _refused(path, "weights.bin", "cut short")


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "a/../../weights.bin", ""])
def test_external_data_outside_its_folder(tmp_path: Path, location: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "weights.bin").write_bytes(WEIGHT.tobytes())
    _refused(_external(inside, location), "outside the model's folder")


def test_external_data_through_a_link_out_of_its_folder(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    path = _external(inside, "link.bin")
    (inside / "link.bin").symlink_to(tmp_path / "secret")
    _refused(path, "link.bin")


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.onnx"
    path.write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ir, "save", fail)
    with pytest.raises(BadInput, match="No space"):
        save_model(ir.from_proto(model("y = Relu(x)")), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_save_into_no_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        save_model(ir.from_proto(model("y = Relu(x)")), tmp_path / "none" / "a.onnx")


def test_check_operators_accepts_functions_and_other_domains() -> None:
    check_operators(ir.from_proto(fused_model()))


def fused_model() -> onnx.ModelProto:
    body = "sg = Sigmoid(x)\ny = Mul(x, sg)"
    return ir.to_proto(fusenorm.optimize(model(body)).model)  # type: ignore[return-value]


def test_the_weights_being_read_are_not_overwritten(tmp_path: Path) -> None:
    path = _external(tmp_path)
    loaded = load_model(path)
    save_model(loaded, tmp_path / "b.onnx")
    again = load_model(tmp_path / "b.onnx")
    before = (tmp_path / "b.onnx.data").read_bytes()
    with pytest.raises(BadInput, match="holds the weights of the model being read"):
        save_model(again, tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx.data").read_bytes() == before
