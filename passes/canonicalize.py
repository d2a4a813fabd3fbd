"""Bit-exact clean-up, so that rules see one spelling where the arithmetic is one."""

from __future__ import annotations

import re

import onnx_ir as ir
import onnx_ir.passes.common as common

from fusenorm.ops.spec import DOMAIN
from fusenorm.passes import facts
from fusenorm.passes.fold_constants import FoldConstants
from fusenorm.passes.unfuse_contrib import UnfuseContrib

_NO_TENSOR = re.compile("Sequence|Optional")
_RANDOM = re.compile("Random|Bernoulli|Multinomial|Dropout")


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
    if node.domain != "" or not node.inputs or node.inputs[0] is None:
        return False
    if node.op_type == "Cast":
        return node.inputs[0].dtype == ir.DataType(node.attributes["to"].as_int())
    return node.op_type == "Identity"


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
            common.RemoveUnusedOpsetsPass(process_functions=False),
            FixedInitializers(),
            InlineFunctions(),
            UnfuseContrib(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            RemoveNoOps(),
            common.RemoveUnusedNodesPass(),
            InferShapes(),
            PlainSpellings(),
            RemoveNoOps(),
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
