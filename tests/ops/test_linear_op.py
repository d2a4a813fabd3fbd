"""Linear maps with packed weights: names, packing, and bodies against the numpy reference."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from fusenorm import ops
from fusenorm.ops import DOMAIN, DTYPES, Linear
from fusenorm.ops.linear import PANEL, pack, pack_gated, unpack

SPECS = list(Linear.variants())
INNER, COLUMNS = 5, 2 * PANEL
BETA = 0.8


def model(spec: Linear, opset: int, rank: int = 3) -> onnx.ModelProto:
    def info(slot: ops.Slot) -> onnx.ValueInfoProto:
        rank_of = {"row": rank, "vector": 1, "panels": 3}[slot.layout]
        dims = [f"{slot.name}{axis}" for axis in range(rank_of)]
        return onnx.helper.make_tensor_value_info(slot.name, DTYPES[slot.dtype].onnx, dims)

    node = onnx.helper.make_node(
        spec.op_type,
        [slot.name for slot in spec.inputs],
        [slot.name for slot in spec.outputs],
        domain=DOMAIN,
        **dict.fromkeys(spec.attributes, BETA),
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


def feeds(spec: Linear, rows: tuple[int, ...] = (2, 3)) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    panels = COLUMNS // PANEL * (2 if spec.gated else 1)
    shapes = {"x": (*rows, INNER), "residual": (*rows, COLUMNS)}
    shapes |= {"panels": (panels, INNER, PANEL), "vector": (COLUMNS,)}
    return {
        slot.name: random.normal(
            0.3, 1.0, shapes[slot.name if slot.layout == "row" else slot.layout]
        ).astype(DTYPES[slot.dtype].numpy)
        for slot in spec.inputs
    }


def test_names_parse_back_and_are_unique() -> None:
    names = [spec.op_type for spec in SPECS]
    assert len(set(names)) == len(names)
    assert [ops.parse(name) for name in names] == SPECS
    assert Linear("gelu", bias=True).op_type == "Linear_gelu_bias"
    assert Linear("swish", gated=True).op_type == "LinearGLU_swish"
    assert Linear(bias=True, residual=True, alpha=True).op_type == "Linear_bias_residual_alpha"


def test_packing_loses_nothing() -> None:
    weight = np.arange(7 * COLUMNS, dtype=np.float32).reshape(7, COLUMNS)
    panels = pack(weight)
    assert panels.shape == (COLUMNS // PANEL, 7, PANEL)
    assert np.array_equal(panels[1, 3], weight[3, PANEL:])
    assert np.array_equal(unpack(panels), weight)
    both = pack_gated(weight, -weight)
    assert np.array_equal(unpack(both[0::2]), weight)
    assert np.array_equal(unpack(both[1::2]), -weight)


@pytest.mark.parametrize("opset", [12, 13, 17, 18, 23])
def test_bodies_are_valid_and_compute_the_reference(opset: int) -> None:
    for spec in SPECS:
        if spec.dtype == "bf16" and opset < 13:
            continue  # ONNX has no Transpose of bf16 there
        proto = model(spec, opset)
        onnx.checker.check_model(proto, full_check=True)
        given = feeds(spec)
        made = ReferenceEvaluator(proto).run(None, given)
        numbers = dict.fromkeys(spec.attributes, BETA)
        bound = {"f64": 1e-7, "f32": 4e-6, "f16": 4e-3, "bf16": 3e-2}[spec.dtype]
        for got, want in zip(made, spec.reference(given, numbers), strict=True):
            assert np.abs(got - want).max() <= bound * np.abs(want).max(), spec.op_type


def test_bodies_change_only_with_their_version() -> None:
    """A library and a model may be of different age, so a new body needs a new op_type."""
    digest = hashlib.sha256()
    for spec, opset in itertools.product(SPECS, (12, 13, 18)):
        digest.update(spec.function_text(opset).encode())
    assert Linear.VERSION == 1
    assert digest.hexdigest()[:16] == "e227c02cc5429433", (
        "a body changed: raise VERSION of its family"
    )


def test_maps_of_one_x_have_their_own_slots() -> None:
    spec = Linear(bias=True, maps=2)
    assert spec.op_type == "Linear_2maps_bias"
    names = ["x", "weight_0", "bias_0", "weight_1", "bias_1"]
    assert [slot.name for slot in spec.inputs] == names
    assert [slot.name for slot in spec.outputs] == ["y_0", "y_1"]
    assert spec.one == Linear(bias=True)
    assert all(each.one == each for each in SPECS if each.activation != "identity" or each.gated)


def test_plain_is_one_map_and_nothing_else() -> None:
    plain = [spec.op_type for spec in SPECS if spec.plain and spec.dtype == "f32"]
    assert plain == ["Linear", "Linear_bias"]
