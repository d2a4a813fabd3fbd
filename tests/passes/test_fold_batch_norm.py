"""BatchNormalization beside a linear map: where it folds, where it must not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusenorm
from fusenorm.passes.evaluate import EvaluationError
from fusenorm.passes.fold_batch_norm import FoldBatchNorm
from tests.graphs import fused, fused_ops, model, reasons, rows, run, same

C = 6
NORM = "BatchNormalization<epsilon = 0.01>("


def _parameters(channels: int = C, seed: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "scale": rng.normal(1, 0.5, channels).astype(np.float32),
        "shift": rng.normal(0, 1, channels).astype(np.float32),
        "mean": rng.normal(0.5, 1, channels).astype(np.float32),
        "var": rng.uniform(0.05, 3, channels).astype(np.float32),
    }


def with_norms(
    body: str,
    inputs: str,
    outputs: str,
    constants: Mapping[str, np.ndarray],
    *,
    opset: int = 18,
    channels: int = C,
) -> onnx.ModelProto:
    return model(
        body.replace("BN(", NORM).replace("|)", ", scale, shift, mean, var)"),
        inputs,
        outputs,
        opset=opset,
        constants={**_parameters(channels), **constants},
    )


def _operators(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


W = rows(8, C, seed=1)
BIAS = {"c": rows(C, seed=2)}
IMAGE = ("float[n,4,h,w] x", "float[n,6,i,j] y", {"x": rows(2, 4, 9, 8)})
ROWS = ("float[n,8] x", "float[n,6] y", {"x": rows(3, 8)})
SEQUENCE = ("float[n,s,8] x", {"x": rows(2, 5, 8)})

BEHIND = {
    "MatMul": (*ROWS, "h = MatMul(x, w)\ny = BN(h|)", {"w": W}, ["MatMul", "Add"]),
    "MatMul, Add": (
        *ROWS,
        "h = MatMul(x, w)\na = Add(c, h)\ny = BN(a|)",
        {"w": W, **BIAS},
        ["MatMul", "Add"],
    ),
    "MatMul, scalar Add": (
        *ROWS,
        "h = MatMul(x, w)\na = Add(h, c)\ny = BN(a|)",
        {"w": W, "c": np.float32(0.3)},
        ["MatMul", "Add"],
    ),
    "MatMul of a Transpose": (
        *ROWS,
        "t = Transpose(w)\nh = MatMul(x, t)\ny = BN(h|)",
        {"w": np.ascontiguousarray(W.T)},
        ["MatMul", "Add"],
    ),
    "Gemm": (*ROWS, "h = Gemm(x, w)\ny = BN(h|)", {"w": W}, ["Gemm"]),
    "Gemm with all": (
        "float[8,n] x",
        "float[n,6] y",
        {"x": rows(8, 3)},
        "h = Gemm<alpha = 0.5, beta = 2.0, transA = 1, transB = 1>(x, w, c)\ny = BN(h|)",
        {"w": np.ascontiguousarray(W.T), **BIAS},
        ["Gemm"],
    ),
    "Gemm with a scalar bias": (
        *ROWS,
        "h = Gemm(x, w, c)\ny = BN(h|)",
        {"w": W, "c": np.float32([[0.4]])},
        ["Gemm"],
    ),
    "MatMul of a channel next to nothing": (
        *ROWS,
        "h = MatMul(x, w)\ny = BN(h|)",
        {"w": W, **{name: np.float32([1e-42, 1, 1, 1, 1, 1]) for name in ("scale", "shift")}},
        ["MatMul", "Add"],
    ),
    "Conv": (
        *IMAGE,
        "h = Conv<pads = [1, 1, 1, 1], strides = [2, 1]>(x, w)\ny = BN(h|)",
        {"w": rows(C, 4, 3, 3)},
        ["Conv"],
    ),
    "Conv with bias": (
        *IMAGE,
        "h = Conv(x, w, c)\ny = BN(h|)",
        {"w": rows(C, 4, 3, 2), **BIAS},
        ["Conv"],
    ),
    "Conv in groups": (
        *IMAGE,
        "h = Conv<group = 2, dilations = [2, 1]>(x, w, c)\ny = BN(h|)",
        {"w": rows(C, 2, 3, 3), **BIAS},
        ["Conv"],
    ),
    "Conv, padded to the same size": (
        *IMAGE,
        'h = Conv<auto_pad = "SAME_UPPER">(x, w, c)\ny = BN(h|)',
        {"w": rows(C, 4, 3, 3), **BIAS},
        ["Conv"],
    ),
    "Conv over time": (
        "float[n,4,t] x",
        "float[n,6,u] y",
        {"x": rows(2, 4, 9)},
        "h = Conv(x, w, c)\ny = BN(h|)",
        {"w": rows(C, 4, 5), **BIAS},
        ["Conv"],
    ),
    "ConvTranspose": (
        *IMAGE,
        "h = ConvTranspose<strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [1, 0]>(x, w)\n"
        "y = BN(h|)",
        {"w": rows(4, C, 3, 3)},
        ["ConvTranspose"],
    ),
    "MatMul, Transpose": (
        "float[n,s,8] x",
        "float[n,6,s] y",
        {"x": rows(2, 5, 8)},
        "h = MatMul(x, w)\nt = Transpose<perm = [0, 2, 1]>(h)\ny = BN(t|)",
        {"w": W},
        ["MatMul", "Add", "Transpose"],
    ),
    "MatMul, Add of three axes, Transpose": (
        "float[n,s,8] x",
        "float[n,6,s] y",
        {"x": rows(2, 5, 8)},
        "h = MatMul(x, w)\na = Add(h, c)\nt = Transpose<perm = [0, 2, 1]>(a)\ny = BN(t|)",
        {"w": W, "c": rows(1, 1, C)},
        ["MatMul", "Add", "Transpose"],
    ),
    "MatMul, Reshape to given sizes, Transpose": (
        "float[16,8] x",
        "float[2,6,2,2,2] y",
        {"x": rows(16, 8)},
        "h = MatMul(x, w)\nr = Reshape(h, sizes)\nt = Transpose<perm = [0, 4, 1, 2, 3]>(r)\n"
        "y = BN(t|)",
        {"w": W, "sizes": np.array([2, 2, 2, 2, C])},
        ["MatMul", "Add", "Reshape", "Transpose"],
    ),
    "MatMul, Flatten": (
        "float[n,s,8] x",
        "float[m,6] y",
        {"x": rows(2, 5, 8)},
        "h = MatMul(x, w)\nf = Flatten<axis = 2>(h)\ny = BN(f|)",
        {"w": W},
        ["MatMul", "Add", "Flatten"],
    ),
    "MatMul, Squeeze": (
        "float[n,1,8] x",
        "float[n,6] y",
        {"x": rows(4, 1, 8)},
        "h = MatMul(x, w)\ns = Squeeze(h, axes)\ny = BN(s|)",
        {"w": W, "axes": np.array([1])},
        ["MatMul", "Add", "Squeeze"],
    ),
    "MatMul, Unsqueeze, Transpose": (
        "float[n,8] x",
        "float[1,6,n] y",
        ROWS[2],
        "h = MatMul(x, w)\nu = Unsqueeze(h, axes)\nt = Transpose<perm = [0, 2, 1]>(u)\ny = BN(t|)",
        {"w": W, "axes": np.array([0])},
        ["MatMul", "Add", "Unsqueeze", "Transpose"],
    ),
    "MatMul, Transpose of four axes": (
        "float[n,i,j,8] x",
        "float[n,6,i,j] y",
        {"x": rows(2, 3, 4, 8)},
        "h = MatMul(x, w)\nt = Transpose<perm = [0, 3, 1, 2]>(h)\ny = BN(t|)",
        {"w": W},
        ["MatMul", "Add", "Transpose"],
    ),
    "MatMul, two Transposes": (
        "float[n,i,j,8] x",
        "float[n,6,i,j] y",
        {"x": rows(2, 3, 4, 8)},
        "h = MatMul(x, w)\nt = Transpose<perm = [0, 1, 3, 2]>(h)\n"
        "u = Transpose<perm = [0, 2, 1, 3]>(t)\ny = BN(u|)",
        {"w": W},
        ["MatMul", "Add", "Transpose", "Transpose"],
    ),
    "Gemm, Add": (
        *ROWS,
        "h = Gemm<beta = 2.0>(x, w, d)\na = Add(h, c)\ny = BN(a|)",
        {"w": W, "d": rows(C, seed=4), **BIAS},
        ["Gemm"],
    ),
    "ConvTranspose to a given size": (
        *IMAGE,
        "h = ConvTranspose<strides = [2, 2], output_shape = [20, 18]>(x, w)\ny = BN(h|)",
        {"w": rows(4, C, 3, 3)},
        ["ConvTranspose"],
    ),
    "MatMul, Reshape, Transpose": (
        "float[n,8] x",
        "float[m,6,2] y",
        {"x": rows(4, 8)},
        "h = MatMul(x, w)\nr = Reshape(h, pairs)\nt = Transpose<perm = [0, 2, 1]>(r)\ny = BN(t|)",
        {"w": W, "pairs": np.array([-1, 2, C])},
        ["MatMul", "Add", "Reshape", "Transpose"],
    ),
    "MatMul, Add, Reshape": (
        "float[n,s,8] x",
        "float[m,6] y",
        {"x": rows(2, 5, 8)},
        "h = MatMul(x, w)\na = Add(h, c)\nr = Reshape(a, flat)\ny = BN(r|)",
        {"w": W, "flat": np.array([-1, C]), **BIAS},
        ["MatMul", "Add", "Reshape"],
    ),
}

PLAIN = "h = MatMul(x, w)\ny = BN(h|)"
V = rows(C, 5, seed=3)
LARGE = np.array([1e7, 1, 1, 1, 1, 1], np.float32)
WIDE = {"k": rows(C, C, 1) * LARGE[:, None, None]}
BEFORE = {
    "MatMul": (
        "float[n,6] x",
        "float[n,5] y",
        {"x": rows(3, C)},
        "h = BN(x|)\ny = MatMul(h, w)",
        {"w": V},
        ["MatMul", "Add"],
    ),
    "MatMul, Add": (
        "float[n,6] x",
        "float[n,5] y",
        {"x": rows(3, C)},
        "h = BN(x|)\nm = MatMul(h, w)\ny = Add(m, c)",
        {"w": V, "c": rows(1, 5)},
        ["MatMul", "Add"],
    ),
    "MatMul, Relu": (
        "float[n,6] x",
        "float[n,5] y",
        {"x": rows(3, C)},
        "h = BN(x|)\nm = MatMul(h, w)\ny = Relu(m)",
        {"w": V},
        ["MatMul", "Add", "Relu"],
    ),
    "Gemm": (
        "float[n,6] x",
        "float[n,5] y",
        {"x": rows(3, C)},
        "h = BN(x|)\ny = Gemm<alpha = 0.5, beta = 3.0, transB = 1>(h, w, c)",
        {"w": np.ascontiguousarray(V.T), "c": rows(5)},
        ["Gemm"],
    ),
    "Reshape, MatMul": (
        "float[n,6] x",
        "float[m,2,5] y",
        {"x": rows(4, C)},
        "h = BN(x|)\nr = Reshape(h, pairs)\ny = MatMul(r, w)",
        {"w": V, "pairs": np.array([-1, 2, C])},
        ["Reshape", "MatMul", "Add"],
    ),
    "Transpose, MatMul": (
        "float[n,6,s] x",
        "float[n,s,5] y",
        {"x": rows(2, C, 4)},
        "h = BN(x|)\nt = Transpose<perm = [0, 2, 1]>(h)\ny = MatMul(t, w)",
        {"w": V},
        ["Transpose", "MatMul", "Add"],
    ),
    "Transpose of four axes, MatMul": (
        "float[n,6,i,j] x",
        "float[n,i,j,5] y",
        {"x": rows(2, C, 4, 3)},
        "h = BN(x|)\nt = Transpose<perm = [0, 2, 3, 1]>(h)\ny = MatMul(t, w)",
        {"w": V},
        ["Transpose", "MatMul", "Add"],
    ),
    "two Transposes, MatMul": (
        "float[n,6,i,j] x",
        "float[n,i,j,5] y",
        {"x": rows(2, C, 4, 3)},
        "h = BN(x|)\nt = Transpose<perm = [0, 2, 1, 3]>(h)\n"
        "u = Transpose<perm = [0, 1, 3, 2]>(t)\ny = MatMul(u, w)",
        {"w": V},
        ["Transpose", "Transpose", "MatMul", "Add"],
    ),
    "Conv": (
        "float[n,6,h,w] x",
        "float[n,4,i,j] y",
        {"x": rows(2, C, 7, 6)},
        "h = BN(x|)\ny = Conv<strides = [2, 1], pads = [0, 0, 0, 0]>(h, w, c)",
        {"w": rows(4, C, 3, 2), "c": rows(4)},
        ["Conv"],
    ),
    "Conv in groups": (
        "float[n,6,h,w] x",
        "float[n,4,i,j] y",
        {"x": rows(2, C, 7, 6)},
        'h = BN(x|)\ny = Conv<group = 2, auto_pad = "VALID">(h, w)',
        {"w": rows(4, 3, 3, 2)},
        ["Conv"],
    ),
}


@pytest.mark.parametrize(
    ("inputs", "outputs", "feeds", "body", "constants", "left"),
    [*BEHIND.values(), *BEFORE.values()],
    ids=[*(f"behind {name}" for name in BEHIND), *(f"before {name}" for name in BEFORE)],
)
def test_folds(
    inputs: str,
    outputs: str,
    feeds: Mapping[str, np.ndarray],
    body: str,
    constants: Mapping[str, np.ndarray],
    left: Sequence[str],
) -> None:
    proto = with_norms(body, inputs, outputs, constants)
    (site,) = same(proto, feeds).sites
    assert (site.op, site.status) == ("BatchNorm", "fused")
    assert site.attributes["kind"] in ("MatMul", "Gemm", "Conv", "ConvTranspose")
    after, _ = fused(proto)
    assert _operators(after) == left
    read = {name for node in after.graph.node for name in node.input}
    assert {tensor.name for tensor in after.graph.initializer} <= read


@pytest.mark.parametrize("opset", [9, 13, 14, 15, 23])
def test_the_default_epsilon(opset: int) -> None:
    body = "h = MatMul(x, w)\ny = BatchNormalization(h, scale, shift, mean, var)"
    constants = {"w": W, "var": np.full(C, 1e-6, np.float32)}
    proto = with_norms(body, *ROWS[:2], constants, opset=opset)
    report = same(proto, ROWS[2])
    assert fused_ops(report) == ["BatchNorm"]


def test_a_shared_weight_is_cloned() -> None:
    body = "h = MatMul(x, w)\ny = BN(h|)\nu = Neg(x)\nz = MatMul(u, w)"
    proto = with_norms(body, "float[n,8] x", "float[n,6] y, float[n,6] z", {"w": W})
    assert fused_ops(same(proto, ROWS[2])) == ["BatchNorm"]
    after, _ = fused(proto)
    (kept,) = (tensor for tensor in after.graph.initializer if tensor.name == "w")
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(kept), W)


def test_two_maps_of_one_weight_and_two_norms_of_one_map() -> None:
    body = """
      h = MatMul(x, w)
      y = BN(h|)
      g = MatMul(u, w)
      a = BN(g|)
      b = BN(a|)
      z = MatMul(b, v)
    """
    proto = with_norms(
        body,
        "float[n,8] x, float[n,8] u",
        "float[n,6] y, float[n,5] z",
        {"w": W, "v": V},
    )
    report = same(proto, {"x": rows(3, 8), "u": rows(3, 8, seed=1)})
    assert fused_ops(report) == ["BatchNorm"] * 3
    after, _ = fused(proto)
    assert sorted(_operators(after)) == ["Add", "Add", "MatMul", "MatMul", "MatMul"]


def test_before_a_map_another_fold_uncovers() -> None:
    body = "a = BN(x|)\nb = BN(a|)\ny = MatMul(b, v)"
    proto = with_norms(body, "float[n,6] x", "float[n,5] y", {"v": V})
    assert fused_ops(same(proto, {"x": rows(3, C)})) == ["BatchNorm"] * 2


@pytest.mark.parametrize("before", [False, True])
def test_a_shape_read_in_between(before: bool) -> None:
    """What `reshape_as` is exported as (LeViT): shapes do not change."""
    body = """
      h = MatMul(x, w)
      size = Shape(h)
      r = Reshape(h, flat)
      n = BN(r|)
      y = Reshape(n, size)
      z = Shape(r)
    """
    if before:
        body = """
          n = BN(x|)
          size = Shape(n)
          y = MatMul(n, v)
          z = Abs(size)
        """
    proto = with_norms(
        body,
        "float[n,6] x" if before else "float[n,s,8] x",
        ("float[n,5] y" if before else "float[n,s,6] y") + ", int64[2] z",
        {"v": V} if before else {"w": W, "flat": np.array([-1, C])},
    )
    report = same(proto, {"x": rows(3, C) if before else rows(2, 5, 8)})
    assert fused_ops(report) == ["BatchNorm"]


def test_both_sides_of_a_convolution() -> None:
    body = "a = BN(x|)\nh = Conv(a, k)\ny = BN(h|)"
    proto = with_norms(body, "float[n,6,9,9] x", "float[n,6,7,7] y", {"k": rows(C, C, 3, 3)})
    report = same(proto, {"x": rows(2, C, 9, 9)})
    assert fused_ops(report) == ["BatchNorm"] * 2
    after, _ = fused(proto)
    assert _operators(after) == ["Conv"]
    assert {site.attributes["kind"] for site in report.sites} == {"Conv"}
    assert len({site.nodes for site in report.sites}) == 2


def test_inside_a_loop() -> None:
    body = """
      y = Loop (count, , x) <body = step (int64 i, bool go, float[n,6] h0)
        => (bool g, float[n,6] h1) { g = Identity(go)
          m = MatMul(h0, square)
          h1 = BN(m|) }
      >
    """
    proto = with_norms(
        body, "int64 count, float[n,6] x", "float[n,6] y", {"square": rows(C, C) / C}
    )
    report = same(proto, {"count": np.array(3), "x": rows(2, C)})
    assert fused_ops(report) == ["BatchNorm"]


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_16_bits_are_opt_in(dtype: str) -> None:
    name, kind = {
        "f16": ("float16", np.dtype(np.float16)),
        "bf16": ("bfloat16", np.dtype(ml_dtypes.bfloat16)),
    }[dtype]
    constants = {key: array.astype(kind) for key, array in {**_parameters(), "w": W}.items()}
    proto = with_norms(PLAIN, f"{name}[n,8] x", f"{name}[n,6] y", constants)
    assert reasons(fusenorm.explain(proto)) == {"types"}
    options = fusenorm.Options(fold_batch_norm=(dtype,))  # type: ignore[arg-type]
    result = fusenorm.optimize(proto, options=options)
    assert fused_ops(result.report) == ["BatchNorm"]
    arrays = [value.const_value.numpy() for value in result.model.graph.initializers.values()]
    scale = constants["scale"].astype(np.float64) / np.sqrt(
        constants["var"].astype(np.float64) + np.float32(0.01)
    )
    wanted = (constants["w"].astype(np.float64) * scale).astype(kind)  # rounded once
    assert any(array.shape == W.shape and (array == wanted).all() for array in arrays)


def test_f16_weights_that_would_overflow() -> None:
    constants = {key: array.astype(np.float16) for key, array in _parameters().items()}
    constants |= {"w": np.full((8, C), 3e4, np.float16), "scale": np.full(C, 9, np.float16)}
    proto = with_norms(PLAIN, "float16[n,8] x", "float16[n,6] y", constants)
    result = fusenorm.optimize(proto, options=fusenorm.Options(fold_batch_norm=("f16",)))
    assert reasons(result.report) == {"not_finite"}


def test_switched_off_and_bisected() -> None:
    body = "h = MatMul(x, w)\ng = BN(h|)\ny = Sigmoid(g)"
    proto = with_norms(body, *ROWS[:2], {"w": W})
    for options in (fusenorm.Options(fold_batch_norm=()), fusenorm.Options(limit=0)):
        result = fusenorm.optimize(proto, options=options)
        assert fused_ops(result.report) == []
        assert "BatchNormalization" in [node.op_type for node in result.model.graph]
    assert fused_ops(fusenorm.optimize(proto).report) == ["BatchNorm"]
    twice = with_norms(
        "a = BN(x|)\nb = BN(a|)\ny = MatMul(b, v)", "float[n,6] x", "float[n,5] y", {"v": V}
    )
    assert fused_ops(fusenorm.optimize(twice, options=fusenorm.Options(limit=1)).report) == [
        "BatchNorm"
    ]


@pytest.mark.parametrize(
    ("body", "shape", "weight"),
    [
        ("t = Transpose(w)\nh = MatMul(x, t)\ny = BN(h|)", "n,8", W.T),
        ("t = Transpose<perm = [1, 0]>(w)\nh = Gemm(x, t)\ny = BN(h|)", "n,8", W.T),
        ("t = Transpose<perm = [0, 1]>(w)\nh = Gemm(x, t)\ny = BN(h|)", "n,8", W),
        (
            "t = Transpose<perm = [1, 2, 0]>(w)\nh = Conv(x, t)\ny = BN(h|)",
            "n,4,9",
            rows(3, C, 4),
        ),
    ],
)
def test_a_weight_too_large_to_transpose_before(body: str, shape: str, weight: np.ndarray) -> None:
    """Constant folding leaves such a Transpose; so does the pass alone."""
    outputs = "float[n,6] y" if shape == "n,8" else "float[n,6,t] y"
    proto = with_norms(body, f"float[{shape}] x", outputs, {"w": np.ascontiguousarray(weight)})
    work = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    assert FoldBatchNorm()(work).modified
    feeds = {"x": rows(*(int(size.replace("n", "2")) for size in shape.split(",")))}
    (a,), (b,) = run(proto, feeds), run(ir.to_proto(work), feeds)
    np.testing.assert_allclose(b, a, rtol=0, atol=4e-6 * np.abs(a).max())


def test_the_report_and_a_second_run() -> None:
    proto = with_norms(PLAIN, *ROWS[:2], {"w": W})
    proto.graph.node[0].name, proto.graph.node[1].name = "dense", "norm"
    once = fusenorm.optimize(proto)
    (site,) = once.report.sites
    assert (site.op, site.nodes, site.output) == ("BatchNorm", ("norm",), "y")
    assert site.attributes == {"kind": "MatMul", "rule": "batch_norm"}
    assert once.report.counts == {"BatchNorm": 1}
    assert once.report.checks["rewrites_validated"] == 1
    assert once.model.graph[0].metadata_props["fusenorm.source"] == "dense\nnorm"
    assert once.model.graph[0].metadata_props["fusenorm.folded"] == "norm\ty"
    twice = fusenorm.optimize(once.model)
    assert twice.report.sites == once.report.sites
    assert not any(record.changed for record in twice.report.passes)


def test_a_wrong_fold_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check sees a wrong weight, a wrong bias and a wrong axis, and nothing is changed."""
    from fusenorm.passes import fold_batch_norm

    proto = with_norms(PLAIN, "float[n,6] x", "float[n,6] y", {"w": rows(C, C)})
    real = fold_batch_norm._read

    def wrong(change: str) -> None:
        def read(norm: ir.Node, opset: int) -> object:
            scale, offset = real(norm, opset)
            changed = {"weight": (scale * 1.001, offset), "bias": (scale, offset + 0.01)}
            return changed.get(change, (scale, offset[None, None]))

        monkeypatch.setattr(fold_batch_norm, "_read", read)

    for change in ("weight", "bias", "shape"):
        wrong(change)
        assert reasons(same(proto, {"x": rows(3, C)}, bound=0.0)) == {"check_failed"}
        work = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
        assert not FoldBatchNorm()(work).modified
        assert FoldBatchNorm(validate=False)(work).modified
    monkeypatch.setattr(fold_batch_norm, "_read", real)
    grouped = fold_batch_norm._grouped
    monkeypatch.setattr(
        fold_batch_norm, "_grouped", lambda node, w: grouped(node, w).swapaxes(1, 2)
    )
    report = same(proto, {"x": rows(3, C)}, bound=0.0)
    assert reasons(report) == {"check_failed"}
    assert report.checks["rolled_back"] == ["y"]


