"""What a proof tries, how it evaluates both sides, and what it calls a difference."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from fusenorm.ops import Attention, Gated, Norm, OpSpec
from fusenorm.ops.spec import Layout
from fusenorm.passes import Validator, validate
from fusenorm.passes.evaluate import evaluate
from fusenorm.passes.rewrite import Rewrite
from fusenorm.passes.validate import SHAPES_OF_ROWS, Claim, Operand, find_flaw, hard_rows
from tests.graphs import values

# The numbers tried.


def drawn(layout: Layout, *shape: int, exponent: int | None = 0) -> np.ndarray:
    return Operand("v", "f32", shape, layout, exponent).draw(np.random.default_rng(0))


@pytest.mark.parametrize("exponent", [0, 3, -20])
def test_vectors_are_numbers_around_1_of_the_constant_s_magnitude(exponent: int) -> None:
    numbers = np.ldexp(drawn("vector", 4096, exponent=exponent), -exponent)
    assert numbers.mean() == pytest.approx(1, abs=0.05)
    assert numbers.std() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("layout", ["heads", "sequence", "table", "cache", "panels"])
def test_attention_s_rows_and_weights_are_plain(layout: Layout) -> None:
    rows = drawn(layout, 8, 2048)
    np.testing.assert_allclose(rows.mean(axis=1), 0, atol=0.1)
    np.testing.assert_allclose(rows.std(axis=1), 1, atol=0.1)


def test_a_mask_hides_some_places_and_in_one_row_all() -> None:
    mask = drawn("scores", 2, 3, 4, 256)
    hidden = mask == -np.inf
    np.testing.assert_array_equal(hidden, ~np.isfinite(mask))
    assert hidden[0, 0, 0].all()
    rows = hidden.mean(axis=-1).reshape(-1)[1:]
    np.testing.assert_allclose(rows, 0.3, atol=0.12)


def test_rows_of_many_shapes() -> None:
    rows = hard_rows(np.random.default_rng(0), (2, 9, 2048)).reshape(18, 2048)
    for index, row in enumerate(rows):
        scale, offset = SHAPES_OF_ROWS[index % 8]
        assert row.mean() == pytest.approx(offset, abs=0.1 * scale)
        assert row.std() == pytest.approx(scale, rel=0.1)
    np.testing.assert_array_equal(
        drawn("row", 2, 3, 8), hard_rows(np.random.default_rng(0), (2, 3, 8))
    )


@pytest.mark.parametrize(
    ("known", "kind", "dtype"),
    [("f32", "f64", "f64"), (None, "f16", "f16"), ("f32", "f16", "f32"), ("f16", "f16", "f16")],
)
def test_an_operand_keeps_its_type_but_in_f64(known: str | None, kind: str, dtype: str) -> None:
    operand = Operand("v", known, (8,), "row")  # type: ignore[arg-type]
    assert operand.type(kind) == dtype  # type: ignore[arg-type]


# Claims.

NUMBERS = {
    "row": np.ones((2, 3, 8), np.float32),
    "g": np.linspace(0.5, 1.5, 8, dtype=np.float32),
    "big": 100 * np.linspace(0.5, 1.5, 8, dtype=np.float32),
    "small": np.linspace(0.01, 0.03, 8, dtype=np.float32),
    "zeros": np.zeros(8, np.float32),
    "eps": np.float32(1e-5),
    "last": np.array([-1]),
    "half": np.float16(0.5),
    "one": np.float32(1),
}


def rewrite(
    body: str,
    inputs: str,
    spec: OpSpec,
    operands: str,
    outputs: str = "y",
    attributes: Mapping[str, float] | None = None,
) -> Rewrite:
    """That the nodes of a graph are one node; `-` is an output the graph does not have."""
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    constants = {k: v for k, v in NUMBERS.items() if k in words or k in operands.split()}
    found = values(body, inputs, constants=constants, opset=18)
    named = [found.get(name) for name in outputs.split()]
    return Rewrite(
        "rule",
        spec,
        tuple(found[name] for name in operands.split()),
        attributes or dict.fromkeys(spec.attributes, 1e-5),
        tuple(named),
        tuple(found["y"].producer().graph),  # type: ignore[union-attr, arg-type]
    )


SKIP = Norm(skip=True)
SUMMED = """
  s = Add(x, {})
  q = Mul(s, s)
  m = ReduceMean<keepdims = 1>(q, last)
  e = Add(m, eps)
  d = Sqrt(e)
  n = Div(s, d)
  y = Mul(n, {})
