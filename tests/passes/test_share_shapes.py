"""Sizes read off the model's inputs: which are, and what goes with what computed them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import fusenorm
from fusenorm.passes.canonicalize import RemoveUnused
from fusenorm.passes.infer_shapes import InferShapes
from fusenorm.passes.share_shapes import ShareShapes
from tests.graphs import model, rows, run

CONSTANTS = {
    "i0": np.array(0),
    "i1": np.array([1]),
    "i2": np.array(2),
    "last": np.array(-1),
    "both": np.array([0, 1]),
    "far": np.array(-3),
}


def shared(body: str, inputs: str = "float[b,s,8] x", outputs: str = "int64 y") -> onnx.ModelProto:
    """The model after the pass; it must compute what it did."""
    used = {name: array for name, array in CONSTANTS.items() if f"{name})" in body}
    proto = model(body, inputs, outputs, constants=used)
    work = ir.from_proto(proto)
    InferShapes()(work)
    ShareShapes()(work)
    RemoveUnused()(work)
    after = ir.to_proto(work)
    onnx.checker.check_model(after)
    feeds = {
        value.name: rows(*(3 + len(dim.dim_param) if dim.dim_param else dim.dim_value
                           for dim in value.type.tensor_type.shape.dim))
        for value in proto.graph.input
    }  # fmt: skip
    for a, b in zip(run(proto, feeds), run(after, feeds), strict=True):
        np.testing.assert_array_equal(b, a)
    return after


@pytest.mark.parametrize(
    ("body", "axis"),
    [
        ("t = Transpose <perm: ints = [0, 2, 1]> (x)\n d = Shape (t)\n y = Gather (d, i0)", 0),
        ("t = Transpose <perm: ints = [0, 2, 1]> (x)\n d = Shape (t)\n y = Gather (d, i2)", 1),
        ("t = Transpose <perm: ints = [0, 2, 1]> (x)\n d = Shape (t)\n y = Gather (d, last)", 1),
        ("t = Transpose <perm: ints = [1, 0, 2]> (x)\n d = Shape (t)\n y = Gather (d, i1)", 0),
        ("t = Transpose <perm: ints = [1, 0, 2]> (x)\n d = Shape (t)\n y = Gather (d, far)", 1),
        ("t = Cos (x)\n d = Shape (t)\n y = Gather (d, i1)", 1),
    ],
)
def test_a_named_dimension_is_read_off_the_input(body: str, axis: int) -> None:
    index = next(name for name in CONSTANTS if f"{name})" in body)
    outputs = "int64[1] y" if CONSTANTS[index].ndim else "int64 y"
    after = shared(body, outputs=outputs)
    assert [node.op_type for node in after.graph.node] == ["Shape", "Gather"]
    assert after.graph.node[0].input[0] == "x"
    (index,) = after.graph.initializer
    assert onnx.numpy_helper.to_array(index).item() == axis


def test_one_shape_serves_all() -> None:
    body = """t = Cos (x)\n d = Shape (t)\n p = Gather (d, i0)
        u = Sin (x)\n e = Shape (u)\n q = Gather (e, i2)\n w = Shape (x)\n y = Add (p, q)"""
    after = shared(body, "float[b,8,s] x")
    assert [node.op_type for node in after.graph.node] == ["Shape", "Gather", "Gather", "Add"]


@pytest.mark.parametrize(
    ("body", "inputs", "outputs"),
    [
        # of a size the inputs do not name
        ("t = Concat <axis: int = 1> (x, x)\n d = Shape (t)\n y = Gather (d, i1)",
         "float[b,s,8] x", "int64[1] y"),
        # more than one of them
        ("t = Cos (x)\n d = Shape (t)\n y = Gather (d, both)", "float[b,s,8] x", "int64[2] y"),
        # the other end of it
        ("t = Cos (x)\n d = Shape <start: int = 1> (t)\n y = Gather (d, i0)",
         "float[b,s,8] x", "int64 y"),
        # an output, whose names somebody may have made up
        ("t = Cos (x)\n d = Shape (t)\n y = Gather (d, i0)", "float[b,s,8] x",
         "int64 y, float[b,s,8] t"),
        # read off an input already
        ("d = Shape (x)\n y = Gather (d, i0)", "float[b,s,8] x", "int64 y"),
        # a name of two sizes
        ("t = Transpose <perm: ints = [1, 0]> (x)\n d = Shape (t)\n y = Gather (d, i0)",
         "float[s,s] x", "int64 y"),
        # of numbers
        ("t = Cos (x)\n d = Identity (t)\n y = Gather (d, i0)", "float[b,s] x", "float[s] y"),
    ],
)  # fmt: skip
def test_what_is_read_elsewhere_stays(body: str, inputs: str, outputs: str) -> None:
    before = len(body.split("\n"))
    assert len(shared(body, inputs, outputs).graph.node) == before


def test_nothing_follows_from_the_names_of_an_output() -> None:
    """A cache declared to be as long as the one before it, which it is longer than."""
    body = """k = Concat <axis: int = 1> (x, z)\n t = Transpose <perm: ints = [1, 0]> (k)
        d = Shape (t)\n y = Gather (d, i0)"""
    after = shared(body, "float[b,past] x, float[b,new] z", "int64 y, float[b,past] k")
    assert len(after.graph.node) == 4
    assert [dim.dim_param for dim in after.graph.output[1].type.tensor_type.shape.dim] == [
        "b",
        "past",
    ]


def test_an_input_that_is_no_tensor_has_no_sizes() -> None:
    text = """<ir_version: 8, opset_import: ["" : 18]>
        g (optional(float[b,s]) o, float[b,s] x) => (int64 y) {
          t = Cos (x)\n d = Shape (t)\n i = Constant <value_int: int = 1> ()\n y = Gather (d, i)
        }"""
    work = ir.from_proto(onnx.parser.parse_model(text))
    fusenorm.passes.canonicalize.FoldConstants()(work)
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(work)
    work.graph[0].outputs[0].shape = ir.Shape(["b", "s"])
    ShareShapes()(work)
    assert [node.inputs[0].name for node in work.graph if node.op_type == "Shape"] == ["x"]


def test_the_first_of_several_inputs_is_read() -> None:
    body = "t = Cos (z)\n d = Shape (t)\n y = Gather (d, i1)"
    after = shared(body, "float[b,s] x, float[s,b] z", "int64[1] y")
    assert after.graph.node[0].input[0] == "x"
    assert onnx.numpy_helper.to_array(after.graph.initializer[0]).tolist() == [0]


def test_queries_are_not_moved_for_their_size_alone() -> None:
    """Nothing but the attention reads them, as compile sees it."""
    body = """t = Transpose <perm: ints = [0, 2, 1]> (x)\n d = Shape (t)\n n = Gather (d, i1)
        c = Concat <axis: int = 0> (n, i1)\n h = Cos (x)\n y = Mul (h, h)"""
    proto = model(
        body.replace("i1)\n h", "n)\n z = Identity (c)\n h"),
        "float[b,8,s] x",
        "float[b,8,s] y, int64[2] z",
        constants={"i1": CONSTANTS["i1"]},
    )
    work, _ = fusenorm.pipeline.lower_regions(fusenorm.optimize(proto).model)
    assert "Transpose" not in {node.op_type for node in work.graph}
