"""Every declared op: name and spec are one to one, the body computes the numpy reference."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from fusenorm import ops
from fusenorm.ops import DOMAIN, DTYPES, OpSpec

SPECS = [spec for family in ops.FAMILIES for spec in family.variants()]
NUMBERS = {"epsilon": 1e-3, "alpha": 1.75, "beta": 0.625, "floor": -0.5, "limit": 0.75}


def _model(spec: OpSpec, opset: int) -> onnx.ModelProto:
    def info(slot: ops.Slot) -> onnx.ValueInfoProto:
        dims = ["d_" + slot.name] if slot.layout == "vector" else ["b", "s", "d_" + slot.name]
        return onnx.helper.make_tensor_value_info(slot.name, DTYPES[slot.dtype].onnx, dims)

    node = onnx.helper.make_node(
        spec.op_type,
        [slot.name for slot in spec.inputs],
        [slot.name for slot in spec.outputs],
        domain=DOMAIN,
        **{name: NUMBERS[name] for name in spec.attributes},
    )
    graph = onnx.helper.make_graph(
        [node], "op", [info(slot) for slot in spec.inputs], [info(slot) for slot in spec.outputs]
    )
    return onnx.helper.make_model(
        graph,
        functions=[spec.function(opset)],
        opset_imports=[onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN, 1)],
        ir_version=8,
    )


def _feeds(spec: OpSpec) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"row": (2, 3, 16), "packed": (2, 3, 32), "vector": (16,)}
    return {
        slot.name: rng.normal(0.3, 1.0, shapes[slot.layout]).astype(DTYPES[slot.dtype].numpy)
        for slot in spec.inputs
    }


def test_op_types_are_unique_and_parse_back() -> None:
    names = [spec.op_type for spec in SPECS]
    assert len(set(names)) == len(names)
    assert [ops.parse(name) for name in names] == SPECS
    assert ops.parse("SkipRMSNorm_nonsense") is None


@pytest.mark.parametrize("opset", [12, 13, 17, 18, 23])
def test_bodies_are_valid_and_compute_the_reference(opset: int) -> None:
    for spec in SPECS:
        if spec.inputs[0].dtype == "bf16":
            continue
        model = _model(spec, opset)
        onnx.checker.check_model(model, full_check=True)
        feeds = _feeds(spec)
        got = ReferenceEvaluator(model).run(None, feeds)
        numbers = {name: NUMBERS[name] for name in spec.attributes}
        # Constants in a body are f32; f16 rounds at up to four places.
        bound = {"f64": 1e-7, "f32": 2e-6, "f16": 4e-3}[spec.inputs[0].dtype]
        for value, want in zip(got, spec.reference(feeds, numbers), strict=True):
            error = np.abs(np.asarray(value, np.float64) - want).max()
            assert error <= bound * np.abs(want).max(), (spec.op_type, error)


def test_a_body_older_than_its_ops_is_refused() -> None:
    with pytest.raises(ValueError, match="needs opset 12"):
        ops.Norm().function(11)


def test_f64_twin_keeps_the_algebra() -> None:
    for spec in SPECS:
        twin = spec.with_dtype("f64")
        assert twin in SPECS
        assert twin.attributes == spec.attributes
        assert [slot.name for slot in twin.inputs] == [slot.name for slot in spec.inputs]


def test_a_norm_alone_of_the_sum_gives_the_bits_of_both_in_one() -> None:
    for spec in SPECS:
        rounded = isinstance(spec, ops.Norm) and spec.skip and spec.residual == "storage"
        if not rounded or spec.inputs[0].dtype == "bf16":
            continue
        feeds, alone = _feeds(spec), spec.alone
        y, s = ReferenceEvaluator(_model(spec, 18)).run(None, feeds)
        given = {slot.name: feeds[slot.name] for slot in alone.inputs} | {"x": s}
        (again,) = ReferenceEvaluator(_model(alone, 18)).run(None, given)
        assert np.array_equal(again, y), spec.op_type


@pytest.mark.parametrize(("spec", "name"), [
    (ops.Norm(), "RMSNorm"),
    (ops.Norm(centred=True, skip=True, bias="f32", alpha=True), "SkipLayerNorm_bias_alpha"),
    (ops.Norm(dtype="f16", scale="f16", affine="storage"), "RMSNorm_f16_castfirst"),
    (ops.Norm(dtype="f16", scale="f32"), "RMSNorm_f16_f32scale"),
    (ops.Gated("swish"), "Swish"),
    (ops.Gated("gelu_tanh", "gate_up", "f16", "storage"), "GLU_gelu_tanh_gate_up_f16_stepwise"),
])  # fmt: skip
def test_names_read_like_what_they_are(spec: OpSpec, name: str) -> None:
    assert spec.op_type == name


def test_bodies_change_only_with_their_version() -> None:
    """A library and a model may be of different age, so a new body needs a new op_type."""
    digest = hashlib.sha256()
    for spec, opset in itertools.product(SPECS, (12, 13, 18)):
        digest.update(spec.function_text(opset).encode())
    frozen = "9c76a3c6b5acb776"
    assert {spec.VERSION for spec in SPECS} == {1}
    assert digest.hexdigest()[:16] == frozen, "a body changed: raise VERSION of its family"
