"""Inference BatchNormalization is affine: a linear map beside it takes it in."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Sequence

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from fusenorm.ops.spec import DTYPES, DType
from fusenorm.passes import facts
from fusenorm.passes.evaluate import EvaluationError, evaluate
from fusenorm.passes.pattern import Miss, Refusal, node_name
from fusenorm.passes.rewrite import MISS_KEY, RULE_KEY, SOURCE_KEY
from fusenorm.passes.validate import ALGEBRA_BOUND

OP = "BatchNorm"
RULE = "batch_norm"
# On a linear map: a line for each BatchNormalization in it, its name and the result of the two.
FOLDED_KEY = "fusenorm.folded"
# Older ones have the attributes is_test and spatial.
MIN_OPSET = 9

_MATRIX = frozenset({"MatMul", "Gemm"})
_LINEAR = _MATRIX | {"Conv", "ConvTranspose"}
_REGROUPS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
# What a convolution does with space: the channels, and so the proof, do not depend on it.
_SPACING = frozenset({"dilations", "strides", "output_padding", "output_shape"})
# What the other axes than the channels have in the proof.
_BATCH = 4
# None of these operators changed since opset 9, but ONNX's reference takes the BatchNormalization
# of an older one than 14 for training.
_OPSET = 15


@dataclasses.dataclass(frozen=True)
class _Chain:
    """A linear map, a BatchNormalization before or behind it, what moves data between them.

    Attributes:
        linear: MatMul, Gemm, Conv or ConvTranspose.
        bias: the Add of a constant behind a MatMul or Gemm, if there is one.
        moves: Transposes and nodes that regroup rows, in graph order.
        norm: the BatchNormalization.
        behind: whether it stands behind the linear map.
    """

    linear: ir.Node
    bias: ir.Node | None
    moves: tuple[ir.Node, ...]
    norm: ir.Node
    behind: bool

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """All of it, in graph order."""
        linear = (self.linear,) if self.bias is None else (self.linear, self.bias)
        ends = (linear, (self.norm,)) if self.behind else ((self.norm,), linear)
        return (*ends[0], *self.moves, *ends[1])

    @property
    def x(self) -> ir.Value:
        """What it reads."""
        value = self.nodes[0].inputs[0]
        assert value is not None
        return value

    @property
    def y(self) -> ir.Value:
        """What it computes."""
        return self.nodes[-1].outputs[0]


@dataclasses.dataclass(frozen=True)
class _Written:
    """What stands for a chain.

    Attributes:
        nodes: in graph order.
        heirs: for each result in the chain one of these nodes' (or x) of the same shape.
    """

    nodes: list[ir.Node]
    heirs: dict[ir.Value, ir.Value]


class FoldBatchNorm(ir.passes.InPlacePass):
    """Inference BatchNormalizations go into the weights of the linear maps beside them.

    ## What it matches
    BatchNormalization behind a MatMul or Gemm [+ Add], Conv or ConvTranspose, or before a MatMul
    or Gemm [+ Add] or Conv, of constant weights; Transpose and row-keeping Reshape between them.

    ## Formula
    s = scale/√(var + ε), t = bias - mean∘s.
    (xW + c)∘s + t = x(W·diag(s)) + (c∘s + t);  (x∘s + t)W + c = x(diag(s)·W) + (tW + c).

    ## Numerics
    The new weight and bias are computed in f64 and rounded once. Checked like every rewrite: both
    sides on random rows in f64.

    ## Refuses
    `no_linear`: no linear map beside it. `shared`: something else reads the value between them,
    and more than its shape.
    `axis`: the channels are not the ones the map contracts or computes. `padding`: the map pads
    with zeros, which the BatchNormalization would have moved. `bias_shape`: the bias is no row of
    what the map computes. `groups`: of a ConvTranspose. `training_mode`, `not_constant`,
    `channels`, `rank_unknown`, `types`, `not_finite`, `opset`, `check_failed`.

    ## References
    arXiv 1502.03167 (BatchNorm).

    Args:
        types: types of the weights that may change; 16-bit ones are rounded once more.
        validate: check each fold numerically when it is made.
        budget: how many rewrites may still be made, shared between passes (for bisecting).
    """

    name = "fold_batch_norm"

    def __init__(
        self,
        types: Iterable[DType] = ("f32", "f64"),
        *,
        validate: bool = True,
        budget: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.types = frozenset(types)
        self.validate = validate
        self.budget = budget if budget is not None else [sys.maxsize]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        opset = model.opset_imports.get("", 0)
        modified = False
        graphs = list(model.graphs())
        taken = {value.name for graph in graphs for value in _values(graph)}
        for graph in graphs:
            # One fold may bring another BatchNormalization beside the linear map.
            while sum(self._visit(graph, node, opset, taken) for node in list(graph)):
                modified = True
        return ir.passes.PassResult(model, modified)

    def _visit(self, graph: ir.Graph, node: ir.Node, opset: int, taken: set[str | None]) -> bool:
        if node.op_type != "BatchNormalization" or node.domain != "" or self.budget[0] <= 0:
            return False
        outcome = self._folded(node, opset, taken)
        if isinstance(outcome, Refusal):
            node.meta[MISS_KEY] = (OP, Miss((node,), outcome))
            return False
        chain, written, constants = outcome
        for value in constants:
            graph.register_initializer(value)
        _replace(graph, chain, written)
        self.budget[0] -= 1
        return True

    def _folded(
        self, norm: ir.Node, opset: int, taken: set[str | None]
    ) -> tuple[_Chain, _Written, list[ir.Value]] | Refusal:
        """The chain of `norm`, what is to stand for it, and the constants that reads."""
        affine = _read(norm, opset)
        if isinstance(affine, Refusal):
            return affine
        refusals = []
        for behind in (True, False):
            chain = _find(norm, behind=behind)
            if isinstance(chain, _Chain):
                break
            refusals.append(chain)
        else:
            return min(refusals, key=lambda refusal: refusal.code == "no_linear")
        arrays = self._arrays(chain, *affine)
        if isinstance(arrays, Refusal):
            return arrays
        stem = chain.linear.outputs[0].name
        weight, bias = (
            ir.val(name, const_value=ir.tensor(array, name=name))
            for part, array in zip(("weight", "bias"), arrays, strict=True)
            for name in (_fresh(f"{stem}_folded_{part}", taken),)
        )
        written = _write(chain, weight, bias, _fresh(f"{stem}_unbiased", taken))
        flaw = _flaw(chain, written.nodes) if self.validate else None
        if flaw is not None:
            return Refusal("check_failed", node_name(norm), flaw)
        return chain, written, [weight, bias]

    def _arrays(
        self, chain: _Chain, scale: np.ndarray, offset: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray] | Refusal:
        """Weight and bias with the BatchNormalization in them, in the weight's own type."""
        linear, name = chain.linear, node_name(chain.linear)
        weight = _weight(linear)
        assert weight is not None
        dtype = weight.dtype
        kind = next((kind for kind, info in DTYPES.items() if info.numpy == dtype), None)
        if kind not in self.types:
            return Refusal("types", name, f"weights of {kind or dtype} are not to be changed")
        weight = weight.astype(np.float64)
        view = _grouped(linear, weight)
        window = (1,) * (view.ndim - 3)
        groups, rows, columns = view.shape[:3]
        channels = groups * (columns if chain.behind else rows)
        if channels != scale.size:
            return Refusal("channels", name, f"has {channels} channels, not {scale.size}")
        bias = _bias(chain, groups * columns)
        if isinstance(bias, Refusal):
            return bias
        with np.errstate(all="ignore"):
            if chain.behind:
                bias = bias * scale + offset
                view *= scale.reshape(groups, 1, columns, *window)
            else:
                moved = offset.reshape(groups, rows, 1, *window) * view
                sums = moved.sum(axis=(1, *range(3, view.ndim))).reshape(-1)
                bias = bias + _factor(linear, "alpha") * sums
                view *= scale.reshape(groups, rows, 1, *window)
            arrays = weight.astype(dtype), bias.astype(dtype)
        if not all(np.isfinite(array.astype(np.float64)).all() for array in arrays):
            return Refusal("not_finite", name, f"a folded number is not finite in {kind}")
        return arrays