@pytest.mark.parametrize(
    ("body", "inputs", "outputs", "large"),
    [
        (PLAIN, "float[n,8] x", "float[n,6] y", {"w": W * LARGE}),
        (
            "h = MatMul(x, w)\nt = Transpose<perm = [0, 2, 1]>(h)\ny = BN(t|)",
            "float[n,s,8] x",
            "float[n,6,s] y",
            {"w": W * LARGE},
        ),
        ("h = Conv(x, k)\ny = BN(h|)", "float[n,6,t] x", "float[n,6,t] y", WIDE),
        ("h = BN(x|)\ny = Conv(h, k)", "float[n,6,t] x", "float[n,6,t] y", WIDE),
        ("h = BN(x|)\ny = MatMul(h, v)", "float[n,6] x", "float[n,6] y", {"v": rows(C, C) * LARGE}),
        (
            "h = BN(x|)\nt = Transpose<perm = [0, 2, 1]>(h)\ny = MatMul(t, v)",
            "float[n,6,s] x",
            "float[n,s,6] y",
            {"v": rows(C, C) * LARGE},
        ),
    ],
)
def test_a_large_channel_hides_no_wrong_one(
    monkeypatch: pytest.MonkeyPatch,
    body: str,
    inputs: str,
    outputs: str,
    large: Mapping[str, np.ndarray],
) -> None:
    from fusenorm.passes import fold_batch_norm

    proto = with_norms(body, inputs, outputs, large)
    assert fused_ops(fusenorm.optimize(proto).report) == ["BatchNorm"]
    real = fold_batch_norm._bias
    monkeypatch.setattr(fold_batch_norm, "_bias", lambda *chain: real(*chain) + 0.01)
    assert reasons(fusenorm.optimize(proto).report) == {"check_failed"}


