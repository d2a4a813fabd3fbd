"""Linear maps at compile time: which fuse, with what, and which stay as they are."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import fusenorm
from fusenorm.ops.linear import unpack
from fusenorm.passes.fuse_linear import FuseLinear
from fusenorm.passes.speller import Speller, spellings
from fusenorm.pipeline import lower_regions
from fusenorm.report import Site
from tests.graphs import model, rows, run

W = rows(8, 64, seed=1)
V = rows(8, 64, seed=2)
B = rows(64, seed=3)
OUT = "float[b,s,64] y"


def lowered(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, list[Site]]:
    """The model compile would pack, as stock onnxruntime sees it, and its regions."""
    work, regions = lower_regions(fusenorm.optimize(proto).model)
    after = ir.to_proto(work)
    onnx.checker.check_model(after)
    return after, regions


def check(proto: onnx.ModelProto) -> tuple[list[str], list[str | None]]:
    """Kinds of the fused regions and reasons of the others; outputs must agree."""
    after, regions = lowered(proto)
    feeds = {
        value.name: rows(*(2 + axis if dim.dim_param else dim.dim_value
                           for axis, dim in enumerate(value.type.tensor_type.shape.dim)))
        for value in proto.graph.input
    }  # fmt: skip
    for a, b in zip(run(proto, feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=4e-6 * np.abs(a).max(initial=1e-3))
    kinds = [str(site.attributes["kind"]) for site in regions if site.status == "fused"]
    return kinds, [site.reason for site in regions if site.status == "refused"]


def _write(speller: Speller) -> ir.Value:
    rule = FuseLinear()
    rule.example(speller)
    return rule.pattern.spell(speller)


@pytest.mark.parametrize(("opset", "rank"), [(12, 3), (13, 2), (18, 4), (23, 3)])
def test_every_spelling_fuses_and_agrees(opset: int, rank: int) -> None:
    models = list(spellings(_write, opset=opset, rank=rank, limit=40))
    assert len(models) >= 6
    for index, found in enumerate(models):
        kinds, refused = check(ir.to_proto(found))
        assert (len(kinds), refused) == (1, []), index


ACTIVATED = {
    "Linear": "y = MatMul (x, w)",
    "Linear_bias": "h = MatMul (x, w)\n y = Add (b, h)",
    "Linear_relu_bias": "h = MatMul (x, w)\n t = Add (h, b)\n y = Relu (t)",
    "Linear_sigmoid": "h = MatMul (x, w)\n y = Sigmoid (h)",
    "Linear_swish": "h = MatMul (x, w)\n s = Sigmoid (h)\n y = Mul (h, s)",
    "Linear_gelu_bias": "h = MatMul (x, w)\n t = Add (h, b)\n y = Gelu (t)",
    "LinearGLU_swish": """g = MatMul (x, w)\n u = MatMul (x, v)
        s = Sigmoid (g)\n a = Mul (g, s)\n y = Mul (a, u)""",
    "LinearGLU_gelu_bias": """g = MatMul (x, w)\n h = Add (g, b)\n u = MatMul (x, v)
        t = Add (u, b)\n a = Gelu (h)\n y = Mul (a, t)""",
    "LinearGLU_identity": "g = MatMul (x, w)\n u = MatMul (x, v)\n y = Mul (g, u)",
}


@pytest.mark.parametrize("kind", ACTIVATED)
def test_what_follows_the_product_joins_it(kind: str) -> None:
    used = {name: array for name, array in {"w": W, "v": V, "b": B}.items()
            if f"{name})" in ACTIVATED[kind] or f"({name}," in ACTIVATED[kind]}  # fmt: skip
    proto = model(ACTIVATED[kind], outputs=OUT, constants=used, opset=20)
    # A standard Gelu is an activation too: it stays native until compile takes it in.
    assert check(proto) == ([kind], [])


@pytest.mark.parametrize(("halves", "gate"), [("g, u", "g"), ("u, g", "g")])
def test_halves_of_one_product_are_dealt_out(halves: str, gate: str) -> None:
    body = f"""h = MatMul (x, w)\n t = Add (h, b)
        {halves} = Split <axis: int = -1, num_outputs: int = 2> (t)
        s = Sigmoid ({gate})\n a = Mul ({gate}, s)\n y = Mul (a, u)"""
    proto = model(body, outputs="float[b,s,64] y", constants={"w": rows(8, 128), "b": rows(128)})
    assert check(proto) == (["LinearGLU_swish_bias"], [])


def test_interleaved_columns_are_dealt_out() -> None:
    ends = {"z": [0], "o": [1], "e": [2**31], "ax": [-1], "st": [2]}
    body = """h = MatMul (x, w)
        g = Slice (h, z, e, ax, st)\n u = Slice (h, o, e, ax, st)
        s = Sigmoid (g)\n a = Mul (g, s)\n y = Mul (a, u)"""
    constants = {"w": rows(8, 128)} | {k: np.array(v, np.int64) for k, v in ends.items()}
    assert check(model(body, outputs=OUT, constants=constants)) == (["LinearGLU_swish"], [])


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm(transposed: int) -> None:
    body = f"y = Gemm <transB: int = {transposed}> (x, w, b)"
    weight = np.ascontiguousarray(W.T) if transposed else W
    proto = model(body, "float[b,8] x", "float[b,64] y", constants={"w": weight, "b": B})
    assert check(proto) == (["Linear_bias"], [])


REFUSED = {
    "columns": ("y = MatMul (x, w)", {"w": rows(8, 48)}, "float[s,48] y"),
    "gemm_form": ("y = Gemm <alpha: float = 2.0> (x, w)", {"w": W}, "float[s,64] y"),
    "bias_shape": ("y = Gemm (x, w, b)", {"w": W, "b": rows(1, 1)}, "float[s,64] y"),
    "weight_shared": ("h = MatMul (x, w)\n c = Cos (w)\n u = MatMul (x, c)\n y = Add (h, u)",
                      {"w": W}, "float[s,64] y"),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_with_a_reason(reason: str) -> None:
    body, constants, outputs = REFUSED[reason]
    kinds, reasons = check(model(body, "float[s,8] x", outputs, constants=constants))
    assert (kinds, reasons) == ([], [reason])


@pytest.mark.parametrize("sizes", [(8, 0), (0, 64), (8, 63)])
def test_a_weight_that_makes_no_panels_stays(sizes: tuple[int, int]) -> None:
    inner, columns = sizes
    proto = model(
        "y = MatMul (x, w)", f"float[s,{inner}] x", f"float[s,{columns}] y",
        constants={"w": rows(inner, columns)},
    )  # fmt: skip
    assert check(proto) == ([], ["columns"])


def test_numbers_that_are_not_finite_stay_so() -> None:
    weight, bias = W.copy(), B.copy()
    weight[0, 0], weight[1, 1], bias[2] = np.inf, np.nan, -np.inf
    constants = {"w": weight, "b": bias}
    after, _ = lowered(
        model("h = MatMul (x, w)\n y = Add (h, b)", outputs=OUT, constants=constants)
    )
    assert [node.op_type for node in after.graph.node] == ["Linear_bias"]
    (y,) = run(after, {"x": rows(1, 3, 8)})
    assert np.isinf(y[..., 0]).all()
    assert np.isnan(y[..., 1]).all()
    assert np.isneginf(y[..., 2]).all()
    assert np.isfinite(y[..., 3:]).all()


def test_a_tied_weight_stays_unpacked() -> None:
    """An embedding table that is the output projection too must not be stored twice."""
    body = "t = Transpose <perm: ints = [1, 0]> (w)\n e = Gather (w, ids)\n y = MatMul (e, t)"
    table = rows(8320, 8)
    proto = model(body, "int64[b,s] ids", "float[b,s,8320] y", constants={"w": table})
    after, regions = lowered(proto)
    assert [site.status for site in regions] == ["refused"]
    assert [site.reason for site in regions] == ["weight_shared"]
    assert after.ByteSize() <= proto.ByteSize() + 2000


def test_a_transposed_weight_of_its_own_is_packed() -> None:
    body = "t = Transpose <perm: ints = [1, 0]> (w)\n y = MatMul (x, t)"
    proto = model(body, outputs="float[b,s,8320] y", constants={"w": rows(8320, 8)})
    assert check(proto) == (["Linear"], [])


def test_a_transpose_that_turns_nothing_is_no_transpose() -> None:
    """Its weight is square, so that every shape fits either way."""
    body = "t = Transpose <perm: ints = [0, 1]> (w)\n y = MatMul (x, t)"
    constants = {"w": rows(320, 320)}
    proto = model(body, "float[s,320] x", "float[s,320] y", constants=constants)
    assert check(proto) == ([], [])


def test_a_product_with_other_readers_keeps_its_activation_apart() -> None:
    body = "h = MatMul (x, w)\n y = Relu (h)"
    proto = model(body, outputs=f"{OUT}, float[b,s,64] h", constants={"w": W})
    assert check(proto) == (["Linear"], [])


def test_a_bias_that_enlarges_is_no_bias() -> None:
    body = "h = MatMul (x, w)\n y = Add (h, b)"
    proto = model(body, "float[s,8] x", "float[3,s,64] y", constants={"w": W, "b": rows(3, 1, 64)})
    assert check(proto) == (["Linear"], [])


def test_gate_and_up_of_different_inputs_stay_two_maps() -> None:
    body = """g = MatMul (x, w)\n u = MatMul (z, v)
        s = Sigmoid (g)\n a = Mul (g, s)\n y = Mul (a, u)"""
    proto = model(body, "float[b,s,8] x, float[b,s,8] z", OUT, constants={"w": W, "v": V})
    assert check(proto) == (["Linear", "Linear"], [])


def test_runtime_weights_stay() -> None:
    proto = model("y = MatMul (x, w)", "float[b,s,8] x, float[8,64] w", OUT)
    assert check(proto) == ([], [])


def test_the_weight_is_stored_once_and_packed() -> None:
    proto = model("y = MatMul (x, w)", outputs=OUT, constants={"w": W})
    after, _ = lowered(proto)
    (weight,) = (onnx.numpy_helper.to_array(tensor) for tensor in after.graph.initializer)
    assert np.array_equal(unpack(weight), W)
    assert after.ByteSize() <= proto.ByteSize() + 2000
