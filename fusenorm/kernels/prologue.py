"""The norm in front of a linear op: rows that are normalised where they are laid out in tiles."""

from __future__ import annotations

from typing import Any

import tvm.script.ir_builder.tirx as T

from fusenorm.kernels.mathfn import Expr, Lanes
from fusenorm.kernels.program import row_program
from fusenorm.kernels.rows import Block, RowEmitter, widen
from fusenorm.ops import Norm


class Prologue(RowEmitter):
    """The row program of a norm, in two steps: each row of a tile once, then element by element.

    Args:
        norm: of rows alone.
        lanes: of the vectors a row is measured with.
        x: [M, K].
        numbers: the norm's attributes.
        rows: the most a tile has.
    """

    def __init__(
        self, norm: Norm, lanes: Lanes, x: Any, numbers: dict[str, Expr], rows: int
    ) -> None:
        program = row_program(norm)
        super().__init__(program, program.outputs, lanes)
        self.x, self.y = norm.inputs[0], program.outputs[0]
        self.buffers[self.x.name] = x
        self.scalars |= numbers
        self.uniform("attribute")
        self.allocate()
        values, nodes = program.values, program.nodes.items()
        reads = [
            read for name, node in nodes if values[name].kind == "element" for read in node.inputs
        ]
        self.kept = {
            name: T.alloc_buffer((rows,), "float32")
            for name in dict.fromkeys(reads)
            if values[name].kind == "row"
        }

    def columns(self) -> Expr:
        return self.buffers[self.x.name].shape[-1]

    def measure_tile(self, row: Expr, count: Expr) -> None:
        """Keep what is one number of a row, of the `count` rows from `row`."""
        with T.serial(count) as i:
            inner = self._inner()
            inner.measure(row + i, {})
            for name, kept in self.kept.items():
                T.buffer_store(kept, inner.scalars[name], [i])

    def value(self, lanes: Lanes, stored: Expr, i: Expr) -> Expr:
        """The f32 lanes of y, of what x holds in row i of the tile measured last."""
        memo = {name: T.bind(lanes.spread(kept[i])) for name, kept in self.kept.items()}
        memo[self.x.name] = lanes.let(widen(lanes, self.x.dtype, stored))
        return self.element(Block(lanes, None, None), self.y.name, memo)
