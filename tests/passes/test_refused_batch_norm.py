"""BatchNormalization beside a linear map: where it must not fold, and why."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import fusenorm
from tests.graphs import reasons, rows, same
from tests.passes.test_fold_batch_norm import BIAS, NORM, PLAIN, ROWS, C, W, with_norms

REFUSED = {
    "read twice": (PLAIN + "\nz = Relu(h)", "float[n,8] x", "float[n,6] y, float[n,6] z", "shared"),
    "an output": (PLAIN, "float[n,8] x", "float[n,6] y, float[n,6] h", "shared"),
    "an activation read twice": (
        "h = Relu(x)\ny = BN(h|)\nz = Neg(h)",
        "float[n,6] x",
        "float[n,6] y, float[n,6] z",
        "no_linear",
    ),
    "the product read twice": (
        "h = MatMul(x, w)\na = Add(h, c)\ny = BN(a|)\nz = Relu(h)",
        "float[n,8] x",
        "float[n,6] y, float[n,6] z",
        "no_linear",
    ),
    "the sum read twice": (
        "m = MatMul(x, w)\nh = Add(m, c)\ny = BN(h|)\nz = Relu(h)",
        "float[n,8] x",
        "float[n,6] y, float[n,6] z",
        "shared",
    ),
    "the product an output": (
        "h = MatMul(x, w)\na = Add(h, c)\ny = BN(a|)",
        "float[n,8] x",
        "float[n,6] y, float[n,6] h",
        "no_linear",
    ),
    "another axis": (
        "h = MatMul(x, w)\ny = BN(h|)",
        "float[n,6,8] x",
        "float[n,6,6] y",
        "axis",
    ),
    "a transpose of other axes": (
        "h = MatMul(x, w)\nt = Transpose<perm = [1, 0, 2]>(h)\ny = BN(t|)",
        "float[6,n,8] x",
        "float[n,6,6] y",
        "axis",
    ),
    "the rows of a Gemm": (
        "h = Gemm(x, w)\nt = Transpose(h)\ny = BN(t|)",
        "float[6,8] x",
        "float[6,6] y",
        "axis",
    ),
    "the time of a convolution": (
        "h = Conv(x, k1)\nt = Transpose<perm = [0, 2, 1]>(h)\ny = BN(t|)",
        "float[n,6,6] x",
        "float[n,6,6] y",
        "axis",
    ),
    "a reshape that splits the channels": (
        "h = MatMul(x, w12)\nr = Reshape(h, flat)\ny = BN(r|)",
        "float[n,8] x",
        "float[p,6] y",
        "no_linear",
    ),
    "a reshape to channels in the middle": (
        "h = MatMul(x, w)\nr = Reshape(h, square)\ny = BN(r|)",
        "float[12,8] x",
        "float[2,6,6] y",
        "no_linear",
    ),
    "a sum behind a convolution": (
        "h = Conv(x, k1)\na = Add(h, one)\ny = BN(a|)",
        "float[n,6,9] x",
        "float[n,6,9] y",
        "no_linear",
    ),
    "one channel made many": (
        "h = MatMul(x, w1)\na = Add(h, c)\ny = BN(a|)",
        "float[n,8] x",
        "float[n,6] y",
        "channels",
    ),
    "a bias of more axes than a Gemm may have": (
        "h = Gemm(x, w)\na = Add(h, c3)\nt = Transpose<perm = [0, 2, 1]>(a)\ny = BN(t|)",
        "float[n,8] x",
        "float[1,6,n] y",
        "bias_shape",
    ),
    "the rows of a Gemm with more axes": (
        "h = Gemm(x, w)\na = Add(h, c3)\ny = BN(a|)",
        "float[6,8] x",
        "float[1,6,6] y",
        "axis",
    ),
    "a reshape of other rows": (
        "h = MatMul(x, w)\nr = Reshape(h, shape)\ny = BN(r|)",
        "float[n,8] x",
        "float[n,6,1] y",
        "no_linear",
    ),
    "weights at run time": (
        "v = Neg(u)\nh = MatMul(x, v)\ny = BN(h|)",
        "float[n,8] x, float[8,6] u",
        "float[n,6] y",
        "not_constant",
    ),
    "statistics at run time": (
        "v = Abs(u)\nh = MatMul(x, w)\ny = BatchNormalization(h, scale, shift, mean, v)",
        "float[n,8] x, float[6] u",
        "float[n,6] y",
        "not_constant",
    ),
    "a bias at run time": (
        "h = Gemm(x, w, u)\ny = BN(h|)",
        "float[n,8] x, float[6] u",
        "float[n,6] y",
        "not_constant",
    ),
    "a bias of one column": (
        "h = MatMul(x, w)\na = Add(h, column)\ny = BN(a|)",
        "float[6,8] x",
        "float[6,6] y",
        "bias_shape",
    ),
    "a bias of many rows": (
        "h = MatMul(x, w)\na = Add(h, many)\ny = BN(a|)",
        "float[3,8] x",
        "float[3,6] y",
        "bias_shape",
    ),
    "an activation between": (
        "h = MatMul(x, w)\na = Relu(h)\ny = BN(a|)",
        "float[n,8] x",
        "float[n,6] y",
        "no_linear",
    ),
    "a sum of two computed values": (
        "h = MatMul(x, w)\na = Add(h, u)\ny = BN(a|)",
        "float[n,8] x, float[n,6] u",
        "float[n,6] y",
        "no_linear",
    ),
    "a batch of weights": (
        "h = MatMul(x, w3)\ny = BN(h|)",
        "float[6,8] x",
        "float[1,6,6] y",
        "not_constant",
    ),
    "nothing linear at all": ("y = BN(x|)", "float[n,6] x", "float[n,6] y", "no_linear"),
    "padding behind it": (
        "h = BN(x|)\ny = Conv<pads = [0, 1, 0, 0]>(h, k)",
        "float[n,6,9,9] x",
        "float[n,4,i,j] y",
        "padding",
    ),
    "padding to the same size": (
        'h = BN(x|)\ny = Conv<auto_pad = "SAME_LOWER">(h, k)',
        "float[n,6,9,9] x",
        "float[n,4,i,j] y",
        "padding",
    ),
    "a transposed convolution behind it": (
        "h = BN(x|)\ny = ConvTranspose(h, kt)",
        "float[n,6,9,9] x",
        "float[n,4,i,j] y",
        "padding",
    ),
    "a transposed convolution in groups": (
        "h = ConvTranspose<group = 2>(x, kg)\ny = BN(h|)",
        "float[n,4,9,9] x",
        "float[n,6,i,j] y",
        "groups",
    ),
    "rows contracted": (
        "h = BN(x|)\ny = Gemm<transA = 1>(h, w5)",
        "float[3,6] x",
        "float[6,5] y",
        "axis",
    ),
    "the weight itself": (
        "h = BN(x|)\ny = MatMul(a, h)",
        "float[n,6] x, float[m,n] a",
        "float[m,6] y",
        "not_constant",
    ),
    "the bias itself": (
        "h = BN(x|)\ny = Gemm(a, v6, h)",
        "float[n,6] x, float[n,6] a",
        "float[n,6] y",
        "not_constant",
    ),
    "no weights": (
        "h = MatMul(x, w0)\ny = BN(h|)",
        "float[n,0] x",
        "float[n,6] y",
        "not_constant",
    ),
    "one channel spread by a bias": (
        "h = BN(x|)\ng = Gemm(h, v1)\ny = Add(g, c)",
        "float[n,6] x",
        "float[n,6] y",
        "bias_shape",
    ),
    "captured by a branch": (
        "h = MatMul(x, w)\ny = BN(h|)\nz = If (flag) <"
        "then_branch = yes () => (float[n,6] p) { p = Relu(h) },"
        "else_branch = no () => (float[n,6] q) { q = Neg(x6) }>",
        "float[n,8] x, bool flag, float[n,6] x6",
        "float[n,6] y, float[n,6] z",
        "shared",
    ),
    "from outside a branch": (
        "h = MatMul(x, w)\ny = If (flag) <"
        "then_branch = yes () => (float[n,6] p) { p = BN(h|) },"
        "else_branch = no () => (float[n,6] q) { q = Neg(x6) }>",
        "float[n,8] x, bool flag, float[n,6] x6",
        "float[n,6] y",
        "shared",
    ),
    "a sum in a branch of a product from outside": (
        "h = MatMul(x, w)\ny = If (flag) <"
        "then_branch = yes () => (float[n,6] p) { a = Add(h, c)\np = BN(a|) },"
        "else_branch = no () => (float[n,6] q) { q = Neg(x6) }>",
        "float[n,8] x, bool flag, float[n,6] x6",
        "float[n,6] y",
        "no_linear",
    ),
    "a branch's output": (
        "y, z = If (flag) <"
        "then_branch = yes () => (float[n,6] p, float[n,6] h)"
        " { h = MatMul(x, w)\np = BN(h|) },"
        "else_branch = no () => (float[n,6] q, float[n,6] r) { q = Neg(x6)\nr = Neg(q) }>",
        "float[n,8] x, bool flag, float[n,6] x6",
        "float[n,6] y, float[n,6] z",
        "shared",
    ),
}
POOL = {
    "w": W,
    **BIAS,
    "w3": rows(1, 8, C),
    "k": rows(4, C, 3, 3),
    "kt": rows(C, 4, 3, 3),
    "kg": rows(4, 3, 3, 3),
    "w5": rows(3, 5),
    "many": rows(3, C),
    "column": rows(C, 1),
    "shape": np.array([-1, C, 1]),
    "flat": np.array([-1, C]),
    "k1": rows(C, C, 1),
    "w12": rows(8, 2 * C),
    "w1": rows(8, 1),
    "c3": rows(1, 1, C),
    "w0": rows(0, C),
    "v1": rows(C, 1),
    "v6": rows(C, C),
    "one": np.float32(1),
    "square": np.array([-1, C, C]),
}
SIZES = {"n": 4, "m": 3, "s": 5}


def _used(body: str) -> dict[str, np.ndarray]:
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return {name: array for name, array in POOL.items() if name in words}


def _feeds(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    feeds = {}
    for seed, info in enumerate(proto.graph.input):
        tensor = info.type.tensor_type
        shape = [SIZES.get(dim.dim_param, dim.dim_value) for dim in tensor.shape.dim]
        is_flag = tensor.elem_type == onnx.TensorProto.BOOL
        feeds[info.name] = np.array(True) if is_flag else rows(*shape, seed=seed)
    return feeds


@pytest.mark.parametrize(
    ("body", "inputs", "outputs", "reason"), REFUSED.values(), ids=REFUSED.keys()
)
def test_refused(body: str, inputs: str, outputs: str, reason: str) -> None:
    proto = with_norms(body, inputs, outputs, _used(body))
    report = same(proto, _feeds(proto), bound=0.0)
    sites = [site for site in report.sites if site.op == "BatchNorm"]
    assert [(site.status, site.reason) for site in sites] == [("refused", reason)]


@pytest.mark.parametrize(
    ("body", "inputs", "reason"),
    [
        (
            "u = Reshape(x, s)\nh = MatMul(u, w)\ny = BN(h|)",
            "float[k] x, int64[r] s",
            "rank_unknown",
        ),
        (
            "u = Reshape(x, s)\nh = MatMul(u, w)\nr = Reshape(h, flat)\ny = BN(r|)",
            "float[k] x, int64[r] s",
            "no_linear",
        ),
        (
            "h = BN(x|)\nr = Reshape(h, s)\ny = MatMul(r, w)",
            "float[n,c] x, int64[2] s",
            "no_linear",
        ),
    ],
    ids=["the rank", "the rank in front of a reshape", "the channels a reshape makes"],
)
def test_unknown(body: str, inputs: str, reason: str) -> None:
    proto = with_norms(body, inputs, "float[p,6] y", _used(body))
    assert reasons(fusenorm.explain(proto)) == {reason}


@pytest.mark.parametrize(("outputs", "opset"), [("y", 18), ("y, a, b", 18), ("y, a, b, d, e", 13)])
def test_statistics_of_its_own_input(outputs: str, opset: int) -> None:
    """Before opset 14 the further outputs alone say so."""
    norm = NORM.replace("<", "<training_mode = 1, ") if opset >= 14 else NORM
    body = f"h = MatMul(x, w)\n{outputs} = {norm}h|)"
    types = f"float[n,6] {outputs}".replace(", ", ", float[6] ")
    proto = with_norms(body, "float[n,8] x", types, {"w": W}, opset=opset)
    assert reasons(fusenorm.explain(proto)) == {"training_mode"}


@pytest.mark.parametrize("body", ["t = Transpose(x)\ny = BN(t|)", "t = BN(x|)\ny = Transpose(t)"])
def test_rows_of_one_axis(body: str) -> None:
    """They have one channel and no axis of it."""
    proto = with_norms(body, "float[n] x", "float[n] y", {}, channels=1)
    assert reasons(same(proto, {"x": rows(4)}, bound=0.0)) == {"no_linear"}


def test_an_opset_in_which_it_means_something_else() -> None:
    proto = with_norms(PLAIN, *ROWS[:2], {"w": W}, opset=18)
    proto.opset_import[0].version = 8
    assert reasons(fusenorm.explain(proto)) == {"opset"}


def test_a_value_made_of_nothing() -> None:
    proto = with_norms("h = RandomNormal<shape = [4, 6]>()\ny = BN(h|)", "", "float[4,6] y", {})
    assert reasons(fusenorm.explain(proto)) == {"no_linear"}