def test_what_cannot_be_evaluated_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusenorm.passes import fold_batch_norm

    def evaluate(*_: object) -> list[np.ndarray]:
        raise EvaluationError("no such operator")

    monkeypatch.setattr(fold_batch_norm, "evaluate", evaluate)
    report = same(with_norms(PLAIN, *ROWS[:2], {"w": W}), ROWS[2], bound=0.0)
    assert reasons(report) == {"check_failed"}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_pass_alone(dtype: type) -> None:
    constants = {name: array.astype(dtype) for name, array in {**_parameters(), "w": W}.items()}
    kind = "float" if dtype is np.float32 else "double"
    body = 'h = Gemm(x, w, "")\ny = BN(h|)'
    proto = with_norms(body, f"{kind}[n,8] x", f"{kind}[n,6] y", constants)
    work = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    budget = [3]
    assert FoldBatchNorm(budget=budget)(work).modified
    assert not FoldBatchNorm(budget=budget)(work).modified
    assert budget == [2]


def test_nodes_keep_their_names_and_tell_their_sources() -> None:
    proto = with_norms("h = MatMul(x, w)\na = Add(h, c)\ny = BN(a|)", *ROWS[:2], {"w": W, **BIAS})
    work = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    names = ("dense", "plus", "norm")
    sources = ("one\ntwo", None, "two\nthree")
    for node, name, source in zip(work.graph, names, sources, strict=True):
        node.name = name
        node.metadata_props.update({"fusenorm.source": source} if source else {})
    assert FoldBatchNorm()(work).modified
    assert [node.name for node in work.graph] == ["dense", "plus"]
    assert work.graph[0].metadata_props["fusenorm.source"] == "one\ntwo\nplus\nthree"


