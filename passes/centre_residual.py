"""LayerNorm of a stream whose rows have mean zero is RMSNorm: what writes the stream is centred."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from fusenorm.ops.linear import Linear
from fusenorm.ops.spec import DOMAIN
from fusenorm.passes import facts
from fusenorm.passes.evaluate import EvaluationError
from fusenorm.passes.fuse_norm import NormCall, read_call
from fusenorm.passes.pattern import Refusal, node_name
from fusenorm.passes.rewrite import RULE_KEY, Rewrite, apply, registered
from fusenorm.passes.validate import (
    LEADING,
    find_difference,
    fused_proto,
    hard_rows,
    run_nodes,
    source_proto,
)

RULE = "centre_residual"
# On a model, while it is in memory: what became of each of its streams.
STREAMS_KEY = "fusenorm.streams"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a residual stream.

    Attributes:
        output: the result of its first norm.
        norms: those that read it.
        writers: the rows that enter it.
        refusal: why it stays as it is, None if it is centred.
    """

    output: str
    norms: tuple[str, ...]
    writers: tuple[str, ...]
    refusal: Refusal | None


@dataclasses.dataclass
class _Stream:
    """A residual stream: sums of rows that norms read and further sums.

    Attributes:
        width: of its rows.
        norms: the LayerNorms that read it, and what they compute.
        writers: rows that enter it, and the nodes of it that read them, with the input's place.
        seen: nodes that were looked at.
        refusal: why it stays as it is, None if it is centred.
    """

    width: int
    norms: dict[ir.Node, NormCall] = dataclasses.field(default_factory=dict)
    writers: dict[ir.Value, list[tuple[ir.Node, int]]] = dataclasses.field(default_factory=dict)
    seen: set[ir.Node] = dataclasses.field(default_factory=set)
    refusal: Refusal | None = None

    def refuse(self, code: str, node: ir.Node | None, detail: str) -> None:
        """Leave it as it is; the first reason counts."""
        self.refusal = self.refusal or Refusal(code, node_name(node), detail)


class CentreResidual(ir.passes.InPlacePass):
    """LayerNorms become RMSNorms where the residual stream they read can be kept at mean zero.

    ## What it matches
    A residual stream of rows in f32: Adds, Reshapes and Concats of rows, the sums of SkipLayerNorm
    ops, read by nothing but LayerNorms and itself. What writes it is a packed Linear op without
    activation, a Gather from a table nothing else reads, or a constant.

    ## Formula
    With C = I - 11ᵀ/N: LayerNorm(h) = RMSNorm(hC). (xW + c)C = x(WC) + cC, and the same of a
    table's rows; sums of rows of mean zero have mean zero.

    ## Numerics
    WC and cC are computed in f64 and rounded once. The stream itself changes: each row by its
    mean. Checked when made: every map against its centred result, every norm against itself on
    centred rows, on hard rows in f64.

    ## Refuses
    `post_norm`: a norm's own result enters the stream. `writer`: what enters it is something else,
    such as an input or a row of a tied table, or is weighted by a vector. `reader`: something
    else reads the stream.
    `output`: it is an output of the graph. `types`: not f32. `check_failed`.

    ## References
    arXiv 2305.14858 (Pre-RMSNorm).
    """

    name = RULE

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        opset = model.opset_imports.get("", 0)
        streams = model.meta.setdefault(STREAMS_KEY, [])
        modified = False
        for graph in list(model.graphs()):
            done: set[ir.Node] = set()
            for node in list(graph):
                width = facts.last_dim(node.inputs[0]) if node.inputs and node.inputs[0] else None
                if node in done or width is None or _layer_norm(node) is None:
                    continue
                stream = _Stream(width)
                _follow(stream, node)
                output, *writers = (str(value.name) for value in (node.outputs[0], *stream.writers))
                names = tuple(node_name(norm) for norm in stream.norms)  # before they change
                _centre(model, stream, opset)
                modified |= stream.refusal is None
                streams.append(Outcome(output, names, tuple(writers), stream.refusal))
                done.update(stream.norms)
        return ir.passes.PassResult(model, modified)


def _layer_norm(node: ir.Node) -> NormCall | None:
    call = read_call(node)
    return call if isinstance(call, NormCall) and call.spec.centred else None


# -- the stream


