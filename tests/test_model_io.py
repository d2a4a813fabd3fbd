"""Bad files: one clear line each, and nothing left behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import fusenorm
from fusenorm import model_io
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


def test_what_onnx_ir_cannot_read(tmp_path: Path) -> None:
    proto = model("y = Relu(x)", outputs="float[b,s,8] y")
    numbers = onnx.helper.make_tensor("n", onnx.TensorProto.FLOAT, [1], [3.0])
    places = onnx.helper.make_tensor("p", onnx.TensorProto.INT64, [1], [2])
    sparse = onnx.helper.make_sparse_tensor(numbers, places, [8])
    proto.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], sparse_value=sparse))
    path = tmp_path / "sparse.onnx"
    onnx.save(proto, path)
    _refused(path, "malformed graph")
    with pytest.raises(BadInput, match="malformed graph"):
        fusenorm.optimize(proto)


def test_missing_file(tmp_path: Path) -> None:
    _refused(tmp_path / "none.onnx", "no such file")
    _refused(tmp_path, "is a folder")


def test_a_name_onnxruntime_cannot_open(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"latin-\xe9.onnx")
    path.write_bytes(model("y = Relu(x)").SerializeToString())
    _refused(path, "not UTF-8")


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
    _refused(path, "link.bin", "a link out")


@pytest.mark.parametrize("name", ["saved.onnx", "model.onnx"])
def test_external_data_where_the_links_of_a_cache_lead(tmp_path: Path, name: str) -> None:
    for folder in ("blobs", "snapshot"):
        (tmp_path / folder).mkdir()
    path = _external(tmp_path / "snapshot", "model.onnx.data")
    link = path.with_name("model.onnx.data")
    path.with_name("weights.bin").rename(link)
    for file in (path, link):
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(f"../blobs/{file.name}")
    saved = path.with_name(name)
    written = save_model(load_model(path), saved)
    assert written[0].name in ("saved.onnx.data", "model.onnx.data.1")
    assert link.is_symlink()  # what weights are read from is not replaced
    _same_outputs(tmp_path / "blobs" / "model.onnx", saved)
    weight = load_model(path).graph.initializers["w"].const_value
    assert weight is not None
    np.testing.assert_array_equal(weight.numpy(), WEIGHT)


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


def _same_outputs(a: Path, b: Path) -> None:
    x = np.ones((1, 2, 8), np.float32)
    outputs = [
        ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
        for path in (a, b)
    ]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("output", ["inside/fused.onnx", "fused.onnx"])
def test_weights_in_or_below_the_folder_stay_where_they_are(tmp_path: Path, output: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    path = _external(inside)
    assert save_model(load_model(path), tmp_path / output) == [tmp_path / output]
    assert sorted(p.name for p in inside.iterdir() if p.suffix != ".onnx") == ["weights.bin"]
    _same_outputs(path, tmp_path / output)


def test_weights_elsewhere_are_copied_whole(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    path = _external(source)
    with open(source / "weights.bin", "r+b") as data:
        data.truncate(2 * WEIGHT.nbytes)
    save_model(load_model(path), target / "a.onnx")
    assert (target / "a.onnx.data").read_bytes() == (source / "weights.bin").read_bytes()
    assert not (target / "a.onnx.data").samefile(source / "weights.bin")
    _same_outputs(path, target / "a.onnx")


def test_of_a_file_needed_for_the_least_part_only_that_is_kept(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    path = _external(source)
    with open(source / "weights.bin", "r+b") as data:
        data.truncate(3 * WEIGHT.nbytes)
    save_model(load_model(path), target / "a.onnx")
    assert (target / "a.onnx.data").stat().st_size == WEIGHT.nbytes
    _same_outputs(path, target / "a.onnx")


def test_holes_stay_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with open(source, "wb") as data:
        data.write(b"start")
        data.seek(1 << 30)
        data.write(b"middle")
        data.truncate(2 << 30)
    model_io._duplicate(source, target)
    assert target.stat().st_size == 2 << 30
    assert target.stat().st_blocks * 512 < 1 << 20
    with open(target, "rb") as data:
        assert data.read(6) == b"start\0"
        data.seek((1 << 30) - 1)
        assert data.read(8) == b"\0middle\0"


def test_files_are_cloned_where_that_can_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clone(target: int, request: int, source: int) -> None:
        assert request == 0x40049409
        os.write(target, b"clone of " + os.pread(source, 100, 0))

    monkeypatch.setattr(model_io.fcntl, "ioctl", clone)
    (tmp_path / "a").write_bytes(b"a")
    model_io._duplicate(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"clone of a"


def test_the_weights_being_read_are_not_overwritten(tmp_path: Path) -> None:
    """Not even by weights in memory that go outside, under the name of that very file."""
    path = _external(tmp_path, "fused.onnx.data")
    (tmp_path / "weights.bin").rename(tmp_path / "fused.onnx.data")
    loaded = load_model(path)
    added = ir.val("added", const_value=ir.tensor(2 * WEIGHT, name="added"))
    loaded.graph.register_initializer(added)
    written = save_model(loaded, tmp_path / "fused.onnx", most=10)
    assert [file.name for file in written] == ["fused.onnx.data.1", "fused.onnx"]
    assert (tmp_path / "fused.onnx.data").read_bytes() == WEIGHT.tobytes()
    again = load_model(tmp_path / "fused.onnx")
    for name, array in (("w", WEIGHT), ("added", 2 * WEIGHT)):
        np.testing.assert_array_equal(again.graph.initializers[name].const_value.numpy(), array)
    assert loaded.graph.initializers["added"] is added
    assert not isinstance(added.const_value, ir.ExternalTensor)