"""
XR = "float[b,s,8] x, float[b,s,8] r"


def summed(row: str = "r", scale: str = "g", inputs: str = XR, outputs: str = "y -") -> Rewrite:
    return rewrite(SUMMED.format(row, scale), inputs, SKIP, f"x {row} {scale}", outputs)


def test_an_output_the_source_does_not_have_is_not_compared() -> None:
    for outputs, wanted in (("y -", (True, False)), ("y s", (True, True))):
        claim = Claim.of(summed(outputs=outputs), 18)
        assert claim.outputs == wanted
        source = onnx.GraphProto.FromString(claim.source)
        assert len(source.output) == sum(wanted)
        assert find_flaw(claim) is None


def test_each_node_is_in_a_claim_once() -> None:
    source = onnx.GraphProto.FromString(Claim.of(summed(), 18).source)
    ops = [node.op_type for node in source.node]
    assert sorted(ops) == ["Add", "Add", "Div", "Mul", "Mul", "ReduceMean", "Sqrt"]


@pytest.mark.parametrize(
    ("scale", "exponent"), [("g", -1), ("big", 6), ("small", -7), ("zeros", -2)]
)
def test_a_scale_stands_for_all_of_its_magnitude(scale: str, exponent: int) -> None:
    claim = Claim.of(summed(scale=scale), 18)
    assert [operand.exponent for operand in claim.operands] == [0, 0, exponent]
    assert claim.operands[2].shape == (8,)
    assert claim.operands[2].name not in claim.constants


@pytest.mark.parametrize(
    ("spec", "operands", "exponents"),
    [
        (Gated("swish", "gate_up"), "row", [0]),
        (Gated("swish", "pair"), "row row", [0, 0]),
        # What is neither a row nor a vector counts by its numbers.
        (Attention(mask=True), "x x x row", [0, 0, 0, None]),
        (Attention(), "x row row", [0, None, None]),
    ],
)
def test_which_constants_stand_for_any(
    spec: OpSpec, operands: str, exponents: list[int | None]
) -> None:
    body = f"y = other.Thing({operands.replace(' ', ', ')})"
    claim = Claim.of(rewrite(body, XR, spec, operands), 18)
    assert [operand.exponent for operand in claim.operands] == exponents
    assert {o.name for o in claim.operands if o.exponent is None} == set(claim.constants)


def test_a_constant_row_stands_for_any_row() -> None:
    claim = Claim.of(summed("row"), 18)
    x, row, _ = claim.operands
    assert (row.shape, row.exponent) == (x.shape, 0)
    assert row.name not in claim.constants


@pytest.mark.parametrize(
    ("inputs", "shape", "scale"),
    [
        ("float[b,s,8] x, float[b,s,8] r, float[8] v", (2, 4, 8), (8,)),
        ("float[b,8] x, float[b,8] r, float[8] v", (4, 8), (8,)),
        ("float[b,c,h,8] x, float[b,c,h,8] r, float[n] v", (3, 2, 4, 8), (16,)),
        ("float[] x, float[] r, float[] v", (2, 4, 16), (16,)),
    ],
)
def test_rows_have_their_rank_and_width(
    inputs: str, shape: tuple[int, ...], scale: tuple[int, ...]
) -> None:
    operands = Claim.of(summed(scale="v", inputs=inputs), 18).operands
    assert [operand.shape for operand in operands] == [shape, shape, scale]
    assert [operand.exponent for operand in operands] == [0, 0, 0]


def test_a_made_up_operand_counts_by_its_numbers() -> None:
    made = dataclasses.replace(
        summed(), inputs=(*summed().inputs[:2], ir.val("v", const_value=ir.tensor(NUMBERS["g"])))
    )
    claim = Claim.of(made, 18)
    assert claim.operands[2].exponent is None
    np.testing.assert_array_equal(claim.constants[claim.operands[2].name], NUMBERS["g"])


def test_equal_claims_of_text_and_of_numbers_have_one_key() -> None:
    claim = Claim.of(summed(), 18)
    texts = [np.array(["".join(("a", end))], object) for end in ("b", "b", "c")]
    keys = [dataclasses.replace(claim, constants={"v": text}).key for text in texts]
    assert keys[0] == keys[1] != keys[2]
    kinds = (np.float32([0, 1]), np.float32([0, 1]), np.float32([[0, 1]]), np.float64([0, 1]))
    keys = [dataclasses.replace(claim, constants={"v": array}).key for array in kinds]
    assert len(set(keys)) == 3
    assert keys[0] == keys[1]


def test_equal_claims_are_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(validate, "find_flaw", lambda claim, seed: asked.append(seed))
    check = Validator(seed=3)
    assert check(summed(), 18) is None
    assert check(summed(), 18) is None
    assert asked == [3]
    assert check(summed(scale="big"), 18) is None
    assert asked == [3, 3]


# Evaluations.

SILU = "z = Sigmoid(x)\ny = Mul(x, z)"
SWISH = {"beta": 1.0}


def flaw(body: str, spec: OpSpec, kind: str, operands: str = "x") -> str | None:
    attributes = SWISH if "beta" in spec.attributes else None
    inputs = f"{kind}[b,s,8] x, {kind}[b,s,8] r"
    return find_flaw(Claim.of(rewrite(body, inputs, spec, operands, attributes=attributes), 18))


@pytest.mark.parametrize(
    ("body", "spec", "kind", "found"),
    [
        (SILU, Gated("swish"), "float", None),
        (SILU, Gated("swish", dtype="f16", precision="storage"), "float16", None),
        (SILU, Gated("swish", dtype="f16"), "float16", "a rounding was lost$"),
        (SILU, Gated("swish", dtype="bf16"), "bfloat16", "a rounding was lost$"),
        (SILU, Gated("gelu"), "float", "of a row's largest output in f64$"),
        (SILU, Gated("gelu", dtype="f16", precision="storage"), "float16",
         "of a row's largest output in f64$"),
        ("w = Cast<to = 1>(x)\nz = Sigmoid(w)\nm = Mul(w, z)\ny = Cast<to = 10>(m)",
         Gated("swish", dtype="f16"), "float16", None),
        ("w = Cast<to = 1>(x)\nh = Mul(w, one)\nz = Sigmoid(h)\ny = Mul(x, z)",
         Gated("swish"), "float", None),
        ("u = other.Thing(x)\ny = Neg(u)", Gated("swish"), "float", "cannot be evaluated: "),
        ("y = ReduceMax(x)", Gated("swish"), "float", "shape [1, 1, 1] became [2, 4, 8]"),
    ],
)  # fmt: skip
def test_where_both_sides_differ(body: str, spec: OpSpec, kind: str, found: str | None) -> None:
    outcome = flaw(body, spec, kind)
    assert outcome == found if found is None else found in f"{outcome}$"


def test_both_sides_are_evaluated_in_f64_and_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[set[str], set[np.dtype]]] = []

    def spy(nodes, feeds, outputs, functions, opset):  # type: ignore[no-untyped-def]
        seen.append(({node.op_type for node in nodes}, {a.dtype for a in feeds.values()}))
        return evaluate(nodes, feeds, outputs, functions, opset)

    monkeypatch.setattr(validate, "evaluate", spy)
    half, wide = np.dtype(np.float16), np.dtype(np.float64)
    spec = Gated("swish", dtype="f16", precision="storage")
    assert flaw(SILU, spec, "float16") is None
    source, fused = {"Sigmoid", "Mul"}, {spec.op_type}
    assert seen == [(source, {wide}), ({spec.with_dtype("f64").op_type}, {wide}),
                    (source, {half}), (fused, {half})]  # fmt: skip


@pytest.mark.parametrize(
    ("attributes", "op", "after"),
    [
        ({"to": 1}, "Cast", {"to": 11}),
        ({"to": 10}, "Cast", {"to": 11}),
        ({"saturate": 1, "to": 16}, "Cast", {"saturate": 1, "to": 11}),
        ({"to": 7}, "Cast", {"to": 7}),
        ({"to": 1}, "Other", {"to": 1}),
    ],
)
def test_casts_to_floats_are_to_f64_in_f64(
    attributes: dict[str, int], op: str, after: dict[str, int]
) -> None:
    node = onnx.helper.make_node(op, ["x"], ["y"], **attributes)
    validate._retype_cast(node)
    assert {attribute.name: attribute.i for attribute in node.attribute} == after


# Differences, in parts of the bound.

BOUND = validate.ALGEBRA_BOUND["f32"]
INF, NAN = np.inf, np.nan
ONE_SIDE = "infinities or NaN appear on one side only"


@pytest.mark.parametrize(
    ("source", "errors", "found"),
    [
        ([[1.0, 0.5]], [[0.0, 0.0]], None),
        ([[1.0, 0.0]], [[0.0, 1.0]], None),
        ([[1.0, 0.0]], [[0.0, 1.01]], "differs by"),
        ([[-1.0, 0.0]], [[0.0, -1.01]], "differs by"),
        ([[1.0, 0.0], [0.01, 0.0]], [[0.0, 0.0], [0.0, 0.1]], "differs by"),  # of its own row
        ([[1e-3, 0.0]], [[0.0, 0.01]], "differs by"),
        ([[100.0], [0.0]], [[0.0], [0.05]], None),  # of zeros: of a part of the largest
        ([[100.0], [0.0]], [[0.0], [0.2]], "differs by"),
        ([[1e-3], [0.0]], [[0.0], [1e-4]], "differs by"),
        ([[0.0], [0.0]], [[0.0], [1e-31 / BOUND]], "differs by"),
        ([[0.0], [0.0]], [[0.0], [0.5e-30]], None),
        ([[INF, 1.0]], [[0.0, 0.5]], None),
        ([[INF, 1e-3]], [[0.0, 0.01]], "differs by"),
        ([[NAN, 1.0]], [[0.0, 0.0]], None),
        ([[1.0, 1.0]], [[INF, 0.0]], ONE_SIDE),
        ([[INF, 1.0]], [[NAN, 0.0]], None),
        ([[1.0, 1.0]], [[NAN, 0.0]], ONE_SIDE),
        (np.zeros((2, 0)), np.zeros((2, 0)), None),
        (np.zeros((0, 2)), np.zeros((0, 2)), None),
    ],
)
def test_a_difference_is_one_of_a_row_s_largest_number(
    source: list[list[float]], errors: list[list[float]], found: str | None
) -> None:
    a = np.array(source, np.float64)
    b = a + BOUND * np.array(errors, np.float64)
    outcome = validate.find_difference([a], [b], "f32", "f64")
    assert outcome == found if found is None else str(outcome).startswith(found)


@pytest.mark.parametrize(
    ("changed", "kind", "found"),
    [
        (0, "f16", None),
        (2, "f16", None),
        (3, "f16", "only 99.7% of f16 outputs are bit-equal: a rounding was lost"),
        (3, "f64", None),
    ],
)
def test_in_16_bits_nearly_all_numbers_are_equal(
    changed: int, kind: str, found: str | None
) -> None:
    a = np.ones((1, 1000), np.float16)
    b = a.copy()
    b[0, :changed] += np.float16(2**-10)
    assert validate.find_difference([a], [b], "f16", kind) == found  # type: ignore[arg-type]


def test_no_numbers_are_equal_numbers() -> None:
    empty = np.zeros((0, 8), ml_dtypes.bfloat16)
    assert validate.find_difference([empty], [empty], "bf16", "bf16") is None