def _follow(stream: _Stream, start: ir.Node) -> None:
    """Collect the stream `start` belongs to; refuse it where something else has to do with it."""
    pending = [start]
    while pending:
        node = pending.pop()
        if node in stream.seen:
            continue
        stream.seen.add(node)
        carried = list(_rows_made(stream, node))
        for place, value in _rows_read(stream, node):
            producer = value.producer()
            if producer is not None and _passes_on(stream, producer, value):
                pending.append(producer)
                continue
            stream.writers.setdefault(value, []).append((node, place))
            if not facts.is_constant(value):  # others may read a constant: they keep it
                carried.append(value)
        for value in carried:
            if value.is_graph_output():
                stream.refuse("output", value.producer(), f"{value.name} is an output")
            pending += [use.node for use in value.uses() if not facts.reads_shape(use.node)]


def _rows_read(stream: _Stream, node: ir.Node) -> list[tuple[int, ir.Value]]:
    """The places and rows of the stream that a node reads."""
    call = _layer_norm(node)
    if call is not None:
        stream.norms[node] = call
        if call.spec.dtype != "f32":
            stream.refuse("types", node, f"the stream is {call.spec.dtype}, not f32")
        if call.spec.layer_scale:
            stream.refuse("writer", node, "what it adds is weighted by a vector")
        return list(enumerate(call.inputs[: 1 + call.spec.skip]))
    if not _is_inner(stream, node):
        stream.refuse("reader", node, f"reads the stream, and {node.op_type} sees its mean")
        return []
    count = 1 if node.op_type == "Reshape" else len(node.inputs)
    return [(place, value) for place, value in enumerate(node.inputs[:count]) if value is not None]


def _rows_made(stream: _Stream, node: ir.Node) -> Sequence[ir.Value]:
    """The rows of the stream a node makes."""
    if _layer_norm(node) is not None:
        return node.outputs[1:]
    return node.outputs if _is_inner(stream, node) else ()


def _passes_on(stream: _Stream, node: ir.Node, value: ir.Value) -> bool:
    """Whether `value`, made by this node, has mean zero where what the node reads has."""
    if isinstance(read_call(node), NormCall):
        if value is node.outputs[0]:
            stream.refuse("post_norm", node, f"its result {value.name} enters the stream")
        return value is not node.outputs[0]
    return _is_inner(stream, node)


def _is_inner(stream: _Stream, node: ir.Node) -> bool:
    """Whether a node adds or only moves rows of the stream's width."""
    if node.domain != "" or node.op_type not in ("Add", "Reshape", "Concat"):
        return False
    rows = node.inputs[:1] if node.op_type == "Reshape" else node.inputs
    values = (*rows, node.outputs[0])
    # Of a Concat along the rows the result is wider, so no row is cut or joined.
    return all(value is not None and facts.last_dim(value) == stream.width for value in values)


# -- centring it


def _centre(model: ir.Model, stream: _Stream, opset: int) -> None:
    """Centre what writes the stream and make its LayerNorms RMSNorms, if all is proved."""
    maps, constants = list[Rewrite](), list[tuple[ir.Value, ir.Node, int]]()
    for value, readers in stream.writers.items():
        if facts.is_constant(value):
            centred = _centred(value)
            constants += [(centred, reader, place) for reader, place in readers]
            continue
        node = value.producer()
        table, linear = _table(node), _centred_map(node)
        if table is not None:
            constants += [(_centred(table), use.node, use.idx) for use in table.uses()]
        elif linear is not None:
            maps.append(linear)
        else:
            what = f"made by {node.op_type}" if node is not None else "an input"
            detail = f"{value.name} is {what}, no result of a packed map or of a table of its own"
            stream.refuse("writer", node, detail)
    if stream.refusal is not None:
        return
    norms = [
        Rewrite(
            rule=RULE,
            spec=dataclasses.replace(call.spec, centred=False),
            inputs=call.inputs,
            attributes=call.attributes,
            outputs=tuple(node.outputs[: len(call.spec.outputs)]),
            nodes=(node,),
        )
        for node, call in stream.norms.items()
    ]
    for rewrite in (*maps, *norms):
        flaw = _flaw(rewrite, stream.width, opset)
        if flaw is not None:
            stream.refuse("check_failed", rewrite.root, flaw)
            return
    for rewrite in maps:
        apply(model, rewrite, opset)
    for centred, node, place in constants:
        assert node.graph is not None
        node.replace_input_with(place, registered(centred, node.graph))
    for rewrite in norms:
        rows = _row_count(rewrite)
        given = (value for value in rewrite.nodes[0].inputs[:rows] if value is not None)
        apply(model, dataclasses.replace(rewrite, inputs=(*given, *rewrite.inputs[rows:])), opset)