def _read(norm: ir.Node, opset: int) -> tuple[np.ndarray, np.ndarray] | Refusal:
    """Scale and offset of a BatchNormalization, one number per channel, in f64."""
    name = node_name(norm)
    if opset < MIN_OPSET:
        return Refusal("opset", name, f"opset {opset} is older than {MIN_OPSET}")
    if facts.attribute_int(norm, "training_mode", 0) or len(norm.outputs) != 1:
        return Refusal("training_mode", name, "computes the statistics of its input")
    known = [facts.constant(value) for value in norm.inputs[1:]]
    arrays = [array.astype(np.float64) for array in known if array is not None]
    if len(arrays) != 4:
        return Refusal("not_constant", name, "its parameters are computed at run time")
    scale, bias, mean, variance = arrays
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    with np.errstate(all="ignore"):
        scale = scale / np.sqrt(variance + epsilon)
    return scale, bias - mean * scale


def _find(norm: ir.Node, *, behind: bool) -> _Chain | Refusal:
    """The chain that ends (behind) or starts in `norm`."""
    name, moves, axis = node_name(norm), list[ir.Node](), 1
    value = norm.inputs[0] if behind else norm.outputs[0]
    assert value is not None
    while True:
        node = _neighbour(value, norm, behind=behind)
        if isinstance(node, Refusal):
            return node
        across = _across(node, axis, upwards=behind)
        if across is None:
            break
        axis = across
        moves.append(node)
        value = node.inputs[0] if behind else node.outputs[0]
        assert value is not None
    if behind:
        moves.reverse()
    linear = _product_of(node) or node
    if linear.domain != "" or linear.op_type not in _LINEAR:
        return Refusal("no_linear", name, f"{node.op_type} is no linear map")
    if _weight(linear) is None:
        return Refusal("not_constant", node_name(linear), "its weight is computed at run time")
    refusal = _aligned(linear, value, axis, behind=behind)
    if refusal is not None:
        return refusal
    return _Chain(linear, _addition_to(linear), tuple(moves), norm, behind)


