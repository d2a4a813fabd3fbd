"""The three ways CUDA kernels go over rows: held in registers, read again, or as one flat line."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import tvm.script.ir_builder.tirx as T

from fusenorm.kernels.mathfn import Expr
from fusenorm.kernels.program import Reduction
from fusenorm.kernels.rows import Block
from fusenorm.kernels.threads import BUSY, FLAT, STREAM, WARP, ThreadEmitter, Tiling

Body = Callable[[Expr, Expr], None]


def resident(emitter: ThreadEmitter, rows: Expr, tile: Tiling) -> None:
    """One launch: `tile.rows` rows per block, each read once and kept in registers."""
    with _launch(rows, tile, tile.parts) as (block, part, thread):
        row, lane = block * tile.rows + thread // tile.threads, thread % tile.threads
        inside = T.bind(T.cast(row, "int64") < rows) if tile.rows > 1 else None

        def each(body: Body) -> None:
            with T.unroll(tile.chunks) as chunk:
                group = T.bind((part * tile.chunks + chunk) * tile.threads + lane)
                checks = [group < tile.groups] if tile.ragged else []
                checks += [] if inside is None else [inside]
                with _only_if(checks):
                    body(chunk, group)

        _Passes(emitter, row, thread, tile, each, tile.chunks).run()


def streaming(emitter: ThreadEmitter, rows: Expr) -> None:
    """One launch: a block per row, which is read again in every pass (from L2, as a rule).

    Without reductions a row is one pass, and several blocks share it.
    """
    groups = emitter.columns() // emitter.vector
    shared = not emitter.program.levels
    emitter.stores_whole = True
    tile = Tiling(0, emitter.vector, FLAT if shared else STREAM, 1, 1, 1)
    steps = (groups + (tile.threads - 1)) // tile.threads
    with _launch(rows, tile, steps if shared else 1) as (row, part, thread):

        def at(step: Expr, body: Body) -> None:
            group = T.bind(T.cast(step, "int64") * tile.threads + T.cast(thread, "int64"))
            with _only_if([group < groups]):
                body(0, group)

        def each(body: Body) -> None:
            if shared:
                at(part, body)
                return
            with T.serial(steps) as step:
                at(step, body)

        _Passes(emitter, row, thread, tile, each, 0).run()


def flat(emitter: ThreadEmitter, count: Expr) -> None:
    """One launch over `count` elements that lie side by side: whole groups, then single ones."""
    span = FLAT * emitter.vector
    tile = Tiling(0, emitter.vector, FLAT, 1, 1, 1)
    with _launch((count + (span - 1)) // span, tile, 1) as (block, _, thread):
        group = T.bind(T.cast(block, "int64") * FLAT + T.cast(thread, "int64"))
        first = T.bind(group * emitter.vector)

        def whole(body: Body) -> None:
            with _only_if([first + emitter.vector <= count]):
                body(0, group)

        zero = T.int64(0)
        _Passes(emitter, zero, thread, tile, whole, 1).run()
        if emitter.vector == 1:
            return

        def single(body: Body) -> None:
            cut_off = [first < count, first + emitter.vector > count]
            with _only_if(cut_off), T.serial(count - first) as lane:
                body(0, first + lane)

        tail = emitter.narrowed()
        _Passes(tail, zero, thread, tile, single, 0).run()


@contextmanager
def _launch(blocks: Expr, tile: Tiling, parts: Expr) -> Iterator[tuple[Expr, Expr, Expr]]:
    """(block, part of its row, thread)."""
    count = (blocks + (tile.rows - 1)) // tile.rows
    threads = tile.threads * tile.rows
    # Without a number of blocks ptxas rather spills than loses the last possible one.
    busy = max(1, BUSY // threads)
    with (
        T.launch_thread("blockIdx.x", T.cast(count, "int32")) as block,
        T.launch_thread("blockIdx.y", T.cast(parts, "int32")) as part,
        T.launch_thread("threadIdx.x", threads) as thread,
        T.attr(T.int32(0), "tirx.launch_bounds_min_blocks_per_sm", T.int32(busy)),
    ):
        yield block, part, thread


@contextmanager
def _only_if(checks: list[Expr]) -> Iterator[None]:
    if not checks:
        yield
        return
    condition = checks[0]
    for check in checks[1:]:
        condition = T.And(condition, check)
    with T.If(condition), T.Then():
        yield


class _Passes:
    """The passes of a program over one row: one per level of reductions, then the outputs.

    Attributes:
        emitter: evaluates elements.
        row: the row.
        thread: the thread's number in its block.
        tile: how the row lies on threads.
        each: emits a body for every group of the thread: body(chunk, group).
        chunks: groups per thread that registers hold; 0: only the group at hand.
    """

    def __init__(
        self,
        emitter: ThreadEmitter,
        row: Expr,
        thread: Expr,
        tile: Tiling,
        each: Callable[[Body], None],
        chunks: int,
    ) -> None:
        self.emitter, self.row, self.thread = emitter, T.cast(row, "int64"), thread
        self.tile, self.each, self.chunks = tile, each, chunks

    def run(self) -> None:
        emitter, program = self.emitter, self.emitter.program
        emitter.uniform("attribute")
        emitter.spread(set(emitter.scalars))
        first = emitter.outputs[0]
        early = [
            slot.name
            for slot in emitter.outputs
            if slot != first and program.levels and program.row_free(slot.name)
        ]
        late = [slot.name for slot in emitter.outputs if slot.name not in early]
        coming = [reduction.input for level in program.levels[1:] for reduction in level]
        kept = emitter.frontier([*coming, *late]) if self.chunks and program.levels else []
        made = list(dict.fromkeys([*early, *(name for name in kept if name in program.nodes)]))
        for level in program.levels:
            self._over(made, level, kept)
            emitter.resident |= {name: name for name in made if name in (*kept, *early)}
            made = []
        self._over(late, (), ())

    def _over(self, made: list[str], level: tuple[Reduction, ...], kept: Collection[str]) -> None:
        """One pass: makes values, stores those that are outputs, and reduces `level`."""
        emitter = self.emitter
        leaves = emitter.leaves([*made, *(reduction.input for reduction in level)])
        leaves = [name for name in leaves if not emitter.holds_whole(name)]
        ahead = [name for name in leaves if self.chunks and not emitter.is_vector(name)]
        beside = [name for name in leaves if name not in ahead]
        for name in ahead:
            emitter.hold(name, self.chunks)
        if ahead:
            self.each(lambda chunk, group: self._fetch(ahead, chunk, group))
        for name in beside:
            emitter.hold(name)
        for name in made:
            emitter.hold(name, self.chunks if name in kept else 0)
        sums = {reduction.output: _zero() for reduction in level}

        def body(chunk: Expr, group: Expr) -> None:
            self._fetch(beside, chunk, group)
            with T.unroll(emitter.vector) as lane:
                emitter.at = (chunk, lane)
                memo: dict[str, Expr] = {}
                block = Block(emitter.lanes, None, None)
                for name in made:
                    emitter.keep(name, emitter.element(block, name, memo))
                for reduction in level:
                    total = sums[reduction.output]
                    value = emitter.element(block, reduction.input, memo)
                    T.buffer_store(total, total[0] + value, [0])
            for slot in emitter.outputs:
                if slot.name in made:
                    emitter.put(slot.name, self.row, group, chunk)

        self.each(body)
        self._means(level, sums)

    def _fetch(self, names: list[str], chunk: Expr, group: Expr) -> None:
        for name in names:
            self.emitter.fetch(name, self.row, group, chunk)

    def _means(self, level: tuple[Reduction, ...], sums: Mapping[str, Any]) -> None:
        """Row values of `level` from every thread's sums."""
        emitter = self.emitter
        for reduction in level:
            total = self._total(sums[reduction.output])
            mean = emitter.scalar.let(total / T.cast(emitter.columns(), "float32"))
            dtype = emitter.program.values[reduction.output].dtype
            rounded = emitter.round_to(emitter.scalar, dtype, mean)
            emitter.scalars[reduction.output] = emitter.scalar.let(rounded)
        emitter.uniform("row")
        emitter.spread(set(emitter.scalars))

    def _total(self, sums: Any) -> Expr:
        """The sum over the threads of a row, in each of them."""
        _shuffle(sums, min(self.tile.threads, WARP))
        if self.tile.threads > WARP:
            warps = self.tile.threads // WARP
            shared = T.alloc_buffer((warps * self.tile.rows,), "float32", scope="shared")
            with T.If(self.thread % WARP == 0), T.Then():
                T.buffer_store(shared, sums[0], [self.thread // WARP])
            T.evaluate(T.tvm_storage_sync("shared"))
            own = self.thread // self.tile.threads * warps
            T.buffer_store(sums, shared[own + self.thread % warps], [0])
            _shuffle(sums, warps)
        return sums[0]


def _zero() -> Any:
    sums = T.alloc_buffer((1,), "float32", scope="local")
    T.buffer_store(sums, T.float32(0.0), [0])
    return sums


def _shuffle(sums: Any, width: int) -> None:
    """Sum over `width` neighbouring threads, in each of them."""
    step = width // 2
    while step:
        other = T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), sums[0], step, WARP, WARP)
        T.buffer_store(sums, sums[0] + other, [0])
        step //= 2
