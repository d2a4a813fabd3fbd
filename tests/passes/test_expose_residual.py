"""Reshapes and transposes between a sum and its norm: moved where that changes nothing."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fusenorm.passes.expose_residual import ExposeResidual
from fusenorm.passes.infer_shapes import InferShapes
from tests.graphs import fused, fused_ops, model, rows, run, same, written

GAMMA = np.linspace(0.5, 1.5, 8, dtype=np.float32)
PAIR = "float[b,s,8] x, float[b,s,8] r"
FEEDS = {"x": rows(2, 3, 8), "r": rows(2, 3, 8, seed=1)}
FLAT = "s = Add(x, r)\nflat = Reshape(s, rows)\ny = LayerNormalization(flat, gamma)"
ROWS = {"gamma": GAMMA, "rows": np.array([-1, 8])}


def exposed(proto: onnx.ModelProto) -> ir.Model | None:
    """The graph the pass makes of one whose shapes are known, None if it changed nothing."""
    work = InferShapes()(ir.from_proto(proto)).model
    before = written(work.graph)
    if not ExposeResidual()(work).modified:
        assert written(work.graph) == before
        return None
    after = ir.to_proto(work)
    onnx.checker.check_model(after)
    onnx.shape_inference.infer_shapes(after, strict_mode=True, check_type=True)
    return work


def moved(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[str] | None:
    """The operators after the pass, None if it changed nothing; outputs stay to the bit."""
    work = exposed(proto)
    if work is None:
        return None
    RemoveUnusedNodesPass()(work)
    after = ir.to_proto(work)
    assert [out.name for out in after.graph.output] == [out.name for out in proto.graph.output]
    for a, b in zip(run(proto, feeds), run(after, feeds), strict=True):
        np.testing.assert_array_equal(a, b)
    return [node.op_type for node in work.graph]


# Reshapes.


def test_a_norm_of_reshaped_rows_is_a_reshaped_norm() -> None:
    proto = model(FLAT, PAIR, "float[n,8] y", constants=ROWS)
    assert moved(proto, FEEDS) == ["Add", "LayerNormalization", "Reshape"]
    assert fused_ops(same(proto, FEEDS)) == ["SkipLayerNorm"]


@pytest.mark.parametrize(("source", "target"), [((2, 3, 8), (-1, 8)), ((6, 8), (2, 3, 8))])
def test_a_positive_axis_stays_the_last_one(
    source: tuple[int, ...], target: tuple[int, ...]
) -> None:
    body = f"""
      s = Add(x, r)
      t = Reshape(s, to)
      y = LayerNormalization<axis = {len(target) - 1}>(t, gamma)
    """
    kinds = ", ".join(f"float{list(source)} {name}" for name in "xr")
    shape = "float[6,8]" if len(target) == 2 else "float[2,3,8]"
    constants = {"gamma": GAMMA, "to": np.array(target)}
    proto = model(body, kinds, f"{shape} y", constants=constants)
    feeds = {name: rows(*source, seed=len(name)) for name in "xr"}
    assert moved(proto, feeds) == ["Add", "LayerNormalization", "Reshape"]
    assert fused_ops(same(proto, feeds)) == ["SkipLayerNorm"]


def test_all_readers_of_the_norm_read_the_reshape() -> None:
    body = FLAT.replace("y =", "n =") + "\na = Neg(n)\nc = Add(n, flat)\ny = Add(a, c)"
    outputs = "float[n,8] y, float[n,8] n"
    proto = model(body, PAIR, outputs, constants=ROWS)
    found = moved(proto, FEEDS)
    assert found is not None
    assert found.count("Reshape") == 2  # the sum is still read in its other shape
    assert fused_ops(same(proto, FEEDS)) == ["SkipLayerNorm"]


def test_the_reshape_keeps_its_attributes() -> None:
    body = FLAT.replace("Reshape(", "Reshape<allowzero = 1>(")
    proto = model(body, PAIR, "float[n,8] y", constants=ROWS)
    work = exposed(proto)
    assert work is not None
    reshape = next(node for node in work.graph if node.op_type == "Reshape")
    assert reshape.attributes["allowzero"].as_int() == 1
    assert list(reshape.outputs[0].shape or ())[-1] == 8


@pytest.mark.parametrize(
    ("body", "shape", "outputs"),
    [
        (FLAT, [-1, 4], "float[n,4] y"),  # other rows
        (FLAT.replace("Add", "Sub"), [-1, 8], "float[n,8] y"),
        (FLAT.replace("Add(x, r)", "Identity(x)"), [-1, 8], "float[n,8] y"),
        ("flat = Reshape(x, rows)\nz = Neg(r)\ny = LayerNormalization(flat, gamma)", [-1, 8],
         "float[n,8] y"),
        ("s = Add(x, r)\nflat = Reshape(s, rows)\nm = Neg(flat)\ny = LayerNormalization(m, gamma)",
         [-1, 8], "float[n,8] y"),
        ("s = Add(x, r)\nflat = Reshape(s, rows)\ny = Relu(flat)\nz = Neg(gamma)", [-1, 8],
         "float[n,8] y"),
    ],
)  # fmt: skip
def test_a_reshape_that_stays(body: str, shape: list[int], outputs: str) -> None:
    constants = {"gamma": GAMMA[: shape[-1]], "rows": np.array(shape)}
    proto = model(body, PAIR, outputs, constants=constants)
    feeds = {info.name: FEEDS[info.name] for info in proto.graph.input}
    assert moved(proto, feeds) is None


def test_a_norm_whose_statistics_are_read_stays() -> None:
    body = FLAT.replace("y =", "y, mean =")
    proto = model(body, PAIR, "float[n,8] y, float[n,1] mean", constants=ROWS)
    assert moved(proto, FEEDS) is None
    unread = ir.from_proto(model(body, PAIR, "float[n,8] y", constants=ROWS))
    InferShapes()(unread)
    assert not ExposeResidual()(unread).modified  # the mean's shape is declared
    unread.graph[-1].resize_outputs(1)
    assert ExposeResidual()(unread).modified


def test_a_norm_over_more_than_the_last_axis_stays() -> None:
    body = "s = Add(x, r)\nt = Reshape(s, to)\ny = LayerNormalization<axis = 1>(t, g)"
    constants = {"to": np.array([2, 3, 8]), "g": rows(3, 8)}
    proto = model(body, PAIR, "float[2,3,8] y", constants=constants)
    assert moved(proto, FEEDS) is None


def test_a_row_of_unknown_width_stays() -> None:
    body = "s = Add(x, r)\nt = Reshape(s, to)\ny = LayerNormalization(t, gamma)"
    kinds = "float[b,s,h] x, float[b,s,h] r, int64[2] to"
    proto = model(body, kinds, "float[n,m] y", constants={"gamma": GAMMA})
    assert moved(proto, {**FEEDS, "to": np.array([6, 8])}) is None


# Transposes.

X8 = "float[8,8,8,8] x, float[8,8,8,8] r"
SQUARE = {"x": rows(8, 8, 8, 8), "r": rows(8, 8, 8, 8, seed=1)}
ROUND = """
  rt = Transpose<perm = [0, 3, 1, 2]>(r)
  s = Add({sum})
  t = Transpose<perm = [0, 2, 3, 1]>(s)
  y = LayerNormalization(t, gamma)
