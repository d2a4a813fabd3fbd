"""The steps of canonicalisation, each alone: what it makes of a graph, and whether it says so."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from fusenorm.passes import Canonicalize, Cleanup, facts
from fusenorm.passes.canonicalize import (
    Annotate,
    DistinctNames,
    FixedInitializers,
    InlineFunctions,
    MergeEqual,
    NameDomains,
    PlainSpellings,
    RemoveNoOps,
    RemoveUnused,
)
from tests.graphs import written

HEAD = '<ir_version: 8, opset_import: ["" : 18, "other" : 1]>'


def parsed(
    body: str, inputs: str = "float[8] x", outputs: str = "float[8] y", head: str = HEAD
) -> ir.Model:
    return ir.from_proto(
        onnx.parser.parse_model(f"{head}\ngraph ({inputs}) => ({outputs}) {{\n{body}\n}}")
    )


def after(step: ir.passes.PassBase, model: ir.Model) -> list[str] | None:
    """The graph a step makes, None where it changes none and says so."""
    before = written(model.graph)
    result = step(model)
    lines = written(result.model.graph)
    assert result.modified or lines == before
    return lines if result.modified else None


def branches(then: str, otherwise: str = "w = Neg(x)") -> str:
    return f"""y = If (f) <
      then_branch = yes () => (float[8] z) {{ {then} }},
      else_branch = no () => (float[8] w) {{ {otherwise} }}
    >"""


FLAGGED = "float[8] x, bool f"


@pytest.mark.parametrize(
    ("body", "lines"),
    [
        ("a = Identity(x)\ny = Neg(a)", ["y = Neg(x)"]),
        ("a = Cast<to = 1>(x)\ny = Neg(a)", ["y = Neg(x)"]),
        ("a = Identity(x)\nb = Identity(a)\ny = Neg(b)", ["y = Neg(x)"]),
        ("a = Cast<to = 10>(x)\ny = Cast<to = 1>(a)", None),
        ("y = Identity(x)", None),
        ("y = Cast<to = 1>(x)", None),
        ("a = other.Identity(x)\ny = Neg(a)", None),
        ("a = other.Cast<to = 1>(x)\ny = Neg(a)", None),
        ("a = Abs(x)\ny = Neg(a)", None),
        (branches("a = Identity(x)\nz = Neg(a)"),
         ["y = If(f)", "  z = Neg(x)", "  w = Neg(x)"]),
        (branches("z = Identity(x)"), None),
    ],
)  # fmt: skip
def test_no_ops_go_unless_they_make_an_output(body: str, lines: list[str] | None) -> None:
    assert after(RemoveNoOps(), parsed(body, FLAGGED)) == lines


@pytest.mark.parametrize(
    ("body", "kind", "lines"),
    [
        ("y = Sum(x, x)", "float", ["y = Add(x, x)"]),
        ("y = Sum(x, x)", "float16", ["y = Add(x, x)"]),
        ("y = Sum(x, a, b)", "float", ["y_sum_of_2 = Add(x, a)", "y = Add(y_sum_of_2, b)"]),
        ("y = Sum(x, a, b)", "double", ["y_sum_of_2 = Add(x, a)", "y = Add(y_sum_of_2, b)"]),
        ("y = Sum(x, a, b)", "float16", None),
        ("y = Sum(x)", "float", None),
        ("y = Max(x, a)", "float", None),
        ("y = other.Sum(x, a)", "float", None),
        (branches("z = Sum(x, a)"), "float", ["y = If(f)", "  z = Add(x, a)", "  w = Neg(x)"]),
    ],
)
def test_a_sum_is_written_as_adds_where_they_round_alike(
    body: str, kind: str, lines: list[str] | None
) -> None:
    inputs = f"{kind}[8] x, {kind}[8] a, {kind}[8] b, bool f"
    assert after(PlainSpellings(), parsed(body, inputs, f"{kind}[8] y")) == lines


def test_the_parts_of_a_sum_have_its_type() -> None:
    model = parsed("y = Sum(x, x, x)", "double[8] x", "double[8] y")
    PlainSpellings()(model)
    assert [node.outputs[0].dtype for node in model.graph] == [ir.DataType.DOUBLE] * 2


@pytest.mark.parametrize(
    ("op", "target", "cast"),
    [
        ("CastLike", "h", 10),
        ("CastLike", "unknown", None),
        ("other.CastLike", "h", None),
    ],
)
def test_a_cast_to_a_known_type_names_it(op: str, target: str, cast: int | None) -> None:
    model = parsed(
        f"unknown = other.Thing(h)\ny = {op}(x, {target})",
        "float[8] x, float16[8] h",
        "float16[8] y",
    )
    lines = after(PlainSpellings(), model)
    if cast is None:
        assert lines is None
        return
    assert lines == ["unknown = other.Thing(h)", "y = Cast(x)"]
    node = model.graph[1]
    assert {name: a.name for name, a in node.attributes.items()} == {"to": "to"}
    assert node.attributes["to"].as_int() == cast


def test_the_standard_domain_has_one_name() -> None:
    model = parsed("a = Neg(x)\ny = other.Thing(a)", head=HEAD.replace('""', '"ai.onnx"'))
    assert after(NameDomains(), model) == ["a = Neg(x)", "y = other.Thing(a)"]
    assert model.graph.opset_imports == {"": 18, "other": 1}
    assert after(NameDomains(), model) is None


# Functions. Between opsets 12 and 13 Softmax changed, Sigmoid and Mul did not in what they mean.

CALLED = '<ir_version: 8, opset_import: ["" : 18, "local" : 1, "fusenorm" : 1]>'


def function(name: str, body: str, imports: str = '"" : 18', domain: str = "local") -> str:
    return f'<domain: "{domain}", opset_import: [{imports}]>\n{name} (p) => (q) {{\n{body}\n}}'


def with_functions(body: str, *functions: str, inputs: str = FLAGGED) -> ir.Model:
    graph = f"graph ({inputs}) => (float[8] y) {{\n{body}\n}}"
    return ir.from_proto(onnx.parser.parse_model("\n".join([CALLED, graph, *functions])))


SILU = "b = Sigmoid(p)\nq = Mul(p, b)"
OLD = '"" : 12, "local" : 1'


@pytest.mark.parametrize(
    ("body", "functions", "lines", "left"),
    [
        ("y = local.silu(x)", [function("silu", SILU)], ["b = Sigmoid(x)", "y = Mul(x, b)"], []),
        ("y = local.f(x)", [function("f", "q = Softmax(p)", OLD)], None, ["f"]),
        # One that stays calls it: it stays as well, for its other callers, too.
        ("a = local.f(x)\ny = local.silu(a)",
         [function("silu", SILU), function("f", "r = Softmax(p)\nq = local.silu(r)", OLD)],
         None, ["silu", "f"]),
        ("a = local.f(x)\nc = local.g(a)\ny = local.silu(c)",
         [function("silu", SILU), function("g", "q = local.neg(p)", '"local" : 1'),
          function("neg", "q = Neg(p)"),
          function("f", "r = Softmax(p)\nq = local.g(r)", OLD)],
         ["a = local.f(x)", "c = local.g(a)", "b = Sigmoid(c)", "y = Mul(c, b)"],
         ["g", "neg", "f"]),
        ("y = Neg(x)", [function("silu", SILU)], None, ["silu"]),
        ("y = fusenorm.Swish(x)", [function("Swish", SILU, domain="fusenorm")], None, ["Swish"]),
        ("y = Neg(x)", [], None, []),
    ],
)  # fmt: skip
def test_functions_are_inlined_where_they_mean_the_same(
    body: str, functions: list[str], lines: list[str] | None, left: list[str]
) -> None:
    model = with_functions(body, *functions)
    assert after(InlineFunctions(), model) == lines
    assert [f.name for f in model.functions.values()] == left


def test_what_is_inlined_hides_no_name_of_a_body() -> None:
    branch = branches("b = Relu(a)\nz = Neg(b)")
    model = with_functions(f"a = local.silu(x)\n{branch}", function("silu", SILU))
    assert after(InlineFunctions(), model) is not None
    onnx.checker.check_model(ir.to_proto(model))


def test_where_nothing_is_inlined_nodes_keep_their_names() -> None:
    model = with_functions("y = Neg(x)")
    assert after(InlineFunctions(), model) is None
    assert [node.name for node in model.graph] == [""]


def test_domains_a_function_needs_are_imported() -> None:
    silu = function("silu", f"{SILU.replace('q', 'r')}\nq = other.Thing(r)", '"" : 17, "other" : 3')
    model = with_functions("y = local.silu(x)", silu)
    assert InlineFunctions()(model).modified
    assert model.opset_imports == {"": 18, "local": 1, "fusenorm": 1, "other": 3}


@pytest.mark.parametrize("imports", ['"" : 18, "local" : 1', OLD])
def test_functions_that_call_themselves_are_refused(imports: str) -> None:
    model = with_functions(
        "y = local.f(x)",
        function("f", "r = Softmax(p)\nq = local.g(r)", imports),
        function("g", "q = local.f(p)", imports),
    )
    with pytest.raises(ir.passes.PassError):
        Canonicalize()(model)


# Initializers.


@pytest.mark.parametrize(("version", "fixed"), [(3, True), (4, False), (8, False)])
def test_initializers_were_inputs_before_ir_4(version: int, fixed: bool) -> None:
    model = parsed(
        "y = Add(x, w)", "float[8] x, float[1] w", head=HEAD.replace("8,", f"{version},", 1)
    )
    model.graph.initializers.add(model.graph.inputs[1])
    model.graph.inputs[1].const_value = ir.tensor(np.float32([2]), name="w")
    assert FixedInitializers()(model).modified == fixed
    assert model.ir_version == max(version, 4)
    assert [value.name for value in model.graph.inputs] == (["x"] if fixed else ["x", "w"])


@pytest.mark.parametrize(
    ("body", "lines"),
    [
        ("a = Neg(x)\ny = Abs(x)", ["y = Abs(x)"]),
        ("y = Abs(x)", None),
        (branches("a = Abs(x)\nz = Neg(x)"), ["y = If(f)", "  z = Neg(x)", "  w = Neg(x)"]),
        ("y = other.Loop(x)", None),
    ],
)
def test_what_nothing_reads_goes(body: str, lines: list[str] | None) -> None:
    assert after(RemoveUnused(), parsed(body, FLAGGED)) == lines


@pytest.mark.parametrize(
    ("inputs", "read"), [("", ", "), (", ", ", "), ("n", "n, "), ("n, f, x", "n, f, x")]
)
def test_a_loop_keeps_its_first_two_inputs(inputs: str, read: str) -> None:
    carried = ", float[8] h" if "x" in inputs else ""
    body = f"""y = Loop ({inputs}) <
      body = step (int64 i, bool go{carried}) => (bool next, float[8] t) {{
        next = Identity(go)
        t = Neg({"h" if carried else "x"})
      }}
    >"""
    model = parsed(body, f"{FLAGGED}, int64 n")
    assert not RemoveUnused()(model).modified
    assert written(model.graph)[0] == f"y = Loop({read})"


NUMBERS = "float[8] k = {1, 2, 3, 4, 5, 6, 7, 8}"


@pytest.mark.parametrize(
    ("numbers", "then", "left"),
    [
        (NUMBERS, "z = Neg(x)", []),
        (NUMBERS, "z = Add(x, k)", ["k"]),
        (f"{NUMBERS}, {NUMBERS.replace('k', 'z')}", "u = other.Use(x)", ["z"]),
    ],
)
def test_initializers_of_bodies_go_unless_read_or_put_out(
    numbers: str, then: str, left: list[str]
) -> None:
    model = parsed(branches(then).replace("{", f"<{numbers}> {{", 1), FLAGGED)
    assert RemoveUnused()(model).modified == (left != ["k"])
    assert list(model.graph[0].attributes["then_branch"].as_graph().initializers) == left
    assert not RemoveUnused()(model).modified


def test_an_empty_constant_is_a_constant_like_others() -> None:
    body = "e = Constant<value = int64[0] {}>()\ny = Reshape(x, e)"
    model = parsed(body, "float[1] x", "float y")
    assert after(Canonicalize(), model) == ["y = Reshape(x, e)"]


def test_last_dimensions_are_proved_in_bodies_too() -> None:
    model = parsed(branches("v = Neg(x)\nz = Neg(v)"), FLAGGED)
    assert not Annotate()(model).modified
    inner = model.graph[0].attributes["then_branch"].as_graph()[0].outputs[0]
    assert facts.last_dim(inner) == 8


@pytest.mark.parametrize("step", [Canonicalize(), Cleanup()])
def test_unused_imports_of_functions_go_too(step: ir.passes.Sequential) -> None:
    imports = '"" : 12, "other" : 1'
    model = with_functions("y = local.f(x)", function("f", "q = Softmax(p)", imports))
    step(model)
    (left,) = model.functions.values()
    assert left.opset_imports == {"": 12}


# Merging and naming.


@pytest.mark.parametrize(
    ("op", "merged"),
    [
        ("Exp", True),
        ("RandomNormalLike", False),
        ("Bernoulli", False),
        ("Multinomial", False),
        ("Dropout", False),
    ],
)
def test_equal_expressions_are_one_unless_drawn(op: str, merged: bool) -> None:
    model = parsed(f"a = {op}(x)\nb = {op}(x)\ny = Add(a, b)")
    lines = after(MergeEqual(), model)
    assert lines == ([f"a = {op}(x)", "y = Add(a, a)"] if merged else None)


def test_nodes_that_leave_out_other_outputs_are_not_one() -> None:
    body = "{}, a = LSTM(x, w, w)\n{}, b = LSTM(x, w, w)\ny = Add(a, b)"
    inputs = "float[8] x, float[8] w"
    lines = after(MergeEqual(), parsed(body.format("", ""), inputs))
    assert lines == [", a = LSTM(x, w, w)", "y = Add(a, a)"]
    for names in (("", "c"), ("c", "")):
        assert after(MergeEqual(), parsed(body.format(*names), inputs)) is None


def test_nodes_with_attributes_that_cannot_be_compared_are_not_one() -> None:
    body = "a = Optional<type = float[8]>()\nb = Optional<type = float[8]>()\ny = other.F(a, b)"
    assert after(MergeEqual(), parsed(body)) is None


@pytest.mark.parametrize(
    ("body", "lines"),
    [
        ("a = Abs(x)\n" + branches("a = Neg(x)\nz = Exp(a)"), ["a_2 = Neg(x)", "z = Exp(a_2)"]),
        ("a = Abs(x)\na_2 = Abs(a)\n" + branches("a = Neg(a_2)\nz = Exp(a)"),
         ["a_3 = Neg(a_2)", "z = Exp(a_3)"]),
        ("a = Abs(x)\n" + branches("a = Neg(x)\na_2 = Abs(a)\nz = Exp(a_2)"),
         ["a_3 = Neg(x)", "a_2 = Abs(a_3)", "z = Exp(a_2)"]),
        ("a = Abs(x)\na_2 = Abs(x)\n" + branches("a = Neg(x)\na_2 = Abs(a)\nz = Exp(a_2)"),
         ["a_3 = Neg(x)", "a_2_2 = Abs(a_3)", "z = Exp(a_2_2)"]),
        ("a = Abs(x)\nb = Abs(x)\nb_2 = Abs(x)\n"
         + branches("a = Neg(x)\nb = Abs(a)\nz = Exp(b)"),
         ["a_2 = Neg(x)", "b_3 = Abs(a_2)", "z = Exp(b_3)"]),
        ("a = Abs(x)\n" + branches("z = Neg(x)"), None),
        # Outputs left out have no names to keep apart.
        ("a, , b = LayerNormalization(x, x)\n" + branches("z, , v = LayerNormalization(x, a)"),
         None),
    ],
)  # fmt: skip
def test_a_body_hides_no_outer_name(body: str, lines: list[str] | None) -> None:
    found = after(DistinctNames(), parsed(body, FLAGGED))
    if found is not None:
        found = [line.strip() for line in found if line.startswith("  ")][:-1]
    assert found == lines


def test_branches_side_by_side_may_use_one_name() -> None:
    body = branches("a = Neg(x)\nz = Exp(a)", "a = Abs(x)\nw = Neg(a)")
    assert after(DistinctNames(), parsed(body, FLAGGED)) is None


def test_what_is_renamed_hides_nothing_further_in() -> None:
    inner = branches("a_2 = Neg(a)\nz = Exp(a_2)").replace("y =", "v =", 1)
    outer = branches(f"a = Neg(x)\n{inner}\nz = Neg(v)")
    lines = after(DistinctNames(), parsed(f"a = Abs(x)\n{outer}", FLAGGED))
    assert lines is not None
    assert lines[4:6] == ["    a_2_2 = Neg(a_2)", "    z_2 = Exp(a_2_2)"]
