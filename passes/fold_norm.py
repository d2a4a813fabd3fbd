"""The scale and bias of a norm go into the linear maps that read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import onnx_ir as ir

from fusenorm.ops.linear import Linear
from fusenorm.ops.spec import DOMAIN, DType
from fusenorm.passes import facts
from fusenorm.passes.evaluate import EvaluationError
from fusenorm.passes.fuse_norm import NormCall, read_call
from fusenorm.passes.pattern import Miss, Refusal, node_name
from fusenorm.passes.rewrite import MISS_KEY, RULE_KEY, Rewrite, apply
from fusenorm.passes.validate import (
    LEADING,
    find_difference,
    fused_proto,
    hard_rows,
    run_nodes,
    source_proto,
)

OP = "NormFold"
RULE = "fold_norm"
# On a norm whose scale and bias went away: the results of the maps that have them, a line each.
INTO_KEY = "fusenorm.folded_into"
# Why a map had better stay as it is, None if it may change.
Pays = Callable[[Rewrite], Refusal | None]


@dataclasses.dataclass(frozen=True)
class _Norm:
    """A norm with scale or bias, standard or ours.

    Attributes:
        node: it.
        call: what it computes.
        maps: the packed linear maps that read its result.
    """

    node: ir.Node
    call: NormCall
    maps: tuple[ir.Node, ...]

    def vector(self, name: str) -> np.ndarray | None:
        """Scale or bias in f64, None without one that matters."""
        for slot, value in zip(self.call.spec.inputs, self.call.inputs, strict=True):
            if slot.name == name:
                assert value.const_value is not None
                array = value.const_value.numpy().astype(np.float64).ravel()
                return None if name == "bias" and not array.any() else array
        return None


class FoldNorm(ir.passes.InPlacePass):
    """Scale and bias of a norm go into the packed linear maps behind it.

    ## What it matches
    LayerNorm, RMSNorm, alone or with a residual sum, ours or standard, with constant scale or
    bias, whose result is read by packed Linear ops and nothing else.

    ## Formula
    y = n∘γ + β, z = act(yW + c): z = act(nW' + c') with W' = diag(γ)·W and c' = c + βW; of a gated
    unit, both maps.

    ## Numerics
    W' and c' are computed in f64 and rounded once: in f32 within the rounding of a product; in 16
    bits each weight is rounded a second time. Checked like every rewrite: both sides on hard rows
    in f64.

    ## Refuses
    `reader`: something but a packed map reads the result, a tied weight's map for one. `output`:
    it is an output of the graph. `not_constant`: γ or β is computed at run time. `types`: weights
    of a type that is not to change. `slower`, `check_failed`, and what read_call refuses.

    ## References
    arXiv 2407.09577 (FlashNorm).

    Args:
        types: types of the weights that may change.
        pays: asked of each map with the bias that comes to it; None takes all.
    """

    name = RULE

    def __init__(self, types: Iterable[DType] = ("f32",), pays: Pays | None = None) -> None:
        super().__init__()
        self.types = frozenset(types)
        self.pays = pays

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        opset = model.opset_imports.get("", 0)
        modified = False
        for graph in list(model.graphs()):
            for node in list(graph):
                norm = _read(node, self.types)
                if norm is None:
                    continue
                refusal = (
                    norm if isinstance(norm, Refusal) else _fold(model, norm, opset, self.pays)
                )
                if refusal is None:
                    modified = True
                else:
                    node.meta[MISS_KEY] = (OP, Miss((node,), refusal))
        return ir.passes.PassResult(model, modified)


def _read(node: ir.Node, types: frozenset[DType]) -> _Norm | Refusal | None:
    """A norm that can be folded; None for what is no norm, or none with linear maps behind it."""
    y = node.outputs[0]
    if not any(map(_is_linear, _readers(y))):
        return None
    call = read_call(node)
    if not isinstance(call, NormCall):
        return call
    spec = call.spec
    if spec.scale is None and spec.bias is None:
        return None
    name = node_name(node)
    if spec.dtype not in types:
        return Refusal("types", name, f"weights of {spec.dtype} are not to be changed")
    if y.is_graph_output():
        return Refusal("output", name, f"{y.name} is an output")
    readers = dict.fromkeys(_readers(y))
    for reader in readers:
        if not _is_packed(reader):
            detail = f"{y.name} is read by {node_name(reader)} too, which is no packed linear map"
            return Refusal("reader", name, detail)
        if reader.graph is not node.graph:
            return Refusal("reader", name, f"{node_name(reader)} is in another graph")
    for slot, value in zip(spec.inputs, call.inputs, strict=True):
        if slot.layout == "vector" and not facts.is_constant(value):
            return Refusal("not_constant", name, f"{value.name} is computed at run time")
    maps = (reader for reader in node.graph or () if reader in readers)
    return _Norm(node, call, tuple(maps))


def _readers(y: ir.Value) -> Iterator[ir.Node]:
    """What reads the numbers of y: not its shape, and behind a Reshape that keeps its rows."""
    pending = [y]
    while pending:
        value = pending.pop()
        for use in value.uses():
            node, moved = use.node, use.node.outputs[0]
            if facts.reads_shape(node):
                continue
            size = facts.last_dim(moved)
            reshape = facts.made_by(moved, "Reshape")
            rows = reshape is not None and size is not None and size == facts.last_dim(value)
            if rows:
                pending.append(moved)
            if not rows or moved.is_graph_output():
                yield node


def _is_linear(node: ir.Node) -> bool:
    return _is_packed(node) or (node.domain == "" and node.op_type in ("MatMul", "Gemm"))


def _is_packed(node: ir.Node) -> bool:
    """Whether it is a map as FuseLinear makes it, which no later pass has extended."""
    spec = Linear.parse(node.op_type) if node.domain == DOMAIN else None
    return spec is not None and spec == spec.products and not spec.residual


def _fold(model: ir.Model, norm: _Norm, opset: int, pays: Pays | None) -> Refusal | None:
    """Put the norm without scale and bias in its place, and the maps that have them in theirs."""
    call = norm.call
    plain = dataclasses.replace(call.spec, scale=None, bias=None, affine="f32")
    kept = {slot.name for slot in plain.inputs}
    rewrites = [
        Rewrite(
            rule=RULE,
            spec=plain,
            inputs=tuple(
                value
                for slot, value in zip(call.spec.inputs, call.inputs, strict=True)
                if slot.name in kept
            ),
            attributes=call.attributes,
            outputs=tuple(norm.node.outputs[: len(plain.outputs)]),
            nodes=(norm.node,),
        ),
        *(_with_affine(node, norm.vector("scale"), norm.vector("bias")) for node in norm.maps),
    ]
    for rewrite in rewrites[1:]:
        refusal = pays(rewrite) if pays is not None else None
        if refusal is not None:
            return refusal
        flaw = _flaw(rewrites[0], rewrite, opset)
        if flaw is not None:
            return Refusal("check_failed", node_name(norm.node), flaw)
    names = [str(node.outputs[0].name) for node in norm.maps]
    made = apply(model, rewrites[0], opset)
    for rewrite in rewrites[1:]:
        (x, *_), given = rewrite.nodes[0].inputs, rewrite.inputs[1:]
        assert x is not None  # the new norm's result, or a Reshape of it
        apply(model, dataclasses.replace(rewrite, inputs=(x, *given)), opset)
    made.metadata_props[INTO_KEY] = "\n".join(names)
    return None


def _with_affine(node: ir.Node, scale: np.ndarray | None, bias: np.ndarray | None) -> Rewrite:
    """A packed map of n for one of n∘scale + bias."""
    spec = Linear.parse(node.op_type)
    y, weight, *biases = (value for value in node.inputs if value is not None)
    assert spec is not None
    assert weight.const_value is not None
    assert weight.shape is not None
    stored = weight.const_value
    folded = dataclasses.replace(spec, bias=spec.bias or bias is not None)
    if scale is not None:
        tensor = ir.LazyTensor(
            lambda: ir.tensor(_scaled(stored.numpy(), scale)), stored.dtype, weight.shape
        )
        weight = ir.val(f"{weight.name}_scaled", const_value=tensor)
    if bias is not None:
        sums = np.stack([bias @ panel.astype(np.float64) for panel in stored.numpy()])
        parts = (sums[0::2], sums[1::2]) if spec.gated else (sums,)
        known = [facts.constant(value) for value in biases] or [np.zeros(())] * len(parts)
        columns = facts.last_dim(biases[0]) if spec.ragged else None
        totals = (
            before + added.ravel()[:columns] for before, added in zip(known, parts, strict=True)
        )
        biases = [
            _vector(f"{node.outputs[0].name}_shift_{part}", total, stored)
            for part, total in enumerate(totals)
        ]
    return Rewrite(
        rule=node.metadata_props.get(RULE_KEY, RULE),
        spec=folded,
        inputs=(y, weight, *biases),
        attributes={name: node.attributes[name].as_float() for name in spec.attributes},
        outputs=(node.outputs[0],),
        nodes=(node,),
    )


def _scaled(panels: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """diag(scale)·W, W in panels; panel by panel, since f64 takes twice the memory or more."""
    made = np.empty_like(panels)
    with np.errstate(over="ignore"):  # what overflows does not pass the proof
        for panel, target in zip(panels, made, strict=True):
            target[:] = scale[:, None] * panel
    return made


def _vector(name: str, numbers: np.ndarray, like: ir.TensorProtocol) -> ir.Value:
    with np.errstate(over="ignore"):
        return ir.val(name, const_value=ir.tensor(numbers.astype(like.dtype.numpy())))


def _flaw(norm: Rewrite, linear: Rewrite, opset: int) -> str | None:
    """What separates a norm and a map from what is to stand for them, None if nothing does."""
    (y, *_), (x, weight, *_) = norm.outputs, linear.inputs
    assert weight.shape is not None
    assert y is not None
    names = {y: "y", x: "y"}  # a Reshape of y has the same rows
    arrays: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(0)
    for slot, value in zip(norm.spec.inputs, norm.inputs, strict=True):
        if slot.layout == "row":
            leading = LEADING[len(LEADING) + 1 - (facts.rank(value) or 3) :]
            names[value] = slot.name
            arrays[slot.name] = hard_rows(rng, (*leading, int(weight.shape[1])))  # type: ignore[arg-type]

    def name_of(value: ir.Value | None) -> str:
        if value is None:
            return ""
        name = names.setdefault(value, f"v{len(names)}")
        known = facts.constant(value) if name not in arrays else None
        if known is not None:
            arrays[name] = known
        return name

    sources, folded = [], []
    for rewrite in (norm, linear):
        (node,) = rewrite.nodes
        outputs = [name_of(value) for value in node.outputs]
        sources.append(source_proto(node, [name_of(value) for value in node.inputs], outputs))
        given = [name_of(value) for value in rewrite.inputs]
        folded.append(fused_proto(rewrite.spec, rewrite.attributes, given, outputs))
    wanted = [name_of(value) for value in (*linear.outputs, *norm.outputs[1:])]
    try:
        before, after = (
            run_nodes(nodes, arrays, wanted, "f64", opset) for nodes in (sources, folded)
        )
    except EvaluationError as error:
        return f"cannot be evaluated: {error}"
    return find_difference(before, after, norm.spec.inputs[0].dtype, "f64")
