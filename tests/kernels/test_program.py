"""Function bodies read as programs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from fusenorm.kernels import row_program, supports, symbols
from fusenorm.ops import Gated, Norm, OpSpec
from tests.kernels.cases import attributes, evaluate, inputs, supported


def test_levels_of_a_layer_norm() -> None:
    program = row_program(Norm(centred=True, skip=True))
    assert [[item.output for item in level] for level in program.levels] == [["mean"], ["variance"]]
    assert [program.values[name].kind for name in ("s", "mean", "centred", "inverse")] == [
        "element",
        "row",
        "element",
        "row",
    ]
    assert program.row_free("s")
    assert not program.row_free("centred")


def test_only_programs_without_rows_are_flat() -> None:
    assert row_program(Gated("gelu")).flat
    assert row_program(Gated("swish", "pair")).flat
    assert not row_program(Gated("swish", "gate_up")).flat
    assert not row_program(Norm(scale=None)).flat


@pytest.mark.parametrize(
    ("layout", "gate", "up"),
    [
        ("gate_up", (0, 0, 1), (1, 0, 1)),
        ("up_gate", (1, 0, 1), (0, 0, 1)),
        ("interleaved", (0, 0, 2), (0, 1, 2)),
    ],
)
def test_views_of_a_packed_row(layout: Any, gate: tuple[int, ...], up: tuple[int, ...]) -> None:
    views = row_program(Gated("swish", layout)).views
    assert {name: (view.half, view.offset, view.stride) for name, view in views.items()} == {
        "gate": gate,
        "up": up,
    }


def test_constants_are_rounded_to_their_type() -> None:
    program = row_program(Gated("gelu_tanh", dtype="f16", precision="storage"))
    assert program.values["act_root"].literal == float(np.float16(np.sqrt(2 / np.pi)))


def test_attributes_stay_apart_from_literals() -> None:
    program = row_program(Norm(skip=True, dtype="f16", scale="f16", alpha=True))
    assert program.values["alpha_value"].kind == "attribute"
    assert program.values["alpha_value"].dtype == "f16"


def test_an_unknown_op_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def strange(self: OpSpec, opset: int) -> onnx.FunctionProto:
        return onnx.parser.parse_function(
            '<domain: "fusenorm", opset_import: ["": 18]>\nRMSNorm <epsilon> (x, scale) => (y)\n'
            "{\n  y = Softplus (x)\n}"
        )

    monkeypatch.setattr(Norm, "function", strange)
    spec = Norm(bias="f16")
    with pytest.raises(NotImplementedError, match="Softplus"):
        row_program(spec)
    assert "Softplus" in (supports(spec) or "")


def test_f64_has_no_kernel() -> None:
    assert "f64" in (supports(Norm(dtype="f64", scale="f64")) or "")


def test_every_other_op_has_a_kernel() -> None:
    from fusenorm.ops import FAMILIES

    missing = [
        spec.op_type
        for family in FAMILIES
        for spec in family.variants()
        if "f64" not in spec.op_type and supports(spec)
    ]
    assert missing == []


def test_two_symbols_where_the_sum_may_be_unused() -> None:
    assert symbols(Norm()) == ("fusenorm_RMSNorm",)
    assert symbols(Norm(skip=True)) == ("fusenorm_SkipRMSNorm", "fusenorm_SkipRMSNorm__nosum")


def test_reading_a_program_does_not_import_tvm() -> None:
    code = "import sys, fusenorm.kernels, fusenorm.lower; sys.exit('tvm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "spec",
    [spec for spec in supported() if spec.dtype == "f16"][::7],
    ids=lambda spec: spec.op_type,
)
def test_the_node_by_node_oracle_is_onnx(spec: OpSpec) -> None:
    values = inputs(spec, 2, 33, "normal")
    evaluator = ReferenceEvaluator(spec.function(18))
    expected = evaluator.run(None, values, attributes=attributes(spec))
    for mine, theirs in zip(evaluate(spec, values), expected, strict=True):
        assert np.allclose(mine, theirs, rtol=4e-3, atol=1e-3)
