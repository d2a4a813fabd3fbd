"""Attention at compile time: which forms become one op, and which stay as they are."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import fusenorm
from fusenorm.passes import facts
from fusenorm.passes.fuse_attention import FuseAttention, FuseAttentions, read_standard
from fusenorm.passes.pattern import Miss
from fusenorm.passes.rewrite import MISS_KEY, SOURCE_KEY, Rewrite
from fusenorm.passes.speller import Speller, spellings
from fusenorm.passes.validate import Validator
from fusenorm.passes.verify_graph import verify_graph
from tests.graphs import model, outcome, proposed, rows, run, values

HEADS = "float[b,6,s,4] q, float[b,6,t,4] k, float[b,6,t,4] v, float[b,1,s,t] m"
SEQUENCE = "float[b,s,6,4] q, float[b,t,6,4] k, float[b,t,6,4] v, float[b,1,s,t] m"
GROUPED = "float[b,6,s,4] q, float[b,2,t,4] k, float[b,2,t,4] v, float[b,1,s,t] m"
OUT = "float[b,6,s,4] y"
SIZES = {"b": 2, "s": 5, "t": 7, "h": 6, "g": 2}
CONSTANTS = {
    "c": np.float32(0.5),
    "r": np.float32(0.70710678),
    "z": np.float32(0),
    "one": np.float32(1),
}
OUTER = "y = Transpose <perm = [0, 2, 1, 3]> (o)"
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
        if value.name in ("cos", "sin"):
            array = np.cos(array)
        feeds[value.name] = array > 0 if kind.elem_type == onnx.TensorProto.BOOL else array
    return feeds


def fuse(
    proto: onnx.ModelProto, refused: str = "Attention"
) -> tuple[onnx.ModelProto, list[str], set[str]]:
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
    return after, fused, {miss.refusal.code for op, miss in misses if op == refused}


def _write(speller: Speller) -> ir.Value:
    rule = FuseAttention()
    rule.example(speller)
    return rule.pattern.spell(speller)


@pytest.mark.parametrize("opset", [13, 18, 23])
def test_every_spelling_fuses_and_agrees(opset: int) -> None:
    spelled = [ir.to_proto(work) for work in spellings(_write, opset=opset, limit=60)]
    factors = {sum(n.op_type in ("Mul", "Div") for n in proto.graph.node) for proto in spelled}
    assert factors == {0, 1, 2, 3, 4}  # on the scores, on both operands, on their tanh
    found = [fuse(proto)[1:] for proto in spelled]
    assert len(found) == 60
    assert all(len(fused) == 1 and not codes for fused, codes in found)
    names = {fused[0].split("_", 2)[1] for fused, _ in found}
    assert names == {f"{q}{k}{v}h" for q in "hs" for k in "hs" for v in "hs"}
    flags = {fused[0].split("_", 2)[2] for fused, _ in found if fused[0].count("_") > 1}
    assert flags == {"mask", "softcap", "mask_softcap"}


def test_spellings_scale_what_they_may_and_bend_and_mask_scores_or_not() -> None:
    pattern = FuseAttention().pattern

    def write(speller: Speller) -> ir.Value:
        for name in ("q", "keys", "v", "mask"):
            speller.row(name)
        speller.scalar("scale", 0.5)
        speller.scalar("softcap", 2.0)
        return pattern.spell(speller)

    found = {" ".join(node.op_type for node in m.graph) for m in spellings(write, limit=200)}
    choices = (("", "Mul Mul "), ("", "Mul ", "Div "), ("", "Tanh Mul "), ("", "Add "))
    assert found == {
        f"{operands}MatMul {scores}{cap}{mask}Softmax MatMul"
        for operands, scores, cap, mask in itertools.product(*choices)
    }


# How operands are written: the shape of each, and the nodes behind.
STORED = {
    "q": [((2, 3, 5, 4), ""), ((2, 5, 3, 4), "Transpose ")],
    "v": [((2, 3, 7, 6), ""), ((2, 7, 3, 6), "Transpose ")],
    "k": [
        ((2, 3, 7, 4), "Transpose "),
        ((2, 7, 3, 4), "Transpose "),
        ((2, 3, 7, 4), "Reshape Transpose Reshape "),
    ],
}


def test_examples_store_operands_in_every_way() -> None:
    rule = FuseAttention()

    def write(speller: Speller) -> ir.Value:
        rule.example(speller)
        scores = speller.node("MatMul", [speller.values["q"], speller.values["keys"]])
        scores = speller.node("Add", [scores, speller.values["mask"]])
        return speller.node("MatMul", [scores, speller.values["v"]])

    written = collections.Counter(
        (
            *((value.name, tuple(value.shape or ())) for value in spelled.graph.inputs),
            " ".join(node.op_type for node in spelled.graph),
        )
        for spelled in spellings(write, limit=200)
    )
    assert written == collections.Counter(
        (
            ("mask", (2, 1, 5, 7)),
            *((name, shape) for name, (shape, _) in zip(STORED, ways, strict=True)),
            "".join(nodes for _, nodes in ways) + "MatMul Add MatMul",
        )
        for ways in itertools.product(*STORED.values())
    )


STATIC = "float[2,6,5,4] q, float[2,6,7,4] k, float[2,6,7,4] v"
ONE_HEAD = "float[b,6,s,4] q, float[b,1,t,4] k, float[b,1,t,4] v"
SHARED = "float[2,6,5,4] q, float[2,2,7,4] k, float[2,2,7,4] v"
WRITTEN = KEYS + "d = MatMul (q, kt)\n a = Mul (d, c)\n"
ADDED = WRITTEN.replace("a =", "e =") + "a = Add (e, {})\n" + TAIL
PRODUCT = "n = MatMul (q, u)\n"
FACTOR = KEYS + "d = MatMul (q, kt)\n a = {}\n" + TAIL
PLAIN_SAFE = WRITTEN + "p = Softmax (a)\n n = IsNaN (p)\n w = Where (n, z, p)\n y = MatMul (w, v)"
TURN = "kf = Reshape (k, flat)\n kp = Transpose <perm = [0, 2, 1]> (kf)\n kt = Reshape (kp, full)\n"
FLAT_KEYS = TURN + WRITTEN.removeprefix(KEYS) + TAIL
COPY = "{0}u = Unsqueeze ({0}, two)\n {0}e = Expand ({0}u, five)\n {0}r = Reshape ({0}e, whole)\n"
COPIED = COPY.format("k") + COPY.format("v") + WRITTEN.replace("(k)", "(kr)")
COPIED += TAIL.replace("v)", "vr)")
REPEATS = "n = Shape (reps)\n spread = Concat <axis = 0> (first, first, n, first, first)\n"
STANDARD = "y = Attention <scale = 0.5> (q, k, v, m)"
MOVED = """qh = Transpose <perm = [0, 2, 1, 3]> (q)\n vh = Transpose <perm = [0, 2, 1, 3]> (v)
    kt = Transpose <perm = [0, 2, 3, 1]> (k)\n d = MatMul (qh, kt)\n a = Mul (d, c)
    p = Softmax (a)\n o = MatMul (p, vh)\n"""
GIVEN = (
    "bs = Shape <start = 0, end = 1> (k)\n"
    "spread = Concat <axis = 0> (bs, first, three, first, first)\n"
    "shaped = Concat <axis = 0> (bs, six_heads, seven, four)\n"
)
SCALED = "qs = Mul (q, c)\n" + WRITTEN.replace("(q,", "(qs,")
NUMBERS = {
    "three": np.array([3]),
    "four": np.array([4]),
    "six_heads": np.array([6]),
    "seven": np.array([7]),
    "c": np.array(0.5, np.float32),
    "z": np.array(0, np.float32),
    "one": np.array(1, np.float32),
    "inf": np.array(np.inf, np.float32),
    "nan": np.array(np.nan, np.float32),
    "row": np.linspace(1, 2, 7, dtype=np.float32),
    "zeros": np.zeros(7, np.float32),
    "w47": rows(4, 7),
    "flat": np.array([12, 7, 4]),
    "flat_turned": np.array([12, 4, 7]),
    "flat_heads": np.array([2, 42, 4]),
    "full": np.array([2, 6, 4, 7]),
    "full_swapped": np.array([6, 2, 4, 7]),
    "full_six": np.array([2, 6, 6, 4]),
    "whole_one": np.array([2, 1, 7, 4]),
    "whole_three": np.array([2, 3, 7, 4]),
    "five_ones": np.array([1, 1, 1, 1, 1]),
    "low": np.array(-1e30, np.float32),
    "two": np.array([2]),
    "minus3": np.array([-3]),
    "first": np.array([1]),
    "five": np.array([1, 1, 3, 1, 1]),
    "five_batch": np.array([2, 2, 3, 7, 4]),
    "five_rows": np.array([2, 1, 1, 3, 1]),
    "five_six": np.array([1, 1, 6, 1, 1]),
    "five_first": np.array([1, 3, 1, 1, 1]),
    "six": np.array([1, 1, 1, 3, 1, 1]),
    "whole": np.array([2, 6, 7, 4]),
    "whole_mixed": np.array([2, 3, 14, 4]),
}


@pytest.mark.parametrize(
    ("found", "body", "inputs"),
    [
        ("Attention_hhhh", WRITTEN + TAIL, HEADS),
        ("Attention_hhhh", WRITTEN + TAIL.replace("(a)", "<axis = 3> (a)"), HEADS),
        ("axis", WRITTEN + TAIL.replace("(a)", "<axis = 2> (a)"), HEADS),
        (None, WRITTEN + TAIL.replace("Softmax", "other.Softmax"), HEADS),
        (None, WRITTEN + TAIL.replace("Softmax", "Sigmoid"), HEADS),
        (None, "y = MatMul (m, v)", HEADS),
        ("shared", WRITTEN + TAIL + "\n r = Neg (p)", HEADS),
        ("shared", "p = Softmax (m)\n y = MatMul (p, v)", HEADS),
        # weights made safe
        ("Attention_hhhh_safe", PLAIN_SAFE, HEADS),
        (None, PLAIN_SAFE.replace("IsNaN", "other.IsNaN"), HEADS),
        (None, PLAIN_SAFE.replace("Where", "other.Where"), HEADS),
        (None, PLAIN_SAFE.replace("IsNaN", "Not"), HEADS),
        (None, PLAIN_SAFE.replace("IsNaN (p)", "IsNaN (a)"), HEADS),
        (None, PLAIN_SAFE.replace("z, p", "one, p"), HEADS),
        (None, PLAIN_SAFE.replace("z, p", "zeros, p"), HEADS),
        (None, PLAIN_SAFE.replace("n = IsNaN (p)\n", "").replace("(n,", "(mb,"), HEADS),
        ("shared", PLAIN_SAFE + "\n r = Neg (p)", HEADS),
        ("shared", PLAIN_SAFE + "\n r = Neg (w)", HEADS),
        # the scores
        ("shared", WRITTEN + TAIL + "\n r = Neg (a)", HEADS),
        ("shared", WRITTEN + TAIL + "\n r = Neg (d)", HEADS),
        ("shared", WRITTEN + "b = other.Neg (a)\n" + TAIL.replace("(a)", "(b)"), HEADS),
        ("scores", WRITTEN + "b = Neg (a)\n" + TAIL.replace("(a)", "(b)"), HEADS),
        ("Attention_hhhh_mask", ADDED.format("m"), HEADS),
        ("Attention_hhhh_mask", ADDED.replace("e, {}", "m, e"), HEADS),
        ("Attention_hhhh_mask", "n = MatMul (q, w47)\n" + ADDED.format("n"), HEADS),
        ("Attention_hhhh_mask", PRODUCT + "l = Neg (n)\n" + ADDED.format("l"), HEADS),
        ("types", PRODUCT + "l = other.Mul (n, c)\n" + ADDED.format("l"), HEADS),
        ("Attention_hhhh_mask", "l = Mul (m, c)\n" + ADDED.format("l"), HEADS),
        ("scores", PRODUCT + ADDED.format("n"), HEADS),
        ("scores", PRODUCT + "l = Mul (c, n)\n" + ADDED.format("l"), HEADS),
        ("scores", PRODUCT + "l = Div (n, c)\n" + ADDED.format("l"), HEADS),
        ("scores", PRODUCT + "l = Add (m, n)\n" + ADDED.format("l"), HEADS),
        ("scores", "a = Add (m, m)\n" + TAIL, HEADS),
        ("scores", "t = Neg (m)\n l = Mul (t, c)\n a = Add (l, m)\n" + TAIL, HEADS),
        ("scores", "t = Tanh (m)\n l = Mul (t, c)\n a = Add (l, m)\n" + TAIL, HEADS),
        # bent
        *(("Attention_hhhh_softcap", WRITTEN.replace("a =", "e =") + f"t = Tanh (e)\n a = {bent}\n"
           + TAIL, HEADS) for bent in ("Mul (t, c)", "Mul (c, t)", "Div (t, c)")),
        ("Attention_hhhh_softcap", WRITTEN + "t = Tanh (a)\n" + TAIL.replace("(a)", "(t)"), HEADS),
        ("Attention_hhhh_mask_softcap", WRITTEN + "t = Tanh (a)\n l = Mul (t, c)\n f = Add (m, l)\n"
         + TAIL.replace("(a)", "(f)"), HEADS),
        *(("softcap", WRITTEN + f"t = Tanh (a)\n l = {bent}\n" + TAIL.replace("(a)", "(l)"), HEADS)
          for bent in ("Mul (t, z)", "Tanh (t)")),
        ("scaled_mask", ADDED.format("m").replace("p =", "t = Tanh (a)\n p =").replace(
            "Softmax (a)", "Softmax (t)"), HEADS),
        # numbers selected
        ("Attention_hhhh_mask_select", "zero = Equal (m, z)\n" + WRITTEN
         + "b = Where (zero, a, m)\n" + TAIL.replace("(a)", "(b)"), HEADS),
        *(("mask_select", f"zero = Equal (m, {of})\n" + WRITTEN + f"b = Where ({chosen})\n"
           + TAIL.replace("(a)", "(b)"), HEADS)
          for of, chosen in (("one", "zero, a, m"), ("q", "zero, a, m"), ("z", "zero, m, a"))),
        ("mask_select", "zero = Equal (m, z)\n" + WRITTEN + "b = Where (zero, a, m)\n"
         "f = Where (zero, b, m)\n" + TAIL.replace("(a)", "(f)"), HEADS),
        ("two_masks", WRITTEN + "b = Where (mb, a, low)\n" + TAIL.replace("(a)", "(b)"), HEADS),
        ("two_masks", WRITTEN + "b = Where (mb, low, a)\n" + TAIL.replace("(a)", "(b)"), HEADS),
        *(("mask_select", WRITTEN + f"b = Where (mb, a, {number})\n" + TAIL.replace("(a)", "(b)"),
           HEADS) for number in ("z", "row", "m", "nan")),
        ("mask_select", "t = Where (mb, m, low)\n a = Add (t, m)\n" + TAIL, HEADS),
        ("mask_select", WRITTEN.replace("a =", "e =") + "f = Where (mb, e, low)\n"
         + "a = Add (f, m)\n" + TAIL, HEADS),
        ("mask_select", ADDED.format("m").replace("p =", "f = Where (mb, a, low)\n p =").replace(
            "Softmax (a)", "Softmax (f)"), HEADS),
        ("scaled_mask", WRITTEN + "b = Where (mb, a, low)\n f = Mul (b, c)\n"
         + TAIL.replace("(a)", "(f)"), HEADS),
        ("two_masks", ADDED.format("m").replace("p =", "f = Add (a, m)\n p =").replace(
            "Softmax (a)", "Softmax (f)"), HEADS),
        ("scaled_mask", KEYS + "d = MatMul (q, kt)\n e = Add (d, m)\n a = Mul (e, c)\n" + TAIL,
         HEADS),
        # factors
        *(("Attention_hhhh", FACTOR.format(f), HEADS)
          for f in ("Mul (d, c)", "Mul (c, d)", "Div (d, c)")),
        *(("scores", FACTOR.format(f), HEADS)
          for f in ("Mul (d, inf)", "Mul (d, row)", "Div (c, d)", "Div (d, z)", "Div (d, inf)")),
        ("shared", FACTOR.format("other.Mul (d, c)"), HEADS),
        ("Attention_hhhh", SCALED + TAIL, HEADS),
        ("types", SCALED.replace("Mul (q,", "other.Mul (q,") + TAIL, HEADS),
        ("Attention_hhhh", "ks = Div (k, c)\n" + WRITTEN.replace("(k)", "(ks)") + TAIL, HEADS),
        # the keys
        ("keys", WRITTEN.replace("0, 1, 3, 2", "1, 0, 3, 2") + TAIL, HEADS),
        ("keys", WRITTEN.replace("Transpose", "other.Transpose") + TAIL, HEADS),
        ("keys", "d = MatMul (q, k)\n a = Mul (d, c)\n" + TAIL, HEADS),
        ("Attention_hhhh", FLAT_KEYS, STATIC),
        ("keys", FLAT_KEYS.replace("flat", "flat_turned"), STATIC),
        ("keys", FLAT_KEYS.replace("flat", "flat_heads"), STATIC),
        ("keys", FLAT_KEYS.replace("full", "full_swapped"), STATIC),
        ("keys", FLAT_KEYS.replace("0, 2, 1", "0, 1, 2"), STATIC),
        ("keys", FLAT_KEYS.replace("Transpose", "other.Transpose"), STATIC),
        ("keys", FLAT_KEYS.replace("Reshape (k,", "other.Reshape (k,"), STATIC),
        ("keys", FLAT_KEYS.replace("Reshape (kp,", "other.Reshape (kp,"), STATIC),
        ("keys", FLAT_KEYS.replace("Transpose <perm = [0, 2, 1]>", "Neg"), STATIC),
        ("keys", FLAT_KEYS, STATIC.replace("float[2,6,7,4] k", "float[] k")),
        # heads repeated
        ("Attention_hhhh_grouped", WRITTEN + TAIL, ONE_HEAD),
        ("Attention_hhhh", WRITTEN + TAIL, ONE_HEAD.replace("b,1,t,4] v", "b,6,t,4] v")),
        ("Attention_hhhh", WRITTEN + TAIL, ONE_HEAD.replace("b,6,s,4] q", "b,h,s,4] q")),
        ("Attention_hhhh_grouped", COPIED, SHARED),
        ("Attention_hhhh_grouped", COPIED.replace("two", "minus3"), SHARED),
        ("Attention_hhhh_grouped", COPIED.replace("five", "five_batch"), SHARED),
        ("Attention_hhhh", COPIED.replace("two", "first").replace("five", "five_first"), SHARED),
        ("types", COPIED.replace("Unsqueeze", "other.Unsqueeze"), SHARED),
        ("types", COPIED.replace("Expand", "other.Expand"), SHARED),
        ("types", COPIED.replace("Reshape", "other.Reshape"), SHARED),
        ("Attention_hhhh", COPIED.replace("vr)", "q)"), SHARED),
        ("Attention_hhhh", COPIED, SHARED.replace("float[2,6,5,4] q", "float[2,3,5,4] q")),
        ("Attention_hhhh", COPIED, SHARED.replace("2,2,7,4] v", "2,1,14,4] v")),
        ("Attention_hhhh", COPIED.replace("whole", "whole_mixed"), SHARED),
        ("Attention_hhhh", COPIED, SHARED.replace("2,2,7,4] k", "2,h,7,4] k")),
        ("Attention_hhhh", REPEATS + COPIED.replace("five", "spread"), SHARED),
        ("Attention_hhhh", REPEATS.replace("reps", "more") + COPIED.replace("five", "spread"),
         SHARED + ', float["how many"] more'),
        ("Attention_hhhh", COPIED, SHARED.replace("2,2,7,4] k", '2,"heads of k",7,4] k')),
        ("Attention_hhhh", COPIED.replace("two", "at"), SHARED + ", int64[1] at"),
        ("Attention_hhhh", COPIED.replace("(ku, five", "(ku, five_rows"),
         SHARED.replace("2,2,7,4] k", "2,7,4] k")),
        ("Attention_hhhh", COPIED.replace("(vu, five", "(vu, five_six"),
         SHARED.replace("2,2,7,4] v", "2,1,7,4] v")),
        ("Attention_hhhh", COPIED.replace("five", "any"), SHARED + ", int64[] any"),
        ("Attention_hhhh", COPIED.replace("whole", "full"), SHARED.replace("5,4] q", "5,7] q")),
        # maybe for several batches at once
        ("Attention_hhhh", "n = Shape (reps)\n" + GIVEN.replace("(bs, first", "(n, first")
         + COPIED.replace("five", "spread").replace("whole", "shaped"),
         SHARED.replace("float[2", "float[b")),
        ("rank", COPIED, SHARED.replace("float[2,6,5,4] q", "float[] q")),
        ("rank", COPIED, SHARED.replace("float[2,6,5,4] q", "float[4] q")),
        # one head of q and k for three of v
        ("Attention_hhhh", COPIED.replace("ku, five", "ku, five_ones").replace(
            "ke, whole", "ke, whole_one").replace("ve, whole", "ve, whole_three"),
         "float[2,1,5,4] q, float[2,1,7,4] k, float[2,1,7,4] v"),
        # rows of k repeated, not its heads
        ("Attention_hshh", COPIED.replace("whole", "full_six").replace("1, 3, 2", "2, 3, 1"),
         "float[2,6,5,4] q, float[2,2,6,4] k, float[2,2,6,4] v"),
        # operands
        ("rank", WRITTEN + TAIL, HEADS.replace("float[b,6,t,4] v", "float[6,t,4] v")),
        ("rank", WRITTEN + TAIL, HEADS.replace("float[b,6,s,4] q", "float[] q")),
        ("rank", ADDED.format("m"), HEADS.replace("[b,1,s,t] m", "[1,b,1,s,t] m")),
        ("rank", ADDED.format("m"), HEADS.replace("[b,1,s,t] m", "[] m")),
        ("types", WRITTEN + TAIL, HEADS.replace("float[b,6,s,4] q", "float16[b,6,s,4] q")),
        ("types", WRITTEN + TAIL, HEADS.replace("float[b,6,t,4] v", "double[b,6,t,4] v")),
        ("types", ADDED.format("m"), HEADS.replace("float[b,1,s,t] m", "float16[b,1,s,t] m")),
        ("shapes_not_proved", WRITTEN + TAIL, HEADS.replace("b,6,t,4] v", "b,6,1,4] v")),
        ("Attention_hhhh", WRITTEN + TAIL, HEADS.replace("t,4]", "1,4]")),
        # transposed results
        ("Attention_hhhs", WRITTEN + TAIL.replace("y =", "o =") + "\n" + OUTER, HEADS),
        (None, WRITTEN + TAIL.replace("y =", "o =") + "\n" + OUTER.replace("0, 2", "2, 0"), HEADS),
        (None, WRITTEN + TAIL.replace("y =", "o =") + "\n r = Neg (o)\n" + OUTER, HEADS),
        (None, WRITTEN + TAIL.replace("y =", "o =") + "\n i = Reshape (o, any)\n"
         + OUTER.replace("(o)", "(i)"), HEADS + ", int64[] any"),
        (None, WRITTEN + TAIL.replace("y =", "o =") + "\n h = Shape (q)\n i = Reshape (o, h)\n"
         + " r = Neg (i)\n" + OUTER.replace("(o)", "(i)"), HEADS),
        *((None, "i = Reshape (o, whole)\n" + OUTER.replace("(o)", "(i)"), f"float[{dims}] o")
          for dims in ("", "2,6,7,4", "2,6,7,4,1")),
        (None, WRITTEN + TAIL.replace("y = ", "o = other.") + "\n" + OUTER, HEADS),
        (None, OUTER.replace("(o)", "(q)"), HEADS),
        (None, "o = Neg (q)\n" + OUTER, HEADS),
        (None, "o = other.MatMul (q, k)\n" + OUTER, HEADS),
        (None, "o = MatMul (m, v)\n" + OUTER, HEADS),
        # the standard op
        ("Attention_hhhh_mask_zero", STANDARD, HEADS),
        ("Attention_hhhs_mask_zero", STANDARD.replace("y =", "o =") + "\n" + OUTER, HEADS),
        ("Attention_hhhh_zero", "y = Attention <scale = 0.5> (q, k, v)", HEADS),
        ("Attention_hhhh_zero", "y = Attention (q, k, v)", HEADS),
        ("form", "y = Attention (q, k, v)", HEADS.replace("float[b,6,s,4] q", "float[b,6,s,d] q")),
        ("form", STANDARD, HEADS.replace("[b,1,s,t]", "[b,1,s,u]")),
        ("form", STANDARD, HEADS.replace("[b,1,s,t]", "[]")),
        ("form", STANDARD, HEADS.replace("s,t] m", "s,?] m").replace("t,4] k", "?,4] k")),
        ("form", STANDARD, HEADS.replace("float[b,6,t,4] k", "float[] k")),
        ("form", STANDARD, HEADS.replace("[b,1,s,t]", "[s,1]")),
        ("Attention_hhhh_mask_zero", STANDARD, HEADS.replace("[b,1,s,t]", "[s,1]").replace(
            "t,4]", "1,4]")),
        ("Attention_hhhh_mask_grouped_zero", STANDARD, GROUPED),
        ("Attention_hhhh_grouped_zero", "y = Attention (q, k, v)", HEADS.replace("b,6,t", "b,h,t")),
        *(("rank", "y = Attention <scale = 0.5> (q, k, v)",
           HEADS.replace("float[b,6,t,4] v", f"float[{dims}] v")) for dims in ("", "4", "6,t,4")),
        ("Attention_hhhh_grouped_zero", "y = Attention (q, k, v)",
         HEADS.replace("b,6,t,4] v", "b,h,t,4] v")),
        *(("form", f"y = Attention <{attribute}> (q, k, v)", HEADS)
          for attribute in ("is_causal = 1", "softcap = 2.0", "softmax_precision = 10",
                            "q_num_heads = 6", "kv_num_heads = 6", "left_window_size = 20",
                            "right_window_size = 0", "new = 1")),
        *(("Attention_hhhh_zero", f"y = Attention <{attribute}> (q, k, v)", HEADS)
          for attribute in ("is_causal = 0", "softcap = 0.0", "softmax_precision = 0",
                            "q_num_heads = 0", "kv_num_heads = 0", "left_window_size = -1",
                            "right_window_size = -1", "qk_matmul_output_mode = 1")),
        ("form", "y, pk, pv = Attention (q, k, v, , k, v)", HEADS),
        ("form", "y, pk = Attention (q, k, v)", HEADS),
        ("form", "y = Attention (q, k, v, , , , lengths)", HEADS + ", int64[b] lengths"),
        ("Attention_shhh_zero", "qh = Transpose <perm = [0, 2, 1, 3]> (q)\n"
         "y = Attention (qh, k, v)", HEADS.replace("6,s,4] q", "s,6,4] q")),
        ("Attention_hhhh_grouped_zero",
         COPY.format("k") + COPY.format("v") + "y = Attention (q, kr, vr)", SHARED),
    ],
)  # fmt: skip
def test_proposals(found: str | None, body: str, inputs: str) -> None:
    inputs += ", float[b,6,4,t] u, bool[b,6,s,t] mb, float[n] reps"
    assert proposed(FuseAttention(), body, inputs, constants=NUMBERS, opset=23) == found


@pytest.mark.parametrize(
    ("body", "inputs", "computed"),
    [
        (ADDED.format("m"), HEADS, set()),
        (PLAIN_SAFE, HEADS, set()),
        ("ks = Div (k, c)\n" + SCALED.replace("(k)", "(ks)") + TAIL, HEADS, set()),
        (FLAT_KEYS, STATIC, set()),
        (COPIED, SHARED, set()),
        (GIVEN + COPIED.replace("five", "spread"), SHARED, {"spread"}),
        (GIVEN + COPIED.replace("(ke, whole)", "(ke, shaped)"), SHARED, {"shaped"}),
        (MOVED + OUTER, SEQUENCE, set()),
        (MOVED + "h = Shape (qh)\n i = Reshape (o, h)\n" + OUTER.replace("(o)", "(i)"), SEQUENCE,
         {"h"}),
    ],
)  # fmt: skip
def test_what_a_proposal_replaces(body: str, inputs: str, computed: set[str]) -> None:
    """Every node but those that compute a shape, and the shapes nothing else need compute."""
    found = outcome(FuseAttention(), body, inputs, constants=NUMBERS, opset=23)
    assert isinstance(found, Rewrite), found
    assert {value.name for value in found.computed} == computed
    (graph,) = {node.graph for node in found.nodes}
    assert graph is not None
    kept = {"Shape", "Concat"}
    assert set(found.nodes) == {node for node in graph if node.op_type not in kept}


def test_rows_of_k_moved_in_front_of_its_heads_and_back() -> None:
    body = MOVED.replace("o =", "y =").replace("(k)", "(ks)")
    body = "ks = Transpose <perm = [0, 2, 1, 3]> (k)\n" + body
    found = outcome(
        FuseAttention(), body, SEQUENCE.replace("t,6,4] k", "6,t,4] k"), constants=NUMBERS, opset=23
    )
    assert isinstance(found, Rewrite), found
    assert found.spec.op_type == "Attention_sssh"
    assert [value.name for value in found.inputs] == ["q", "ks", "v"]


@pytest.mark.parametrize(
    ("axis", "given", "found"),
    [(2, "five", "Attention_hhhh_grouped"), (1, "five_first", "Attention_hhhh")],
)
def test_heads_repeated_as_before_opset_13(axis: int, given: str, found: str) -> None:
    body = COPIED.replace("Unsqueeze", f"Unsqueeze <axes = [{axis}]>").replace(", two", "")
    body = body.replace("five", given)
    assert proposed(FuseAttention(), body, SHARED, constants=NUMBERS, opset=12) == found


@pytest.mark.parametrize(
    ("body", "inputs", "scale", "grouped"),
    [
        ("y = Attention <scale = 0.25> (q, k, v)", HEADS, 0.25, False),
        ("y = Attention <scale = 0.25> (q, k, v)", HEADS.replace("s,4] q", "s,d] q"), 0.25, False),
        ("y = Attention (q, k, v)", HEADS, 0.5, False),
        ("y = Attention (q, k, v)", HEADS.replace("s,4] q", "s,16] q"), 0.25, False),
        ("y = Attention (q, k, v)", GROUPED, 0.5, True),
        ("y = Attention (q, k, v)", HEADS.replace("[b,6,t,4] k", "[] k"), 0.5, True),
    ],
)
def test_what_the_standard_op_says(body: str, inputs: str, scale: float, grouped: bool) -> None:
    root = values(body, inputs, opset=23)["y"].producer()
    assert root is not None
    site = read_standard(root)
    assert (site.scale, site.grouped) == (scale, grouped)


@pytest.mark.parametrize(
    ("body", "node"),
    [
        (FLAT_KEYS.replace("0, 2, 1", "0, 1, 2"), "kp"),
        (FLAT_KEYS.replace("flat", "flat_turned"), "kt"),
        (FLAT_KEYS.replace("Transpose <perm = [0, 2, 1]>", "Neg"), "kp"),
    ],
)
def test_where_keys_are_no_transpose(body: str, node: str) -> None:
    found = outcome(FuseAttention(), body, STATIC, constants=NUMBERS, opset=23)
    assert isinstance(found, Miss)
    assert found.refusal is not None
    assert (found.refusal.code, found.refusal.node) == ("keys", node)


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
FLAT_OF_ANOTHER = (
    FLAT.replace("1, 0, 2", "0, 2, 1").replace("end = 1> (k)", "end = 1> (m)")
    + "d = MatMul (q, kt)\n a = Mul (d, c)\n"
    + TAIL
)
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
        ("Attention_hhhh", FLAT_OF_ANOTHER, HEADS, OUT),
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
        ("softcap", SCORES + "f = Tanh (e)\n g = Tanh (f)\n a = Add (g, m)\n" + TAIL),
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


CONDITIONS = HEADS.replace("float[b,1,s,t] m", "bool[b,1,s,t] m1, bool[t] m2")


@pytest.mark.parametrize("number", [-np.inf, np.finfo(np.float32).min, -1e4, -1.0, 0.5])
@pytest.mark.parametrize(
    "body",
    [
        "a = Where (m1, e, low)",
        "a = Where (m1, low, e)",
        "f = Where (m1, e, low)\n a = Where (m2, one, f)",
        "f = Where (m2, low, e)\n a = Where (m1, f, low)",
        "f = Tanh (e)\n g = Mul (f, c)\n a = Where (m1, g, low)",
    ],
)
def test_numbers_selected_in_the_place_of_scores(body: str, number: float) -> None:
    proto = graph(SCORES + body + "\n" + TAIL, CONDITIONS, low=np.float32(number))
    _, fused, codes = fuse(proto)
    softcap = "_softcap" if "Tanh" in body else ""
    assert (fused, codes) == ([f"Attention_hhhh_mask_select{softcap}"], set())


def test_masks_added_one_after_another() -> None:
    inputs = HEADS + ", float[t] n, float[6,1,1] h"
    for order in (("m", "n", "h"), ("h", "m", "n")):
        steps = "f = Add (e, {})\n g = Add ({}, f)\n a = Add (g, {})\n".format(*order)
        assert fuse(graph(SCORES + steps + TAIL, inputs))[1:] == (["Attention_hhhh_mask"], set())


@pytest.mark.parametrize(
    ("first", "second", "made"),
    [
        ("f = Where (m1, e, low)", "f = Where (m1, e, low)", 1),
        ("f = Where (m1, e, low)", "f = Where (m1, low, e)", 2),
        ("f = Where (m1, e, low)", "f = Where (m1, e, one)", 2),
        ("f = Where (m1, e, low)", "f = Where (m2, e, low)", 2),
    ],
)
def test_layers_share_their_masks(first: str, second: str, made: int) -> None:
    layers = [SCORES + step + "\n" + TAIL.replace("(a)", "(f)") for step in (first, second)]
    body = "\n".join(
        re.sub(r"\b(kt|[defp])\b", rf"\g<1>{number}", layer)
        for number, layer in enumerate(
            (layers[0].replace("y =", "o ="), layers[1].replace("q", "o"))
        )
    )
    after, fused, _ = fuse(graph(body, CONDITIONS, low=np.float32(-np.inf)))
    assert fused == ["Attention_hhhh_mask_select"] * 2
    assert sum(node.op_type == "Where" for node in after.graph.node) == made


def test_what_a_joined_mask_was_made_of_is_reported() -> None:
    body = SCORES + "f = Where (m1, e, low)\n a = Where (m2, one, f)\n" + TAIL
    work = fusenorm.optimize(graph(body, CONDITIONS, low=np.float32(-np.inf))).model
    names = {node.outputs[0].name for node in work.graph}
    FuseAttentions(Validator())(work)
    (fused,) = (node for node in work.graph if node.op_type.startswith("Attention"))
    assert set(fused.metadata_props[SOURCE_KEY].split("\n")) == names


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


BOOLEAN = HEADS.replace("float[b,1,s,t]", "bool[b,1,s,t]") + ", bool go"
BRANCH = "branch () => (float[b,6,s,4] z) {z = Attention <scale = 0.5> (q, k, v, m)}"
SCAN = """y = Scan <num_scan_inputs = 4, body = each
    (float[6,s,4] qi, float[6,t,4] ki, float[6,t,4] vi, bool[1,s,t] mi) => (float[6,s,4] yi)
    {yi = Neg (qi)}> (q, k, v, m)"""


@pytest.mark.parametrize(
    ("body", "inputs", "budget", "ops"),
    [
        (STANDARD, BOOLEAN, 0, "Constant Constant Where Attention"),
        (STANDARD, BOOLEAN, 1, "Constant Constant Where Attention_hhhh_mask_zero"),
        (STANDARD, HEADS, 1, "Attention_hhhh_mask_zero"),
        # masks that stay, and what has them
        (STANDARD, HEADS, 0, None),
        ("y = Attention <is_causal = 1> (q, k, v, m)", BOOLEAN, 1, None),
        (f"y = If (go) <then_branch = {BRANCH}, else_branch = {BRANCH}>", BOOLEAN, 0, None),
        (STANDARD.replace("Attention", "other.Attention"), BOOLEAN, 1, None),
        (SCAN, BOOLEAN, 1, None),
    ],
)
def test_what_the_pass_changes(body: str, inputs: str, budget: int, ops: str | None) -> None:
    root = values(body, inputs, opset=23)["y"].producer()
    assert root is not None
    assert isinstance(root.graph, ir.Graph)
    work = ir.Model(root.graph, ir_version=10)
    before = [node.op_type for node in work.graph.all_nodes()]
    modified = FuseAttentions(budget=[budget])(work).modified
    assert modified == (ops is not None)
    after = [node.op_type for node in work.graph.all_nodes()]
    assert after == (ops.split() if ops is not None else before)


def test_what_is_added_for_a_boolean_mask() -> None:
    root = values(STANDARD, BOOLEAN, opset=23)["y"].producer()
    assert root is not None
    assert isinstance(root.graph, ir.Graph)
    FuseAttentions(budget=[0])(ir.Model(root.graph, ir_version=10))
    kept, dropped, where, _ = root.graph
    assert [node.name for node in (kept, dropped, where)] == ["m_kept", "m_dropped", "m_additive"]
    assert [node.attributes["value_float"].as_float() for node in (kept, dropped)] == [0, -np.inf]
    mask = where.inputs[0]
    assert mask is not None
    assert mask.name == "m"
    assert where.inputs[1:] == (kept.outputs[0], dropped.outputs[0])
    (added,) = where.outputs
    assert root.inputs[3] is added
    assert (added.name, added.dtype, added.shape) == (where.name, ir.DataType.FLOAT, mask.shape)


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


def test_the_names_of_an_output_prove_no_heads() -> None:
    """There may be fewer of k and v, each for several of q."""
    body = "k = Cos (k0)\n v = Sin (v0)\n y = Attention <scale = 0.5> (q, k, v)"
    inputs = "float[b,h,s,4] q, float[b,g,t,4] k0, float[b,g,t,4] v0"
    outputs = "float[b,h,s,4] y, float[b,h,t,4] k, float[b,h,t,4] v"
    proto = model(body, inputs, outputs, opset=23, ir_version=10)
    assert fuse(proto)[1:] == (["Attention_hhhh_grouped_zero"], set())


def test_the_names_of_a_cache_that_is_an_output_prove_its_length() -> None:
    body = f"k = Concat <axis = 2> (past, k0)\n {STANDARD}"
    inputs = HEADS.replace("float[b,6,t,4] k", "float[b,6,s,4] k0, float[b,6,g,4] past")
    proto = model(body, inputs, f"{OUT}, float[b,6,t,4] k", opset=23, ir_version=10)
    assert fuse(proto)[1:] == (["Attention_hhhh_mask_zero"], set())


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


@pytest.mark.parametrize("mask", ["", "t", "1,1,1,t", "1,1,1,1", "s,1", "s,t"])
@pytest.mark.parametrize("wrong", ["empty", "mask"])
def test_a_proof_with_any_mask_catches_what_is_read_wrong(
    mask: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = HEADS.replace("b,1,s,t", mask) if mask else HEADS.replace("float[b,1,s,t]", "float")
    proto = graph(SCORES + "a = Add (e, m)\n" + SAFE, inputs)
    assert fuse(proto)[1:] == (["Attention_hhhh_mask_safe"], set())
    original = FuseAttention.propose

    def propose(self: FuseAttention, root: ir.Node) -> Rewrite | Miss | None:
        found = original(self, root)
        if not isinstance(found, Rewrite):
            return found
        changed = {"empty": "nan"} if wrong == "empty" else {"select": True}
        return dataclasses.replace(found, spec=dataclasses.replace(found.spec, **changed))

    monkeypatch.setattr(FuseAttention, "propose", propose)
    assert fuse(proto)[1:] == ([], {"check_failed"})


@pytest.mark.parametrize("opset", [11, 12])
def test_masks_are_joined_only_where_attention_may_fuse(opset: int) -> None:
    body = SCORES + "a = Where (m1, e, low)\n" + TAIL.replace("(a)", "<axis = -1> (a)")
    after, fused, _ = fuse(graph(body, CONDITIONS, opset=opset, low=np.float32(-1e9)))
    assert fused == []
    assert sum(node.op_type == "Where" for node in after.graph.node) == 1


def test_masks_shared_by_layers_in_another_order() -> None:
    """The layer visited first reads the mask behind the other one."""
    body = KEYS + "b0 = MatMul (q2, kt)\n b1 = Where (m1, b0, low)\n a0 = MatMul (q, kt)\n"
    body += "a1 = Where (m1, a0, low)\n a2 = Softmax (a1)\n y = MatMul (a2, v)\n"
    body += "b2 = Softmax (b1)\n u = MatMul (b2, v)"
    inputs = CONDITIONS + ", float[b,6,s,4] q2"
    proto = graph(body, inputs, OUT + ", float[b,6,s,4] u", low=np.float32(-1e9))
    work = fusenorm.optimize(proto).model
    FuseAttentions(budget=[0])(work)
    verify_graph(work, "fuse_attention", ["y", "u"])


def test_factors_behind_a_mask_that_cancel_out_are_factors() -> None:
    body = SCORES + "f = Add (e, m)\n g = Mul (f, c)\n a = Div (g, c)\n" + TAIL
    assert fuse(graph(body))[1:] == ([], {"scaled_mask"})
