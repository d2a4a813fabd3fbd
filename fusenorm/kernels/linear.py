"""Linear kernels: a tile of rows times packed panels in registers, then the epilogue.

The rows of x are laid out once, in tiles of some rows: per column of x its numbers of those rows,
widened to f32 and normalised, if the op does so. The accumulators of a tile fill most vector
registers; tiles and panels are both read from front to back, the gate of a gated unit before its
up. 16-bit weights are widened in registers; the first of several tiles leaves them in f32 for the
others. A tile's sums go through a small buffer to the epilogue, which is the row program of the
activation or gated unit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import tvm.script.ir_builder.tirx as T

from fusenorm.kernels.mathfn import Expr, Lanes
from fusenorm.kernels.program import row_program, symbols
from fusenorm.kernels.prologue import Prologue
from fusenorm.kernels.registers import Tile
from fusenorm.kernels.rows import BUFFER, Emitter, function, narrow, prefetch, round_to, widen
from fusenorm.ops import DTYPES, Linear, Slot
from fusenorm.ops.linear import PANEL

# Bytes of a panel fetched ahead of their use: the hardware's own prefetching stops at each page.
# One row waits for memory: what is still far off is kept from taking the first cache's own buffers.
# Of more rows the tile itself is fetched too.
_AHEAD, _FAR, _NEAR, _LINE = 4096, 16384, 2048, 64
# Tiles that share the fetching of the next panel: the last ones, or the rows of others would drive
# it out of the second cache before it is used.
_SHARES = 8
# Places in which few tiles fetch it at once: memory then gives more at a time.
_STREAMS = 4
# Rows of a tile from which laying them out as vectors pays.
_TRANSPOSED = 4
_SCALAR = Lanes(1)


def functions(spec: Linear, lanes: int) -> list[Any]:
    """The PrimFuncs of one map of `spec` with vectors of `lanes` f32, in the order of `symbols`.

    Both see the M rows in tiles: the first `taller` of height + 2 rows, the others of `height`,
    which is 1 or even; none has more than `Tile.rows`, the last may have one fewer and then that
    one twice. The first multiplies: tiles f32 [(M + 1)·K], weight [P, K, PANEL], the biases [N],
    residual [M, N], y [M, N], of 16-bit weights wide f32 [K·PANEL, or twice that for a gated unit]
    to write to, int64 height, taller, first and last tile, first and last panel of y, then the
    attributes as float32; residual may be y itself. The second makes the tiles: x [M, K], tiles,
    height, taller, first and last tile, then epsilon as float32 if it normalises the rows.
    """
    product, tiles = symbols(spec)
    tile = Tile.of(lanes)
    with function(product, noalias=not spec.residual) as multiplying:
        _multiply(spec.products, tile)
    with function(tiles) as laying_out:
        _lay_out(spec, tile)
    return [multiplying.get(), laying_out.get()]


def _integers(*names: str) -> list[Expr]:
    return [T.arg(name, T.int64()) for name in names]


def _buffer(slot: Slot, handle: Expr, shape: tuple[Any, ...]) -> Any:
    align = DTYPES[slot.dtype].numpy.itemsize
    return T.match_buffer(handle, shape, BUFFER[slot.dtype], align=align)


# -- products


def _multiply(spec: Linear, tile: Tile) -> None:
    slots = {slot.name: slot for slot in (*spec.inputs, *spec.outputs)}
    handles = {name: T.arg(name, T.handle()) for name in slots}
    wide = None
    if spec.dtype != "f32":
        wide = T.match_buffer(T.arg("wide", T.handle()), (T.int64(),), "float32", align=4)
    height, taller, begin, end, first, last = _integers(
        "height", "taller", "tile_begin", "tile_end", "panel_begin", "panel_end"
    )
    numbers = {name: T.arg(name, T.float32()) for name in spec.attributes}
    rows, inner, columns, panels = T.int64(), T.int64(), T.int64(), T.int64()
    shapes = {"weight": (panels, inner, PANEL)} | dict.fromkeys(("residual", "y"), (rows, columns))
    tiles = T.match_buffer(handles.pop("x"), (T.int64(),), "float32", align=4)
    # The outputs first: their shape defines the symbols the inputs' use.
    buffers = {
        name: _buffer(slots[name], handles[name], shapes.get(name, (columns,)))
        for name in sorted(handles, key=lambda name: name != "y")
    }
    parts = spec.parts
    sums = _on_stack(parts * tile.size)
    epilogue = _Epilogue(spec, tile, buffers, numbers, sums)
    steps = PANEL // tile.width
    with T.serial((last - first) * steps) as step:
        panel = T.bind(first + step // steps)
        offset = T.bind((step % steps) * tile.width)
        column = T.bind(panel * PANEL + offset)
        count = T.bind(end - begin)
        with T.serial(count) as index:
            row, size = _rows(begin + index, height, taller, rows)
            start, padded = T.bind(row * inner), _padded(size)
            shares = T.bind(T.min(count, T.int64(_SHARES)))
            next_panel = T.bind(inner * (PANEL * parts + step % steps * tile.width))
            ahead = (next_panel, T.bind(index - count + shares), shares)
            if spec.residual:
                item = DTYPES[spec.dtype].numpy.itemsize
                with T.serial(size) as i:
                    for later in range(0, tile.width, _LINE // item):
                        prefetch(buffers["residual"][row + i, column + later], 1)
            with T.serial(parts) as part:
                place = _Place(start, part, T.bind(panel * parts + part), offset, *ahead)
                for known in (1, *range(2, tile.rows + 1, 2)):
                    turns = _turns(spec, tile, known, index, count)
                    for turn, holds in turns.items():
                        with T.If(T.And(padded == known, holds)), T.Then():
                            read = _Panels(buffers["weight"], wide, turn)
                            _accumulate(spec, tile, tiles, read, sums, known, place)
            epilogue.finish(row, size, column)


# Of a tile among those that pass the same panels.
_Turn = Literal["row", "few", "first", "later"]


def _turns(spec: Linear, tile: Tile, rows: int, index: Expr, count: Expr) -> dict[_Turn, Expr]:
    """Which turns tile `index` of `count` may have if it has so many rows, and when.

    One of several has more than half of what a tile can hold. A few still wait for memory, of wide
    vectors more than of narrow ones.
    """
    if rows == 1:
        return {"row": T.bool(True)}
    if 2 * rows <= tile.rows:
        return {"few": T.bool(True)}
    if spec.dtype == "f32":
        few = tile.lanes // 4
        return {"few": count <= few, "later": count > few}
    return {"few": count == 1, "first": T.And(count > 1, index == 0), "later": index > 0}


@dataclasses.dataclass(frozen=True)
class _Panels:
    """What a tile multiplies with.

    Attributes:
        weight: [P, K, PANEL].
        wide: the columns of the tile in f32, row after row of each part: the first tile makes them,
            later ones read them; none of f32 weights.
        turn: of the tile.
    """

    weight: Any
    wide: Any
    turn: _Turn

    @property
    def widened(self) -> bool:
        return self.wide is not None and self.turn == "later"


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tile works.

    Attributes:
        start: its first number in `tiles`.
        part: 1 for the up of a gated unit, else 0.
        panel: of the weight.
        offset: the first column in that panel.
        later: the first weight that is fetched meanwhile, counted from the panel's first: all steps
            over a panel fetch the next one of the same part.
        share, shares: its own share in that, none if negative, and how many there are.
    """

    start: Expr
    part: Expr
    panel: Expr
    offset: Expr
    later: Expr
    share: Expr
    shares: Expr

    def streams(self, tile: Tile, inner: Expr, count: int) -> tuple[list[Expr], Expr]:
        """Which weights to fetch at row 0, and how many further at each next row."""
        each = T.truncdiv(tile.width + self.shares * count - 1, self.shares * count)
        pace = T.bind(T.Select(self.share < 0, T.int64(0), each))
        apart = T.bind(inner * pace)
        first = T.bind(self.later + apart * count * self.share)
        return [T.bind(first + apart * i) for i in range(count)], pace


