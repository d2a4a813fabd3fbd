"""Rotary positions at compile time: which join the attention behind them, and which do not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

import fusenorm
from fusenorm.ops.attention import Form
from fusenorm.passes import facts
from fusenorm.passes.fuse_attention import FuseAttention, FuseAttentions
from fusenorm.passes.rewrite import MISS_KEY
from fusenorm.passes.rotary import turned
from fusenorm.passes.speller import Speller, spellings
from fusenorm.passes.validate import Validator
from fusenorm.pipeline import lower_regions
from tests.graphs import model, proposed
from tests.passes.test_fuse_attention import COPY, fuse, graph

INPUTS = (
    "float[b,6,s,8] q, float[b,6,s,8] k, float[b,6,s,8] v, float[b,1,s,8] cos, float[b,1,s,8] sin"
)
OUT = "float[b,6,s,8] y"
HALVES = """{0}1 = Slice ({0}, zero, four, last)
    {0}2 = Slice ({0}, four, end, last)
    {0}n = Neg ({0}2)
    {0}o = Concat <axis = -1> ({0}n, {0}1)
"""
SUM = "{0}c = Mul ({0}, cos)\n {0}s = Mul ({0}o, sin)\n {0}t = Add ({0}c, {0}s)\n"
PAIRS = """{0}1 = Slice ({0}, zero, end, last, two)
    {0}2 = Slice ({0}, one, end, last, two)
    {0}n = Neg ({0}2)
    {0}nu = Unsqueeze ({0}n, last)
    {0}1u = Unsqueeze ({0}1, last)
    {0}p = Concat <axis = -1> ({0}nu, {0}1u)
    {0}o = Reshape ({0}p, same)
