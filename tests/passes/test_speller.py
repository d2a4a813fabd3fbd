"""The generator behind every rule's tests: all its choices are made, its graphs are as asked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from onnx.shape_inference import infer_shapes

from fusenorm.passes.pattern import (
    Casted,
    Const,
    Joined,
    Named,
    OneOf,
    Op,
    Pattern,
    Reduce,
    Scalar,
    Var,
    Width,
)
from fusenorm.passes.speller import WIDTH, Speller, spellings
from tests.graphs import rows, run

X = Var("x")


def write(pattern: Pattern) -> Callable[[Speller], ir.Value]:
    def spell(speller: Speller) -> ir.Value:
        speller.row("x")
        speller.vector("g")
        speller.scalar("beta", 1.5)
        return pattern.spell(speller)

    return spell


def spelled(pattern: Pattern, **options: object) -> list[ir.Model]:
    models = list(spellings(write(pattern), **options))  # type: ignore[arg-type]
    for model in models:
        infer_shapes(ir.to_proto(model), check_type=True, strict_mode=True)
    return models


def nodes(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def value(model: ir.Model) -> np.ndarray:
    """What a spelling computes of the same rows."""
    (info,) = model.graph.inputs
    dtype = np.float16 if info.dtype == ir.DataType.FLOAT16 else np.float32
    return run(ir.to_proto(model), {"x": rows(*info.shape.numpy(), dtype=dtype)})[0]  # type: ignore[union-attr, arg-type]


# Choices.


def test_a_choice_is_taken_from_the_list_then_the_first() -> None:
    speller = Speller([1, 5], 18, "f32", 3)
    assert [speller.pick(3), speller.pick(3), speller.pick(3), speller.pick(2)] == [1, 2, 0, 0]
    assert speller.taken == [1, 2, 0, 0]
    assert speller.sizes == [3, 3, 3, 2]


def test_every_option_of_every_choice_is_written_once() -> None:
    taken: list[tuple[int, ...]] = []

    def choose(speller: Speller) -> ir.Value:
        x = speller.row("x")
        taken.append((speller.pick(2), speller.pick(4), speller.pick(3)))
        return speller.node("Neg", [x])

    models = list(spellings(choose, limit=100))
    assert len(models) == 2 * 4 * 3
    singles = {(0, 0, 0), (1, 0, 0), *((0, i, 0) for i in range(4)), *((0, 0, i) for i in range(3))}
    assert set(taken[: len(singles)]) >= {(0, 0, 0), (1, 0, 0), (0, 3, 0), (0, 0, 2)}
    assert singles <= set(taken[:12])


def test_at_most_200_of_opset_18_unless_asked_for_others() -> None:
    def choose(speller: Speller) -> ir.Value:
        x = speller.row("x")
        for _ in range(3):
            speller.pick(12)
        return speller.node("Neg", [x])

    assert [model.opset_imports[""] for model in spellings(choose)] == [18] * 200


def test_no_more_than_asked_for_and_never_one_twice() -> None:
    one, two = Op("Neg", (X,)), Op("Abs", (X,))
    pattern = Op("Mul", (Op("Add", (X, Op("Mul", (one, two)))), OneOf((X, one))))
    texts = [str(ir.to_proto(model)) for model in spelled(pattern, limit=100)]
    assert len(texts) == len(set(texts)) == 2 * 2 * 2 * 2
    assert [len(spelled(pattern, limit=count)) for count in (1, 3)] == [1, 3]
    mixed = [str(ir.to_proto(model)) for model in spellings(write(pattern), limit=18)]
    assert sorted(mixed) == sorted(texts)


def test_half_are_systematic_and_half_are_mixtures_of_the_seed() -> None:
    pattern: Pattern = X
    for _ in range(8):
        pattern = Op("Sub", (pattern, OneOf((X, Op("Neg", (X,)), Op("Abs", (X,))))))
    one, two, other = (
        [nodes(model) for model in spelled(pattern, limit=60, seed=seed)] for seed in (0, 0, 1)
    )
    assert one == two
    assert one[:30] == other[:30]
    assert one[30:] != other[30:]
    assert one[30] != other[30]
    # The first have one or two choices that are not the default, the others most of them.
    unusual = [len(names) - 8 for names in one]
    assert max(unusual[:30]) <= 2
    assert sum(unusual[30:]) >= 30 * 4


# Patterns as nodes.


def test_both_orders_of_a_commutative_operator() -> None:
    for op, count in (("Add", 2), ("Mul", 2), ("Sub", 1), ("Div", 1)):
        models = spelled(Op(op, (Op("Neg", (X,)), X)))
        orders = {tuple(v.name for v in model.graph[-1].inputs) for model in models}  # type: ignore[union-attr]
        assert len(models) == len(orders) == count
        if count == 2:
            np.testing.assert_array_equal(value(models[0]), value(models[1]))


def test_alternatives_and_names() -> None:
    models = spelled(Named("inner", OneOf((Op("Neg", (X,)), Op("Abs", (X,))))))
    assert [nodes(model) for model in models] == [["Neg"], ["Abs"]]


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_numbers_have_the_type_of_what_they_meet(dtype: str) -> None:
    pattern = Op("Sub", (Const(3.0), Op("Mul", (X, Scalar("beta")))))
    for model in spelled(pattern, dtype=dtype, island=False):
        assert {v.dtype for node in model.graph for v in node.inputs} == {  # type: ignore[union-attr]
            model.graph.inputs[0].dtype
        }
        x = rows(2, 3, WIDTH)
        np.testing.assert_allclose(value(model), 3 - x * 1.5, atol=1e-2 if dtype == "f16" else 1e-6)


@pytest.mark.parametrize(
    ("op", "opset", "by_input"),
    [
        ("ReduceSum", 12, False),
        ("ReduceSum", 13, True),
        ("ReduceSum", 17, True),
        ("ReduceMean", 13, False),
        ("ReduceMean", 17, False),
        ("ReduceMean", 18, True),
    ],
)
def test_a_reduction_writes_its_axis_both_ways(op: str, opset: int, by_input: bool) -> None:
    models = spelled(Reduce(op, X), opset=opset)
    found = []
    for model in models:
        (node,) = model.graph
        assert node.attributes["keepdims"].as_int() == 1
        assert len(node.inputs) == 1 + by_input
        axes = (
            node.inputs[1].const_value.numpy()  # type: ignore[union-attr]
            if by_input
            else node.attributes["axes"].as_ints()
        )
        found.append(list(axes))
    assert found == [[-1], [2]]


def test_columns_side_by_side() -> None:
    pattern = Joined((X, Op("Neg", (X,))))
    (model,) = spelled(pattern)
    (x,) = (info.shape.numpy() for info in model.graph.inputs)  # type: ignore[union-attr]
    assert value(model).shape == (*x[:-1], 2 * x[-1])


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_integers_stay_what_they_are(dtype: str) -> None:
    """The axes of an Unsqueeze, the shape of a Reshape: they are not of the type they meet."""

    def spell(speller: Speller) -> ir.Value:
        x = speller.row("x")
        speller.values["axis"] = speller.constant(np.array([0]))
        speller.values["shape"] = speller.constant(np.array(x.shape.numpy()))  # type: ignore[union-attr]
        rows = Op("Unsqueeze", (X, Var("axis")))
        return Op("Reshape", (rows, Var("shape"))).spell(speller)

    (model,) = spellings(spell, dtype=dtype)  # type: ignore[arg-type]
    infer_shapes(ir.to_proto(model), check_type=True, strict_mode=True)
    assert nodes(model) == ["Unsqueeze", "Reshape"]
    assert value(model).ndim == 3


def test_no_number_takes_the_type_of_an_integer() -> None:
    speller = Speller([], 18, "f16", 3)
    number = speller.number(1.5, "f64")
    assert speller.typed(number, speller.constant(np.array([1, 2]))) is number


def test_a_reduction_over_two_axes_and_its_width() -> None:
    pattern = Op("Div", (Reduce("ReduceSum", X), Width("x")))
    models = spelled(pattern, axes=2, rank=3)
    for model in models:
        x = rows(2, 3, WIDTH)
        np.testing.assert_allclose(value(model), x.mean((1, 2), keepdims=True), atol=1e-6)
    part = Op("Mul", (Reduce("ReduceSum", X), Width("x", reciprocal=True)))
    for model in spelled(part, rank=2):
        x = rows(2, WIDTH)
        np.testing.assert_allclose(value(model), x.mean(1, keepdims=True), atol=1e-6)


def casts(model: ir.Model) -> list[str]:
    return [
        ir.DataType(node.attributes["to"].as_int()).name
        for node in model.graph
        if node.op_type == "Cast"
    ]


ISLAND = Casted(Op("Neg", (Casted(X, "wide"),)), "storage")


@pytest.mark.parametrize(
    ("dtype", "island", "wanted"),
    [
        ("f16", True, ["FLOAT", "FLOAT16"]),
        ("bf16", True, ["FLOAT", "BFLOAT16"]),
        ("f16", False, []),
        ("f32", True, []),
    ],
)
def test_an_island_of_casts(dtype: str, island: bool, wanted: list[str]) -> None:
    (model,) = spelled(ISLAND, dtype=dtype, island=island)
    assert casts(model) == wanted
    assert model.graph.outputs[0].dtype == model.graph.inputs[0].dtype


def test_where_one_operand_is_rounded_the_others_skip_their_cast() -> None:
    pattern = Op(
        "Mul", (Casted(Op("Neg", (Casted(X, "wide"),)), "storage"), Casted(Var("g"), "wide"))
    )
    for model in spelled(pattern, dtype="f16"):
        product = model.graph[-1]
        assert product.op_type == "Mul"
        assert {v.dtype for v in product.inputs} == {ir.DataType.FLOAT16}  # type: ignore[union-attr]
        x = rows(2, 3, WIDTH, dtype=np.float16)
        scale = np.linspace(0.3, 1.7, WIDTH) * -0.7
        np.testing.assert_allclose(value(model), -x * scale, rtol=2e-3, atol=1e-6)
        assert model.graph.outputs[0].dtype == ir.DataType.FLOAT16


# Values.


@pytest.mark.parametrize(
    ("rank", "shape"), [(1, [12]), (2, [2, 12]), (3, [2, 3, 12]), (4, [2, 3, 2, 12])]
)
def test_rows(rank: int, shape: list[int]) -> None:
    speller = Speller([], 18, "f16", rank)
    x = speller.row("x")
    assert (x.name, list(x.shape), x.dtype) == ("x", shape, ir.DataType.FLOAT16)  # type: ignore[arg-type]
    assert speller.values["x"] is x
    assert speller.inputs == [x]
    wide = speller.row("packed", factor=2)
    assert list(wide.shape) == [*shape[:-1], 24]  # type: ignore[arg-type]


def test_vectors_tell_their_elements_and_each_other_apart() -> None:
    speller = Speller([], 18, "f16", 3)
    speller.vector("scale")
    speller.vector("bias")
    scale, bias = (speller.values[name].const_value.numpy() for name in ("scale", "bias"))  # type: ignore[union-attr]
    assert scale.dtype == bias.dtype == np.float16
    assert scale.shape == bias.shape == (WIDTH,)
    for vector in (scale, bias):
        assert len(set(vector.tolist())) == WIDTH
        assert not {0.0, 1.0} & set(vector.tolist())
    assert not set(scale.tolist()) & set(bias.tolist())
    assert (scale > 0).all()
    assert (bias < 0).all()
    several = Speller([], 18, "f32", 3, axes=2)
    several.vector("g")
    assert several.values["g"].const_value.shape == [3, WIDTH]  # type: ignore[union-attr]
    several.vector("short", size=5)
    assert several.values["short"].const_value.shape == [3, 5]  # type: ignore[union-attr]


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("layout", ["split", "slice", "interleaved"])
def test_halves(layout: str, opset: int) -> None:
    def difference(speller: Speller) -> ir.Value:
        packed = speller.row("x", factor=2)
        halves = [
            speller.split(packed, part)
            if layout == "split"
            else speller.columns(packed, part, interleaved=layout == "interleaved")
            for part in (0, 1)
        ]
        return speller.node("Sub", halves)

    models = list(spellings(difference, opset=opset))
    axes = [
        node.attributes["axis"].as_int()
        for m in models
        for node in m.graph
        if "axis" in node.attributes
    ]
    assert axes == ([-1, 2] if layout == "split" else [])
    for model in models:
        infer_shapes(ir.to_proto(model), check_type=True, strict_mode=True)
        assert nodes(model).count("Split") == (layout == "split")
        x = rows(2, 3, 2 * WIDTH)
        a, b = (x[..., ::2], x[..., 1::2]) if layout == "interleaved" else np.split(x, 2, -1)
        np.testing.assert_array_equal(value(model), a - b)


def test_an_island_is_the_default() -> None:
    assert Speller([], 18, "f16", 3).island
    assert [casts(model) for model in spelled(ISLAND, dtype="f16")] == [["FLOAT", "FLOAT16"]]


def test_the_model_is_what_was_asked_for() -> None:
    (model,) = spelled(Op("Neg", (X,)), opset=15, dtype="bf16", rank=2)
    assert model.opset_imports == {"": 15}
    assert model.ir_version == 8
    assert [out.name for out in model.graph.outputs] == ["out"]
    assert model.graph.inputs[0].dtype == model.graph.outputs[0].dtype == ir.DataType.BFLOAT16