def _rows(tile: Expr, height: Expr, taller: Expr, rows: Expr) -> tuple[Expr, Expr]:
    """The first row of a tile, and how many it has."""
    first = T.bind(tile * height + T.min(tile, taller) * 2)
    most = height + T.Select(tile < taller, T.int64(2), T.int64(0))
    return first, T.bind(T.min(most, rows - first))


def _padded(size: Expr) -> Expr:
    """Rows a tile of `size` rows is laid out for."""
    return T.bind(size + T.Select(size > 1, size % 2, T.int64(0)))


def _on_stack(size: int) -> Any:
    """An f32 buffer on the stack: from 1 KiB on TVM would ask its runtime for memory."""
    return T.alloc_buffer((size,), "float32", annotations={"disable_lower_builtin": True})


def _accumulate(
    spec: Linear,
    tile: Tile,
    tiles: Any,
    panels: _Panels,
    sums: Any,
    rows: int,
    place: _Place,
) -> None:
    """Products of a tile of `rows` rows with the tile's columns, left in `sums`."""
    weight, wide, turn = panels.weight, panels.wide, panels.turn
    lanes, inner = Lanes(tile.lanes), weight.shape[1]
    size = DTYPES[spec.dtype].numpy.itemsize
    totals = lanes.zeros(rows * tile.vectors)
    kept = T.bind(place.part * inner * tile.width)
    streams, pace = place.streams(tile, inner, _STREAMS if turn == "few" else 1)
    with T.serial(inner) as k:
        if turn != "row":
            for stream in streams:
                prefetch(weight[place.panel, T.int64(0), stream + k * pace], 2)
            prefetch(tiles[place.start + k * rows + _NEAR // 4], 1)
        if panels.widened:
            for column in range(0, tile.width, _LINE // 4):
                prefetch(wide[kept + k * tile.width + column + _AHEAD // 4], 1)
        else:
            for column in range(0, tile.width, _LINE // size):
                ahead = {2: _FAR, 1: _NEAR} if turn == "row" else {1: _AHEAD}
                for level, count in ahead.items():
                    later = k + count // (PANEL * size)
                    prefetch(weight[place.panel, later, place.offset + column], level)
        weights = []
        for vector in range(tile.vectors):
            at = T.ramp(kept + k * tile.width + vector * tile.lanes, 1, tile.lanes)
            if panels.widened:
                weights.append(T.bind(wide[at]))
                continue
            column = T.ramp(place.offset + vector * tile.lanes, 1, tile.lanes)
            weights.append(T.bind(widen(lanes, spec.dtype, weight[place.panel, k, column])))
            if turn == "first":
                T.buffer_store(wide, weights[-1], [at])
        for i in range(rows):
            spread = T.bind(lanes.spread(tiles[place.start + k * rows + i]))
            for j, vector in enumerate(weights):
                lanes.add(totals[i * tile.vectors + j], spread * vector)
    for index, total in enumerate(totals):
        target = T.ramp(place.part * tile.size + index * tile.lanes, 1, tile.lanes)
        T.buffer_store(sums, total[T.ramp(0, 1, tile.lanes)], [target])


# -- the rows of x


def _lay_out(spec: Linear, tile: Tile) -> None:
    source, target = T.arg("x", T.handle()), T.arg("tiles", T.handle())
    height, taller, begin, end = _integers("height", "taller", "tile_begin", "tile_end")
    norm = spec.prologue
    numbers = {name: T.arg(name, T.float32()) for name in (norm.attributes if norm else ())}
    rows, inner = T.int64(), T.int64()
    x = _buffer(spec.inputs[0], source, (rows, inner))
    tiles = T.match_buffer(target, (T.int64(),), "float32", align=4)
    prologue = Prologue(norm, Lanes(tile.lanes), x, numbers, tile.rows) if norm else None

    def value(lanes: Lanes, stored: Expr, i: Expr) -> Expr:
        if prologue is not None:
            return prologue.value(lanes, stored, i)
        return lanes.let(widen(lanes, spec.dtype, stored))

    with T.serial(end - begin) as index:
        row, size = _rows(begin + index, height, taller, rows)
        start, padded = T.bind(row * inner), _padded(size)
        if prologue is not None:
            prologue.measure_tile(row, size)
        with T.If(size < _TRANSPOSED):
            with T.Then(), T.serial(inner) as k, T.serial(padded) as i:
                at = T.bind(T.min(i, size - 1))
                number = value(_SCALAR, x[row + at, k], at)
                T.buffer_store(tiles, number, [start + k * padded + i])
            with T.Else():
                for group in range(0, tile.rows, tile.lanes):
                    with T.If(size > group), T.Then():
                        _transpose(value, Lanes(tile.lanes), x, tiles, row, group, (size, padded))


def _transpose(
    value: Callable[[Lanes, Expr, Expr], Expr],
    lanes: Lanes,
    x: Any,
    tiles: Any,
    row: Expr,
    group: int,
    sizes: tuple[Expr, Expr],
) -> None:
    """Rows from row + `group` of a tile, as many as a vector has lanes.

    value: f32 lanes of what is stored in a row of the tile.
    sizes: of the tile, and padded.
    """
    size, padded = sizes
    inner, width = x.shape[1], lanes.count
    rows = [T.bind(T.min(T.int64(group + lane), size - 1)) for lane in range(width)]
    held = lanes.first(T.bind(padded - group))
    start = T.bind(row * inner + group)

    def columns(k: Expr, mask: Expr) -> list[Expr]:
        column = T.ramp(k, 1, width)
        if mask is None:
            stored = [T.bind(x[row + i, column]) for i in rows]
        else:
            kind = lanes.type(str(x.dtype))
            stored = [T.bind(T.masked_load(kind, x, row + i, column, mask)) for i in rows]
        return lanes.transposed([value(lanes, *each) for each in zip(stored, rows, strict=True)])

    def place(k: Expr) -> Expr:
        return T.ramp(start + k * padded, 1, width)

    blocks = T.bind(inner // width)
    with T.serial(blocks) as block:
        k = T.bind(block * width)
        for later in range(_NEAR // 4, _NEAR // 4 + width * width, _LINE // 4):
            prefetch(tiles[start + k * padded + later], 1)
        for lane, vector in enumerate(columns(k, None)):
            T.evaluate(T.masked_store(tiles, vector, place(k + lane), held))
    rest = T.bind(inner - blocks * width)
    with T.If(rest > 0), T.Then():
        k = T.bind(blocks * width)
        for lane, vector in enumerate(columns(k, lanes.first(rest))):
            with T.If(rest > lane), T.Then():
                T.evaluate(T.masked_store(tiles, vector, place(k + lane), held))


# -- what follows the products


class _Epilogue:
    """Bias, activation and product, or residual sum, of a tile, one row at a time."""

    def __init__(
        self,
        spec: Linear,
        tile: Tile,
        buffers: dict[str, Any],
        numbers: dict[str, Expr],
        sums: Any,
    ) -> None:
        self.spec, self.tile, self.buffers, self.sums = spec, tile, buffers, sums
        self.numbers = numbers
        self.lanes = Lanes(tile.lanes)
        self.activation: Emitter | None = None
        self.alpha: Expr = None

    def finish(self, row: Expr, count: Expr, column: Expr) -> None:
        """Write `count` rows of y from the sums."""
        if not self.spec.ragged:
            self._finish(row, count, column, whole=True)
            return
        with T.If(column + self.tile.width <= self.buffers["y"].shape[1]):
            with T.Then():
                self._finish(row, count, column, whole=True)
            with T.Else():
                self._finish(row, count, column, whole=False)

    def _finish(self, row: Expr, count: Expr, column: Expr, *, whole: bool) -> None:
        """The columns of the tile from `column`, some of which y may not have unless `whole`."""
        tile = self.tile
        with T.serial(count) as i:
            self.lanes = Lanes(tile.lanes, T.bind(T.cast(T.shift_right(i, 40), "uint32")))
            self.activation = self._activation()
            if self.spec.alpha:
                alpha = round_to(_SCALAR, self.spec.dtype, self._number("alpha"))
                self.alpha = T.bind(self.lanes.spread(alpha))
            for vector in range(tile.vectors):
                first = column + vector * tile.lanes
                columns, mask = T.ramp(first, 1, tile.lanes), None
                if not whole:
                    left = self.buffers["y"].shape[1] - first
                    mask = self.lanes.first(T.max(left, T.int64(0)))
                parts = [
                    self._sum(part * tile.size + i * tile.width, part, vector, columns, mask)
                    for part in range(self.spec.parts)
                ]
                value = self._apply(parts)
                if self.spec.residual:
                    value = self._with_residual(value, [row + i, columns])
                y = T.bind(narrow(self.lanes, self.spec.dtype, value))
                if mask is None:
                    T.buffer_store(self.buffers["y"], y, [row + i, columns])
                else:
                    T.evaluate(T.masked_store(self.buffers["y"], y, row + i, columns, mask))

    def _activation(self) -> Emitter | None:
        if not self.spec.gated and self.spec.activation == "identity":
            return None
        program = row_program(self.spec.unit)
        emitter = Emitter(program, program.outputs, self.lanes)
        for name in self.numbers:
            emitter.scalars[name] = self._number(name)
        emitter.uniform("attribute")
        emitter.spread(set(emitter.scalars))
        return emitter

    def _number(self, name: str) -> Expr:
        """An attribute, read anew in each turn as constants are."""
        return _SCALAR.from_bits(_SCALAR.bits(self.numbers[name]) ^ self.lanes.zero)

    def _sum(self, at: Expr, part: int, vector: int, columns: Expr, mask: Expr) -> Expr:
        lanes, dtype = self.lanes, self.spec.dtype
        total = self.sums[T.ramp(at + vector * self.tile.lanes, 1, self.tile.lanes)]
        value = lanes.let(round_to(lanes, dtype, total))
        if not self.spec.bias:
            return value
        names = [slot.name for slot in self.spec.inputs if slot.layout == "vector"]
        biases = self.buffers[names[part]]
        if mask is None:
            stored = biases[columns]
        else:
            stored = T.masked_load(lanes.type(BUFFER[dtype]), biases, columns, mask)
        bias = T.bind(widen(lanes, dtype, T.bind(stored)))
        return lanes.let(round_to(lanes, dtype, value + bias))

    def _apply(self, parts: list[Expr]) -> Expr:
        if self.activation is None:
            return parts[0]
        names = ("gate", "up") if self.spec.gated else ("x",)
        return self.activation.apply(dict(zip(names, parts, strict=True)))

    def _with_residual(self, value: Expr, place: list[Expr]) -> Expr:
        """`value`, rounded already, and residual at `place`, which nothing reads later."""
        lanes, dtype = self.lanes, self.spec.dtype
        residual = T.bind(widen(lanes, dtype, self.buffers["residual"][tuple(place)]))
        if self.spec.alpha:
            residual = lanes.let(round_to(lanes, dtype, residual * self.alpha))
        return lanes.let(value + residual)
