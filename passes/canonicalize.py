"""Bit-exact clean-up, so that rules see one spelling where the arithmetic is one."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from fusenorm.ops.spec import DOMAIN
from fusenorm.passes import facts
from fusenorm.passes.evaluate import EvaluationError, evaluate

# Larger results would grow the file; shapes, scalars and norm scales are far below.
FOLD_LIMIT = 1 << 16
# Ops whose numpy result is the runtime's to the bit: integers, and IEEE-rounded arithmetic.
FOLDABLE = frozenset(
    "Add Sub Mul Div Neg Sqrt Cast Concat Gather Slice Reshape Squeeze Unsqueeze Transpose "
    "Identity Flatten Equal Where Range".split()
)


# Casts whose numpy result is the runtime's; others saturate or print in their own ways.
CASTABLE = frozenset({"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT32", "INT64", "BOOL"})
_NO_TENSOR = re.compile("Sequence|Optional")
_RANDOM = re.compile("Random|Bernoulli|Multinomial|Dropout")


class RemoveNoOpCasts(ir.passes.InPlacePass):
    """A Cast to the type its input has is the input."""

    name = "remove_no_op_casts"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for graph in model.graphs():
            for node in list(graph):
                if node.op_type != "Cast" or node.domain != "":
                    continue
                source, out = node.inputs[0], node.outputs[0]
                if source is None or source.dtype is None or out.is_graph_output():
                    continue
                if source.dtype == ir.DataType(node.attributes["to"].as_int()):
                    out.replace_all_uses_with(source)
                    graph.remove(node, safe=True)
                    modified = True
        return ir.passes.PassResult(model, modified)


class PlainSpellings(ir.passes.InPlacePass):
    """Sum of two is Add; CastLike to a known type is Cast."""

    name = "plain_spellings"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for graph in model.graphs():
            for node in graph:
                if node.domain != "":
                    continue
                if node.op_type == "Sum" and len(node.inputs) == 2:
                    node.op_type = "Add"
                    modified = True
                elif node.op_type == "CastLike" and node.inputs[1] is not None:
                    target = node.inputs[1].dtype
                    if target is not None:
                        node.op_type = "Cast"
                        node.resize_inputs(1)
                        node.attributes["to"] = ir.AttrInt64("to", int(target))
                        modified = True
        return ir.passes.PassResult(model, modified)


class FoldConstants(ir.passes.InPlacePass):
    """Replace small nodes with constant inputs, and Shape of a known dimension, by constants.

    Args:
        limit: largest result in elements.
    """

    name = "fold_constants"

    def __init__(self, limit: int = FOLD_LIMIT) -> None:
        super().__init__()
        self.limit = limit

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        opset = model.opset_imports.get("", 0)
        for graph in model.graphs():
            facts.annotate(graph)
            for node in list(graph):
                array = self._fold(node, opset)
                if array is not None:
                    _replace(graph, node, array)
                    modified = True
        return ir.passes.PassResult(model, modified)

    def _fold(self, node: ir.Node, opset: int) -> np.ndarray | None:
        if node.domain != "" or len(node.outputs) != 1 or node.outputs[0].is_graph_output():
            return None
        if node.op_type == "Gather":
            known = _gathered_dim(node)
            if known is not None:
                return known
        if node.op_type in ("Shape", "Size"):
            return _static_shape(node)
        if node.op_type not in FOLDABLE or not node.inputs:
            return None
        if node.op_type == "Cast" and not _castable(node):
            return None
        arrays = [facts.constant(value) for value in node.inputs]
        if any(array is None for array in arrays):
            return None
        if sum(array.size for array in arrays if array is not None) > self.limit:
            return None
        proto = ir.serde.serialize_node(node)
        feeds = {name: array for name, array in zip(proto.input, arrays, strict=True) if name}
        try:
            (result,) = evaluate([proto], feeds, proto.output, (), opset)  # type: ignore[arg-type]
        except EvaluationError:
            return None  # a branch never taken may hold a node that cannot run
        return result if result.size <= self.limit else None


def _castable(node: ir.Node) -> bool:
    source = node.inputs[0]
    target = ir.DataType(node.attributes["to"].as_int())
    return (
        source is not None
        and source.dtype is not None
        and {source.dtype.name, target.name} <= CASTABLE
    )


def _static_shape(node: ir.Node) -> np.ndarray | None:
    """What Shape or Size returns, where the dimensions it reads are known.

    The size of a Shape's own result is the rank, known even if no dimension is.
    """
    source = node.inputs[0]
    if source is None or source.shape is None:
        return None
    dims = list(source.shape)
    if node.op_type == "Shape":
        start = facts.attribute_int(node, "start", 0)
        end = facts.attribute_int(node, "end", len(dims))
        dims = dims[slice(start, end)]
    if not all(isinstance(dim, int) for dim in dims):
        return None
    sizes = np.array(dims, np.int64)
    return sizes if node.op_type == "Shape" else np.array(sizes.prod(), np.int64)


def _gathered_dim(node: ir.Node) -> np.ndarray | None:
    """Gather(Shape(x), i) where dimension i of x is known."""
    shape_of = node.inputs[0].producer() if node.inputs[0] is not None else None
    index = facts.constant(node.inputs[1])
    if shape_of is None or shape_of.op_type != "Shape" or shape_of.attributes:
        return None
    source = shape_of.inputs[0]
    if index is None or index.size != 1 or source is None:
        return None
    position = int(index.reshape(()))
    rank = facts.rank(source)
    dim: object = None
    if position == -1 or (rank is not None and position == rank - 1):
        dim = facts.last_dim(source)
    elif source.shape is not None and -source.shape.rank() <= position < source.shape.rank():
        dim = source.shape[position]
    return np.full(index.shape, dim, np.int64) if isinstance(dim, int) else None


def _replace(graph: ir.Graph, node: ir.Node, array: np.ndarray) -> None:
    old = node.outputs[0]
    name = old.name
    old.name = f"{name}_unfolded"
    new = ir.val(name, const_value=ir.tensor(array, name=name))
    old.replace_all_uses_with(new)
    graph.remove(node, safe=True)
    graph.register_initializer(new)


class NameDomains(ir.passes.InPlacePass):
    """The standard domain has two names; everywhere here it is the empty one."""

    name = "name_domains"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if "ai.onnx" not in model.graph.opset_imports:
            return ir.passes.PassResult(model, False)
        model.graph.opset_imports[""] = model.graph.opset_imports.pop("ai.onnx")
        for node in model.graph.all_nodes():
            if node.domain == "ai.onnx":
                node.domain = ""
        return ir.passes.PassResult(model, True)


class InlineFunctions(ir.passes.InPlacePass):
    """Model-local functions of other domains, written in the model's own opset, are inlined."""

    name = "inline_functions"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        opset = model.opset_imports.get("")

        def same_language(function: ir.Function) -> bool:
            return function.domain != DOMAIN and function.opset_imports.get("", opset) == opset

        result = common.InlinePass(criteria=same_language)(model)
        if result.modified:
            common.NameFixPass()(model)
        return ir.passes.PassResult(model, result.modified)