"""
GAMMA_ONLY = {"gamma": GAMMA}


@pytest.mark.parametrize("order", ["x, rt", "rt, x"])
def test_transposes_that_undo_each_other_are_one(order: str) -> None:
    proto = model(ROUND.format(sum=order), X8, "float[8,8,8,8] y", constants=GAMMA_ONLY)
    assert moved(proto, SQUARE) == ["Transpose", "Add", "LayerNormalization"]
    assert fused_ops(same(proto, SQUARE)) == ["SkipLayerNorm"]


def test_every_reader_of_the_transposed_sum_reads_the_new_one() -> None:
    body = ROUND.format(sum="x, rt").replace("y =", "n =") + "y = Sub(n, t)"
    proto = model(body, X8, "float[8,8,8,8] y", constants=GAMMA_ONLY)
    assert moved(proto, SQUARE) == ["Transpose", "Add", "LayerNormalization", "Sub"]


def test_dimensions_move_with_the_transpose() -> None:
    proto = model(
        ROUND.format(sum="x, rt"),
        "float[b,8,h,w] x, float[b,h,w,8] r",
        "float[b,h,w,8] y",
        constants=GAMMA_ONLY,
    )
    work = exposed(proto)
    assert work is not None
    shapes = {node.op_type: str(node.outputs[0].shape) for node in work.graph}
    assert shapes["Add"] == "[b,h,w,8]"
    feeds = {"x": rows(2, 8, 3, 5), "r": rows(2, 3, 5, 8, seed=1)}
    assert moved(proto, feeds) == ["Transpose", "Add", "LayerNormalization"]


def test_an_operand_that_is_broadcast_keeps_its_own_shape() -> None:
    proto = model(
        ROUND.format(sum="x, rt"),
        "float[1,8,1,5] x, float[2,3,5,8] r",
        "float[2,3,5,8] y",
        constants=GAMMA_ONLY,
    )
    work = exposed(proto)
    assert work is not None
    (add,) = (node for node in work.graph if node.op_type == "Add")
    assert str(add.inputs[0].shape) == "[1,1,5,8]"  # type: ignore[union-attr]
    feeds = {"x": rows(1, 8, 1, 5), "r": rows(2, 3, 5, 8, seed=1)}
    assert moved(proto, feeds) == ["Transpose", "Add", "LayerNormalization"]


TURNED = "rt = Transpose<perm = [0, 3, 1, 2]>(r)\ns = Add(x, rt)"
STAYS = [
    "rt = Transpose<perm = [0, 2, 3, 1]>(r)\ns = Add(x, rt)\nt = Transpose<perm = [0, 2, 3, 1]>(s)",
    "rt = Transpose(r)\ns = Add(x, rt)\nt = Transpose<perm = [0, 2, 3, 1]>(s)",
    "rt = Transpose<perm = [0, 3, 1, 2]>(r)\ns = Add(x, rt)\nt = Transpose(s)",
    "rt = Transpose<perm = [0, 3, 1, 2]>(r)\ns = Mul(x, rt)\nt = Transpose<perm = [0, 2, 3, 1]>(s)",
    "rt = Neg(r)\ns = Add(x, rt)\nt = Transpose<perm = [0, 2, 3, 1]>(s)",
    "s = Add(x, r)\nt = Transpose<perm = [0, 2, 3, 1]>(s)",
]


@pytest.mark.parametrize("lines", STAYS)
def test_transposes_that_stay(lines: str) -> None:
    body = f"{lines}\ny = LayerNormalization(t, gamma)"
    proto = model(body, X8, "float[8,8,8,8] y", constants=GAMMA_ONLY)
    assert moved(proto, SQUARE) is None


def test_a_sum_that_others_read_stays_where_it_is() -> None:
    body = ROUND.format(sum="x, rt").replace("y =", "n =") + "q = Neg(s)\ny = Add(n, q)"
    proto = model(body, X8, "float[8,8,8,8] y", constants=GAMMA_ONLY)
    assert moved(proto, SQUARE) is None
    body = ROUND.format(sum="x, rt")
    outputs = "float[8,8,8,8] y, float[8,8,8,8] s"
    assert moved(model(body, X8, outputs, constants=GAMMA_ONLY), SQUARE) is None


def test_a_transposed_sum_that_is_an_output() -> None:
    outputs = "float[8,8,8,8] y, float[8,8,8,8] t"
    proto = model(ROUND.format(sum="x, rt"), X8, outputs, constants=GAMMA_ONLY)
    moved(proto, SQUARE)
    same(proto, SQUARE)


def test_an_operand_of_lower_rank_has_no_axes_to_move() -> None:
    proto = model(
        ROUND.format(sum="x, rt"),
        "float[8,8,8] x, float[8,8,8,8] r",
        "float[8,8,8,8] y",
        constants=GAMMA_ONLY,
    )
    assert moved(proto, {"x": rows(8, 8, 8), "r": rows(8, 8, 8, 8, seed=1)}) is None
    body = ROUND.format(sum="x, rt").replace("[0, 3, 1, 2]", "[2, 0, 1]")
    body = body.replace("[0, 2, 3, 1]", "[0, 1, 2, 3]")
    proto = model(
        body, "float[8,8,8,8] x, float[8,8,8] r", "float[8,8,8,8] y", constants=GAMMA_ONLY
    )
    assert moved(proto, {"x": rows(8, 8, 8, 8), "r": rows(8, 8, 8, seed=1)}) is None


def test_operands_of_unknown_rank_may_be_of_lower_rank() -> None:
    lines = ROUND.format(sum="u, rt").replace("(r)", "(v)")
    body = f"u = Reshape(x, lower)\nv = Reshape(r, higher)\n{lines}"
    inputs = "float[n] x, float[m] r, int64[k] lower, int64[l] higher"
    proto = model(body, inputs, "float[a,b,c,d] y", constants=GAMMA_ONLY)
    feeds = {
        "x": rows(512), "r": rows(4096, seed=1),
        "lower": np.array([8, 8, 8]), "higher": np.array([8, 8, 8, 8]),
    }  # fmt: skip
    assert moved(proto, feeds) is None


def test_a_transpose_of_unknown_rank_turns_unknown_axes() -> None:
    turned = TURNED.replace("(r)", "(v)").replace("x", "u")
    body = f"""
      u = Reshape(x, to)
      v = Reshape(r, to)
      {turned}
      t = Transpose(s)
      y = LayerNormalization(t, gamma)
    """
    inputs = "float[n] x, float[m] r, int64[k] to"
    proto = model(body, inputs, "float[a,b,c,d] y", constants=GAMMA_ONLY)
    feeds = {"x": rows(4096), "r": rows(4096, seed=1), "to": np.array([8, 8, 8, 8])}
    assert moved(proto, feeds) is None


@pytest.mark.parametrize(
    ("outside", "inside"),
    [
        ("s = Add(x, r)\nt = Reshape(s, to)", ""),
        ("s = Add(x, r)", "t = Reshape(s, to)"),
        (f"{TURNED}\nt = Transpose<perm = [0, 2, 3, 1]>(s)", ""),
        (TURNED, "t = Transpose<perm = [0, 2, 3, 1]>(s)"),
    ],
)
def test_a_norm_inside_a_branch(outside: str, inside: str) -> None:
    body = f"""
      {outside}
      y = If (flag) <
        then_branch = yes () => (float[8,8,8,8] p) {{ {inside} p = LayerNormalization(t, gamma) }},
        else_branch = no () => (float[8,8,8,8] q) {{ q = Neg(x) }}
      >
    """
    to = {"to": np.array([8, 8, 8, 8])} if "to)" in body else {}
    constants = {"gamma": GAMMA, **to}
    proto = model(body, f"{X8}, bool flag", "float[8,8,8,8] y", constants=constants)
    for flag in (True, False):
        assert moved(proto, {**SQUARE, "flag": np.array(flag)}) is None
        same(proto, {**SQUARE, "flag": np.array(flag)})


def test_a_fused_norm_is_moved_too() -> None:
    body = """
      s = Add(x, r)
      flat = Reshape(s, rows)
      sq = Mul(flat, flat)
      ms = ReduceMean<keepdims = 1>(sq, last)
      shifted = Add(ms, eps)
      root = Sqrt(shifted)
      y = Div(flat, root)
    """
    constants = {"rows": np.array([-1, 8]), "last": np.array([-1]), "eps": np.float32(1e-5)}
    proto = model(body, PAIR, "float[n,8] y", constants=constants)
    after, report = fused(proto)
    assert fused_ops(report) == ["SkipRMSNorm"]
    assert [node.op_type for node in after.graph.node][-1] == "Reshape"
    same(proto, FEEDS)
