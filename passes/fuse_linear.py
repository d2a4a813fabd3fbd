"""Linear maps of constant weights: packed at compile time, with what follows them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from fusenorm.ops.activation import Gated
from fusenorm.ops.linear import PANEL, Linear, pack, pack_gated
from fusenorm.ops.spec import DOMAIN
from fusenorm.passes import facts
from fusenorm.passes.fuse_glu import read_activation
from fusenorm.passes.fuse_norm import as_vector
from fusenorm.passes.pattern import Miss, Op, Pattern, Refusal, Speller, Var, node_name
from fusenorm.passes.rewrite import Check, Rewrite, RewritePass, Rule, root_key
from fusenorm.passes.spelling import add, one_of
from fusenorm.passes.validate import LEADING

_STANDARD = ("Relu", "Sigmoid", "Gelu")


@dataclasses.dataclass(frozen=True)
class _Map:
    """x·W + b as the graph has it.

    Attributes:
        x: the rows.
        weight: the constant, [K, N], or [N, K] if `transposed`.
        bias: [N], if there is one.
        nodes: what computes it.
        computed: shapes that Reshapes among them are given, in a check.
        part: the columns of W and b that are meant.
    """

    x: ir.Value
    weight: ir.Value
    transposed: bool
    bias: ir.Value | None
    nodes: tuple[ir.Node, ...]
    computed: Mapping[ir.Value, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    part: slice = dataclasses.field(default_factory=lambda: slice(None))

    @property
    def shape(self) -> tuple[int, int]:
        """K, N."""
        assert self.weight.shape is not None
        inner, columns = (int(size) for size in self.weight.shape)  # type: ignore[arg-type]
        if self.transposed:
            inner, columns = columns, inner
        return inner, len(range(columns)[self.part])

    @property
    def ragged(self) -> bool:
        """Whether its columns leave a panel unfilled."""
        return self.shape[1] % PANEL > 0

    def cut(self, part: slice, name: str) -> _Map:
        """The map to some of its columns; `name` ends that of its bias."""
        bias = self.bias
        if bias is not None:
            assert bias.const_value is not None
            array = np.ascontiguousarray(bias.const_value.numpy().ravel()[part])
            bias = ir.val(f"{bias.name}_{name}", const_value=ir.tensor(array))
        return dataclasses.replace(self, bias=bias, part=part)

    def no_bias(self) -> ir.Value:
        """A bias that changes nothing, not even the sign of 0."""
        assert self.weight.dtype is not None
        nothing = np.full(self.shape[1], -0.0, self.weight.dtype.numpy())
        return ir.val(f"{self.weight.name}_no_bias", const_value=ir.tensor(nothing))

    def matrix(self) -> np.ndarray:
        """W as [K, N]."""
        assert self.weight.const_value is not None
        array = self.weight.const_value.numpy()
        return (array.T if self.transposed else array)[:, self.part]


def _read_map(
    value: ir.Value | None, *, inside: bool = True, reshaped: bool = True
) -> _Map | Refusal | None:
    """The linear map whose result `value` is; None if it is none.

    Args:
        value: the result.
        inside: whether it becomes a value inside the fused op: then nothing else may read it.
        reshaped: whether there may be Reshapes around its product.
    """
    node = value.producer() if value is not None else None
    if value is None or node is None or node.domain != "":
        return None
    if inside and (len(value.uses()) != 1 or value.is_graph_output()):
        return None
    if node.op_type == "Add":
        for product, bias in (node.inputs, tuple(reversed(node.inputs))):
            # Behind another Add it would have a bias already.
            plain = facts.constant(bias) is not None and facts.made_by(product, "Add") is None
            found = _read_map(product, reshaped=reshaped) if plain else None
            if not isinstance(found, _Map) or found.bias is not None or bias is None:
                continue
            vector = as_vector(bias, found.shape[1], facts.rank(found.x))
            if vector is not None:
                return dataclasses.replace(found, bias=vector, nodes=(*found.nodes, node))
        return None
    if node.op_type == "Reshape":
        return _read_rows(node) if reshaped else None
    if node.op_type not in ("MatMul", "Gemm"):
        return None
    return _read_product(node)


def _read_rows(node: ir.Node) -> _Map | None:
    """The map of x [..., K] that `node` ends: x as [-1, K], its product, and that as [..., N]."""
    found = _read_map(node.inputs[0], reshaped=False)
    flat = facts.made_by(found.x, "Reshape") if isinstance(found, _Map) else None
    if not isinstance(found, _Map) or flat is None:
        return None
    (x, rows), (y, target) = flat.inputs, (node.outputs[0], node.inputs[1])
    assert x is not None
    assert rows is not None
    assert target is not None
    inner, columns = found.shape
    sizes = facts.last_dim(x), facts.last_dim(y)
    if sizes != (inner, columns) or not facts.same_leading_dims(x, y) or facts.rank(x) == 1:
        return None
    leading = LEADING[len(LEADING) + 1 - len(x.shape) :]  # type: ignore[arg-type]
    computed = {rows: (-1, inner), target: (*leading, columns)}
    return dataclasses.replace(found, x=x, nodes=(flat, *found.nodes, node), computed=computed)


def _read_product(node: ir.Node) -> _Map | Refusal | None:
    x, operand, *rest = node.inputs
    stored = _stored(operand)
    if x is None or stored is None:
        return None
    name, rank = node_name(node), facts.rank(x)
    if rank is None or rank < 2:
        return None
    weight, transposed = stored
    dtype = facts.dtype_of(weight)
    if dtype not in ("f32", "f16"):
        return Refusal("types", name, "only weights of f32 and f16 are packed")
    # A MatMul has none of these attributes.
    factors = [node.attributes[key] for key in ("alpha", "beta") if key in node.attributes]
    scales = any(factor.as_float() != 1.0 for factor in factors)
    if scales or facts.attribute_int(node, "transA", 0):
        return Refusal("gemm_form", name, "scales its operands or transposes x")
    transposed ^= bool(facts.attribute_int(node, "transB", 0))
    bias = rest[0] if rest else None
    found = _Map(x, weight, transposed, None, (node,))
    inner, columns = found.shape
    facts.assume_row(x, dtype, inner)
    if len(weight.uses()) > 1 or weight.is_graph_output():
        return Refusal("weight_shared", name, f"{weight.name} has other readers: not packed twice")
    if not inner * columns:
        return Refusal("empty", name, f"{weight.name} has no numbers")
    if not _fills(columns):
        return Refusal("columns", name, f"{columns} columns fill too little of panels of {PANEL}")
    if bias is None:
        return found
    vector = as_vector(bias, columns, 2) if facts.constant(bias) is not None else None
    if vector is None:
        return Refusal("bias_shape", name, f"{bias.name} is not one row of {columns} numbers")
    return dataclasses.replace(found, bias=vector)


def _fills(columns: int) -> bool:
    """Whether panels hold at most a quarter more than so many columns: more costs too much time."""
    return 4 * (-columns % PANEL) <= columns


def _stored(value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """The constant matrix behind `value`, and whether `value` is its transpose."""
    node = value.producer() if value is not None else None
    transposed = facts.permutation(node) == (1, 0)
    if node is not None and transposed:
        if len(node.outputs[0].uses()) != 1 or node.outputs[0].is_graph_output():
            return None
        value = node.inputs[0]
    if not facts.is_constant(value) or facts.rank(value) != 2:
        return None
    return value, transposed


def _halves(value: ir.Value | None, spec: Gated) -> tuple[_Map | None, _Map | None]:
    """Gate and up of a gated unit of one map: its columns are dealt out to two."""
    found = _read_map(value)
    if not isinstance(found, _Map) or found.shape[1] % 2:
        return None, None
    half = found.shape[1] // 2
    if not _fills(half):
        return None, None
    gate, up = (
        (slice(0, None, 2), slice(1, None, 2))
        if spec.layout == "interleaved"
        else (slice(0, half), slice(half, None))
    )
    if spec.layout == "up_gate":
        gate, up = up, gate
    return found.cut(gate, "gate"), found.cut(up, "up")


def _packed(like: ir.Value, panels: tuple[int, ...], make: Callable[[], np.ndarray]) -> ir.Value:
    """A made-up constant of the type of `like` that is computed when it is read."""
    assert like.dtype is not None
    tensor = ir.LazyTensor(lambda: ir.tensor(make()), dtype=like.dtype, shape=ir.Shape(panels))
    return ir.val(f"{like.name}_packed", const_value=tensor)


class FuseLinear(Rule):
    """A MatMul with a constant weight takes in what follows it, its weight packed for the CPU.

    ## What it matches
    MatMul or Gemm with a constant f32 or f16 weight [K, N] that nothing else reads; the Reshapes
    around it that make rows of x and take them back; a bias; the activation that reads the result
    (a standard one, or one fused before); a gated unit of two such maps of one input, or of the
    halves of one.

    ## Formula
    y = act(x·W + b), or y = act(x·W + b)∘(x·V + c).

    ## Numerics
    Products are summed in f32 in another order than onnxruntime's; in 16 bits the sum, the bias and
    the activation round where the graph rounds them. Columns that leave a panel of 32 unfilled
    come with a bias, and both maps of a gated unit if one has it: of -0, which changes no bit.

    ## Refuses
    `weight_shared`: a tied weight stays as it is, or it would be stored twice. `columns`: panels of
    32 would hold more than a quarter more than N. `empty`: K or N is 0. `bias_shape`, `gemm_form`,
    `types`, `check_failed`.

    ## References
    Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008.
    """

    name = "linear"
    op = "Linear"
    roots = frozenset(
        {"MatMul", "Gemm", "Add", "Reshape", *_STANDARD}
        | {root_key(DOMAIN, spec.op_type) for spec in Gated.variants()}
    )

    @functools.cached_property
    def pattern(self) -> Pattern:
        product = Op("MatMul", (Var("x"), Var("weight")))
        biased = one_of(product, add(product, Var("bias")))
        return one_of(biased, Op("Relu", (biased,)), Op("Sigmoid", (biased,)))

    def example(self, speller: Speller) -> None:
        speller.row("x")
        speller.matrix("weight", PANEL)
        speller.vector("bias", PANEL)

    def propose(self, root: ir.Node) -> Rewrite | Miss | None:
        spec = Gated.parse(root.op_type)
        if spec is not None and spec.layout != "none":
            return self._unit(root, spec)
        if spec is not None or root.op_type in _STANDARD:
            act = read_activation(root.outputs[0])
            if act is None:
                return None
            found = _read_map(act.gate)
            if not isinstance(found, _Map):
                return None
            return self._rewrite(root, (found,), act.spec, act.attributes)
        found = _read_map(root.outputs[0], inside=False)
        if isinstance(found, Refusal):
            return Miss((root,), found)
        if found is None:
            return None
        dtype = facts.dtype_of(found.weight)
        assert dtype is not None
        return self._rewrite(root, (found,), Gated("identity", "none", dtype), {})

    def _unit(self, root: ir.Node, spec: Gated) -> Rewrite | None:
        """The map or maps in front of a gated unit fused before."""
        attributes = {name: root.attributes[name].as_float() for name in spec.attributes}
        gate, up = (
            map(_read_map, root.inputs) if spec.layout == "pair" else _halves(root.inputs[0], spec)
        )
        if not isinstance(gate, _Map) or not isinstance(up, _Map):
            return None
        if gate.x is not up.x or gate.shape != up.shape:
            return None
        return self._rewrite(root, (gate, up), spec, attributes)

    def _rewrite(
        self, root: ir.Node, maps: tuple[_Map, ...], unit: Gated, attributes: dict[str, float]
    ) -> Rewrite | None:
        """The op of one map, or of gate and up, that ends in `unit`."""
        first, *_ = maps
        # The length of a bias tells how many columns a ragged weight has.
        biased = first.ragged or any(found.bias is not None for found in maps)
        given = [found.bias or found.no_bias() for found in maps] if biased else []
        linear = Linear.ending_in(unit, bias=biased, ragged=first.ragged)
        if linear is None:
            return None
        inner, columns = first.shape
        weight = _packed(
            first.weight,
            (len(maps) * math.ceil(columns / PANEL), inner, PANEL),
            lambda: (pack_gated if len(maps) > 1 else pack)(*(found.matrix() for found in maps)),
        )
        nodes = (node for found in maps for node in found.nodes)
        return Rewrite(
            rule=self.name,
            spec=linear,
            inputs=(first.x, weight, *given),
            attributes=attributes,
            outputs=(root.outputs[0],),
            nodes=tuple(dict.fromkeys((*nodes, root))),
            computed={value: shape for found in maps for value, shape in found.computed.items()},
        )


class FuseLinearMaps(RewritePass):
    """The pass of the linear rule."""

    name = "fuse_linear"

    def __init__(self, check: Check | None = None, budget: list[int] | None = None) -> None:
        super().__init__((FuseLinear(),), check, budget)