def _neighbour(value: ir.Value, norm: ir.Node, *, behind: bool) -> ir.Node | Refusal:
    """What computes `value` (behind) or reads it, if it is a matter between two nodes only."""
    name = node_name(norm)
    readers = [use.node for use in value.uses() if not facts.reads_shape(use.node)]
    found = [value.producer()] if behind else readers
    linear = any(node is not None and node.op_type in (*_LINEAR, "Add") for node in found)
    if len(readers) != 1 or value.is_graph_output():
        code = "shared" if linear else "no_linear"
        return Refusal(code, name, f"{value.name} is not read by one node alone")
    node = found[0]
    if node is None:
        return Refusal("no_linear", name, f"{value.name} is no result of a linear map")
    if node.graph is not norm.graph:
        return Refusal("shared", name, f"{value.name} belongs to another graph")
    return node


def _across(node: ir.Node, axis: int, *, upwards: bool) -> int | None:
    """Where the channels are on the other side of a node that only moves data; None if it is not.

    Regrouping keeps the channels if they are the last axis, and stay it.
    """
    order = facts.permutation(node)
    if order is not None and axis < len(order):
        return order[axis] if upwards else order.index(axis)
    if node.domain != "" or node.op_type not in _REGROUPS:
        return None
    source, result = node.inputs[0], node.outputs[0]
    assert source is not None
    here, there = (result, source) if upwards else (source, result)
    size, other = facts.last_dim(here), facts.rank(there)
    if facts.rank(here) != axis + 1 or not other or size is None or size != facts.last_dim(there):
        return None
    return other - 1


def _product_of(add: ir.Node) -> ir.Node | None:
    """The MatMul or Gemm an Add of a constant adds it to, if nothing else reads the product."""
    if add.op_type != "Add" or add.domain != "":
        return None
    for product, bias in (add.inputs, tuple(reversed(add.inputs))):
        if facts.constant(bias) is None:
            continue
        assert product is not None
        node = product.producer()
        if node is not None and node.op_type in _MATRIX and node.graph is add.graph:
            return node if len(product.uses()) == 1 and not product.is_graph_output() else None
    return None


def _addition_to(product: ir.Node) -> ir.Node | None:
    """The Add of a constant behind a MatMul or Gemm, if nothing else reads the product."""
    readers = (use.node for use in product.outputs[0].uses())
    return next((node for node in readers if _product_of(node) is product), None)


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """A constant, also where it is written as the Transpose of one."""
    turned = facts.made_by(value, "Transpose")
    order = facts.permutation(turned)
    if order is None:
        return facts.constant(value)
    assert turned is not None
    array = facts.constant(turned.inputs[0])
    return None if array is None else array.transpose(order)


def _weight(linear: ir.Node) -> np.ndarray | None:
    """The constant a linear map applies; None if it is none, empty, or a batch of them."""
    array = _constant(linear.inputs[1])
    if array is None or not array.size or (array.ndim == 2) != (linear.op_type in _MATRIX):
        return None
    return array


