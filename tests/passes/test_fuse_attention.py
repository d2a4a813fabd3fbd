"""Attention at compile time: which forms become one op, and which stay as they are."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import fusenorm
from fusenorm.passes import facts
from fusenorm.passes.fuse_attention import FuseAttention, FuseAttentions
from fusenorm.passes.rewrite import MISS_KEY
from fusenorm.passes.speller import Speller, spellings
from fusenorm.passes.validate import Validator
from fusenorm.passes.verify_graph import verify_graph
from tests.graphs import model, rows, run

HEADS = "float[b,6,s,4] q, float[b,6,t,4] k, float[b,6,t,4] v, float[b,1,s,t] m"
SEQUENCE = "float[b,s,6,4] q, float[b,t,6,4] k, float[b,t,6,4] v, float[b,1,s,t] m"
GROUPED = "float[b,6,s,4] q, float[b,2,t,4] k, float[b,2,t,4] v, float[b,1,s,t] m"
OUT = "float[b,6,s,4] y"
SIZES = {"b": 2, "s": 5, "t": 7}
CONSTANTS = {
    "c": np.float32(0.5),
    "r": np.float32(0.70710678),
    "z": np.float32(0),
    "one": np.float32(1),
}
KEYS = "kt = Transpose <perm = [0, 1, 3, 2]> (k)\n"
SCORES = KEYS + "d = MatMul (q, kt)\n e = Mul (d, c)\n"
TAIL = "p = Softmax (a)\n y = MatMul (p, v)"


def graph(
    body: str, inputs: str = HEADS, outputs: str = OUT, *, opset: int = 18, **more: np.ndarray
) -> onnx.ModelProto:
    constants = {**CONSTANTS, **more}
    used = {
        name: array for name, array in constants.items() if f" {name}" in body.replace("(", " ")
    }
    return model(body, inputs, outputs, opset=opset, constants=used)


def feeds_of(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    feeds = {}
    for seed, value in enumerate(proto.graph.input):
        kind = value.type.tensor_type
        shape = [SIZES.get(dim.dim_param, dim.dim_value) for dim in kind.shape.dim]
        array = rows(*shape, seed=seed)
        if value.name == "m":
            array = np.where(array > 0.5, -np.inf, array).astype(np.float32)
            array[(0,) * (array.ndim - 1)] = -np.inf
        feeds[value.name] = array > 0 if kind.elem_type == onnx.TensorProto.BOOL else array
    return feeds


def fuse(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str], set[str]]:
    """The model, its fused attentions, and the codes of what was refused; outputs must agree."""
    work = fusenorm.optimize(proto).model
    before = [value.name for value in work.graph.outputs]
    FuseAttentions(Validator())(work)
    verify_graph(work, "fuse_attention", before)
    after = ir.to_proto(work)
    onnx.checker.check_model(after)
    feeds = feeds_of(proto)
    for a, b in zip(run(proto, feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=4e-6)
    fused = [node.op_type for node in work.graph if node.op_type.startswith("Attention_")]
    misses = [node.meta[MISS_KEY] for node in work.graph if MISS_KEY in node.meta]
    return after, fused, {miss.refusal.code for op, miss in misses if op == "Attention"}


def _write(speller: Speller) -> ir.Value:
    rule = FuseAttention()
    rule.example(speller)
    return rule.pattern.spell(speller)


@pytest.mark.parametrize("opset", [13, 18, 23])
def test_every_spelling_fuses_and_agrees(opset: int) -> None:
    found = [fuse(ir.to_proto(spelled))[1:] for spelled in spellings(_write, opset=opset, limit=60)]
    assert len(found) == 60
    assert all(len(fused) == 1 and not codes for fused, codes in found)
    layouts = {fused[0].removesuffix("_mask") for fused, _ in found}
    assert layouts == {f"Attention_{q}{k}{v}h" for q in "hs" for k in "hs" for v in "hs"}


MOVED = """qh = Transpose <perm = [0, 2, 1, 3]> (q)\n vh = Transpose <perm = [0, 2, 1, 3]> (v)
    kt = Transpose <perm = [0, 2, 3, 1]> (k)\n d = MatMul (qh, kt)\n a = Mul (d, c)
    p = Softmax (a)\n o = MatMul (p, vh)\n"""
SAFE = "p = Softmax (a)\n n = IsNaN (p)\n w = Where (n, z, p)\n y = MatMul (w, v)"
REPEAT = """{0}u = Unsqueeze ({0}, two)\n {0}e = Expand ({0}u, spread)
    {0}r = Reshape ({0}e, whole)\n"""
DYNAMIC = """bs = Shape <start = 0, end = 1> (k)\n ts = Shape <start = 2, end = 3> (k)
    spread = Concat <axis = 0> (bs, two, three, ts, four)
    whole = Concat <axis = 0> (bs, six, ts, four)\n"""
FLAT = """ts = Shape <start = 2, end = 3> (k)\n bs = Shape <start = 0, end = 1> (k)
    flat = Concat <axis = 0> (any, ts, four)\n full = Concat <axis = 0> (bs, six, four, ts)
    kf = Reshape (k, flat)\n kp = Transpose <perm = [1, 0, 2]> (kf)\n kt = Reshape (kp, full)