@pytest.mark.parametrize("op_type", ["MatMul", "Add", "Reshape", "BatchNormalization"])
def test_operators_of_another_domain_stay(op_type: str) -> None:
    body = "h = MatMul(x, w)\na = Add(h, c)\nr = Reshape(a, flat)\ny = BN(r|)"
    flat = np.array([-1, C])
    proto = with_norms(body, *SEQUENCE[:1], "float[m,6] y", {"w": W, "flat": flat, **BIAS})
    proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    for node in proto.graph.node:
        node.domain = "other" if node.op_type == op_type else ""
    assert not FoldBatchNorm(validate=False)(ir.from_proto(proto)).modified


def test_names_never_meet() -> None:
    """The names the pass makes up may be taken, here or in a branch."""
    body = """
      h = MatMul(x, w)
      y = BN(h|)
      z = If (flag) <
        then_branch = yes () => (float[n,8] p) { h_unbiased = Neg(x)\np = Relu(h_unbiased) },
        else_branch = no () => (float[n,8] q) { q = Mul(x, h_folded_weight) }
      >
    """
    constants = {"w": W, "h_folded_weight": rows(8)}
    proto = with_norms(body, "float[n,8] x, bool flag", "float[n,6] y, float[n,8] z", constants)
    for flag in (True, False):
        report = same(proto, {"x": rows(4, 8), "flag": np.array(flag)})
        assert fused_ops(report) == ["BatchNorm"]


