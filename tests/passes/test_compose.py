"""The passes are onnx_ir passes: alone, in other people's pipelines, and in ours."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest

import fusenorm
import fusenorm.passes
from fusenorm.ops import DOMAIN
from fusenorm.passes import (
    Canonicalize,
    Cleanup,
    FuseActivation,
    FuseGatedUnit,
    FuseNorm,
    FuseResidualNorm,
    Validator,
)
from fusenorm.passes.pattern import Refusal
from fusenorm.passes.rewrite import Rewrite
from tests.graphs import fused_ops, model, rows, run, same

BODY = """
  s = Add(x, r)
  sq = Mul(s, s)
  ms = ReduceMean<keepdims=1>(sq, last)
  shifted = Add(ms, eps)
  root = Sqrt(shifted)
  n = Div(s, root)
  h = Mul(n, gamma)
  g = Sigmoid(h)
  y = Mul(h, g)
"""
CONSTANTS = {
    "last": np.array([-1], np.int64),
    "eps": np.float32(1e-6),
    "gamma": np.linspace(0.5, 1.5, 8, dtype=np.float32),
}


@pytest.fixture
def block() -> onnx.ModelProto:
    return model(BODY, "float[b,s,8] x, float[b,s,8] r", constants=CONSTANTS)


def _domains(work: ir.Model) -> list[str]:
    return [node.op_type for node in work.graph if node.domain == DOMAIN]


def test_one_pass_alone(block: onnx.ModelProto) -> None:
    work = ir.from_proto(block)
    common.ShapeInferencePass()(work)
    result = FuseNorm()(work)
    assert result.modified
    assert _domains(work) == ["RMSNorm"]
    assert not FuseNorm()(work).modified


def test_in_a_foreign_pipeline(block: onnx.ModelProto) -> None:
    pipeline = ir.passes.Sequential(
        common.LiftConstantsToInitializersPass(),
        Canonicalize(),
        FuseNorm(Validator()),
        FuseResidualNorm(Validator()),
        FuseActivation(Validator()),
        FuseGatedUnit(Validator()),
        Cleanup(),
        common.RemoveUnusedNodesPass(),
    )
    work = pipeline(ir.from_proto(block)).model
    assert _domains(work) == ["SkipRMSNorm", "Swish"]
    feeds = {"x": rows(2, 3, 8), "r": rows(2, 3, 8, seed=1)}
    (a,), (b,) = run(block, feeds), run(ir.to_proto(work), feeds)
    np.testing.assert_allclose(b, a, rtol=0, atol=4e-6)


def test_optimize_leaves_its_argument_alone(block: onnx.ModelProto) -> None:
    before = block.SerializeToString()
    work = ir.from_proto(block)
    fusenorm.optimize(block)
    fusenorm.optimize(work)
    assert block.SerializeToString() == before
    assert _domains(work) == []


def test_optimize_is_idempotent(block: onnx.ModelProto) -> None:
    once = fusenorm.optimize(block)
    twice = fusenorm.optimize(once.model)
    assert fused_ops(once.report) == fused_ops(twice.report) == ["SkipRMSNorm", "Swish"]
    assert not any(record.changed for record in twice.report.passes)


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_limit_bisects(block: onnx.ModelProto, limit: int) -> None:
    result = fusenorm.optimize(block, options=fusenorm.Options(limit=limit))
    # The norm first, then the residual sum joins it, then the activation.
    assert fused_ops(result.report) == [[], ["RMSNorm"], ["SkipRMSNorm"]][limit]


def test_a_failed_check_rolls_back_and_says_so(block: onnx.ModelProto) -> None:
    def refuse(rewrite: Rewrite, opset: int) -> Refusal:
        return Refusal("check_failed", "here", f"{rewrite.spec.op_type} at opset {opset}")

    work = Canonicalize()(ir.from_proto(block)).model
    before = [node.op_type for node in work.graph]
    assert not FuseNorm(refuse)(work).modified
    assert [node.op_type for node in work.graph] == before
    assert not work.functions


def test_the_validator_refuses_wrong_rewrites(block: onnx.ModelProto) -> None:
    work = Canonicalize()(ir.from_proto(block)).model
    proposals: list[Rewrite] = []

    def record(rewrite: Rewrite, opset: int) -> Refusal:
        proposals.append(rewrite)
        return Refusal("recorded", "", "")

    FuseNorm(record)(work)
    import dataclasses

    right = next(p for p in proposals if p.spec.op_type == "RMSNorm")
    assert Validator()(right, 18) is None
    for wrong in (
        dataclasses.replace(right, attributes={"epsilon": 1e-12}),
        dataclasses.replace(right, attributes={"epsilon": 1e-5}),
        dataclasses.replace(right, spec=dataclasses.replace(right.spec, centred=True)),
        dataclasses.replace(right, inputs=(right.inputs[0], ir.val(
            "ones", const_value=ir.tensor(np.ones(8, np.float32), name="ones")
        ))),
    ):  # fmt: skip
        refusal = Validator()(wrong, 18)
        assert refusal is not None
        assert refusal.code == "check_failed"


def test_low_ir_version_is_raised_and_reported() -> None:
    body = "g = Sigmoid(x)\ny = Mul(x, g)"
    result = fusenorm.optimize(model(body, opset=13, ir_version=7))
    assert result.model.ir_version == 8
    assert result.report.model["ir_version"] == 7
    assert result.report.model["ir_version_after"] == 8


def test_old_opset_is_refused_by_name() -> None:
    body = "g = Sigmoid(x)\ny = Mul(x, g)"
    report = fusenorm.optimize(model(body, opset=11)).report
    assert [(site.status, site.reason) for site in report.sites] == [("refused", "opset")]
    assert "opset 11 is older than 12" in str(report.sites[0].detail)


def test_names_and_metadata_are_kept(block: onnx.ModelProto) -> None:
    work = fusenorm.optimize(block).model
    assert [value.name for value in work.graph.outputs] == ["y"]
    (norm, swish) = work.graph
    assert norm.metadata_props["fusenorm.rule"] == "residual"
    assert len(norm.metadata_props["fusenorm.source"].split("\n")) == 7
    assert norm.outputs[0].name == "h"
    assert swish.metadata_props["fusenorm.rule"] == "swish"


def test_a_reshape_between_the_sum_and_its_norm() -> None:
    body = """
      s = Add(x, r)
      flat = Reshape(s, shape)
      n = LayerNormalization(flat, gamma)
      y = Add(n, flat)
    """
    constants = {"gamma": CONSTANTS["gamma"], "shape": np.array([-1, 8], np.int64)}
    proto = model(body, "float[b,s,8] x, float[b,s,8] r", "float[n,8] y", constants=constants)
    report = same(proto, {"x": rows(2, 3, 8), "r": rows(2, 3, 8, seed=1)})
    assert fused_ops(report) == ["SkipLayerNorm"]


def test_a_reshape_that_changes_the_rows_stays() -> None:
    body = "s = Add(x, r)\nflat = Reshape(s, shape)\ny = LayerNormalization(flat, gamma)"
    constants = {"gamma": np.ones(4, np.float32), "shape": np.array([-1, 4], np.int64)}
    proto = model(body, "float[b,s,8] x, float[b,s,8] r", "float[n,4] y", constants=constants)
    report = same(proto, {"x": rows(2, 3, 8), "r": rows(2, 3, 8, seed=1)})
    assert [site.status for site in report.sites] == ["native"]


@pytest.mark.parametrize(
    ("second", "expected"), [([0, 3, 1, 2], "fused"), ([0, 2, 3, 1], "native")]
)
def test_transposes_around_the_sum(second: list[int], expected: str) -> None:
    body = f"""
      rt = Transpose<perm = {second}>(r)
      s = Add(x, rt)
      t = Transpose<perm = [0, 2, 3, 1]>(s)
      y = LayerNormalization(t, gamma)
    """
    proto = model(
        body,
        "float[2,8,8,8] x, float[2,8,8,8] r",
        "float[2,8,8,8] y",
        constants={"gamma": CONSTANTS["gamma"]},
    )
    report = same(proto, {"x": rows(2, 8, 8, 8), "r": rows(2, 8, 8, 8, seed=1)})
    assert [site.status for site in report.sites] == [expected]


def _pass_classes() -> list[type[ir.passes.PassBase]]:
    found = []
    for info in pkgutil.iter_modules(fusenorm.passes.__path__, "fusenorm.passes."):
        module = importlib.import_module(info.name)
        found += [
            kind
            for kind in vars(module).values()
            if isinstance(kind, type)
            and issubclass(kind, ir.passes.PassBase)
            and kind.__module__ == info.name
        ]
    return found


@pytest.mark.parametrize("kind", _pass_classes(), ids=lambda kind: kind.__name__)
def test_a_pass_is_called_as_its_class_or_its_file_and_may_find_nothing_to_do(
    kind: type[ir.passes.PassBase],
) -> None:
    words = re.sub("(?<!^)(?=[A-Z])", "_", kind.__name__).lower()
    assert kind.name in (words, kind.__module__.rpartition(".")[2])  # type: ignore[attr-defined]
    if all(p.default is not p.empty for p in inspect.signature(kind).parameters.values()):
        assert not kind()(ir.from_proto(model("y = Neg(x)"))).modified