class FixedInitializers(ir.passes.InPlacePass):
    """Before IR 4 every initializer had to be listed as an input; that never meant "override"."""

    name = "fixed_initializers"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if model.ir_version >= 4:
            return ir.passes.PassResult(model, False)
        model.ir_version = 4
        common.RemoveInitializersFromInputsPass()(model)
        return ir.passes.PassResult(model, True)


class RemoveIdentities(ir.passes.InPlacePass):
    """An Identity is its input, unless it gives a graph output its name or its own node."""

    name = "remove_identities"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for graph in model.graphs():
            for node in list(graph):
                if node.op_type != "Identity" or node.domain != "":
                    continue
                source, out = node.inputs[0], node.outputs[0]
                if source is None or out.is_graph_output():
                    continue
                out.replace_all_uses_with(source)
                graph.remove(node, safe=True)
                modified = True
        return ir.passes.PassResult(model, modified)


class InferShapes(ir.passes.InPlacePass):
    """ONNX shape inference with data propagation; a model it cannot handle stays as it is.

    Initializers that a caller may override are unknown to it. A model that holds sequences or
    optionals keeps the types it came with.
    """

    name = "infer_shapes"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if any(_NO_TENSOR.search(node.op_type) for node in model.graph.all_nodes()):
            return ir.passes.PassResult(model, False)
        overridable = [value for value in model.graph.inputs if value.const_value is not None]
        defaults = [value.const_value for value in overridable]
        for value in overridable:
            value.const_value = None
        try:
            return common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
        finally:
            for value, default in zip(overridable, defaults, strict=True):
                value.const_value = default


class Annotate(ir.passes.InPlacePass):
    """Prove last dimensions where shape inference lost them."""

    name = "annotate"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for graph in model.graphs():
            facts.annotate(graph)
        return ir.passes.PassResult(model, False)


class Canonicalize(ir.passes.Sequential):
    """Constants lifted and folded, no-op nodes dropped, equal expressions merged, shapes known.

    Every step keeps each remaining value's bits.
    """

    name = "canonicalize"

    def __init__(self) -> None:
        super().__init__(
            NameDomains(),
            FixedInitializers(),
            InlineFunctions(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            RemoveIdentities(),
            common.RemoveUnusedNodesPass(),
            InferShapes(),
            PlainSpellings(),
            RemoveNoOpCasts(),
            FoldConstants(),
            InferShapes(),
            MergeEqual(),
            FoldConstants(),
            common.RemoveUnusedNodesPass(),
            Annotate(),
        )


class MergeEqual(ir.passes.InPlacePass):
    """Equal expressions of equal inputs are one, in models where nothing is drawn at random."""

    name = "merge_equal"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if any(_RANDOM.search(node.op_type) for node in model.graph.all_nodes()):
            return ir.passes.PassResult(model, False)
        return common.CommonSubexpressionEliminationPass()(model)


class Cleanup(ir.passes.Sequential):
    """Merge fused nodes that became equal, drop what fusion left without a reader."""

    name = "cleanup"

    def __init__(self) -> None:
        super().__init__(
            MergeEqual(),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),
            common.RemoveUnusedOpsetsPass(process_functions=False),
        )
