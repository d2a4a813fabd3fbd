"""Bit-exact clean-up, so that rules see one spelling where the arithmetic is one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from fusenorm.ops.spec import DOMAIN
from fusenorm.passes import facts
from fusenorm.passes.fold_constants import FoldConstants
from fusenorm.passes.infer_shapes import InferShapes
from fusenorm.passes.unfuse_contrib import UnfuseContrib

_RANDOM = re.compile("Random|Bernoulli|Multinomial|Dropout")
_COMPARED = frozenset(
    ir.AttributeType[name]
    for name in "INT FLOAT STRING TENSOR GRAPH INTS FLOATS STRINGS GRAPHS".split()
)


class RemoveNoOps(ir.passes.InPlacePass):
    """An Identity, or a Cast to the type its input has, is its input.

    It stays where it gives a graph output its name or its own node.
    """

    name = "remove_no_ops"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for graph in model.graphs():
            for node in list(graph):
                if not _is_no_op(node) or node.outputs[0].is_graph_output():
                    continue
                source = node.inputs[0]
                assert source is not None
                node.outputs[0].replace_all_uses_with(source)
                graph.remove(node, safe=True)
                modified = True
        return ir.passes.PassResult(model, modified)


def _is_no_op(node: ir.Node) -> bool:
    if node.domain != "":
        return False
    if node.op_type == "Cast":
        source, target = node.inputs[0], node.attributes["to"]
        assert source is not None
        # A name before opset 6.
        named = target.type == ir.AttributeType.STRING
        return not named and source.dtype == ir.DataType(target.as_int())
    return node.op_type == "Identity"


class PlainSpellings(ir.passes.InPlacePass):
    """Sum is Adds from left to right; CastLike to a known type is Cast.

    In 16 bits a Sum of more than two stays: it rounds once, Adds would each round.
    """

    name = "plain_spellings"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for graph in model.graphs():
            for node in graph:
                if node.domain != "":
                    continue
                if node.op_type == "Sum" and _sums_in_order(node):
                    _write_as_adds(graph, node)
                    modified = True
                elif node.op_type == "CastLike":
                    like = node.inputs[1]
                    assert like is not None
                    if like.dtype is not None:
                        node.op_type = "Cast"
                        node.resize_inputs(1)
                        node.attributes["to"] = ir.AttrInt64("to", int(like.dtype))
                        modified = True
        return ir.passes.PassResult(model, modified)


def _sums_in_order(node: ir.Node) -> bool:
    """Whether a Sum is to the bit what Adds from left to right are."""
    if len(node.inputs) < 2:
        return False
    return len(node.inputs) == 2 or facts.dtype_of(node.outputs[0]) in ("f32", "f64")


def _write_as_adds(graph: ir.Graph, node: ir.Node) -> None:
    total, *rest = node.inputs
    for index, term in enumerate(rest[:-1]):
        name = facts.unused(f"{node.outputs[0].name}_sum_of_{index + 2}", graph)
        part = ir.val(name, dtype=node.outputs[0].dtype)
        graph.insert_before(node, ir.node("Add", [total, term], outputs=[part]))
        total = part
    node.op_type = "Add"
    node.resize_inputs(2)
    node.replace_input_with(0, total)
    node.replace_input_with(1, rest[-1])


class NameDomains(ir.passes.InPlacePass):
    """The standard domain has two names; everywhere here it is the empty one, as in nodes."""

    name = "name_domains"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if "ai.onnx" not in model.graph.opset_imports:
            return ir.passes.PassResult(model, False)
        model.graph.opset_imports[""] = model.graph.opset_imports.pop("ai.onnx")
        return ir.passes.PassResult(model, True)


class InlineFunctions(ir.passes.InPlacePass):
    """Model-local functions of other domains are inlined.

    A function stays where one of its operators means something else in its opset than in the
    model's, or where one that stays calls it.
    """

    name = "inline_functions"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        foreign = [f for f in model.functions.values() if f.domain != DOMAIN]
        imports = dict(model.opset_imports)
        staying = []
        for function in foreign:
            if all(
                _means_the_same(node, function.opset_imports, imports)
                for node in function.all_nodes()
            ):
                imports = {**function.opset_imports, **imports}
            else:
                staying.append(function)
        for function in staying:  # grows on the way
            called = {node.op_identifier() for node in function.all_nodes()}
            staying += [f for f in foreign if f.identifier() in called and f not in staying]
        inlined = [function for function in foreign if function not in staying]
        for function in inlined:
            own = function.opset_imports
            own.update({domain: imports[domain] for domain in own})
        result = common.InlinePass(criteria=lambda function: function in inlined)(model)
        if result.modified:
            common.NameFixPass()(model)
        return ir.passes.PassResult(model, result.modified)


def _means_the_same(node: ir.Node, own: Mapping[str, int], imports: Mapping[str, int]) -> bool:
    """Whether an operator did not change between the version a function and a model import."""
    versions = {found for found in (own.get(node.domain), imports.get(node.domain)) if found}
    try:
        schemas = [onnx.defs.get_schema(node.op_type, version, node.domain) for version in versions]
    except onnx.defs.SchemaError:
        return len(versions) < 2
    return len({schema.since_version for schema in schemas}) < 2


class FixedInitializers(ir.passes.InPlacePass):
    """Before IR 4 every initializer had to be listed as an input; that never meant "override"."""

    name = "fixed_initializers"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if model.ir_version >= 4:
            return ir.passes.PassResult(model, False)
        model.ir_version = 4
        common.RemoveInitializersFromInputsPass()(model)
        return ir.passes.PassResult(model, True)


class Annotate(ir.passes.InPlacePass):
    """Prove last dimensions where shape inference lost them."""

    name = "annotate"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for graph in model.graphs():
            facts.annotate(graph)
        return ir.passes.PassResult(model, False)


class RemoveUnused(ir.passes.InPlacePass):
    """Nodes and initializers nothing reads go, those of bodies too."""

    name = "remove_unused"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = common.RemoveUnusedNodesPass()(model).modified
        for node in model.graph.all_nodes():
            # The pass drops absent inputs at the end, but a Loop must have its first two.
            if node.op_type == "Loop" and node.domain == "":
                node.resize_inputs(max(2, len(node.inputs)))
        for body in model.graph.subgraphs():
            for value in list(body.initializers.values()):
                if not (value.uses() or value.is_graph_output()):
                    body.initializers.pop(str(value.name))
                    modified = True
        return ir.passes.PassResult(model, modified)


class Canonicalize(ir.passes.Sequential):
    """Constants lifted and folded, no-op nodes dropped, equal expressions merged, shapes known.

    Every step keeps each remaining value's bits.
    """

    name = "canonicalize"

    def __init__(self) -> None:
        super().__init__(
            NameDomains(),
            common.RemoveUnusedOpsetsPass(),
            FixedInitializers(),
            InlineFunctions(),
            UnfuseContrib(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            RemoveNoOps(),
            RemoveUnused(),
            InferShapes(),
            PlainSpellings(),
            RemoveNoOps(),
            FoldConstants(),
            InferShapes(),
            MergeEqual(),
            FoldConstants(),
            RemoveUnused(),
            Annotate(),
        )


class MergeEqual(ir.passes.InPlacePass):
    """Equal expressions of equal inputs are one, in models where nothing is drawn at random.

    Nothing is merged either where an attribute cannot be compared, or where one node has an output
    that another one like it leaves out: it may be the one that stays.
    """

    name = "merge_equal"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        given: dict[tuple[ir.OperatorIdentifier, int], list[bool]] = {}
        for node in model.graph.all_nodes():
            named = [bool(out.name) for out in node.outputs]
            compared = all(a.type in _COMPARED for a in node.attributes.values())
            known = given.setdefault((node.op_identifier(), len(named)), named)
            if _RANDOM.search(node.op_type) or not compared or named != known:
                return ir.passes.PassResult(model, False)
        return common.CommonSubexpressionEliminationPass()(model)


class DistinctNames(ir.passes.InPlacePass):
    """A value made up in a body loses a name it shares with an outer one, which it would hide."""

    name = "distinct_names"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(model, _uncover(model.graph, frozenset()))


def _uncover(graph: ir.Graph, outer: frozenset[str | None]) -> bool:
    """Rename what has a name of `outer`, in a graph and its nodes' bodies."""
    values = [*graph.inputs, *graph.initializers.values()]
    values += [out for node in graph for out in node.outputs]
    taken, modified = outer | {value.name for value in values}, False
    for value in values:
        if value.name and value.name in outer:
            numbered = (f"{value.name}_{count}" for count in itertools.count(2))
            value.name = next(name for name in numbered if name not in taken)
            taken, modified = taken | {value.name}, True
    for node in graph:
        for body in facts.bodies(node):
            modified |= _uncover(body, taken)
    return modified


class Cleanup(ir.passes.Sequential):
    """Merge fused nodes that became equal, drop what fusion left without a reader."""

    name = "cleanup"

    def __init__(self) -> None:
        super().__init__(
            MergeEqual(),
            RemoveUnused(),
            common.RemoveUnusedFunctionsPass(),
            common.RemoveUnusedOpsetsPass(),
            DistinctNames(),
        )