def _aligned(linear: ir.Node, value: ir.Value, axis: int, *, behind: bool) -> Refusal | None:
    """Why axis `axis` of `value` is not the one a linear map computes (behind) or contracts."""
    name, kind, channels = node_name(linear), linear.op_type, 1
    if kind in _MATRIX:
        rank = facts.rank(value)
        if rank is None:
            return Refusal("rank_unknown", name, f"the rank of {value.name} is unknown")
        channels = rank - 1
    if axis != channels:
        return Refusal("axis", name, f"the channels are axis {axis}, not {channels}")
    if kind == "ConvTranspose" and facts.attribute_int(linear, "group", 1) != 1:
        return Refusal("groups", name, "ONNX's reference, the judge of a fold, has no groups here")
    if behind:
        return None
    if facts.attribute_int(linear, "transA", 0):
        return Refusal("axis", name, "contracts the rows (transA = 1)")
    if kind == "ConvTranspose":
        return Refusal("padding", name, "its border sums fewer terms than its inside")
    if _pads(linear):
        return Refusal("padding", name, "pads the BatchNormalization's result with zeros")
    return None


def _pads(conv: ir.Node) -> bool:
    """Whether a convolution pads its input; other maps have no such attribute."""
    mode = conv.attributes["auto_pad"].as_string() if "auto_pad" in conv.attributes else "NOTSET"
    if mode == "NOTSET":
        return "pads" in conv.attributes and any(conv.attributes["pads"].as_ints())
    return mode != "VALID"


def _factor(linear: ir.Node, name: str) -> float:
    """Gemm's alpha or beta; 1 elsewhere."""
    return linear.attributes[name].as_float() if name in linear.attributes else 1.0


def _bias(chain: _Chain, width: int) -> np.ndarray | Refusal:
    """What a linear map of `width` results adds, in f64: one row, or one number for all."""
    linear = chain.linear
    beta = _factor(linear, "beta")
    parts = [(linear, value, beta) for value in linear.inputs[2:] if value is not None]
    if chain.bias is not None:
        constants = filter(facts.is_constant, chain.bias.inputs)
        parts += [(chain.bias, value, 1.0) for value in constants]
    total = np.zeros(1)
    for node, value, factor in parts:
        array = facts.constant(value)
        if array is None:
            return Refusal("not_constant", node_name(node), "its bias is computed at run time")
        total = total + factor * array.astype(np.float64)
    row = total.size == total.shape[-1] and total.size in (1, width)
    if not row or (linear.op_type == "Gemm" and total.ndim > 2):
        detail = f"its bias {list(total.shape)} is no row of {width}"
        return Refusal("bias_shape", node_name(linear), detail)
    return total


def _grouped(linear: ir.Node, weight: np.ndarray) -> np.ndarray:
    """A view of a weight as [groups, in, out, *window], in and out those of one group."""
    if linear.op_type == "Gemm":
        return (weight.T if facts.attribute_int(linear, "transB", 0) else weight)[None]
    groups = facts.attribute_int(linear, "group", 1)
    view = weight.reshape(groups, -1, *weight.shape[1:])
    return view.swapaxes(1, 2) if linear.op_type == "Conv" else view


def _fresh(name: str, taken: set[str | None]) -> str:
    """`name`, or the first numbered one nothing has."""
    count, candidate = 1, name
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    yield from (value for node in graph for value in node.outputs)


def _write(chain: _Chain, weight: ir.Value, bias: ir.Value, product: str) -> _Written:
    """What stands for a chain; the last node's result has the name of the chain's.

    Args:
        chain: what they stand for.
        weight: of the new linear map.
        bias: the same.
        product: name for the result of a MatMul that no Add was behind.
    """
    linear, value = chain.linear, chain.x
    nodes: list[ir.Node] = []
    heirs = {}
    for node in chain.nodes:
        if node in (chain.norm, chain.bias):
            heirs[node.outputs[0]] = value
            continue
        if node is not linear:
            nodes.append(_like(node, [value, *node.inputs[1:]]))
        elif node.op_type != "MatMul":
            nodes.append(_like(node, [value, weight, bias]))
        else:
            nodes.append(_like(node, [value, weight]))
            added = [nodes[-1].outputs[0], bias]
            if chain.bias is not None:
                nodes.append(_like(chain.bias, added))
            else:
                total = ir.val(node.outputs[0].name)
                facts.copy_facts(node.outputs[0], total)
                nodes.append(ir.node("Add", added, outputs=[total]))
                nodes[-2].outputs[0].name = product
        value = nodes[-1].outputs[0]
        heirs[node.outputs[0]] = value
    value.name = chain.y.name
    stamped = next(node for node in nodes if node.op_type == linear.op_type)
    known = linear.metadata_props.get(FOLDED_KEY)
    folded = f"{node_name(chain.norm)}\t{chain.y.name}"
    sources = [
        node.metadata_props.get(SOURCE_KEY, node_name(node)).split("\n") for node in chain.nodes
    ]
    stamped.metadata_props.update(
        {
            RULE_KEY: RULE,
            SOURCE_KEY: "\n".join(dict.fromkeys(itertools.chain(*sources))),
            FOLDED_KEY: f"{known}\n{folded}" if known else folded,
        }
    )
    return _Written(nodes, heirs)


