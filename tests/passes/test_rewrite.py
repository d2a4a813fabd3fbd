"""How a proposal becomes a node: what is replaced, kept, named, declared, remembered, refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

import fusenorm
from fusenorm.errors import BadInput
from fusenorm.ops import DOMAIN, Gated, Norm, OpSpec
from fusenorm.passes import facts
from fusenorm.passes import rewrite as rewriting
from fusenorm.passes.pattern import Const, Miss, Op, Pattern, Refusal, State, Var
from fusenorm.passes.rewrite import Rewrite, RewritePass, Rule, first_accepted, root_key
from fusenorm.passes.speller import Speller
from fusenorm.passes.verify_graph import find_problem
from tests.graphs import model, rows, values, written

SWISH = Gated("swish")
SKIP = Norm(skip=True)
Propose = Callable[[ir.Node], Rewrite | Miss | None]


class Stub(Rule):
    """A rule that proposes what it is told."""

    name = "stub"
    op = "Stub"

    def __init__(self, propose: Propose, *roots: str) -> None:
        self.roots = frozenset(roots)  # type: ignore[misc]
        self.propose = propose  # type: ignore[method-assign]

    @property
    def pattern(self) -> Pattern:
        raise NotImplementedError

    def example(self, speller: Speller) -> None:
        raise NotImplementedError

    def propose(self, root: ir.Node) -> Rewrite | Miss | None:
        raise NotImplementedError


def swish_of(root: ir.Node, spec: OpSpec = SWISH, nodes: tuple[ir.Node, ...] = ()) -> Rewrite:
    """One node as a swish of its input, whatever it computes."""
    x = root.inputs[0]
    assert x is not None
    return Rewrite("stub", spec, (x,), {"beta": 1.5}, (root.outputs[0],), nodes or (root,))


def skip_of(root: ir.Node, *outputs: ir.Value | None, scale: ir.Value | None = None) -> Rewrite:
    x, r = root.inputs
    assert x is not None
    assert r is not None
    vector = scale if scale is not None else constant(np.ones(8, np.float32))
    return Rewrite("stub", SKIP, (x, r, vector), {"epsilon": 1e-5}, outputs, (root,))


def constant(array: np.ndarray, name: str = "made_up") -> ir.Value:
    return ir.val(name, const_value=ir.tensor(array))


def model_of(
    body: str, inputs: str = "float[b,s,8] x", opset: int = 18, ir_version: int = 10
) -> ir.Model:
    found = values(body, inputs, opset=opset, known="float[b,s,8] a, float[b,s,8] c")
    return ir.Model(found["y"].producer().graph, ir_version=ir_version)  # type: ignore[arg-type, union-attr]


def apply(model: ir.Model, *rules: Rule, **options: object) -> bool:
    """Run the pass; whatever it did, the graph must be sound."""
    modified = RewritePass(rules, **options)(model).modified  # type: ignore[arg-type]
    assert find_problem(model) is None
    return modified


def types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


# Which proposals are applied.


def test_a_rule_sees_its_roots_only() -> None:
    model = model_of("a = Neg(x)\nc = other.Neg(a)\ny = Abs(c)")
    seen: list[ir.Node] = []
    assert not apply(model, Stub(seen.append, "Neg"))
    assert [node.op_identifier()[:2] for node in seen] == [("", "Neg")]
    seen.clear()
    assert not apply(model, Stub(seen.append, "other::Neg", "Abs"))
    assert [node.op_type for node in seen] == ["Abs", "Neg"]  # from outputs to inputs
    assert root_key("", "Neg") == "Neg"
    assert root_key("other", "Neg") == "other::Neg"


def test_nodes_a_larger_match_removed_are_not_visited() -> None:
    model = model_of("a = Neg(x)\ny = Abs(a)")
    seen: list[str] = []

    def propose(root: ir.Node) -> Rewrite | None:
        seen.append(root.op_type)
        inner, x = root.inputs[0].producer(), root.inputs[0].producer().inputs[0]  # type: ignore[union-attr]
        return Rewrite("stub", SWISH, (x,), {"beta": 1}, (root.outputs[0],), (inner, root))  # type: ignore[arg-type]

    assert apply(model, Stub(propose, "Abs", "Neg"))
    assert seen == ["Abs"]
    assert types(model) == ["Swish"]


def test_the_first_rule_that_is_accepted_wins() -> None:
    gelu = Gated("gelu")
    refusal = Miss((), Refusal("no", "n", ""))
    rules = (
        Stub(lambda root: None, "Neg"),
        Stub(lambda root: refusal, "Neg"),
        Stub(lambda root: swish_of(root), "Neg"),
        Stub(lambda root: swish_of(root, gelu), "Neg"),
    )
    model = model_of("y = Neg(x)")
    assert apply(model, *rules)
    assert types(model) == ["Swish"]


@pytest.mark.parametrize("budget", [0, 1, 2, 5])
def test_a_budget_is_shared_and_counts_rewrites(budget: int) -> None:
    model = model_of("a = Neg(x)\nc = Abs(a)\ny = Neg(c)")
    left = [budget]
    assert apply(model, Stub(swish_of, "Neg"), budget=left) == (budget > 0)
    done = min(budget, 2)
    assert left == [budget - done]
    assert types(model).count("Swish") == done
    assert apply(model, Stub(swish_of, "Abs"), budget=left) == (budget > 2)


def test_without_a_budget_there_is_no_limit() -> None:
    model = model_of("a = Neg(x)\nc = Neg(a)\ny = Neg(c)")
    assert apply(model, Stub(swish_of, "Neg"))
    assert types(model) == ["Swish"] * 3


def test_the_check_decides_and_its_refusal_is_remembered() -> None:
    asked: list[tuple[str, int]] = []

    def check(rewrite: Rewrite, opset: int) -> Refusal | None:
        asked.append((rewrite.root.op_type, opset))
        return Refusal("check_failed", "a", "") if rewrite.root.op_type == "Neg" else None

    model = model_of("a = Neg(x)\ny = Abs(a)", opset=15)
    assert apply(model, Stub(swish_of, "Neg", "Abs"), check=check)
    assert asked == [("Abs", 15), ("Neg", 15)]
    assert types(model) == ["Neg", "Swish"]
    op, miss = model.graph[0].meta[rewriting.MISS_KEY]
    assert (op, miss.refusal.code, miss.nodes) == ("Stub", "check_failed", (model.graph[0],))


@pytest.mark.parametrize(
    ("spec", "opset", "code"),
    [
        (SWISH, 12, None),
        (SWISH, 11, "opset"),
        (Gated("swish", dtype="f64"), 18, "types"),
        (Gated("swish", dtype="f16", precision="storage"), 18, None),
        (Gated("swish", precision="storage"), 18, "types"),  # declared for 16 bits only
    ],
)
def test_only_declared_ops_of_a_new_enough_opset(spec: Gated, opset: int, code: str | None) -> None:
    model = model_of("y = Neg(x)", opset=opset)
    checked: list[object] = []

    def check(rewrite: Rewrite, opset: int) -> None:
        checked.append(rewrite)

    assert apply(model, Stub(lambda root: swish_of(root, spec), "Neg"), check=check) == (not code)
    assert len(checked) == (not code)
    if code:
        assert model.graph[0].meta[rewriting.MISS_KEY][1].refusal.code == code


@pytest.mark.parametrize(("opset", "seen"), [(1, False), (6, False), (7, True)])
def test_operators_that_broadcast_by_attributes_are_not_read(opset: int, seen: bool) -> None:
    model = model_of("y = Neg(x)")
    model.graph.opset_imports[""] = opset
    roots: list[ir.Node] = []
    assert not apply(model, Stub(roots.append, "Neg"))
    assert bool(roots) == seen


@pytest.mark.parametrize(
    ("x", "body", "refused"),
    [
        ("float x", "y = Mul(x, row)", True),
        ("float x", "a = Neg(x)\ny = Max(a, row)", True),
        ("float x", "y = Mul(x, number)", False),
        ("float x", "y = Mul(x, z)", False),
        ("float x", "y = PRelu(x, row)", False),  # keeps the shape of x
        ("float x", "y = Neg(x)", False),
        ("float[n] x", "y = Mul(x, row)", False),
        ("float[b,8] x", "y = Mul(x, row)", False),
    ],
)
def test_a_constant_would_give_a_scalar_its_axis(x: str, body: str, refused: bool) -> None:
    constants = {"row": np.float32([2]), "number": np.float32(2)}
    held = {name: array for name, array in constants.items() if name in body}
    found = values(body, f"{x}, float[1] z", constants=held)
    model = ir.Model(found["y"].producer().graph, ir_version=10)  # type: ignore[arg-type, union-attr]
    nodes = tuple(model.graph)

    def propose(root: ir.Node) -> Rewrite:
        return Rewrite("stub", SWISH, (found["x"],), {"beta": 1.0}, (root.outputs[0],), nodes)

    root = nodes[-1]
    assert apply(model, Stub(propose, root.op_type)) == (not refused)
    if refused:
        assert root.meta[rewriting.MISS_KEY][1].refusal.code == "rank"


def test_a_row_of_unknown_rank_is_no_scalar() -> None:
    found = values("y = Mul(x, row)", "float x", constants={"row": np.float32([2])})
    facts.assume_row(found["x"], "f32", 8)
    model = ir.Model(found["y"].producer().graph, ir_version=10)  # type: ignore[arg-type, union-attr]
    assert apply(model, Stub(swish_of, "Mul"))


def test_a_model_without_standard_operators_has_no_opset() -> None:
    model = model_of("y = other.Neg(x)")
    del model.graph.opset_imports[""]
    assert not apply(model, Stub(swish_of, "other::Neg"))
    assert model.graph[0].meta[rewriting.MISS_KEY][1].refusal.detail == "opset 0 is older than 12"


def test_a_rule_without_documentation() -> None:
    class Silent(Stub):
        pass

    silent = Silent(swish_of)
    assert (silent.summary, silent.documentation) == ("", "")


def test_the_first_line_sums_a_rule_up() -> None:
    class Told(Stub):
        """What it is.

        What more there is.
        """

    told = Told(swish_of)
    assert told.summary == "What it is."
    assert told.documentation == "What it is.\n\nWhat more there is."


def test_branches_are_graphs_too() -> None:
    body = """
      y = If (flag) <
        then_branch = yes () => (float[] p) { p = Neg(x) },
        else_branch = no () => (float[] q) { u = Neg(x) q = Abs(u) }
      >
    """
    model = model_of(body, "float[b,s,8] x, bool flag")
    assert apply(model, Stub(swish_of, "Neg"))
    branches = [
        model.graph[0].attributes[name].as_graph() for name in ("then_branch", "else_branch")
    ]
    assert [[node.op_type for node in branch] for branch in branches] == [
        ["Swish"],
        ["Swish", "Abs"],
    ]
    assert list(model.functions) == [(DOMAIN, "Swish", "")]


# What stands in the graph afterwards.


def test_the_node_takes_over_names_facts_and_readers() -> None:
    model = model_of("a = Neg(x)\nc = Abs(a)\ny = Exp(c)")
    before = model.graph[1].outputs[0]
    shape = before.shape
    assert shape is not None
    assert apply(model, Stub(swish_of, "Abs"))
    neg, fused, exp = model.graph
    assert fused.op_identifier() == (DOMAIN, "Swish", "")
    assert (fused.inputs, exp.inputs) == (neg.outputs, fused.outputs)
    assert (fused.name, fused.outputs[0].name, fused.outputs[0].shape) == ("c_Swish", "c", shape)
    assert fused.outputs[0].dtype == ir.DataType.FLOAT
    assert {name: value.as_float() for name, value in fused.attributes.items()} == {"beta": 1.5}
    assert fused.metadata_props == {"fusenorm.rule": "stub", "fusenorm.source": "c"}


def test_a_graph_output_stays_one() -> None:
    model = model_of("a = Neg(x)\ny = Abs(a)")
    assert apply(model, Stub(swish_of, "Abs"))
    assert tuple(model.graph.outputs) == model.graph[1].outputs
    assert model.graph.outputs[0].name == "y"


def test_source_nodes_others_read_stay() -> None:
    model = model_of("a = Neg(x)\nc = Abs(a)\ny = Sub(c, a)")

    def propose(root: ir.Node) -> Rewrite:
        inner = root.inputs[0].producer()  # type: ignore[union-attr]
        return Rewrite(
            "stub", SWISH, (inner.inputs[0],), {"beta": 1.0}, root.outputs, (inner, root)
        )  # type: ignore[union-attr, arg-type]

    assert apply(model, Stub(propose, "Abs"))
    assert sorted(types(model)) == ["Neg", "Sub", "Swish"]


def test_sources_of_sources_are_named_once() -> None:
    model = model_of("a = Neg(x)\nc = Abs(a)\ny = Exp(c)")
    neg, abs_, _ = model.graph
    neg.metadata_props["fusenorm.source"] = "one\ntwo"
    abs_.metadata_props["fusenorm.source"] = "two\nthree"
    nodes = tuple(model.graph)
    assert apply(model, Stub(lambda root: swish_of(root, nodes=nodes), "Exp"))
    assert model.graph[-1].metadata_props["fusenorm.source"] == "one\ntwo\nthree\ny"


def test_an_output_the_source_does_not_have_gets_a_name_and_shape() -> None:
    model = model_of("c = Add(x, r)\ny = Neg(c)", "float[b,s,8] x, float[b,s,8] r")
    assert apply(model, Stub(lambda root: skip_of(root, root.outputs[0], None), "Add"))
    (y, s) = model.graph[0].outputs
    assert (y.name, s.name) == ("c", "c_s")
    assert s.shape == y.shape
    assert s.dtype == ir.DataType.FLOAT
    assert not s.uses()


def test_outputs_keep_facts_of_their_own() -> None:
    model = model_of("c, a = other.Both(x, r)\ny = Sub(c, a)", "float[b,s,8] x, float[b,s,8] r")
    first, second = model.graph[0].outputs
    first.shape, second.shape = ir.Shape(["n", 8]), ir.Shape(["m", 8])
    assert apply(model, Stub(lambda root: skip_of(root, *root.outputs), "other::Both"))
    assert [(v.name, str(v.shape)) for v in model.graph[0].outputs] == [
        ("c", "[n,8]"),
        ("a", "[m,8]"),
    ]


def test_a_root_that_stays_for_another_output_gives_up_its_name() -> None:
    model = model_of("c, a = other.Both(x)\ny = Sub(c, a)")
    assert apply(model, Stub(swish_of, "other::Both"))
    assert written(model.graph) == [
        "c = fusenorm.Swish(x)",
        "c_before_Swish, a = other.Both(x)",
        "y = Sub(c, a)",
    ]


def test_readers_before_the_root_are_sorted_behind_the_node() -> None:
    body = "c = Add(x, r)\na = Neg(c)\ny = Sub(c, a)"
    model = model_of(body, "float[b,s,8] x, float[b,s,8] r")

    def propose(root: ir.Node) -> Rewrite:
        total = root.inputs[0].producer()  # type: ignore[union-attr]
        assert total is not None
        made = skip_of(total, root.outputs[0], total.outputs[0])
        return Rewrite(made.rule, SKIP, made.inputs, made.attributes, made.outputs, (total, root))

    assert apply(model, Stub(propose, "Sub"))
    assert types(model) == [SKIP.op_type, "Neg"] or types(model) == [SKIP.op_type]


# Constants a rule made up.


def two_skips(first: np.ndarray, second: np.ndarray, *taken: str) -> ir.Model:
    body = "c = Add(x, r)\na = Add(c, r)\ny = Neg(a)"
    model = model_of(body, "float[b,s,8] x, float[b,s,8] r" + "".join(taken))
    made = iter((second, first))

    def propose(root: ir.Node) -> Rewrite:
        return skip_of(root, root.outputs[0], None, scale=constant(next(made)))

    assert apply(model, Stub(propose, "Add"))
    return model


def test_equal_constants_are_one() -> None:
    ones = np.ones(8, np.float32)
    model = two_skips(ones, ones.copy())
    assert list(model.graph.initializers) == ["made_up"]
    np.testing.assert_array_equal(model.graph.initializers["made_up"].const_value.numpy(), ones)  # type: ignore[union-attr]


@pytest.mark.parametrize("other", [np.zeros(8, np.float32), np.ones(8, np.float16)])
def test_other_constants_get_names_of_their_own(other: np.ndarray) -> None:
    model = two_skips(np.ones(8, np.float32), other)
    found = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert list(found) == ["made_up", "made_up_2"]
    assert [tensor.name for tensor in found.values()] == list(found)  # type: ignore[union-attr]
    assert {node.inputs[2].name for node in model.graph if node.domain == DOMAIN} == set(found)  # type: ignore[union-attr]


def test_large_constants_are_not_compared() -> None:
    large = np.ones(rewriting.SHARED_SIZE + 1, np.float32)
    assert len(two_skips(large, large).graph.initializers) == 2
    small = np.ones(8, np.float32)
    assert len(two_skips(large, small).graph.initializers) == 2
    largest = np.ones(rewriting.SHARED_SIZE, np.float32)
    assert len(two_skips(largest, largest).graph.initializers) == 1


@pytest.mark.parametrize("name", ["x", "c", "given"])
def test_a_constant_s_name_is_no_other_value_s(name: str) -> None:
    body = "c = Add(x, r)\na = Mul(c, given)\ny = Neg(a)"
    found = values(
        body,
        "float[b,s,8] x, float[b,s,8] r",
        constants={"given": np.ones(8, np.float32)},
    )
    graph = found["y"].producer().graph  # type: ignore[union-attr]
    model = ir.Model(graph, ir_version=10)  # type: ignore[arg-type]
    scale = constant(np.ones(8, np.float32), name)
    assert apply(model, Stub(lambda root: skip_of(root, root.outputs[0], None, scale=scale), "Add"))
    fused = next(node for node in model.graph if node.domain == DOMAIN)
    assert fused.inputs[2].name == f"{name}_2"  # type: ignore[union-attr]


def test_values_of_the_graph_are_taken_as_they_are() -> None:
    body = "g = Abs(w)\nc = Add(x, r)\ny = Neg(c)"
    found = values(body, "float[b,s,8] x, float[b,s,8] r", constants={"w": np.ones(8, np.float32)})
    graph = found["y"].producer().graph  # type: ignore[union-attr]
    model = ir.Model(graph, ir_version=10)  # type: ignore[arg-type]
    for scale in (found["g"], found["w"]):
        work = model.clone()
        root = work.graph[1]
        own = work.graph[0].outputs[0] if scale is found["g"] else work.graph.initializers["w"]
        assert apply(
            work, Stub(lambda r, own=own: skip_of(r, r.outputs[0], None, scale=own), "Add")
        )  # type: ignore[misc]
        assert root.graph is None
        fused = next(node for node in work.graph if node.domain == DOMAIN)
        assert fused.inputs[2] is own
        assert list(work.graph.initializers) == ["w"]


# Declarations.


@pytest.mark.parametrize(("before", "after"), [(7, 8), (8, 8), (10, 10)])
def test_functions_need_ir_8(before: int, after: int) -> None:
    model = model_of("a = Neg(x)\ny = Neg(a)", opset=13, ir_version=before)
    assert apply(model, Stub(swish_of, "Neg"))
    assert model.ir_version == after
    assert model.opset_imports == {"": 13, "other": 1, DOMAIN: 1}
    (function,) = model.functions.values()
    assert function.identifier() == (DOMAIN, "Swish", "")
    assert function.opset_imports == {"": 13}


def test_a_body_that_is_there_is_kept() -> None:
    model = model_of("a = Neg(x)\ny = Abs(a)")
    assert apply(model, Stub(swish_of, "Neg"))
    (function,) = model.functions.values()
    assert apply(model, Stub(swish_of, "Abs"))
    assert list(model.functions.values()) == [function]


def test_another_version_of_our_domain_is_refused() -> None:
    model = model_of("y = Neg(x)")
    model.graph.opset_imports[DOMAIN] = 2
    with pytest.raises(BadInput, match="imported at version 2"):
        RewritePass((Stub(swish_of, "Neg"),))(model)


# The nearest miss.


def accepted(pattern: Pattern, answers: dict[str, str | None]) -> Rewrite | Miss:
    """first_accepted at y = Add(n, x), the match of each x refused with a code or accepted."""
    found = values("n = Neg(x)\ny = Add(n, x)")

    def accept(state: State) -> Rewrite | Refusal:
        name = str(state.bindings["v"].name)
        code = answers[name]
        root = found["y"].producer()
        assert root is not None
        return swish_of(root) if code is None else Refusal(code, name, "")

    return first_accepted(pattern, found["y"], accept)


def test_the_first_match_that_is_accepted() -> None:
    either = Op("Add", (Var("v"), Var("w")))
    assert isinstance(accepted(either, {"n": "no", "x": None}), Rewrite)
    assert isinstance(accepted(either, {"n": None}), Rewrite)
    outcome = accepted(either, {"n": "first", "x": "second"})
    assert isinstance(outcome, Miss)
    assert outcome.refusal == Refusal("first", "n", "")


def test_the_refusal_of_the_larger_match_is_told() -> None:
    from fusenorm.passes.pattern import OneOf

    deep = OneOf((Op("Add", (Var("v"), Var("w"))), Op("Add", (Op("Neg", (Var("v"),)), Var("w")))))
    outcome = accepted(deep, {"n": "small", "x": "large"})
    assert isinstance(outcome, Miss)
    assert outcome.refusal == Refusal("large", "x", "")
    assert [node.op_type for node in outcome.nodes] == ["Add", "Neg"]


def test_where_nothing_matches_the_matcher_says_why() -> None:
    outcome = accepted(Op("Add", (Var("v"), Const(1))), {})
    assert isinstance(outcome, Miss)
    assert outcome.refusal is not None
    assert outcome.refusal.code == "constant"


def test_every_node_of_a_miss_remembers_the_largest() -> None:
    model = model_of("a = Neg(x)\nc = Abs(a)\ny = Exp(c)")
    neg, abs_, exp = model.graph
    misses = {
        "Exp": Miss((neg, abs_), Refusal("larger", "", "")),
        "Abs": Miss((abs_,), Refusal("smaller", "", "")),
        "Neg": Miss((neg, exp), Refusal("as large", "", "")),
    }
    assert not apply(model, Stub(lambda root: misses[root.op_type], *misses))
    codes = [node.meta[rewriting.MISS_KEY][1].refusal.code for node in (neg, abs_, exp)]
    assert codes == ["as large", "larger", "as large"]
    assert not apply(model, Stub(lambda root: Miss((neg, abs_, exp)), "Exp"))
    assert neg.meta[rewriting.MISS_KEY][1].refusal.code == "as large"


# Several last axes made one.


def test_merged_axes_are_reshaped_and_restored() -> None:
    found = values(
        "c = Add(x, r)\ny = Neg(c)",
        "float[b,3,8] x, float[b,3,8] r, float[3,8] g",
        known="float[b,3,8] c",
    )
    graph = found["y"].producer().graph  # type: ignore[union-attr]
    model = ir.Model(graph, ir_version=10)  # type: ignore[arg-type]

    def propose(root: ir.Node) -> Rewrite:
        made = skip_of(root, root.outputs[0], None, scale=model.graph.inputs[2])
        return dataclasses.replace(made, merged=(3, 8))

    assert apply(model, Stub(propose, "Add"))
    assert types(model) == ["Reshape"] * 3 + [SKIP.op_type, "Reshape", "Neg"]
    x, _, g, fused, back, neg = model.graph
    shapes = [
        node.inputs[1].const_value.numpy().tolist()  # type: ignore[union-attr]
        for node in (x, g, back)
    ]
    assert shapes == [[0, 24], [24], [0, 3, 8]]
    assert [str(node.outputs[0].shape) for node in (x, fused, back)] == [
        "[b,24]", "[b,24]", "[b,3,8]",
    ]  # fmt: skip
    assert (back.outputs[0].name, neg.inputs[0]) == ("c", back.outputs[0])
    assert back.inputs[0] is fused.outputs[0]
    assert fused.outputs[0].name == f"c_{SKIP.op_type}"


def test_a_constant_row_is_reshaped_by_a_node_a_constant_vector_at_once() -> None:
    array = np.arange(24, dtype=np.float32).reshape(1, 3, 8)
    found = values(
        "c = Add(x, r)\ny = Neg(c)",
        "float[1,3,8] x",
        known="float[1,3,8] c",
        constants={"r": array},
    )
    model = ir.Model(found["y"].producer().graph, ir_version=10)  # type: ignore[arg-type, union-attr]

    def propose(root: ir.Node) -> Rewrite:
        made = skip_of(root, root.outputs[0], None, scale=constant(array[0]))
        return dataclasses.replace(made, merged=(3, 8))

    assert apply(model, Stub(propose, "Add"))
    assert types(model) == ["Reshape", "Reshape", SKIP.op_type, "Reshape", "Neg"]
    scale = model.graph.initializers["made_up_flat"].const_value
    assert scale is not None
    np.testing.assert_array_equal(scale.numpy(), array.reshape(24))


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("a = Add(x, z)\nf = Reshape(a, flat)\ny = LayerNormalization(f, row)", "n,8"),
        (
            "m = ReduceMean<keepdims = 1>(x, last)\nc = Sub(x, m)\nq = Mul(c, c)\n"
            "v = ReduceMean<keepdims = 1>(q, last)\ne = Add(v, eps)\nr = Sqrt(e)\ny = Div(c, r)",
            "n,4,8",
        ),
        (
            "f = Flatten(x)\nh = MatMul(f, w)\ny = BatchNormalization(h, four, four, four, four)",
            "n,4",
        ),
    ],
)
def test_an_output_keeps_the_names_it_was_given(body: str, shape: str) -> None:
    constants = {
        "flat": np.array([-1, 8]),
        "last": np.array([-2, -1]),
        "eps": np.float32(1e-5),
        "row": np.ones(8, np.float32),
        "four": np.ones(4, np.float32),
        "w": rows(32, 4),
    }
    words = set(re.findall(r"\w+", body))
    held = {name: array for name, array in constants.items() if name in words}
    proto = model(body, "float[b,4,8] x, float[b,4,8] z", f"float[{shape}] y", constants=held)
    result = fusenorm.optimize(proto)
    assert [site.status for site in result.report.sites] == ["fused"]
    assert str(result.model.graph.outputs[0].shape) == f"[{shape}]"