def _row_count(rewrite: Rewrite) -> int:
    return sum(slot.layout == "row" for slot in rewrite.spec.inputs)


def _table(node: ir.Node | None) -> ir.Value | None:
    """The table whose rows a Gather takes, if nothing else reads it."""
    if node is None or (node.domain, node.op_type) != ("", "Gather"):
        return None
    table = node.inputs[0]
    if not facts.is_constant(table) or facts.rank(table) != 2:
        return None
    if facts.attribute_int(node, "axis", 0) or len(table.uses()) != 1 or table.is_graph_output():
        return None
    return table


def _centred(value: ir.Value) -> ir.Value:
    """A constant whose rows have mean zero, computed when it is read."""
    stored = value.const_value
    assert stored is not None

    def make() -> ir.TensorProtocol:
        array = stored.numpy()
        with np.errstate(all="ignore"):  # the proof sees what is not finite
            return ir.tensor(_without_mean(array).astype(array.dtype))

    tensor = ir.LazyTensor(make, stored.dtype, ir.Shape(stored.shape.numpy()))
    return ir.val(f"{value.name}_centred", const_value=tensor)


def _without_mean(rows: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float64)
    return wide - wide.mean(axis=-1, keepdims=True)


def _centred_map(node: ir.Node | None) -> Rewrite | None:
    """A packed map without activation whose results have mean zero."""
    if node is None or node.domain != DOMAIN:
        return None
    spec = Linear.parse(node.op_type)
    if spec is None or not spec.plain:
        return None
    x, weight, *biases = (value for value in node.inputs if value is not None)
    stored = weight.const_value
    assert stored is not None

    def make() -> ir.TensorProtocol:
        panels = stored.numpy()
        means = panels.mean(axis=(0, 2), dtype=np.float64)[:, None]
        made = np.empty_like(panels)
        with np.errstate(all="ignore"):  # the proof sees what is not finite
            for panel, target in zip(panels, made, strict=True):
                target[:] = panel - means
        return ir.tensor(made)

    tensor = ir.LazyTensor(make, stored.dtype, ir.Shape(stored.shape.numpy()))
    return Rewrite(
        rule=node.metadata_props.get(RULE_KEY, RULE),
        spec=spec,
        inputs=(
            x,
            ir.val(f"{weight.name}_centred", const_value=tensor),
            *(_centred(bias) for bias in biases),
        ),
        attributes={},
        outputs=(node.outputs[0],),
        nodes=(node,),
    )


def _flaw(rewrite: Rewrite, width: int, opset: int) -> str | None:
    """What separates a map's centred results, or a norm of centred rows, from what replaces it."""
    (node,), is_map = rewrite.nodes, isinstance(rewrite.spec, Linear)
    rng = np.random.default_rng(0)
    source, made = {}, {}
    for place, (slot, value) in enumerate(zip(rewrite.spec.inputs, rewrite.inputs, strict=True)):
        known = facts.constant(value)
        if slot.layout == "row":
            size = rewrite.inputs[1].shape[1] if is_map else width  # type: ignore[index]
            rows = hard_rows(rng, (*LEADING[-2:], int(size)))  # type: ignore[arg-type]
            source[f"i{place}"] = rows
            made[slot.name] = rows if is_map else _without_mean(rows)
            continue
        if known is None:
            known = rng.normal(1.0, 0.5, width).astype(np.float32)
        own = facts.constant(node.inputs[place])
        source[f"i{place}"] = known if own is None else own
        made[slot.name] = known
    results = [slot.name for slot in rewrite.spec.outputs]
    try:
        before, after = (
            run_nodes([proto], arrays, results, "f64", opset)
            for proto, arrays in (
                (source_proto(node, list(source), results), source),
                (fused_proto(rewrite.spec, rewrite.attributes, list(made), results), made),
            )
        )
    except EvaluationError as error:
        return f"cannot be evaluated: {error}"
    kept = 0 if is_map else 1
    before[kept:] = [_without_mean(rows) for rows in before[kept:]]
    return find_difference(before, after, "f32", "f64")
