"""Attention: softmax of scaled products of queries and keys, times values, as one op."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import onnx_ir as ir

from fusenorm.ops.attention import Attention, Empty
from fusenorm.passes import facts
from fusenorm.passes.attention_site import (
    ROWS_FIRST,
    Refused,
    Site,
    check_operands,
    dims_of,
    input_of,
    is_inside,
    rewrite_of,
)
from fusenorm.passes.infer_shapes import InferShapes
from fusenorm.passes.join_masks import Made, Step, join, read_selected, read_selection
from fusenorm.passes.pattern import Miss, Op, Pattern, Scalar, Speller, Var, node_name
from fusenorm.passes.rewrite import Check, Rewrite, RewritePass, Rule
from fusenorm.passes.rotary import read_turns
from fusenorm.passes.spelling import add, mul, one_of

# Attributes of the standard op, and the values at which they do nothing.
_IDLE = {
    "is_causal": 0,
    "softcap": 0,
    "softmax_precision": 0,
    "q_num_heads": 0,
    "kv_num_heads": 0,
    "left_window_size": -1,
    "right_window_size": -1,
}


class FuseAttention(Rule):
    """Scaled dot-product attention becomes one op that never stores the scores.

    ## What it matches
    softmax(c·q·kᵀ + mask)·v of rank 4 in f32, with constant factors on q, on k or on the scores, as
    Mul or Div; scores bent by c·tanh(scores / c); masks added one after another, or numbers
    selected in the place of scores by Where, but not both; kᵀ as one Transpose or as Reshape,
    Transpose, Reshape; NaN weights set to 0 by Where and IsNaN; transposes between [B, S, H, D] and
    [B, H, S, D] around it; heads of k and v repeated by Unsqueeze, Expand, Reshape, or one head by
    MatMul. The standard Attention op with an additive or boolean mask. Rotary positions of q, or of
    q and k: x·cos + x'·sin of halves or of pairs, of all or of the first numbers of a row, or the
    standard RotaryEmbedding.

    ## Formula
    y = softmax(scale·q·kᵀ + mask)·v; softcap·tanh(x / softcap) of the product, if it is bent;
    mask in the place of scores where it is not 0, if they are selected.

    ## Numerics
    Sums in f32 in another order; several masks are added up first; q is scaled before the products,
    weights are divided by their sum at the end (arXiv 2205.14135). Values whose weight is 0 by a
    mask of -1e37 or less may be left out, unless one of them, of q or of k is NaN or beyond ±1e15.

    ## Refuses
    `shared`: the scores or weights have other readers. `keys`: kᵀ is no transpose. `softcap`,
    `mask_select`, `two_masks`, `scaled_mask`, `scores`: something else happens to the scores, or
    in another order.
    `form`: the standard op does more. `axis`, `rank`, `types`, `shapes_not_proved`,
    `check_failed`. Rotary positions alone: `rotary_shared`: what is turned has other readers.
    `rotary_keys`: k is turned otherwise than q. `rotary_tables`: cos and sin provably fit no head.
    `rotary_form`: the standard op does more. `other_graph`: it turns outside the attention's body.

    ## References
    arXiv 1706.03762, 2205.14135, 2305.13245, 2104.09864; ONNX Attention-23, RotaryEmbedding-23.
    """

    name = "attention"
    op = "Attention"
    roots = frozenset({"MatMul", "Transpose", "Attention"})

    @functools.cached_property
    def pattern(self) -> Pattern:
        q, keys, scale = Var("q"), Var("keys"), Scalar("scale")
        plain = Op("MatMul", (q, keys))
        product = one_of(plain, Op("MatMul", (mul(q, scale), mul(keys, scale))))
        scores = one_of(product, mul(product, scale), Op("Div", (product, scale)))
        scores = one_of(scores, mul(Op("Tanh", (scores,)), Scalar("softcap")))
        weights = Op("Softmax", (one_of(scores, add(scores, Var("mask"))),))
        return Op("MatMul", (weights, Var("v")))

    def example(self, speller: Speller) -> None:
        """Operands heads-first or sequence-first, kᵀ in each of its forms."""

        def tensor(name: str, shape: tuple[int, ...]) -> ir.Value:
            value = ir.val(name, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape))
            speller.inputs.append(value)
            return value

        speller.scalar("scale", 0.5)
        speller.scalar("softcap", 2.0)
        speller.values["mask"] = tensor("mask", (2, 1, 5, 7))
        for name, rows, columns in (("q", 5, 4), ("v", 7, 6)):
            if speller.pick(2):
                value = tensor(name, (2, rows, 3, columns))
                speller.values[name] = speller.node("Transpose", [value], perm=ROWS_FIRST[4])
            else:
                speller.values[name] = tensor(name, (2, 3, rows, columns))
        form = speller.pick(3)
        keys = tensor("k", (2, 7, 3, 4) if form == 1 else (2, 3, 7, 4))
        if form < 2:
            keys = speller.node("Transpose", [keys], perm=((0, 1, 3, 2), (0, 2, 3, 1))[form])
        else:
            flat, full = (speller.constant(np.array(s)) for s in ((-1, 7, 4), (2, 3, 4, 7)))
            keys = speller.node(
                "Transpose", [speller.node("Reshape", [keys, flat])], perm=(0, 2, 1)
            )
            keys = speller.node("Reshape", [keys, full])
        speller.values["keys"] = keys

    def propose(self, root: ir.Node) -> Rewrite | Miss | None:
        node, moves = root, []
        if root.op_type == "Transpose":
            moves = [root, *_read_idle(root)]
            value = input_of(moves[-1])
            found = value.producer()
            if facts.permutation(root) not in ROWS_FIRST.values() or not is_inside(value):
                return None
            if found is None or found.op_type not in ("MatMul", "Attention") or found.domain != "":
                return None
            node = found
        try:
            site = read_standard(node) if node.op_type == "Attention" else _read_written(node)
            if site is None:
                return None
            if moves and facts.permutation(root) != ROWS_FIRST[site.rank]:
                return None
            if moves:
                site.nodes = [*moves, *site.nodes]
                site.letters["y"] = "s"
                for move in moves[1:]:
                    _note_shape(site, move)
            check_operands(site)
            if site.steps:
                raise Refused("two_masks", site.steps[0].node, "its masks are not joined")
            return rewrite_of(root, site)
        except Refused as refused:
            return Miss((node,), refused.refusal)


class FuseAttentions(RewritePass):
    """The pass of the attention rule; boolean masks of the standard op become additive ones."""

    name = "fuse_attention"

    def __init__(self, check: Check | None = None, budget: list[int] | None = None) -> None:
        super().__init__((FuseAttention(),), check, budget)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for graph in model.graphs():
            modified |= _add_masks(graph)
            if model.opset_imports.get("", 0) >= Attention.MIN_OPSET:
                modified |= _join_masks(graph)
        if modified:
            InferShapes()(model)
        return ir.passes.PassResult(model, super().call(model).modified or modified)


# -- reading a graph


def _read_written(product: ir.Node) -> Site | None:
    """The attention whose last product this is; None where no Softmax leads to it.

    Raises:
        Refused: it is one that cannot be fused.
    """
    weights, v = product.inputs
    assert weights is not None
    assert v is not None
    nodes = [product]
    weights, empty = _read_safe(weights, nodes)
    softmax = facts.made_by(weights, "Softmax")
    if softmax is None:
        return None
    axis = facts.attribute_int(softmax, "axis", -1)
    if not facts.is_last_axis(axis, weights):
        raise Refused("axis", softmax, f"softmax over axis {axis}, not provably the last one")
    if empty == "nan" and not is_inside(weights):
        raise Refused("shared", softmax, f"{weights.name} has other readers")
    nodes.append(softmax)
    site = Site(product, v, v, v, empty=empty, nodes=nodes)
    scores = softmax.inputs[0]
    assert scores is not None
    last = _read_scores(site, scores)
    q, keys = last.inputs
    assert q is not None
    assert keys is not None
    if facts.rank(q) in ROWS_FIRST:
        site.rank = len(dims_of(q))
    site.q = _strip_factors(site, q)
    _read_operands(site, _strip_factors(site, keys))
    return site


def _read_idle(reader: ir.Node) -> list[ir.Node]:
    """The Reshape in front of `reader` if it provably changes nothing."""
    value = input_of(reader)
    node = facts.made_by(value, "Reshape")
    if node is None or not is_inside(value):
        return []
    source = input_of(node)
    return [node] if facts.equal_dims(facts.proved_dims(value), facts.proved_dims(source)) else []


def _read_safe(weights: ir.Value, nodes: list[ir.Node]) -> tuple[ir.Value, Empty]:
    """Through Where(IsNaN(weights), 0, weights)."""
    where = facts.made_by(weights, "Where")
    if where is None:
        return weights, "nan"
    condition, zero, source = where.inputs
    test = facts.made_by(condition, "IsNaN")
    if test is None or test.inputs[0] is not source or source is None or facts.scalar(zero) != 0.0:
        return weights, "nan"
    if not is_inside(weights) or not is_inside(source, 2):
        raise Refused("shared", where, f"{source.name} has other readers")
    nodes += [where, test]
    return source, "safe"


def _read_scores(site: Site, scores: ir.Value) -> ir.Node:
    """The product of q and kᵀ in the scores; takes factors and the mask on the way."""
    scaled = False
    while True:
        node = scores.producer()
        if not is_inside(scores) or node is None or node.domain != "":
            raise Refused(
                "shared", node, f"the scores {scores.name} have other readers or come from outside"
            )
        site.nodes.append(node)
        if node.op_type == "MatMul":
            if len(site.steps) == 1 and site.steps[0].kind != "chosen":
                site.mask = site.steps.pop().value
            return node
        factored = _factor(node)
        if factored is not None:
            scores, factor = factored
            site.scale *= factor
            scaled |= factor != 1.0
            continue
        if node.op_type == "Tanh":
            if site.softcap is not None or not site.scale:
                raise Refused("softcap", node, "the scores are bent twice, or times 0")
            site.softcap = site.scale
            scores = input_of(node)
            continue
        step = _read_step(node)
        if scaled or site.softcap is not None:
            raise Refused("scaled_mask", node, "the mask is scaled or bent with the scores")
        if site.select or (site.steps and step.kind != site.steps[0].kind):
            raise Refused("mask_select", node, "numbers are selected and a mask is added")
        site.select = step.kind == "selected"
        site.steps.append(step)
        scores = step.scores


def _read_step(node: ir.Node) -> Step:
    """What a node that is no product and no factor does to the scores."""
    if node.op_type == "Where":
        step = read_selected(node) or read_selection(node)
        if step is None:
            raise Refused("mask_select", node, "selects what is not one constant number but 0")
        return step
    if node.op_type != "Add":
        raise Refused("scores", node, f"{node.op_type} changes the scores before the softmax")
    added = [value for value in node.inputs if value is not None]
    operands = [value for value in added if _has_product(value)]
    if not operands:
        code = "mask_select" if any(facts.made_by(value, "Where") for value in added) else "scores"
        raise Refused(code, node, f"{node_name(node)} adds no product of q and k")
    if len(operands) != 1:
        raise Refused("scores", node, f"both sides of {node_name(node)} are products")
    (scores,) = operands
    (mask,) = (value for value in added if value is not scores)
    return Step(node, scores, mask, "added")


def _has_product(value: ir.Value) -> bool:
    """Whether a product of two computed values is found behind factors and sums."""
    pending, seen = [value], set[ir.Node]()
    while pending:
        node = pending.pop().producer()
        if node is None or node.domain != "" or node in seen:
            continue
        seen.add(node)
        if node.op_type == "MatMul" and facts.constant(node.inputs[1]) is None:
            return True
        if node.op_type in ("Mul", "Div", "Add", "Tanh"):
            pending += filter(None, node.inputs)
    return False


def _factor(node: ir.Node) -> tuple[ir.Value, float] | None:
    """(x, c) if the node is c·x with a constant c."""
    if node.domain != "" or node.op_type not in ("Mul", "Div"):
        return None
    a, b = node.inputs
    for value, constant in ((a, b), (b, a)) if node.op_type == "Mul" else ((a, b),):
        number = facts.scalar(constant)
        if value is not None and number is not None and math.isfinite(number):
            if node.op_type == "Div":
                return (value, 1 / number) if number else None
            return value, number
    return None


def _strip_factors(site: Site, value: ir.Value) -> ir.Value:
    while (node := value.producer()) is not None and (factored := _factor(node)) is not None:
        site.nodes.append(node)
        value, factor = factored
        site.scale *= factor
    return value


def _read_operands(site: Site, keys: ir.Value) -> None:
    """Everything behind kᵀ, q and v that only moves data."""
    node = keys.producer()
    permutation = facts.permutation(node)
    *axes, rows, columns = range(site.rank)
    *moved, last, _ = site.heads_first
    swapped = {(*axes, columns, rows): "h", (*moved, columns, last): "s"}
    if permutation in swapped:
        assert node is not None
        site.nodes.append(node)
        site.k = input_of(node)
        site.letters["k"] = swapped[permutation]
    else:
        site.k = _read_flat_swap(site, keys)
    site.k = _strip_factors(site, site.k)
    if site.letters["k"] == "h" and site.rank == 4:
        _read_groups(site)
    read_turns(site)
    for name in "qkv":
        if site.letters[name] == "h":
            _read_sequence(site, name)


def _read_flat_swap(site: Site, keys: ir.Value) -> ir.Value:
    """k where kᵀ is Reshape(Transpose(Reshape(k))), [B, H, T, D] being [B·H, T, D] in between."""
    chain = []
    value = keys
    for op_type in ("Reshape", "Transpose", "Reshape"):
        node = facts.made_by(value, op_type)
        if node is None:
            detail = f"{keys.name} is no transpose of the keys"
            raise Refused("keys", value.producer(), detail)
        chain.append(node)
        value = input_of(node)
    flat = chain[1].inputs[0]
    assert flat is not None
    shapes = [facts.rank(value), facts.rank(flat), facts.rank(keys)]
    if shapes != [4, 3, 4] or facts.permutation(chain[1]) != (0, 2, 1):
        raise Refused("keys", chain[1], f"{keys.name} is no transpose of the keys")
    batch, heads, rows, inner = dims_of(value)
    if not facts.equal_dims(dims_of(flat)[1:], (rows, inner)) or not facts.equal_dims(
        dims_of(keys), (batch, heads, inner, rows)
    ):
        raise Refused("keys", chain[0], f"{keys.name} is not provably a transpose of the keys")
    site.nodes += chain
    site.flattened = value
    for reshape in chain[::2]:
        _note_shape(site, reshape)
    return value


def _read_groups(site: Site) -> None:
    """Through the repetition of heads of k and v, if both are the same."""
    k, v = _read_repeat(site.k), _read_repeat(site.v)
    if k is None or v is None or facts.rank(site.q) != 4:
        return
    heads, repeated = dims_of(k.source)[1], dims_of(k.result)[1]
    if dims_of(v.source)[1] != heads or dims_of(site.q)[1] != repeated:
        return
    if dims_of(v.result)[1] != repeated:
        return
    site.k, site.v, site.grouped = k.source, v.source, True
    for repeat in (k, v):
        site.nodes += repeat.nodes
        reshape, expand, _ = repeat.nodes
        _note_shape(site, reshape)
        _note_shape(site, expand)


def _note_shape(site: Site, node: ir.Node) -> None:
    """The source may take the shape of a Reshape or Expand from values outside the match."""
    shape = node.inputs[1]
    assert shape is not None
    if facts.constant(shape) is None:
        site.computed[shape] = node.outputs[0]


@dataclasses.dataclass(frozen=True)
class _Repeat:
    source: ir.Value
    result: ir.Value
    nodes: tuple[ir.Node, ...]  # Reshape, Expand, Unsqueeze


def _read_repeat(value: ir.Value) -> _Repeat | None:
    """[B, H, T, D] → [B, H, 1, T, D] → [B, H, n, T, D] → [B, H·n, T, D], by provable shapes."""
    nodes = []
    result = value
    for op_type in ("Reshape", "Expand", "Unsqueeze"):
        node = facts.made_by(value, op_type)
        if node is None:
            return None
        nodes.append(node)
        value = input_of(node)
    expanded = nodes[1].outputs[0]
    if facts.squeezed_axis(nodes[2]) not in (2, -3):
        return None
    if facts.rank(value) != 4 or facts.rank(expanded) != 5:
        return None
    batch, heads, rows, inner = dims_of(value)
    copies = dims_of(expanded)[2]
    if not isinstance(heads, int) or not isinstance(copies, int):
        return None
    if not facts.equal_dims(dims_of(expanded), (batch, heads, copies, rows, inner)):
        return None
    if not facts.equal_dims(facts.proved_dims(result), (batch, heads * copies, rows, inner)):
        return None
    return _Repeat(value, result, tuple(nodes))


def _read_sequence(site: Site, name: str) -> None:
    """Through the transpose from sequence-first to heads-first."""
    node = getattr(site, name).producer()
    if facts.permutation(node) == site.heads_first:
        site.nodes.append(node)
        setattr(site, name, input_of(node))
        site.letters[name] = "s"


def read_standard(node: ir.Node) -> Site:
    """The standard Attention op.

    Raises:
        Refused: it does more than the fused op.
    """
    q, k, v, mask, *past = (*node.inputs, None)
    assert q is not None
    assert k is not None
    assert v is not None
    if any(value is not None for value in past) or any(out.name for out in node.outputs[1:]):
        raise Refused("form", node, "keeps past keys and values, or gives its scores")
    for name, attribute in node.attributes.items():
        used = name in ("scale", "qk_matmul_output_mode")
        if not used and attribute.value != _IDLE.get(name):
            raise Refused("form", node, f"has {name} = {attribute.value}")
    given = node.attributes.get("scale")
    inner = facts.last_dim(q)
    if given is not None:
        scale = given.as_float()
    elif inner:
        scale = 1 / math.sqrt(inner)
    else:
        raise Refused("form", node, "scales by the root of a size that is not known")
    site = Site(node, q, k, v, mask, scale, "zero", nodes=[node])
    if mask is not None and not _covers(mask, k):
        raise Refused("form", node, f"{mask.name} may be shorter than the keys")
    _read_groups(site)
    if not site.grouped:
        site.grouped = not _same_heads(q, k, v)
    read_turns(site)
    for name in "qkv":
        _read_sequence(site, name)
    return site


def _covers(mask: ir.Value, k: ir.Value) -> bool:
    """Whether the mask provably has a column for every row of k [B, H, T, D].

    Where it has fewer, even one, the standard lets nothing attend to the rows without. The names
    of a cache that is an output count: where they are wrong, onnxruntime takes no such mask.
    """
    if not facts.rank(mask) or facts.rank(k) != 4:
        return False
    return facts.equal_dims((mask.shape[-1],), (k.shape[2],))  # type: ignore[index]


def _same_heads(q: ir.Value, k: ir.Value, v: ir.Value) -> bool:
    if any(facts.rank(value) != 4 for value in (q, k, v)):
        return False
    return all(facts.equal_dims(dims_of(value)[1:2], dims_of(q)[1:2]) for value in (k, v))


def _add_masks(graph: ir.Graph) -> bool:
    """Turn boolean masks of the standard op into what the standard adds for them: 0 or -inf."""
    made: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.op_type != "Attention" or node.domain != "" or len(node.inputs) < 4:
            continue
        mask = node.inputs[3]
        if mask is None or mask.dtype != ir.DataType.BOOL or node.graph is not mask.graph:
            continue
        if facts.dtype_of(input_of(node)) != "f32":  # it will stay as it is
            continue
        try:
            read_standard(node)
        except Refused:
            continue
        if mask not in made:
            made[mask] = _additive(graph, node, mask)
        node.replace_input_with(3, made[mask])
    return bool(made)


def _join_masks(graph: ir.Graph) -> bool:
    """Make one of several masks of scores, and of numbers selected in their place."""
    made: Made = {}
    for node in list(graph):
        if node.op_type != "MatMul" or node.domain != "":
            continue
        try:
            site = _read_written(node)
            if site is None or not site.steps:
                continue
            check_operands(site)
        except Refused:
            continue
        join(site.steps, made)
    if made:
        graph.sort()  # a mask may be made behind another reader of it
    return bool(made)


def _additive(graph: ir.Graph, before: ir.Node, mask: ir.Value) -> ir.Value:
    nodes = [
        ir.node("Constant", [], attributes={"value_float": number}, name=f"{mask.name}_{name}")
        for name, number in (("kept", 0.0), ("dropped", -math.inf))
    ]
    nodes.append(ir.node("Where", [mask, *(node.outputs[0] for node in nodes)]))
    for node in nodes:
        node.outputs[0].dtype = ir.DataType.FLOAT
    added = nodes[-1].outputs[0]
    nodes[-1].name = added.name = facts.unused(f"{mask.name}_additive", graph)
    added.shape = mask.shape
    graph.insert_before(before, nodes)
    return added
