"""Linear kernels: a tile of rows times packed panels in registers, then the epilogue.

The accumulators of a tile fill most vector registers; panels are read from front to back, rows of
x by broadcast; 16-bit weights are widened in registers, 16-bit rows a chunk at a time on the stack.
A tile's sums go through a small buffer to the epilogue, which is the row program of the activation
or gated unit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import tvm.script.ir_builder.tirx as T

from fusenorm.kernels.mathfn import Expr, Lanes
from fusenorm.kernels.program import row_program, symbols
from fusenorm.kernels.rows import BUFFER, Emitter, function, narrow, round_to, widen
from fusenorm.ops import DTYPES, Linear
from fusenorm.ops.linear import PANEL

# Columns of 16-bit rows that are widened at a time.
CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one pass over K computes: `rows` rows of `vectors` vectors of each of `parts` panels.

    parts: 2 for a gated unit (gate and up), else 1.
    """

    lanes: int
    rows: int
    vectors: int
    parts: int

    @classmethod
    def of(cls, spec: Linear, lanes: int) -> Tile:
        """The tile whose accumulators, panel vectors and a broadcast fit the registers."""
        parts = 2 if spec.gated else 1
        if lanes == 16:
            return cls(lanes, 6 if spec.gated else 8, 2, parts)
        return cls(lanes, 6, 2 // parts, parts)

    @property
    def width(self) -> int:
        """Output columns."""
        return self.lanes * self.vectors

    @property
    def columns(self) -> int:
        """Accumulated columns."""
        return self.width * self.parts


def functions(spec: Linear, lanes: int) -> list[Any]:
    """The PrimFunc of `spec` with vectors of `lanes` f32.

    Arguments: x [M, K], weight [P, K, PANEL], the biases [N], y [M, N], int64 first and last row,
    first and last panel of y, then the attributes as float32.
    """
    (name,) = symbols(spec)
    tile = Tile.of(spec, lanes)
    with function(name) as builder:
        _emit(spec, tile)
    return [builder.get()]


def _emit(spec: Linear, tile: Tile) -> None:
    handles = {slot.name: T.arg(slot.name, T.handle()) for slot in (*spec.inputs, *spec.outputs)}
    begin, end, first, last = (
        T.arg(name, T.int64()) for name in ("row_begin", "row_end", "panel_begin", "panel_end")
    )
    numbers = {name: T.arg(name, T.float32()) for name in spec.attributes}
    rows, inner, columns, panels = T.int64(), T.int64(), T.int64(), T.int64()
    shapes = {"x": (rows, inner), "weight": (panels, inner, PANEL), "y": (rows, columns)}
    # The outputs first: their shape defines the symbols the inputs' use.
    names = ("y", *(slot.name for slot in spec.inputs))
    buffers = {
        name: T.match_buffer(
            handles[name],
            shapes.get(name, (columns,)),
            BUFFER[spec.dtype],
            align=DTYPES[spec.dtype].numpy.itemsize,
        )
        for name in names
    }
    sums = _on_stack(tile.rows * tile.columns)
    epilogue = _Epilogue(spec, tile, buffers, numbers, sums)
    steps = PANEL // tile.width
    with T.serial((last - first) * steps) as step:
        panel = T.bind(first + step // steps)
        offset = T.bind((step % steps) * tile.width)
        epilogue.begin(T.bind(panel * PANEL + offset))
        full = T.bind((end - begin) // tile.rows)
        with T.serial(full) as index:
            row = T.bind(begin + index * tile.rows)
            _accumulate(spec, tile, buffers, sums, tile.rows, (row, panel, offset))
            epilogue.finish(row, tile.rows)
        row = T.bind(begin + full * tile.rows)
        rest = T.bind(end - row)
        for count in range(1, tile.rows):
            with T.If(rest == count), T.Then():
                _accumulate(spec, tile, buffers, sums, count, (row, panel, offset))
        epilogue.finish(row, rest)


def _on_stack(size: int) -> Any:
    """An f32 buffer on the stack: from 1 KiB on TVM would ask its runtime for memory."""
    return T.alloc_buffer((size,), "float32", annotations={"disable_lower_builtin": True})


def _accumulate(
    spec: Linear,
    tile: Tile,
    buffers: dict[str, Any],
    sums: Any,
    rows: int,
    origin: tuple[Expr, Expr, Expr],
) -> None:
    """Products of `rows` rows with the tile's columns, left in `sums`.

    origin: the tile's first row, its panel of y, and its first column in that panel.
    """
    lanes, per_row = Lanes(tile.lanes), tile.vectors * tile.parts
    row, panel, offset = origin
    inner = buffers["x"].shape[1]
    registers = _on_stack(rows * tile.columns)

    def at(i: int, j: int) -> Expr:
        return T.ramp((i * per_row + j) * tile.lanes, 1, tile.lanes)

    def step(k: Expr, value: Callable[[int], Expr]) -> None:
        """One row of the panels times one column of x."""
        weights = []
        for part in range(tile.parts):
            for vector in range(tile.vectors):
                column = T.ramp(offset + vector * tile.lanes, 1, tile.lanes)
                stored = buffers["weight"][panel * tile.parts + part, k, column]
                weights.append(T.bind(widen(lanes, spec.dtype, stored)))
        for i in range(rows):
            spread = T.bind(lanes.spread(value(i)))
            for j in range(per_row):
                T.buffer_store(registers, registers[at(i, j)] + spread * weights[j], [at(i, j)])

    tiles = [(i, j) for i in range(rows) for j in range(per_row)]
    for i, j in tiles:
        T.buffer_store(registers, lanes.f32(0.0), [at(i, j)])
    if spec.dtype == "f32":
        with T.serial(inner) as k:
            step(k, lambda i: buffers["x"][row + i, k])
    else:
        # Seen through a second name, or TVM shrinks it to the part used, of unknown size.
        wide = T.decl_buffer((rows * CHUNK,), "float32", data=_on_stack(rows * CHUNK).data)
        with T.serial((inner + CHUNK - 1) // CHUNK) as chunk:
            first = T.bind(chunk * CHUNK)
            size = T.bind(T.min(inner - first, CHUNK))
            for i in range(rows):
                _widen_row(spec, lanes, wide, i * CHUNK, buffers["x"], row + i, first, size)
            with T.serial(size) as k:
                step(first + k, lambda i: wide[i * CHUNK + k])
    for i, j in tiles:
        T.buffer_store(sums, registers[at(i, j)], [at(i, j)])


def _widen_row(
    spec: Linear, lanes: Lanes, target: Any, at: int, x: Any, row: Expr, first: Expr, size: Expr
) -> None:
    """x[row, first : first + size] as f32 at target[at...]."""
    count = T.bind(size // lanes.count)
    with T.serial(count) as block:
        column = T.bind(block * lanes.count)
        stored = x[row, T.ramp(first + column, 1, lanes.count)]
        value = widen(lanes, spec.dtype, stored)
        T.buffer_store(target, value, [T.ramp(at + column, 1, lanes.count)])
    done = T.bind(count * lanes.count)
    with T.serial(size - done) as rest:
        value = widen(Lanes(1), spec.dtype, x[row, first + done + rest])
        T.buffer_store(target, value, [at + done + rest])


class _Epilogue:
    """Bias, activation and product of a tile, one row at a time."""

    def __init__(
        self,
        spec: Linear,
        tile: Tile,
        buffers: dict[str, Any],
        numbers: dict[str, Expr],
        sums: Any,
    ) -> None:
        self.spec, self.tile, self.buffers, self.sums = spec, tile, buffers, sums
        self.lanes = Lanes(tile.lanes)
        self.activation = None
        if spec.gated or spec.activation != "identity":
            program = row_program(spec.unit)
            self.activation = Emitter(program, program.outputs, tile.lanes)
            self.activation.scalars.update(numbers)
            self.activation.uniform("attribute")
            self.activation.spread(set(self.activation.scalars))
        self.column: Expr = None
        self.biases: list[list[Expr]] = []

    def begin(self, column: Expr) -> None:
        """Load what all rows of these columns share."""
        self.column = column
        names = [slot.name for slot in self.spec.inputs if slot.layout == "vector"]
        self.biases = [[self._vector(name, v) for v in range(self.tile.vectors)] for name in names]

    def _vector(self, name: str, vector: int) -> Expr:
        stored = self.buffers[name][self._columns(vector)]
        return T.bind(widen(self.lanes, self.spec.dtype, stored))

    def _columns(self, vector: int) -> Expr:
        return T.ramp(self.column + vector * self.tile.lanes, 1, self.tile.lanes)

    def finish(self, row: Expr, count: Expr) -> None:
        """Write `count` rows of y from the sums."""
        tile = self.tile
        with T.serial(count) as i:
            for vector in range(tile.vectors):
                parts = [
                    self._sum(i * tile.columns + part * tile.width, part, vector)
                    for part in range(tile.parts)
                ]
                y = T.bind(narrow(self.lanes, self.spec.dtype, self._apply(parts)))
                T.buffer_store(self.buffers["y"], y, [row + i, self._columns(vector)])

    def _sum(self, at: Expr, part: int, vector: int) -> Expr:
        lanes, dtype = self.lanes, self.spec.dtype
        total = self.sums[T.ramp(at + vector * self.tile.lanes, 1, self.tile.lanes)]
        value = lanes.let(round_to(lanes, dtype, total))
        if not self.biases:
            return value
        return lanes.let(round_to(lanes, dtype, value + self.biases[part][vector]))

    def _apply(self, parts: list[Expr]) -> Expr:
        if self.activation is None:
            return parts[0]
        names = ("gate", "up") if self.spec.gated else ("x",)
        return self.activation.apply(dict(zip(names, parts, strict=True)))