def _like(node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Node:
    """A copy of `node` that reads `inputs`; Gemm's beta is 1."""
    out = ir.val(node.outputs[0].name)
    facts.copy_facts(node.outputs[0], out)
    beta = {"beta": ir.AttrFloat32("beta", 1.0)} if node.op_type == "Gemm" else {}
    return ir.node(
        node.op_type,
        inputs,
        attributes={**node.attributes, **beta},
        outputs=[out],
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )


def _replace(graph: ir.Graph, chain: _Chain, written: _Written) -> None:
    old = chain.nodes
    graph.insert_before(chain.norm, written.nodes)
    for value, heir in written.heirs.items():
        facts.replace(value, heir)
    for node in reversed(old):
        graph.remove(node, safe=True)
    graph.sort()  # what else the chain reads, or who reads a shape in it, may stand elsewhere


def _flaw(chain: _Chain, nodes: Sequence[ir.Node]) -> str | None:
    """What separates `nodes` from the chain on random rows in f64, None if nothing does."""
    weight = _weight(chain.linear)
    assert weight is not None
    feed = np.random.default_rng(0).normal(size=_sizes(chain, weight))
    try:
        source, folded = (_run(part, chain.x, feed) for part in (chain.nodes, nodes))
    except EvaluationError as failure:
        return f"cannot be evaluated: {failure}"
    if source.shape != folded.shape:
        return f"shape {list(source.shape)} became {list(folded.shape)}"
    channels = 1 if chain.behind or chain.linear.op_type == "Conv" else source.ndim - 1
    others = tuple(axis for axis in range(source.ndim) if axis != channels)
    size = np.abs(source).max(others)
    error = np.abs(source - folded).max(others)
    kind = next(kind for kind, info in DTYPES.items() if info.numpy == weight.dtype)
    least = float(ml_dtypes.finfo(weight.dtype).smallest_normal)
    if (error <= ALGEBRA_BOUND[kind] * size + least).all():
        return None
    worst = float((error / np.maximum(size, least)).max())
    return f"differs by {worst:.1e} of a channel's largest output"


def _sizes(chain: _Chain, weight: np.ndarray) -> tuple[int, ...]:
    """A shape for what a chain reads."""
    linear, place = chain.linear, 1
    groups, rows = _grouped(linear, weight).shape[:2]
    others = [_BATCH]
    if linear.op_type not in _MATRIX:
        others += [size + 1 for size in weight.shape[2:]]
    else:
        # Two axes are enough, unless a Transpose names more before rows are regrouped.
        order = facts.permutation(next(iter(chain.moves), None))
        others *= 1 if order is None else len(order) - 1
        if chain.behind:
            place = 0 if facts.attribute_int(linear, "transA", 0) else len(others)
    return (*others[:place], groups * rows, *others[place:])


def _run(nodes: Iterable[ir.Node], x: ir.Value, feed: np.ndarray) -> np.ndarray:
    """The result of the last node where x is `feed`, everything in f64."""
    arrays: dict[str, np.ndarray] = {}
    protos = []
    for node in nodes:
        proto = ir.serde.serialize_node(node)
        if node.op_type in _REGROUPS:
            target = f"{proto.output[0]}_rows"
            proto = onnx.helper.make_node("Reshape", [proto.input[0], target], proto.output)
            rank = facts.rank(node.outputs[0])
            assert rank is not None  # or it would not have been crossed
            leading = [1] * (rank - 2)
            arrays[target] = np.array([*leading, -1, facts.last_dim(node.outputs[0])])
        else:
            kept = [field for field in proto.attribute if field.name not in _SPACING]
            del proto.attribute[:]
            proto.attribute.extend(kept)
            for value in filter(None, node.inputs):
                array = _constant(value)
                if array is not None:
                    arrays[str(value.name)] = array.astype(np.float64)
        protos.append(proto)
    arrays[str(x.name)] = feed
    return evaluate(protos, arrays, [protos[-1].output[0]], (), _OPSET)[0]
