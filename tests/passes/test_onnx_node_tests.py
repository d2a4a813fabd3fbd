"""ONNX's own node tests of the ops we know, with the outputs ONNX expects."""

from __future__ import annotations

import functools
import re
import warnings

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx.backend.test.case.test_case import TestCase

import fusenorm
from tests.graphs import run

NAMES = re.compile("layer_normalization|rms_normalization|gelu|swiglu|(?<!hard)swish")


@functools.cache
def cases() -> dict[str, TestCase]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        found = collect_testcases(None)
    return {case.name: case for case in found if NAMES.search(case.name) and case.model.graph.node}


def names() -> list[str]:
    return sorted(name for name in cases() if "causal_conv" not in name)


def test_there_are_as_many_as_there_were() -> None:
    assert len(names()) >= 111


@pytest.mark.parametrize("name", names())
def test_node(name: str) -> None:
    case = cases()[name]
    inputs, outputs = case.data_sets[0]
    result = fusenorm.optimize(case.model)
    import onnx_ir as ir

    after = ir.to_proto(result.model)
    onnx.checker.check_model(after)
    feeds = {info.name: array for info, array in zip(case.model.graph.input, inputs, strict=True)}
    for got, wanted in zip(run(after, feeds), outputs, strict=True):
        assert got.shape == wanted.shape
        np.testing.assert_allclose(
            got.astype(np.float64), wanted.astype(np.float64), rtol=case.rtol, atol=1e-6
        )
    statuses = {site.status for site in result.report.sites}
    standard = {node.op_type for node in case.model.graph.node} & {
        "LayerNormalization", "RMSNormalization", "Gelu",
    }  # fmt: skip
    assert statuses == ({"native"} if standard else {"fused"})


def test_opset_28_swiglu_runs_only_rewritten() -> None:
    case = cases()["test_swiglu"]
    inputs, _ = case.data_sets[0]
    feeds = {info.name: array for info, array in zip(case.model.graph.input, inputs, strict=True)}
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.NotImplemented):
        run(case.model, feeds)