def test_names_made_up_in_a_branch() -> None:
    """The first that no value has, an outer one the branch may read included."""
    body = """
      h_folded_bias = Neg(h_folded_weight)
      y = If (flag) <
        then_branch = yes () => (float[n,6] p) {
          h = MatMul(x, w)
          b = BN(h|)
          m = Mul(b, h_folded_weight_2)
          p = Add(m, h_folded_bias) },
        else_branch = no () => (float[n,6] q) { q = Abs(h_folded_bias) }
      >
    """
    inputs = "float[n,8] x, float[n,6] h_folded_weight, bool flag"
    proto = with_norms(body, inputs, "float[n,6] y", {"w": W, "h_folded_weight_2": rows(C)})
    work = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    assert FoldBatchNorm()(work).modified
    branch = next(node for node in work.graph if node.op_type == "If").attributes["then_branch"]
    assert set(branch.as_graph().initializers) == {"h_folded_weight_3", "h_folded_bias_2"}
    feeds = {"x": rows(4, 8), "h_folded_weight": rows(4, C), "flag": np.array(True)}
    (a,), (b,) = run(proto, feeds), run(ir.to_proto(work), feeds)
    np.testing.assert_allclose(b, a, rtol=0, atol=4e-6 * np.abs(a).max())


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_random_chains(data: st.DataObject) -> None:
    """Linear maps, BatchNormalizations and what may stand between: outputs never change."""
    rank = data.draw(st.sampled_from([2, 3]))
    lines, value = [], "x"
    for index in range(data.draw(st.integers(1, 6))):
        kinds = ["MatMul(@, square)", "Add(@, c)", "BN(@|)", "Relu(@)"]
        kinds += ["Gemm<beta = 0.5>(@, square, c)"] if rank == 2 else ["Conv(@, thin, c)"]
        kinds += ["Transpose<perm = [0, 2, 1]>(@)"] if rank == 3 else []
        kind = data.draw(st.sampled_from(kinds))
        lines.append(f"v{index} = {kind.replace('@', value)}")
        value = data.draw(st.sampled_from([f"v{index}"] * 5 + [value]))
    lines.append(f"y = Identity(v{len(lines) - 1})")
    body = "\n".join(lines)
    pool = {"square": rows(C, C) / 3, "thin": rows(C, C, 1) / 3, "c": rows(C)}
    shape = "2,6" if rank == 2 else "2,6,6"  # square, so that a wrong axis still runs
    constants = {key: array for key, array in pool.items() if key in body}
    proto = with_norms(body, f"float[{shape}] x", f"float[{shape}] y", constants)
    report = same(proto, {"x": rows(*map(int, shape.split(",")))}, bound=2e-5)
    assert "check_failed" not in reasons(report)
