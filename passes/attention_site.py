"""One attention as it was read of a graph, and the rewrite it becomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from fusenorm.ops.attention import Attention, Empty, Form
from fusenorm.passes import facts
from fusenorm.passes.join_masks import Step
from fusenorm.passes.pattern import Refusal, node_name
from fusenorm.passes.rewrite import Rewrite, View

# By rank, the order that makes the axes of a heads-first operand those of a sequence-first one.
ROWS_FIRST = {3: (1, 0, 2), 4: (0, 2, 1, 3), 5: (0, 3, 1, 2, 4)}


class Refused(Exception):
    """A candidate that is none; carries why."""

    def __init__(self, code: str, node: ir.Node | None, detail: str) -> None:
        super().__init__(detail)
        self.refusal = Refusal(code, node_name(node), detail)


@dataclasses.dataclass(frozen=True)
class Turn:
    """How a value is turned.

    Attributes:
        source: the rows before.
        cos, sin: the tables.
        width: how many numbers of a row turn.
        form, partial: see Attention.
        nodes: what turns it, last first.
        computed: shapes it takes from elsewhere, and the value each is the shape of.
    """

    source: ir.Value
    cos: ir.Value
    sin: ir.Value
    width: int
    form: Form
    nodes: tuple[ir.Node, ...]
    computed: Mapping[ir.Value, ir.Value] = dataclasses.field(default_factory=dict)
    partial: bool = False

    def like(self, other: Turn) -> bool:
        """Whether another value is turned in the same way."""
        names = ("cos", "sin", "form", "partial")
        return all(getattr(self, name) == getattr(other, name) for name in names)


@dataclasses.dataclass
class Site:
    """What has been read of one attention.

    Attributes:
        q, k, v: the operands, heads-first unless their letter says `s`: [B, H, S, D], [H, S, D] or,
            with heads in groups, [B, G, H, S, D].
        mask: what is added to the scores.
        scale: the product of the factors found.
        empty: see Attention.
        grouped: whether heads of k and v are shared.
        turn: the rotary positions of q.
        keys_turn: whether k has the same.
        select, softcap: see Attention.
        steps: what happens to the scores behind the softcap and has to be joined to one mask first.
        nodes: what computes it, last first.
        computed: shapes the source takes from elsewhere, and the value each is the shape of.
        flattened: what Reshapes turn into kᵀ; no operand, but its sizes have names.
    """

    root: ir.Node
    q: ir.Value
    k: ir.Value
    v: ir.Value
    mask: ir.Value | None = None
    scale: float = 1.0
    empty: Empty = "nan"
    grouped: bool = False
    turn: Turn | None = None
    keys_turn: bool = False
    select: bool = False
    softcap: float | None = None
    steps: list[Step] = dataclasses.field(default_factory=list)
    letters: dict[str, str] = dataclasses.field(default_factory=lambda: dict.fromkeys("qkvy", "h"))
    nodes: list[ir.Node] = dataclasses.field(default_factory=list)
    computed: dict[ir.Value, ir.Value] = dataclasses.field(default_factory=dict)
    flattened: ir.Value | None = None
    rank: int = 4

    @property
    def heads_first(self) -> tuple[int, ...]:
        """The order that makes the axes of a sequence-first operand those of a heads-first one."""
        return tuple(map(ROWS_FIRST[self.rank].index, range(self.rank)))

    def sizes(self, name: str) -> tuple[tuple[int | ir.SymbolicDim, ...], int | ir.SymbolicDim]:
        """The heads, and the rows, of q, k or v."""
        dims = dims_of(getattr(self, name))
        first = ROWS_FIRST[self.rank].index(self.rank - 2)
        if self.letters[name] == "s":
            return dims[first + 1 : -1], dims[first]
        return dims[first:-2], dims[-2]


def check_operands(site: Site) -> None:
    for name in "qkv":
        value = getattr(site, name)
        if facts.dtype_of(value) != "f32":
            raise Refused("types", site.root, f"{value.name} is not known to be f32")
        if facts.rank(value) != site.rank:
            raise Refused("rank", site.root, f"{value.name} is not known to have {site.rank} axes")
    (heads, _), (k_heads, k_rows), (v_heads, v_rows) = map(site.sizes, "qkv")
    # MatMul repeats the last heads of k and v, if they are one, for each of q.
    if k_heads[-1] == v_heads[-1] == 1 and isinstance(heads[-1], int) and heads[-1] > 1:
        site.grouped = True
    if (k_rows == 1) != (v_rows == 1):
        raise Refused("shapes_not_proved", site.root, "the one row of k or v may be repeated")
    for mask in filter(None, (site.mask, *(step.value for step in site.steps))):
        if mask.dtype != ir.DataType.BOOL and facts.dtype_of(mask) != "f32":
            raise Refused("types", site.root, f"the mask {mask.name} is not known to be f32")
        rank = facts.rank(mask)
        if rank is None or rank > min(site.rank, 4):
            raise Refused("rank", site.root, f"the mask {mask.name} has {rank} axes")
        if site.rank > 4 and any(dim != 1 for dim in dims_of(mask)[:-2]):
            raise Refused("rank", site.root, f"the mask {mask.name} may differ between heads")


def _views(site: Site) -> tuple[dict[str, View], View | None]:
    """How the op sees the operands, and y is seen, with four axes."""
    if site.rank == 4:
        return {}, None
    if site.rank == 3:
        return dict.fromkeys("qkv", View("Unsqueeze", (0,))), View("Squeeze", (0,))
    own, _ = site.sizes("q")
    shared = (own[0], 1) if site.grouped else own
    sizes = {}
    for name, heads in zip("qkv", (own, shared, shared), strict=True):
        value = getattr(site, name)
        known = [size for size in (*heads, dims_of(value)[-1]) if isinstance(size, int) and size]
        sequence = site.letters[name] == site.letters["y"] == "s"
        if site.sizes(name)[0] != heads or len(known) < 3 or not sequence:
            detail = f"the groups of heads of {value.name} are not provably one axis"
            raise Refused("rank", site.root, detail)
        sizes[name] = known
    views = {name: View("Reshape", (0, 0, a * b, last)) for name, (a, b, last) in sizes.items()}
    return views, View("Reshape", (0, 0, *sizes["q"][:2], sizes["v"][2]))


def rewrite_of(root: ir.Node, site: Site) -> Rewrite:
    turn = site.turn
    spec = Attention(
        "".join(site.letters.values()),
        site.mask is not None,
        site.grouped,
        site.empty,
        "none" if turn is None else "qk" if site.keys_turn else "q",
        "halves" if turn is None else turn.form,
        turn is not None and turn.partial,
        site.select,
        site.softcap is not None,
    )
    attributes = {"scale": site.scale}
    if site.softcap is not None:
        attributes["softcap"] = site.softcap
    mask = () if site.mask is None else (site.mask,)
    tables = () if turn is None else (turn.cos, turn.sin)
    inputs = (site.q, site.k, site.v, *mask, *tables)
    shapes, symbols = _trial(site)
    views, result = _views(site)
    computed = {}
    for value, like in site.computed.items():
        dims = [dim if isinstance(dim, int) else symbols.get(dim.value) for dim in dims_of(like)]
        if dims.count(None) == 1 and facts.made_by(like, "Reshape") is not None:
            dims = [-1 if dim is None else dim for dim in dims]
        if None in dims:
            raise Refused("shapes_not_proved", root, f"{like.name} has a size found nowhere else")
        computed[value] = tuple(dim for dim in dims if dim is not None)
    return Rewrite(
        rule="attention",
        spec=spec,
        inputs=inputs,
        attributes=attributes,
        outputs=(root.outputs[0],),
        nodes=tuple(dict.fromkeys(reversed(site.nodes))),
        views=views,
        result=result,
        shapes=shapes,
        computed=computed,
    )


_ROLES = {
    "q": "BHSD",
    "k": "BGTD",
    "v": "BGTE",
    "mask": "BHST",
    "cos": "BHSR",
    "sin": "BHSR",
    "flattened": "BHTD",
}
_CACHE_ROLES = dict.fromkeys(("cos", "sin"), "HBSR")  # three axes at most
_SIZES = {"B": 2, "H": 6, "G": 3, "S": 5, "T": 7, "D": 4, "E": 3}


def _trial(site: Site) -> tuple[dict[ir.Value, tuple[int, ...]], Mapping[str | None, int]]:
    """Shapes to try the operands with, known sizes as they are; and sizes by symbol."""
    axes: list[tuple[str, int | ir.SymbolicDim]] = []
    operands: list[tuple[ir.Value, str]] = []
    tables = {} if site.turn is None else {"cos": site.turn.cos, "sin": site.turn.sin}
    cached = site.turn is not None and site.turn.form == "cached"
    for name, roles in (_ROLES | (_CACHE_ROLES if cached else {})).items():
        value = tables.get(name) or getattr(site, name, None)
        if value is None:
            continue
        rank = len(dims_of(value))
        lead = {3: roles[1], 4: roles[:2], 5: roles[:2] + roles[1]}[site.rank]
        roles = lead + roles[2:]
        roles = roles[len(roles) - rank :]
        if site.letters.get(name) == "s":
            roles = "".join(roles[axis] for axis in ROWS_FIRST[rank])
        if site.keys_turn:
            roles = roles.replace("T", "S")
        if not site.grouped:
            roles = roles.replace("G", "H")
        operands.append((value, roles))
        axes += zip(roles, dims_of(value), strict=True)
    sizes = _SIZES | {role: dim for role, dim in axes if isinstance(dim, int) and dim > 1}
    names = {dim.value: role for role, dim in axes if isinstance(dim, ir.SymbolicDim) and dim.value}
    for role, dim in axes:  # rows of q and of k may be of one number
        if isinstance(dim, ir.SymbolicDim) and dim.value:
            sizes[role] = sizes[names[dim.value]]
    shapes = {
        value: tuple(
            dim if isinstance(dim, int) and dim > 0 else sizes[role]
            for role, dim in zip(roles, dims_of(value), strict=True)
        )
        for value, roles in operands
    }
    return shapes, {name: sizes[role] for name, role in names.items()}


def dims_of(value: ir.Value) -> tuple[int | ir.SymbolicDim, ...]:
    dims = facts.proved_dims(value)
    assert dims is not None
    return dims


def input_of(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def is_inside(value: ir.Value, readers: int = 1) -> bool:
    """Whether nothing but the nodes of the match reads the value."""
    return len(value.uses()) == readers and not value.is_graph_output()