"""
CUT = "{0}x = Slice ({0}f, zero, eight, last)\n {0}y = Slice ({0}f, eight, end, last)\n"
JOIN = "{0}w = Concat <axis = -1> ({0}t, {0}y)\n"
KEYS = "kk = Transpose <perm = [0, 1, 3, 2]> ({})\n"
REST = "d = MatMul ({}, kk)\n a = Mul (d, c)\n p = Softmax (a)\n y = MatMul (p, v)"
TAIL = KEYS.format("kt") + REST.format("qt")
Q, K = ((HALVES + SUM).format(name) for name in "qk")
WRITTEN = Q + K + TAIL
ONLY_Q = Q + KEYS.format("k") + REST.format("qt")
ONLY_K = K + KEYS.format("kt") + REST.format("q")
PAIRED = (PAIRS + SUM).format("q") + (PAIRS + SUM).format("k") + TAIL
PART = "".join(
    CUT.format(name) + (HALVES + SUM).format(f"{name}x").replace(f"{name}xt", f"{name}t")
    + JOIN.format(name)
    for name in "qk"
) + KEYS.format("kw") + REST.format("qw")  # fmt: skip
PART_INPUTS = INPUTS.replace("8] q", "12] qf").replace("8] k", "12] kf")
FLAT = """rows = Shape <start = 2, end = 3> (kt)\n batch = Shape <start = 0, end = 1> (v)
    flat = Concat <axis = 0> (last, rows, eight)
    full = Concat <axis = 0> (batch, six, eight, rows)
    kf = Reshape (kt, flat)\n kp = Transpose <perm = [0, 2, 1]> (kf)\n kk = Reshape (kp, full)\n"""
CACHED = "qt = RotaryEmbedding (q, cos, sin)\n kt = RotaryEmbedding (k, cos, sin)\n"
CACHES = INPUTS.replace("float[b,1,s,8]", "float[b,s,4]")
NUMBERS = {
    "c": np.array(0.25, np.float32),
    "minus": np.array(-1, np.float32),
    "zero": np.array([0]),
    "one": np.array([1]),
    "two": np.array([2]),
    "three": np.array([3]),
    "four": np.array([4]),
    "six": np.array([6]),
    "eight": np.array([8]),
    "end": np.array([2**31]),
    "last": np.array([-1]),
    "before": np.array([-2]),
    "same": np.array([0, 0, 0, 8]),
    "moved": np.array([0, 0, 8, -1]),
}


def _tables(more: str) -> str:
    return INPUTS.replace("float[b,1,s,8] cos, float[b,1,s,8] sin", more)


def _both(kind: str) -> str:
    return _tables(f"float{kind} cos, float{kind} sin")


@pytest.mark.parametrize(
    ("found", "body", "inputs"),
    [
        ("qk", WRITTEN, INPUTS),
        ("qk", WRITTEN.replace("Mul (q, cos)", "Mul (cos, q)"), INPUTS),
        ("qk", WRITTEN.replace("Mul (ko, sin)", "Mul (sin, ko)"), INPUTS),
        ("qk", WRITTEN.replace("Add (qc, qs)", "Add (qs, qc)"), INPUTS),
        ("qk", WRITTEN.replace("Neg (q2)", "Mul (q2, minus)"), INPUTS),
        ("qk", WRITTEN.replace("axis = -1", "axis = 3"), INPUTS),
        ("qk", Q + K + FLAT + REST.format("qt"), _both("[b,1,p,8]")),
        ("q", ONLY_Q, INPUTS),
        ("", ONLY_K, INPUTS),
        ("q", WRITTEN.replace("Mul (k, cos)", "Mul (k, sin)"), INPUTS),
        ("q", WRITTEN.replace("Mul (ko, sin)", "Mul (ko, cos)"), INPUTS),
        ("q", WRITTEN.replace("(kn, k1)", "(k1, kn)"), INPUTS),
        # parts out of place
        ("q", WRITTEN.replace("Neg (k2)", "Neg (k1)").replace("kn, k1", "kn, k2"), INPUTS),
        ("q", WRITTEN.replace("Neg (k2)", "Neg (k1)"), INPUTS),
        ("q", WRITTEN.replace("kn, k1", "kn, k2"), INPUTS),
        ("q", WRITTEN.replace("Slice (k, zero", "Slice (v, zero"), INPUTS),
        ("q", WRITTEN.replace("Slice (k, four", "Slice (v, four"), INPUTS),
        ("q", WRITTEN.replace("Mul (k, cos)", "Mul (v, cos)"), INPUTS),
        ("rank", WRITTEN.replace("Slice (k, zero, four, last)", "Slice (k, zero, four, before)"),
         INPUTS),
        ("rank", WRITTEN.replace("<axis = -1> (kn", "<axis = -2> (kn"), INPUTS),
        ("rank", WRITTEN.replace("<axis = -1> (kn", "<axis = 2> (kn"), INPUTS),
        ("rank", WRITTEN.replace("(kn, k1)", "(kn, k1, k2)"), INPUTS),
        ("q", WRITTEN.replace("Add (kc", "Sub (kc"), INPUTS),
        # readers
        ("qk", WRITTEN + "\n r = Shape (kt)\n r2 = Shape (qt)", INPUTS),
        ("q", WRITTEN + "\n r = Neg (kt)", INPUTS),
        ("", WRITTEN + "\n r = Neg (qt)", INPUTS),
        # tables
        *(("qk", WRITTEN, _both(kind)) for kind in ("[1,1,s,8]", "[1,s,8]", "[s,8]", "[8]")),
        *(("", WRITTEN, _both(kind)) for kind in (
            "[b,6,s,8]", "[6,s,8]", "[b,1,s,1]", "[b,1,s,d]")),
        ("keys", WRITTEN, _both("[1,b,1,s,8]")),
        ("rank", WRITTEN, _both("[]")),
        ("", WRITTEN, _tables("float[b,1,s,8] cos, float[1,1,s,8] sin")),
        ("", WRITTEN, _tables("float[b,1,s,8] cos, float[b,1,t,8] sin")),
        ("rank", WRITTEN, _tables("float[b,1,s,8] cos, float[] sin")),
        ("Attention_hshh_rotary_q", WRITTEN.replace("[0, 1, 3, 2]", "[0, 2, 3, 1]"),
         _both("[8]").replace("float[b,6,s,8] k", "float[b,s,6,8] k")),
        # part of a row
        ("qk_partial", PART, PART_INPUTS),
        ("qk_partial", PART.replace("axis = -1", "axis = 3"), PART_INPUTS),
        ("qk", PART, INPUTS.replace("8] q", "8] qf").replace("8] k", "8] kf")),
        ("q_partial", PART.replace("(kt, ky)", "(ky, kt)"), PART_INPUTS),
        ("q_partial", PART.replace("(kt, ky)", "(kt, ky, ky)"), PART_INPUTS),
        ("types", PART.replace("<axis = -1> (kt", "<axis = -2> (kt"), PART_INPUTS),
        ("q_partial", PART.replace("Slice (kf, eight", "Slice (qf, eight"), PART_INPUTS),
        ("q_partial", PART.replace("Slice (kf, eight", "Slice (kf, four"), PART_INPUTS),
        ("q_partial", PART.replace("Slice (kf, zero, eight", "Slice (kf, four, end"), PART_INPUTS),
        ("q_partial", PART.replace("kx = Slice (kf, zero, eight, last)", "kx = Identity (v)"),
         PART_INPUTS),
        ("q_partial", PART.replace("ky = Slice (kf, eight, end, last)", "ky = Identity (v)"),
         PART_INPUTS),
        # pairs
        ("qk_pairs", PAIRED, INPUTS),
        ("qk_pairs", "same2 = Shape (q)\n" + PAIRED.replace(", same)", ", same2)"), INPUTS),
        ("q_pairs", PAIRED.replace("Slice (k, one", "Slice (k, zero"), INPUTS),
        ("q_pairs", PAIRED.replace("(knu, k1u)", "(k1u, knu)"), INPUTS),
        ("q_pairs", PAIRED.replace("<axis = -1> (knu", "<axis = -2> (knu"), INPUTS),
        ("q_pairs", PAIRED.replace("(kn, last)", "(kn, before)").replace("(k1, last)",
         "(k1, before)"), INPUTS),
        ("q_pairs", PAIRED.replace("(kp, same)", "(kp, moved)"), INPUTS),
        ("q_pairs", PAIRED.replace((PAIRS + SUM).format("k"), K), INPUTS),
        ("q_pairs", PAIRED.replace(PAIRS.format("k"), HALVES.format("k")
         .replace("four, last)", "end, last, two)").replace("(k, four, end, last)",
         "(k, one, end, last, two)")), INPUTS),
        # the standard op
        ("qk_cached", CACHED + TAIL, CACHES),
        ("qk_cached", CACHED + TAIL, CACHES.replace("[b,s,4]", "[1,s,4]")),
        ("qk_cached_partial", CACHED.replace("Embedding", "Embedding <rotary_embedding_dim = 4>")
         + TAIL, CACHES.replace("b,s,4", "b,s,2")),
        ("qk_cached", CACHED.replace("Embedding", "Embedding <rotary_embedding_dim = 8>") + TAIL,
         CACHES),
        ("q_cached", CACHED.replace("Embedding (k", "Embedding <rotary_embedding_dim = 4> (k")
         + TAIL, CACHES),
        ("q_cached", CACHED.replace("Embedding (k", "Embedding <interleaved = 1> (k") + TAIL,
         CACHES),
        ("qk_cached", CACHED.replace("Embedding", "Embedding <interleaved = 0>") + TAIL, CACHES),
        ("q_cached", CACHED.replace("(k, cos, sin", "(k, cos, sin, at") + TAIL,
         CACHES + ", int64[b,s] at"),
        ("", CACHED + TAIL, CACHES.replace("b,6,s,8] q", "b,6,s,d] q")),
        ("", CACHED + TAIL, CACHES.replace("b,s,4", "b,1,s,4")),
        ("", CACHED + TAIL, CACHES.replace("b,s,4", "b,s,8")),
        ("", CACHED + TAIL, CACHES.replace("b,s,4] sin", "b,t,4] sin")),
        ("rank", CACHED + TAIL, CACHES.replace("float[b,6,s,8]", "float[]", 1)),
    ],
)  # fmt: skip
def test_proposals(found: str, body: str, inputs: str) -> None:
    kind = proposed(FuseAttention(), body, inputs, constants=NUMBERS, opset=23)
    assert kind is not None
    assert kind.removeprefix("Attention_hhhh").removeprefix("_rotary_") == found


def _slice(speller: Speller, x: ir.Value, start: int, end: int, step: int = 1) -> ir.Value:
    bounds = [speller.constant(np.array([bound])) for bound in (start, end, -1, step)]
    return speller.node("Slice", [x, *bounds])


def _spell_turn(speller: Speller, name: str, x: ir.Value, form: Form, partial: bool) -> ir.Value:
    """x [2, 3, 5, 8], all or half of whose numbers turn."""
    far, size = None, 8
    if partial:
        x, far, size = _slice(speller, x, 0, 4), _slice(speller, x, 4, 8), 4
    speller.values[name] = x
    if form == "halves" and speller.pick(2):
        parts = [speller.split(x, part) for part in (0, 1)]
    elif form == "halves":
        parts = [_slice(speller, x, start, start + size // 2) for start in (0, size // 2)]
    else:
        parts = [_slice(speller, x, start, size, 2) for start in (0, 1)]
    for number, part in enumerate(parts, 1):
        speller.values[f"{name}_{number}"] = part
        axis = (-1, 4)[speller.pick(2)] if form == "pairs" else -1
        speller.values[f"{name}_axis_{number}"] = speller.constant(np.array([axis]))
    speller.values[f"{name}_shape"] = speller.constant(np.array((2, 3, 5, size)))
    found = turned(name, form).spell(speller)
    return found if far is None else speller.node("Concat", [found, far], axis=-1)


def _writer(form: Form) -> Callable[[Speller], ir.Value]:
    def write(speller: Speller) -> ir.Value:
        partial = bool(speller.pick(2))
        size = (4 if partial else 8) // (2 if form == "cached" else 1)
        shape = (2, 5, size) if form == "cached" else ((1, 1, 5, size), (5, size))[speller.pick(2)]
        for name, dims in (("q", (2, 5, 3, 8)), ("k", (2, 3, 5, 8)), ("v", (2, 3, 5, 6)),
                           ("cos", shape), ("sin", shape)):  # fmt: skip
            value = ir.val(name, dtype=ir.DataType.FLOAT, shape=ir.Shape(dims))
            speller.inputs.append(value)
            speller.values[name] = value
        q = speller.node("Transpose", [speller.values["q"]], perm=(0, 2, 1, 3))
        q = _spell_turn(speller, "q", q, form, partial)
        k = speller.values["k"]
        if speller.pick(2):
            k = _spell_turn(speller, "k", k, form, partial)
        k = speller.node("Transpose", [k], perm=(0, 1, 3, 2))
        scores = speller.node("MatMul", [q, k])
        scores = speller.node("Mul", [scores, speller.number(0.25, "f32")])
        weights = speller.node("Softmax", [scores], axis=-1)
        return speller.node("MatMul", [weights, speller.values["v"]])

    return write


@pytest.mark.parametrize(
    ("form", "opset"),
    [("halves", 13), ("halves", 18), ("halves", 23), ("pairs", 13), ("pairs", 23), ("cached", 23)],
)
def test_every_spelling_fuses_and_agrees(form: Form, opset: int) -> None:
    kinds = set()
    for spelled in spellings(_writer(form), opset=opset, rank=4, limit=24):
        _, fused, codes = fuse(ir.to_proto(spelled))
        assert not codes
        kinds |= set(fused)
    suffix = "" if form == "halves" else f"_{form}"
    turns = [f"{keys}{suffix}{part}" for keys in ("q", "qk") for part in ("", "_partial")]
    assert kinds == {f"Attention_shhh_rotary_{turn}" for turn in turns}


GROUPED = "float[2,6,5,8] q, float[2,2,5,8] k, float[2,2,5,8] v, float[5,8] cos, float[5,8] sin"
REPEATED = COPY.format("kt") + COPY.format("v") + KEYS.format("ktr") + REST.format("qt")
REPEATED = Q + K + REPEATED.replace(", v)", ", vr)")
SHARED = "{}\n extra = Neg ({})"


@pytest.mark.parametrize(
    ("turns", "code", "body", "inputs"),
    [
        ("_rotary_qk", None, WRITTEN, INPUTS),
        ("_grouped_rotary_qk", None, REPEATED, GROUPED),
        ("_rotary_q", None, ONLY_Q, INPUTS),
        ("_rotary_qk_pairs", None, "same2 = Shape (like)\n" + PAIRED.replace(", same)", ", same2)"),
         INPUTS + ", float[b,6,s,8] like"),
        ("_rotary_qk", None, WRITTEN, _both("[1,1,1,8]")),
        ("_rotary_q", "rotary_shared", SHARED.format(WRITTEN, "kt"), INPUTS),
        ("", "rotary_shared", SHARED.format(ONLY_Q, "qt"), INPUTS),
        ("_rotary_q", "rotary_keys", WRITTEN.replace("Mul (ko, sin)", "Mul (ko, cos)"), INPUTS),
        ("", "rotary_keys", ONLY_K, INPUTS),
        ("", "rotary_tables", WRITTEN, _both("[b,6,s,8]")),
        ("_zero_rotary_qk_cached", None, CACHED + "y = Attention (qt, kt, v)", CACHES),
        ("_rotary_q_cached", "rotary_form", CACHED.replace("(k, cos, sin", "(k, table, table, at")
         + TAIL, CACHES),
    ],
)  # fmt: skip
def test_graphs(turns: str, code: str | None, body: str, inputs: str) -> None:
    outputs = OUT + (", float[b,6,s,8] extra" if "extra" in body else "")
    constants = NUMBERS | {
        "five": np.array([1, 1, 3, 1, 1]),
        "whole": np.array([2, 6, 5, 8]),
        "at": np.arange(10).reshape(2, 5) % 5,
        "table": np.cos(np.arange(20, dtype=np.float32)).reshape(5, 4),
    }
    del constants["c"]
    opset = 23 if "Rotary" in body else 18
    proto = graph(body, inputs, outputs, opset=opset, **constants)
    after, fused, codes = fuse(proto, "Rotary")
    left = {node.op_type for node in after.graph.node} & {"Neg", "Concat", "RotaryEmbedding"}
    assert not left or code
    assert fused == [f"Attention_hhhh{turns}"]
    assert codes == ({code} if code else set())


def test_keys_for_a_cache_stay_as_they_are_and_the_report_says_so() -> None:
    proto = model(WRITTEN, INPUTS, f"{OUT}, float[b,6,s,8] kt", constants=NUMBERS)
    lowered, sites = lower_regions(fusenorm.optimize(proto).model)
    assert [node.op_type for node in lowered.graph][-1] == "Attention_hhhh_rotary_q"
    assert [(site.op, site.status, site.reason) for site in sites] == [
        ("Rotary", "refused", "rotary_shared"),
        ("Attention", "fused", None),
    ]
    assert sites[0].output == "kt"
    assert set(sites[0].nodes) == {"kt", "kc", "ks", "ko", "kn", "k1", "k2"}


@pytest.mark.parametrize(
    ("outside", "inside", "codes"),
    [
        (Q + K, "", {"other_graph"}),
        (HALVES.format("q"), SUM.format("q") + K, {"other_graph", "rotary_keys"}),
    ],
)
def test_what_turns_outside_a_body_is_computed_once(
    outside: str, inside: str, codes: set[str]
) -> None:
    tail = KEYS.format("kt") + REST.format("qt").replace("y =", "z =")
    body = f"""{outside}flag = Constant <value_int = 1> ()
        on = Cast <to = 9> (flag)
        y = If (on) <
            then_branch = yes () => (float[b,6,s,8] z) {{ {inside}{tail} }},
            else_branch = no () => (float[b,6,s,8] w) {{ w = Neg (v) }}
        >"""
    proto = model(body, INPUTS, OUT, constants=NUMBERS)
    work = fusenorm.optimize(proto).model
    FuseAttentions(Validator())(work)
    nodes = list(work.graph.all_nodes())
    assert "Attention_hhhh" in [node.op_type for node in nodes]
    misses = [node.meta[MISS_KEY] for node in nodes if MISS_KEY in node.meta]
    assert {miss.refusal.code for op, miss in misses if op == "Rotary"} == codes


def test_a_standard_op_that_does_more_is_named() -> None:
    body = CACHED.replace("Embedding", "Embedding <interleaved = 1>") + TAIL
    proto = model(body, CACHES, OUT, opset=23, constants=NUMBERS, ir_version=10)
    _, sites = lower_regions(fusenorm.optimize(proto).model)
    refused = [site for site in sites if site.op == "Rotary"]
    assert [site.reason for site in refused] == ["rotary_form"] * 2
    assert refused[0].detail == f"{refused[0].nodes[0]}: it looks rows up, or turns pairs"


def test_a_proof_catches_what_is_read_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """(x2, -x1) taken for (-x2, x1)."""
    body = WRITTEN
    for name in "qk":
        body = body.replace(f"Neg ({name}2)", f"Neg ({name}1)")
        body = body.replace(f"({name}n, {name}1)", f"({name}n, {name}2)")
    constants = {name: array for name, array in NUMBERS.items() if name != "c"}
    proto = graph(body, INPUTS, OUT, **constants)
    assert fuse(proto)[1:] == (["Attention_hhhh"], set())
    half_of = facts.half_of

    def exchanged(value: ir.Value) -> tuple[ir.Value, str, int] | None:
        half = half_of(value)
        return half and (half[0], half[1], 1 - half[2])

    monkeypatch.setattr(facts, "half_of", exchanged)
    assert fuse(proto)[1:] == ([], {"check_failed"})