"""
INTEGERS = {
    name: np.array([number], np.int64)
    for name, number in {"two": 2, "three": 3, "four": 4, "six": 6, "any": -1}.items()
}
GQA = (
    DYNAMIC
    + REPEAT.format("k")
    + REPEAT.format("v")
    + """kt = Transpose <perm = [0, 1, 3, 2]> (kr)\n d = MatMul (q, kt)
    a = Add (d, m)\n p = Softmax (a)\n y = MatMul (p, vr)"""
)


@pytest.mark.parametrize(
    ("kind", "body", "inputs", "outputs"),
    [
        ("Attention_hhhh", SCORES.replace("e =", "a =") + TAIL, HEADS, OUT),
        ("Attention_hhhh_mask", SCORES + "a = Add (m, e)\n" + TAIL, HEADS, OUT),
        ("Attention_hhhh_mask_safe", SCORES + "a = Add (e, m)\n" + SAFE, HEADS, OUT),
        ("Attention_hhhh_mask_grouped", GQA, GROUPED, OUT),
        (
            "Attention_sssh",
            MOVED + "y = Identity (o)",
            SEQUENCE,
            OUT,
        ),
        (
            "Attention_ssss",
            MOVED + "y = Transpose <perm = [0, 2, 1, 3]> (o)",
            SEQUENCE,
            "float[b,s,6,4] y",
        ),
        (
            "Attention_ssss",
            MOVED + "h = Shape (qh)\n i = Reshape (o, h)\n y = Transpose <perm = [0, 2, 1, 3]> (i)",
            SEQUENCE,
            "float[b,s,6,4] y",
        ),
    ],
)
def test_forms(kind: str, body: str, inputs: str, outputs: str) -> None:
    assert fuse(graph(body, inputs, outputs, **INTEGERS))[1:] == ([kind], set())


def test_factors_multiply() -> None:
    body = (
        """kt = Transpose <perm = [0, 1, 3, 2]> (k)\n ks = Mul (kt, r)\n qs = Div (q, r)
        d = MatMul (qs, ks)\n e = Mul (c, d)\n a = Div (e, r)\n"""
        + TAIL
    )
    after, fused, _ = fuse(graph(body))
    assert fused == ["Attention_hhhh"]
    node = next(node for node in after.graph.node if node.op_type == "Attention_hhhh")
    assert node.attribute[0].f == pytest.approx(0.5 / 0.70710678, rel=1e-6)


@pytest.mark.parametrize(
    ("code", "body"),
    [
        ("shared", SCORES + "a = Add (e, m)\n" + TAIL + "\n extra = Identity (p)"),
        ("shared", SCORES + "a = Add (e, m)\n" + TAIL + "\n extra = Identity (e)"),
        ("shared", SCORES + "a = Add (e, m)\n" + SAFE + "\n extra = Identity (p)"),
        ("softcap", SCORES + "g = Tanh (e)\n a = Add (g, m)\n" + TAIL),
        ("two_masks", SCORES + "g = Add (e, m)\n a = Add (g, m)\n" + TAIL),
        ("scores", SCORES + "a = Neg (e)\n" + TAIL),
        ("scores", SCORES + "a = Add (e, d)\n" + TAIL),
        ("scaled_mask", KEYS + "d = MatMul (q, kt)\n g = Add (d, m)\n a = Mul (g, c)\n" + TAIL),
        ("keys", "kt = Reshape (k, flip)\n d = MatMul (q, kt)\n a = Mul (d, c)\n" + TAIL),
        ("keys", FLAT + "d = MatMul (q, kt)\n a = Mul (d, c)\n" + TAIL),
        ("axis", SCORES + "a = Add (e, m)\n p = Softmax <axis = 2> (a)\n y = MatMul (pt, v)"),
    ],
)
def test_refusals(code: str, body: str) -> None:
    inputs, outputs = HEADS, OUT
    if "extra" in body:
        outputs += ", float[b,6,s,t] extra"
    if code == "axis":
        body = body.replace("y =", "pt = Identity (p)\n y =")
    flip = np.array([0, 6, 4, -1], np.int64)
    _, fused, codes = fuse(graph(body, inputs, outputs, flip=flip, **INTEGERS))
    assert (fused, codes) == ([], {code})


def test_scores_that_are_an_output() -> None:
    body = SCORES + "a = Add (e, m)\n" + TAIL
    _, fused, codes = fuse(graph(body, outputs=OUT + ", float[b,6,s,t] a"))
    assert (fused, codes) == ([], {"shared"})


def test_a_selected_mask_is_refused() -> None:
    body = SCORES + "a = Where (b, e, low)\n" + TAIL
    inputs = HEADS.replace("float[b,1,s,t] m", "bool[b,1,s,t] b")
    _, fused, codes = fuse(graph(body, inputs, low=np.float32(-1e30)))
    assert (fused, codes) == ([], {"mask_select"})


@pytest.mark.parametrize(
    "safe",
    [
        "n = IsNaN (p)\n w = Where (n, one, p)\n",  # another number
        "n = IsNaN (a)\n w = Where (n, z, p)\n",  # of other values
        "n = IsNaN (p)\n w = Where (n, p, z)\n",  # the other way round
    ],
)
def test_other_selections_of_weights_are_none(safe: str) -> None:
    body = SCORES + "a = Add (e, m)\n p = Softmax (a)\n" + safe + "y = MatMul (w, v)"
    assert fuse(graph(body))[1:] == ([], set())


def test_heads_repeated_all_together_stay_repeated() -> None:
    """h0 h1 h0 h1 is not h0 h0 h1 h1, though every shape is the same."""
    inputs = GROUPED.replace("float[b,6,s,4] q", "float[b,4,s,4] q")
    repeat = """{0}u = Unsqueeze ({0}, at)\n {0}e = Expand ({0}u, given)
        {0}r = Reshape ({0}e, given4)\n"""
    body = repeat.format("k") + repeat.format("v") + GQA[GQA.index("kt =") :]
    outputs = "float[b,4,s,4] y"
    for at, shape, kind in [
        (2, [1, 1, 2, 1, 1], "Attention_hhhh_mask_grouped"),
        (1, [1, 2, 1, 1, 1], "Attention_hhhh_mask"),
    ]:
        constants = {
            "at": np.array([at], np.int64),
            "given": np.array(shape, np.int64),
            "given4": np.array([0, 4, -1, 4], np.int64),
        }
        shaped = inputs.replace(",t,", ",7,").replace("s,t]", "s,7]")
        assert fuse(graph(body, shaped, outputs, **constants))[1:] == ([kind], set())


def test_a_reshape_that_moves_data_stays() -> None:
    body = MOVED + "i = Reshape (o, odd)\n y = Transpose <perm = [0, 2, 1, 3]> (i)"
    odd = np.array([0, 4, -1, 6], np.int64)
    proto = graph(body, SEQUENCE, "float[b,s,4,6] y", odd=odd)
    assert fuse(proto)[1:] == (["Attention_sssh"], set())


STANDARD = "y = Attention <scale = 0.5> (q, k, v, m)"


@pytest.mark.parametrize(
    ("kind", "body", "inputs"),
    [
        ("Attention_hhhh_mask_zero", STANDARD, HEADS),
        ("Attention_hhhh_mask_zero", STANDARD, HEADS.replace("float[b,1,s,t]", "bool[b,1,s,t]")),
        ("Attention_hhhh_mask_zero", STANDARD, HEADS.replace("float[b,1,s,t]", "bool[s,t]")),
        ("Attention_hhhh_mask_grouped_zero", STANDARD, GROUPED),
        ("Attention_hhhh_zero", "y = Attention (q, k, v)", HEADS.rsplit(",", 4)[0]),
    ],
)
def test_the_standard_op(kind: str, body: str, inputs: str) -> None:
    assert fuse(graph(body, inputs.removesuffix(", float[b"), opset=23))[1:] == ([kind], set())


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        ("y = Attention <is_causal = 1> (q, k, v)", HEADS),
        ("y = Attention <softcap = 2.0> (q, k, v)", HEADS),
        ("y = Attention <scale = 0.5> (q, k, v, m)", HEADS.replace("[b,1,s,t]", "[b,1,s,u]")),
        ("y, pk, pv = Attention <scale = 0.5> (q, k, v, , k, v)", HEADS),
    ],
)
def test_the_standard_op_refused(body: str, inputs: str) -> None:
    SIZES["u"] = SIZES["t"]
    outputs = OUT
    if "pk" in body:
        outputs += ", float[b,6,u,4] pk, float[b,6,u,4] pv"
    _, fused, codes = fuse(graph(body, inputs, outputs, opset=23))
    assert (fused, codes) == ([], {"form"})


def test_one_boolean_mask_becomes_one_additive_mask() -> None:
    body = "h = Attention <scale = 0.5> (q, k, v, m)\n y = Attention <scale = 0.5> (h, k, v, m)"
    inputs = HEADS.replace("float[b,1,s,t]", "bool[b,1,s,t]")
    after, fused, _ = fuse(graph(body, inputs, opset=23))
    assert len(fused) == 2
    assert sum(node.op_type == "Where" for node in after.graph.node) == 1


def test_a_boolean_mask_of_what_stays_stays_boolean() -> None:
    proto = graph(
        STANDARD,
        HEADS.replace("float[b,1,s,t]", "bool[b,1,s,t]").replace("float[", "float16["),
        OUT.replace("float[", "float16["),
        opset=23,
    )
    work = fusenorm.optimize(proto).model
    FuseAttentions(Validator())(work)
    assert [node.op_type for node in work.graph] == ["Attention"]


def test_a_row_of_keys_a_mask_repeats_is_refused() -> None:
    """Several rows of v then share one of k."""
    inputs = HEADS.replace("float[b,6,t,4] k", "float[b,6,1,4] k")
    body = SCORES + "a = Add (e, m)\n" + TAIL
    assert fuse(graph(body, inputs))[1:] == ([], {"shapes_not_proved"})


def test_f16_and_old_opsets() -> None:
    half = HEADS.replace("float[", "float16[")
    constants = {"c": np.float16(0.5)}
    body = SCORES.replace("e =", "a =") + TAIL
    proto = model(body, half, OUT.replace("float[", "float16["), constants=constants)
    work = fusenorm.optimize(proto).model
    FuseAttentions(Validator())(work)
    misses = [node.meta[MISS_KEY] for node in work.graph if MISS_KEY in node.meta]
    assert {miss.refusal.code for op, miss in misses if op == "Attention"} == {"types"}
    old = body.replace("Softmax (a)", "Softmax <axis = -1> (a)")
    assert fuse(graph(old, opset=12))[1:] == ([], {"opset"})


def test_a_proof_catches_what_is_read_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a row without a key that become 1, taken for 0."""
    body = SCORES + "a = Add (e, m)\n" + SAFE.replace("(n, z, p)", "(n, one, p)")
    assert fuse(graph(body))[1] == []
    scalar = facts.scalar
    monkeypatch.setattr(
        facts, "scalar", lambda value: 0.0 if scalar(value) == 1.0 else scalar(value)
    )
    assert fuse(graph(body))[1:] == ([], {"check_failed"})
