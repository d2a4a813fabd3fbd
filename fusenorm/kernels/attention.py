"""Attention kernels: blocks of keys pass by tiles of query rows, softmax kept up to date (online).

Per row the running maximum and sum of its weights are kept, and y holds the weighted sum of values
so far; a larger maximum rescales both (arXiv 2205.14135). Keys are transposed into panels once per
block; a few rows read them as they lie. Rotary positions turn rows on their way into the tile of q
and into the panels (arXiv 2104.09864). Where a mask leaves a tile no weight for the last keys of a
block, the tile skips them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tvm.script.ir_builder.tirx as T

from fusenorm.kernels import mathfn
from fusenorm.kernels.mathfn import Expr, Lanes
from fusenorm.kernels.program import symbols
from fusenorm.kernels.registers import KEYS
from fusenorm.kernels.rows import function, prefetch
from fusenorm.ops import Attention

_STEP = 64  # of D: successive numbers of a row in the tile of q
_VECTORS = 2  # of a panel of keys
_SIZES = (12, 8, 4, 2, 1)  # rows of a tile; narrow vectors have registers for half as many
_PACKED = 4  # rows from which packing keys pays
_COPIED = 16  # rows from which bringing values together pays
_TRIMMED = 32  # rows from which looking at the mask pays
_LINE = 16  # numbers of a cache line
# With scores within ±1e34, a weight whose mask is at most _DROPPED underflows to 0 beside one whose
# mask is at least _KEPT.
_DROPPED, _KEPT, _TAME = -1e37, -1e35, 1e15

_INTEGERS = (
    "positions",
    "keys",
    "inner",
    "columns",
    "row_begin",
    "row_end",
    "q_head",
    "q_row",
    "k_row",
    "v_row",
    "y_head",
    "y_row",
    "mask_head",
    "mask_row",
    "mask_column",
    "turning",
    "table_row",
)

Block = Callable[[Expr, Expr], None]


def functions(spec: Attention, lanes: int) -> list[Any]:
    """The PrimFunc of `spec` with vectors of `lanes` f32.

    It works on one head of k and v and the heads of q that share it. Arguments: the inputs and y
    from that head on, and scratch, each as one row of f32; then int64: rows per head of q, keys
    T > 0, D, E, first and last row, counted through the heads; strides in elements of the heads and
    rows of q, the rows of k and v, the heads and rows of y, the heads, rows and columns of the
    mask, the last 0 or 1; R and the stride of the tables' rows; then the attributes. Scratch holds
    `(KEYS + 16)·D + KEYS·E + 528` numbers and, of each of 12 rows, D rounded up to 64 and KEYS, and
    two for every row.
    """
    (name,) = symbols(spec)
    with function(name) as builder:
        _Kernel(spec, lanes).emit()
    return [builder.get()]


class _Kernel:
    def __init__(self, spec: Attention, lanes: int) -> None:
        self.spec = spec
        self.lanes = Lanes(lanes)
        self.width = lanes
        self.panel = _VECTORS * lanes
        self.sizes = _SIZES if lanes == 16 else [size // 2 for size in _SIZES[:-1]]

    def emit(self) -> None:
        names = [*(slot.name for slot in self.spec.inputs), "y", "scratch"]
        handles = {name: T.arg(name, T.handle()) for name in names}
        self.at = {name: T.arg(name, T.int64()) for name in _INTEGERS}
        self.numbers = {name: T.arg(name, T.float32()) for name in self.spec.attributes}
        self.buffers = {
            name: T.match_buffer(handle, (T.int64(),), "float32", align=4)
            for name, handle in handles.items()
        }
        at = self.at
        self.scratch = self.buffers["scratch"]
        self.count = T.bind(at["row_end"] - at["row_begin"])
        # Parts of scratch: panels of keys, turned rows, a tile of q, its scores, maxima and sums of
        # every row, values.
        self.turned = T.bind(at["inner"] * KEYS + self.width * self.panel)
        self.tile_q = T.bind(self.turned + (at["inner"] + 1) * self.width)
        self.steps = T.bind(T.truncdiv(at["inner"] + (_STEP - 1), T.int64(_STEP)))
        self.scores = T.bind(self.tile_q + self.steps * (_STEP * _SIZES[0]))
        self.maxima = T.bind(self.scores + KEYS * _SIZES[0])
        self.sums = T.bind(self.maxima + self.count)
        self.values = T.bind(self.sums + self.count)
        self.correction = T.alloc_buffer((_SIZES[0],), "float32")
        self.factor = T.alloc_buffer((_SIZES[0],), "float32")
        self.wild = T.alloc_buffer((self.width,), "float32")
        self.wild_q = T.alloc_buffer((self.width,), "float32")
        self.live = T.alloc_buffer((1,), "int64")
        with T.serial(self.count) as row:
            self._put(self.maxima + row, T.float32(-math.inf))
        blocks = T.truncdiv(at["keys"] + (KEYS - 1), T.int64(KEYS))
        with T.serial(blocks) as block:
            self.first = T.bind(block * KEYS)
            self.size = T.bind(T.min(T.int64(KEYS), at["keys"] - self.first))
            self.last = T.bind(block == blocks - 1)
            with T.If(self._packed()), T.Then():
                self._pack()
            self._tiles()

    # -- helpers

    def _put(self, at: Expr, value: Expr) -> None:
        T.buffer_store(self.scratch, value, [at])

    def _ramp(self, at: Expr) -> Expr:
        return T.ramp(at, 1, self.width)

    def _load(self, name: str, at: Expr, mask: Expr) -> Expr:
        """A vector; 0 where `mask` says no."""
        buffer, index = self.buffers[name], self._ramp(at)
        if mask is None:
            return T.bind(buffer[index])
        stored = T.masked_load(self.lanes.type("float32"), buffer, index, mask)
        return self.lanes.let(T.Select(mask, stored, self.lanes.f32(0.0)))

    def _store(self, name: str, at: Expr, mask: Expr, value: Expr) -> None:
        buffer, index = self.buffers[name], self._ramp(at)
        if mask is None:
            T.buffer_store(buffer, value, [index])
        else:
            T.evaluate(T.masked_store(buffer, value, index, mask))

    def _blocks(self, total: Expr, body: Block) -> None:
        """`body(at, mask)` over vectors of [0, total); the mask of a whole one is None."""
        whole = T.bind(T.truncdiv(total, T.int64(self.width)))
        with T.serial(whole) as index:
            body(T.bind(index * self.width), None)
        rest = T.bind(total - whole * self.width)
        with T.If(rest > 0), T.Then():
            body(T.bind(whole * self.width), self.lanes.first(rest))

    def _row(self, row: Expr) -> tuple[Expr, Expr]:
        """Head and position of a row."""
        head = T.bind(T.truncdiv(row, self.at["positions"]))
        return head, T.bind(row - head * self.at["positions"])

    def _place(self, name: str, row: Expr) -> Expr:
        """Where the row of q, y or the mask begins."""
        head, position = self._row(row)
        return T.bind(head * self.at[f"{name}_head"] + position * self.at[f"{name}_row"])

    def _totals(self, vectors: list[Expr]) -> Expr:
        """A vector of the sums of as many vectors as it has lanes."""
        while len(vectors) > 1:
            half = len(vectors) // 2
            pairs = [self.lanes.interleaved(vectors[i], vectors[i + half]) for i in range(half)]
            vectors = [self.lanes.let(low + high) for low, high in pairs]
        return vectors[0]

    def _across(self, vector: Expr, combine: Callable[[Expr, Expr], Expr]) -> Expr:
        """All lanes combined, as a tree of halves."""
        cell = T.alloc_buffer((self.width,), "float32")
        T.buffer_store(cell, vector, [self._ramp(0)])
        size = self.width
        while size > 1:
            size //= 2
            low, high = (T.ramp(start, 1, size) if size > 1 else start for start in (0, size))
            T.buffer_store(cell, combine(cell[low], cell[high]), [low])
        return T.bind(cell[0])

    def _note_wild(self, wild: Any, vector: Expr) -> None:
        """Remember in `wild` whether a number is NaN or beyond ±_TAME."""
        size = T.bind(self.lanes.from_bits(self.lanes.bits(vector) & self.lanes.u32(0x7FFFFFFF)))
        tame = T.Select(size <= self.lanes.f32(_TAME), self.lanes.f32(0.0), self.lanes.f32(1.0))
        index = self._ramp(0)
        T.buffer_store(wild, _larger(wild[index], tame), [index])

    # -- rotary positions

    def _turn(self, name: str, start: Expr, position: Expr, target: Expr) -> None:
        """The row of q or k at `start`, turned by its position, in scratch at `target`."""
        size = self.at["turning"]
        table = T.bind(position * self.at["table_row"])
        half = T.bind(T.truncdiv(size, T.int64(2)))

        def turned(at: Expr, mask: Expr, column: Expr, x: Expr, other: Expr) -> None:
            cos, sin = (self._load(each, table + column, mask) for each in ("cos", "sin"))
            self._store("scratch", target + at, mask, self.lanes.let(x * cos + other * sin))

        def halves(at: Expr, mask: Expr) -> None:
            first, second = (self._load(name, start + at + part, mask) for part in (0, half))
            turned(at, mask, at, first, self.lanes.let(self.lanes.f32(0.0) - second))
            column = at if self.spec.form == "cached" else at + half
            turned(at + half, mask, column, second, first)

        def pairs(at: Expr, mask: Expr) -> None:
            x = self._load(name, start + at, mask)
            swapped = T.Shuffle([x], [T.int32(lane ^ 1) for lane in range(self.width)])
            signs, _ = self.lanes.interleaved(self.lanes.f32(-1.0), self.lanes.f32(1.0))
            turned(at, mask, at, x, self.lanes.let(self.lanes.let(swapped) * signs))

        def rest(at: Expr, mask: Expr) -> None:
            value = self._load(name, start + size + at, mask)
            self._store("scratch", target + size + at, mask, value)

        if self.spec.form == "pairs":
            self._blocks(size, pairs)
        else:
            self._blocks(half, halves)
        if self.spec.partial:
            self._blocks(self.at["inner"] - size, rest)

    # -- keys

    def _packed(self) -> Expr:
        """Whether keys are laid out in panels; those that turn always are."""
        return T.bool(True) if self.spec.rotary == "qk" else self.count >= _PACKED

    def _pack(self) -> None:
        """The block's keys as panels [D, 2·lanes], the last panel filled up with the last key.

        Notes whether they and the block's values are tame.
        """
        inner, keys = self.at["inner"], self.at["keys"]
        T.buffer_store(self.wild, self.lanes.f32(0.0), [self._ramp(0)])
        panels = T.truncdiv(self.size + (self.panel - 1), T.int64(self.panel))
        with T.serial(panels * _VECTORS) as group:
            panel = T.bind(T.truncdiv(group, T.int64(_VECTORS)))
            vector = T.bind(group - panel * _VECTORS)
            target = T.bind(panel * (inner * self.panel) + vector * self.width)
            key = T.bind(self.first + group * self.width)
            if self.spec.rotary == "qk":
                source, starts = "scratch", self._turn_keys(T.bind(T.min(key, keys - 1)))
            else:
                source = "k"
                starts = [
                    T.bind(T.min(key + lane, keys - 1) * self.at["k_row"])
                    for lane in range(self.width)
                ]

            def body(at: Expr, mask: Expr) -> None:
                vectors = [self._load(source, start + at, mask) for start in starts]
                if self.spec.mask:
                    for vector in vectors:
                        self._note_wild(self.wild, vector)
                for lane, vector in enumerate(self.lanes.transposed(vectors)):
                    index = self._ramp(target + (at + lane) * self.panel)
                    T.buffer_store(self.scratch, vector, [index])

            self._blocks(inner, body)
        with T.If(self.count >= _COPIED), T.Then(), T.serial(self.size) as key:
            columns = self.at["columns"]
            start = T.bind((self.first + key) * self.at["v_row"])
            target = T.bind(self.values + key * columns)

            def copy(at: Expr, mask: Expr) -> None:
                vector = self._load("v", start + at, mask)
                if self.spec.mask:
                    self._note_wild(self.wild, vector)
                self._store("scratch", target + at, mask, vector)

            self._blocks(columns, copy)

    def _turn_keys(self, key: Expr) -> list[Expr]:
        """Where the turned keys from `key` on are in scratch, the last one as often as needed."""
        inner = self.at["inner"]
        count = T.bind(T.min(T.int64(self.width), self.at["keys"] - key))
        with T.serial(count) as lane:
            row = T.bind(key + lane)
            self._turn("k", T.bind(row * self.at["k_row"]), row, T.bind(self.turned + lane * inner))
        return [
            T.bind(self.turned + T.min(T.int64(lane), count - 1) * inner)
            for lane in range(self.width)
        ]

    # -- a tile of rows

    def _tiles(self) -> None:
        """Tiles of the largest size, the rest in smaller ones."""
        done = T.alloc_buffer((1,), "int64")
        T.buffer_store(done, T.int64(0), [0])
        with T.While(done[0] < self.count):
            left = T.bind(self.count - done[0])
            size = T.int64(1)
            for each in sorted(self.sizes):
                size = T.Select(left >= each, T.int64(each), size)
            size = T.bind(size)
            self._tile(size, T.bind(self.at["row_begin"] + done[0]))
            T.buffer_store(done, done[0] + size, [0])

    def _tile(self, size: Expr, row: Expr) -> None:
        T.buffer_store(self.live, self.size, [0])
        self._load_q(size, row)
        if self.spec.mask:
            with T.If(self.count >= _TRIMMED), T.Then():
                self._trim(size, row)
        live = T.bind(self.live[0])
        with T.If(live > 0), T.Then():
            with T.If(self._packed()):
                with T.Then():
                    self._for_each_size(size, lambda n: self._scores_of_panels(n, row, live))
                with T.Else(), T.serial(size) as i:
                    self._scores_of_row(i)
            with T.serial(size) as i:
                self._softmax(row, i, live)
            copied = "scratch", self.values, self.at["columns"]
            stored = "v", T.bind(self.first * self.at["v_row"]), self.at["v_row"]
            with T.If(self.count >= _COPIED):
                with T.Then():
                    self._for_each_size(size, lambda n: self._add_values(n, row, live, copied))
                with T.Else():
                    self._for_each_size(size, lambda n: self._add_values(n, row, live, stored))
        if self.spec.mask:
            with T.If(T.And(self.last, live == 0)), T.Then(), T.serial(size) as i:
                self._rescale(row + i)
        if self.spec.empty == "safe":
            with T.If(self.last), T.Then(), T.serial(size) as i:
                self._add_nothing(row + i)

    def _for_each_size(self, size: Expr, body: Callable[[int], None]) -> None:
        """`body` with the size known while compiling."""
        for each in self.sizes:
            with T.If(size == each), T.Then():
                body(each)

    def _load_q(self, size: Expr, row: Expr) -> None:
        """Rows of q times the scale, as [D / 64, rows, 64]; whether they are tame."""
        T.buffer_store(self.wild_q, self.lanes.f32(0.0), [self._ramp(0)])
        with T.serial(size) as i:
            source, start = "q", self._place("q", row + i)
            self._fetch_q(row + i + self.sizes[0], start + self.sizes[0] * self.at["q_row"])
            if self.spec.rotary != "none":
                _, position = self._row(row + i)
                self._turn("q", start, position, self.turned)
                source, start = "scratch", self.turned

            def body(at: Expr, mask: Expr) -> None:
                step = T.bind(T.truncdiv(at, T.int64(_STEP)))
                inside = T.bind(at - step * _STEP)
                index = self._ramp(self.tile_q + step * (_STEP * _SIZES[0]) + i * _STEP + inside)
                value = self.lanes.let(
                    self._load(source, start + at, mask) * self.lanes.spread(self.numbers["scale"])
                )
                T.buffer_store(self.scratch, value, [index])
                if self.spec.mask:
                    self._note_wild(self.wild_q, value)

            self._blocks(self.at["inner"], body)

    def _fetch_q(self, row: Expr, start: Expr) -> None:
        """Have a row of the next tile brought to the caches, if there is one."""
        with T.If(row < self.at["row_end"]), T.Then():
            lines = T.truncdiv(self.at["inner"] + (_LINE - 1), T.int64(_LINE))
            with T.serial(lines) as line:
                prefetch(self.buffers["q"][start + line * _LINE], 1)

    def _trim(self, size: Expr, row: Expr) -> None:
        """Leave out of `live` the last keys that the mask gives no weight in any of the rows."""
        key = T.bind((self.first + self.size - 1) * self.at["mask_column"])
        last = T.bind(self._place("mask", row) + key)
        dropped = T.bind(self.buffers["mask"][last] <= T.float32(_DROPPED))
        index = self._ramp(0)
        wild = self._across(_larger(self.wild[index], self.wild_q[index]), _larger)
        apart = T.bind(self.at["mask_column"] == 1)
        with T.If(T.And(apart, T.And(wild == T.float32(0.0), dropped))), T.Then():
            found = T.alloc_buffer((1,), "int64")
            kept = T.alloc_buffer((1,), "float32")
            T.buffer_store(found, T.int64(0), [0])
            with T.serial(size) as i:
                start = T.bind(self._place("mask", row + i) + self.first)
                before = T.bind(self.scratch[self.maxima + (row + i - self.at["row_begin"])])
                T.buffer_store(
                    kept,
                    T.Select(before >= T.float32(_KEPT), T.float32(2.0), T.float32(0.0)),
                    [0],
                )

                def body(at: Expr, mask: Expr) -> None:
                    value = self._load("mask", start + at, mask)
                    zero, one, two = (self.lanes.f32(number) for number in (0.0, 1.0, 2.0))
                    rank = T.Select(value >= self.lanes.f32(_KEPT), two, one)
                    rank = T.Select(value <= self.lanes.f32(_DROPPED), zero, rank)
                    if mask is not None:
                        rank = T.Select(mask, rank, zero)
                    best = self._across(self.lanes.let(rank), _larger)
                    T.buffer_store(kept, _larger(kept[0], best), [0])
                    with T.If(best > T.float32(0.0)), T.Then():
                        T.buffer_store(found, T.max(found[0], at + self.width), [0])

                self._blocks(self.size, body)
                with T.If(kept[0] < T.float32(2.0)), T.Then():
                    T.buffer_store(found, self.size, [0])
            T.buffer_store(self.live, T.min(found[0], self.size), [0])

    def _fetch_mask(self, size: int, row: Expr, panel: Expr) -> None:
        """Have a mask too large for the caches brought there bit by bit while scores are made."""
        own = T.And(self.at["mask_row"] != 0, self.at["mask_column"] == 1)
        with T.If(own), T.Then():
            for i in range(size):
                start = T.bind(self._place("mask", row + i) + self.first + panel * self.panel)
                for column in range(0, self.panel, _LINE):
                    prefetch(self.buffers["mask"][start + column], 2)

    def _scores_of_panels(self, size: int, row: Expr, live: Expr) -> None:
        """Products of the tile of q with every panel of keys."""
        inner = self.at["inner"]
        panels = T.truncdiv(live + (self.panel - 1), T.int64(self.panel))
        with T.serial(panels) as panel:
            if self.spec.mask:
                self._fetch_mask(size, row, panel)
            sums = self.lanes.zeros(_VECTORS * size)
            start = T.bind(panel * (inner * self.panel))
            with T.serial(self.steps) as step:
                tile = T.bind(self.tile_q + step * (_STEP * _SIZES[0]))
                part = T.bind(start + step * (_STEP * self.panel))
                with T.serial(T.min(T.int64(_STEP), inner - step * _STEP)) as d:
                    places = [part + d * self.panel + j * self.width for j in range(_VECTORS)]
                    keys = [T.bind(self.scratch[self._ramp(at)]) for at in places]
                    for i in range(size):
                        value = T.bind(self.lanes.spread(self.scratch[tile + d + i * _STEP]))
                        for j, key in enumerate(keys):
                            self.lanes.add(sums[_VECTORS * i + j], value * key)
            for index, total in enumerate(sums):
                target = self.scores + index // _VECTORS * KEYS + panel * self.panel
                target += index % _VECTORS * self.width
                T.buffer_store(self.scratch, total[self._ramp(0)], [self._ramp(target)])

    def _scores_of_row(self, i: Expr) -> None:
        """Products of a row of q with keys as they lie, as many at a time as a vector holds."""
        groups = T.truncdiv(self.size + (self.width - 1), T.int64(self.width))
        with T.serial(groups) as group:
            key = T.bind(self.first + group * self.width)
            starts = [
                T.bind(T.min(key + lane, self.at["keys"] - 1) * self.at["k_row"])
                for lane in range(self.width)
            ]
            sums = self.lanes.zeros(self.width)

            def body(at: Expr, mask: Expr) -> None:
                step = T.bind(T.truncdiv(at, T.int64(_STEP)))
                inside = T.bind(at - step * _STEP)
                index = self.tile_q + step * (_STEP * _SIZES[0]) + i * _STEP + inside
                query = T.bind(self.scratch[self._ramp(index)])
                for start, total in zip(starts, sums, strict=True):
                    self.lanes.add(total, query * self._load("k", start + at, mask))

            self._blocks(self.at["inner"], body)
            total = self._totals([T.bind(total[self._ramp(0)]) for total in sums])
            target = self._ramp(self.scores + i * KEYS + group * self.width)
            T.buffer_store(self.scratch, total, [target])

    def _softmax(self, row: Expr, i: Expr, live: Expr) -> None:
        """Turn a row of scores into weights relative to the row's new maximum."""
        lanes = self.lanes
        scores = T.bind(self.scores + i * KEYS)
        largest = T.alloc_buffer((self.width,), "float32")
        index = self._ramp(0)
        lowest = lanes.f32(-math.inf)
        T.buffer_store(largest, lowest, [index])

        def raise_maximum(at: Expr, mask: Expr, value: Expr) -> None:
            if mask is not None:
                value = T.Select(mask, value, lowest)
            value = lanes.let(value)
            T.buffer_store(self.scratch, value, [self._ramp(scores + at)])
            T.buffer_store(largest, _larger(largest[index], value), [index])

        def score(at: Expr) -> Expr:
            value = T.bind(self.scratch[self._ramp(scores + at)])
            return self._bent(value) if self.spec.softcap else value

        if self.spec.mask:
            start = T.bind(self._place("mask", row + i) + self.first * self.at["mask_column"])

            def masked(at: Expr, mask: Expr) -> None:
                value = self._masked(score(at), self._load("mask", start + at, mask))
                raise_maximum(at, mask, value)

            def shifted(at: Expr, mask: Expr) -> None:
                value = self._masked(score(at), T.bind(lanes.spread(self.buffers["mask"][start])))
                raise_maximum(at, mask, value)

            with T.If(self.at["mask_column"] == 1):
                with T.Then():
                    self._blocks(live, masked)
                with T.Else():
                    self._blocks(live, shifted)
        else:
            self._blocks(live, lambda at, mask: raise_maximum(at, mask, score(at)))
        state = T.bind(row + i - self.at["row_begin"])
        before = T.bind(self.scratch[self.maxima + state])
        now = _SCALAR.let(_larger(before, self._across(largest[index], _larger)))
        # Of a row without weight so far, exp(-inf - 0) is 0 where exp(-inf + inf) is NaN.
        zero = T.float32(0.0)
        base = _SCALAR.let(T.Select(now == T.float32(-math.inf), zero, now))
        total = T.alloc_buffer((self.width,), "float32")
        T.buffer_store(total, lanes.f32(0.0), [index])

        def weigh(at: Expr, mask: Expr) -> None:
            at = self._ramp(scores + at)
            weight = _exp(lanes, lanes.let(self.scratch[at] - lanes.spread(base)))
            T.buffer_store(self.scratch, weight, [at])
            T.buffer_store(total, total[index] + weight, [index])

        self._blocks(live, weigh)
        added = self._across(total[index], lambda a, b: a + b)
        self._put(self.maxima + state, now)
        with T.If(self.first == 0):
            with T.Then():
                self._put(self.sums + state, added)
            with T.Else():
                correction = _exp(_SCALAR, _SCALAR.let(before - base))
                T.buffer_store(self.correction, correction, [i])
                self._put(self.sums + state, self.scratch[self.sums + state] * correction + added)
        T.buffer_store(self.factor, T.float32(1.0), [i])
        with T.If(self.last), T.Then():
            T.buffer_store(self.factor, self._factor(row + i), [i])

    def _bent(self, score: Expr) -> Expr:
        """softcap·tanh(score / softcap)."""
        cap = T.bind(self.lanes.spread(self.numbers["softcap"]))
        return self.lanes.let(mathfn.tanh(self.lanes, self.lanes.let(score / cap)) * cap)

    def _masked(self, score: Expr, mask: Expr) -> Expr:
        if self.spec.select:
            return T.Select(mask == self.lanes.f32(0.0), score, mask)
        return score + mask

    def _add_values(self, size: int, row: Expr, live: Expr, v: tuple[str, Expr, Expr]) -> None:
        """y = y·correction + weights·v; `v` is a buffer, where the block's values begin, a row."""
        targets = [self._place("y", row + i) for i in range(size)]
        vectors = 2 * _VECTORS if 3 * size <= self.sizes[0] else _VECTORS
        columns = self.at["columns"]
        blocks = T.bind(T.truncdiv(columns, T.int64(vectors * self.width)))
        with T.serial(blocks) as block:
            start = T.bind(block * (vectors * self.width))
            self._add_columns(size, targets, live, v, start, vectors, None)
        done = T.bind(blocks * (vectors * self.width))
        rest = T.truncdiv(columns - done + (self.width - 1), T.int64(self.width))
        with T.serial(rest) as vector:
            start = T.bind(done + vector * self.width)
            self._add_columns(size, targets, live, v, start, 1, self.lanes.first(columns - start))

    def _add_columns(
        self,
        size: int,
        targets: list[Expr],
        live: Expr,
        v: tuple[str, Expr, Expr],
        column: Expr,
        wide: int,
        mask: Expr,
    ) -> None:
        name, begin, stride = v
        sums = self.lanes.zeros(size * wide)
        places = [(i, column + j * self.width) for i in range(size) for j in range(wide)]
        start = T.bind(begin + column)
        with T.serial(live) as key:
            values = [
                self._load(name, start + key * stride + j * self.width, mask) for j in range(wide)
            ]
            for i in range(size):
                weight = T.bind(self.lanes.spread(self.scratch[self.scores + i * KEYS + key]))
                for j in range(wide):
                    self.lanes.add(sums[i * wide + j], weight * values[j])
        totals = [total[self._ramp(0)] for total in sums]
        factors = [T.bind(self.lanes.spread(self.factor[i])) for i in range(size)]
        with T.If(self.first == 0):
            with T.Then():
                for (i, at), total in zip(places, totals, strict=True):
                    self._store("y", targets[i] + at, mask, self.lanes.let(total * factors[i]))
            with T.Else():
                for (i, at), total in zip(places, totals, strict=True):
                    correction = self.lanes.spread(self.correction[i])
                    value = self._load("y", targets[i] + at, mask) * correction + total
                    value = self.lanes.let(self.lanes.let(value) * factors[i])
                    self._store("y", targets[i] + at, mask, value)

    def _factor(self, row: Expr) -> Expr:
        """What the weighted sum of values of a row is divided by, as a factor."""
        total = T.bind(self.scratch[self.sums + (row - self.at["row_begin"])])
        factor = T.float32(1.0) / total
        if self.spec.empty != "nan":  # a sum of 0 has no weights
            factor = T.Select(total == T.float32(0.0), T.float32(1.0), factor)
        return _SCALAR.let(factor)

    def _rescale(self, row: Expr) -> None:
        """Divide a row of y, which the last block of keys adds nothing to."""
        start, factor = self._place("y", row), T.bind(self.lanes.spread(self._factor(row)))

        def body(at: Expr, mask: Expr) -> None:
            value = self._load("y", start + at, mask) * factor
            self._store("y", start + at, mask, self.lanes.let(value))

        self._blocks(self.at["columns"], body)

    def _add_nothing(self, row: Expr) -> None:
        """Make y the sum of values times 0 where weights are NaN: NaN where one is not finite."""
        total = T.bind(self.scratch[self.sums + (row - self.at["row_begin"])])
        start = self._place("y", row)

        def body(at: Expr, mask: Expr) -> None:
            # Read back from memory: TVM takes a product with a constant 0 for 0.
            T.buffer_store(self.correction, T.float32(0.0), [0])
            (sums,) = self.lanes.zeros(1)
            with T.serial(self.at["keys"]) as key:
                value = self._load("v", key * self.at["v_row"] + at, mask)
                self.lanes.add(sums, value * self.lanes.spread(self.correction[0]))
            self._store("y", start + at, mask, T.bind(sums[self._ramp(0)]))

        # By its bits: TVM knows of no comparison that only NaN passes.
        nan = T.bind(_SCALAR.bits(total) & _SCALAR.u32(0x7FFFFFFF)) > _SCALAR.u32(0x7F800000)
        with T.If(nan), T.Then():
            self._blocks(self.at["columns"], body)


_SCALAR = Lanes(1)


def _larger(a: Expr, b: Expr) -> Expr:
    return T.Select(a < b, b, a)


def _exp(lanes: Lanes, x: Expr) -> Expr:
    """e^x, 0 where it is less than the smallest normal number."""
    return lanes.let(T.Select(x < lanes.f32(-87.33654), lanes.f32(0.0), mathfn.exp(lanes, x)))
