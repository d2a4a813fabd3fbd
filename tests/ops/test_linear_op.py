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
NUMBERS = {"alpha": 1.7, "beta": 0.8, "epsilon": 1e-5}


def numbers(spec: ops.OpSpec) -> dict[str, float]:
    return {name: NUMBERS[name] for name in spec.attributes}


def model(spec: ops.OpSpec, opset: int, rank: int = 3) -> onnx.ModelProto:
    def info(slot: ops.Slot) -> onnx.ValueInfoProto:
        rank_of = {"row": rank, "vector": 1, "panels": 3}[slot.layout]
        dims = [f"{slot.name}{axis}" for axis in range(rank_of)]
        return onnx.helper.make_tensor_value_info(slot.name, DTYPES[slot.dtype].onnx, dims)

    node = onnx.helper.make_node(
        spec.op_type,
        [slot.name for slot in spec.inputs],
        [slot.name for slot in spec.outputs],
        domain=DOMAIN,
        **numbers(spec),
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
    shapes |= {"panels": (panels, INNER, PANEL), "vector": (COLUMNS - 3 * spec.ragged,)}
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
    assert Linear("swish", True, dtype="f16", norm="rms").op_type == "LinearGLU_swish_rms_f16"


def test_packing_loses_nothing() -> None:
    weight = np.arange(7 * COLUMNS, dtype=np.float32).reshape(7, COLUMNS)
    panels = pack(weight)
    assert panels.shape == (COLUMNS // PANEL, 7, PANEL)
    assert np.array_equal(panels[1, 3], weight[3, PANEL:])
    assert np.array_equal(unpack(panels), weight)
    both = pack_gated(weight, -weight)
    assert np.array_equal(unpack(both[0::2]), weight)
    assert np.array_equal(unpack(both[1::2]), -weight)


@pytest.mark.parametrize("columns", [1, PANEL - 1, PANEL + 1, 2 * PANEL + 20])
def test_the_last_panel_is_filled_up_with_zeros(columns: int) -> None:
    weight = np.random.default_rng(0).standard_normal((7, columns)).astype(np.float16)
    panels = pack(weight)
    assert panels.shape == (columns // PANEL + 1, 7, PANEL)
    assert panels.dtype == weight.dtype
    assert np.array_equal(unpack(panels)[:, :columns], weight)
    assert not unpack(panels)[:, columns:].any()
    assert np.array_equal(pack(weight.T.copy().T), panels)
    both = pack_gated(weight, -weight)
    assert np.array_equal(both[0::2], panels)
    assert np.array_equal(both[1::2], -panels)


@pytest.mark.parametrize("opset", [12, 13, 17, 18, 23])
def test_bodies_are_valid_and_compute_the_reference(opset: int) -> None:
    for spec in SPECS:
        if spec.dtype == "bf16" and opset < 13:
            continue  # ONNX has no Transpose of bf16 there
        proto = model(spec, opset)
        onnx.checker.check_model(proto, full_check=True)
        given = feeds(spec)
        made = ReferenceEvaluator(proto).run(None, given)
        bound = {"f64": 1e-7, "f32": 4e-6, "f16": 4e-3, "bf16": 3e-2}[spec.dtype]
        for got, want in zip(made, spec.reference(given, numbers(spec)), strict=True):
            assert np.abs(got - want).max() <= bound * np.abs(want).max(), spec.op_type


def test_bodies_change_only_with_their_version() -> None:
    """A library and a model may be of different age, so a new body needs a new op_type."""
    digest = hashlib.sha256()
    for spec, opset in itertools.product(SPECS, (12, 13, 18)):
        digest.update(spec.function_text(opset).encode())
    assert Linear.VERSION == 1
    assert digest.hexdigest()[:16] == "f996ba271aa0dd1a", (
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


@pytest.mark.parametrize("dtype", ["f32", "f16", "f64"])
@pytest.mark.parametrize("norm", ["rms", "ln"])
def test_with_a_norm_it_is_the_op_of_what_the_norm_gives(norm: str, dtype: str) -> None:
    """Bit for bit, so that every rounding is where two nodes have theirs."""
    spec = Linear("swish", gated=True, bias=True, dtype=dtype, norm=norm)  # type: ignore[arg-type]
    given, prologue = feeds(spec), spec.prologue
    assert prologue is not None
    assert spec.attributes == (*spec.products.attributes, *prologue.attributes)
    (rows,) = ReferenceEvaluator(model(prologue, 18)).run(None, {"x": given["x"]})
    products = ReferenceEvaluator(model(spec.products, 18)).run(None, given | {"x": rows})
    together = ReferenceEvaluator(model(spec, 18)).run(None, given)
    assert np.array_equal(together[0], products[0])


def test_plain_is_one_map_and_nothing_else() -> None:
    plain = [spec.op_type for spec in SPECS if spec.plain and spec.dtype == "f32"]
    assert plain == ["Linear", "Linear_bias"]


def test_a_ragged_op_has_one_map_and_a_bias_that_tells_its_columns() -> None:
    ragged = [spec for spec in SPECS if spec.ragged]
    assert all(spec.bias and spec.maps == 1 and not spec.residual for spec in ragged)
    assert len(ragged) == len([spec for spec in SPECS if not spec.ragged and spec.bias
                               and spec.maps == 1 and not spec.residual])  # fmt: skip
    spec = Linear("swish", gated=True, bias=True, ragged=True)
    assert spec.op_type == "LinearGLU_swish_bias_ragged"
    given = feeds(spec)
    given |= {name: given[name][None] for name in ("gate_bias", "up_bias")}  # 1s in front
    (y,) = ReferenceEvaluator(model(spec, 18)).run(None, given)
    assert y.shape == (2, 3, COLUMNS - 3)
    assert np.allclose(y, spec.reference(given, numbers(spec))[0], atol=1e-5)
