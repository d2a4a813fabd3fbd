"""The ways CUDA kernels go over rows: held in registers, read again, split, or as one flat line."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import tvm.script.ir_builder.tirx as T

from fusenorm.kernels.mathfn import Expr
from fusenorm.kernels.program import Reduction
from fusenorm.kernels.rows import Block
from fusenorm.kernels.threads import BUSY, FLAT, SPLIT, STREAM, WARP, ThreadEmitter, Tiling
from fusenorm.ops import DTYPES

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

        def own(body: Body) -> None:
            group = T.bind(T.cast(part, "int64") * tile.threads + T.cast(thread, "int64"))
            with _only_if([group < groups]):
                body(0, group)

        each = own if shared else _stretch(T.int64(0), groups, tile, thread)
        _Passes(emitter, row, thread, tile, each, 0).run()


def split(emitter: ThreadEmitter, rows: Expr) -> None:
    """One launch per pass: few long rows, each over several blocks.

    Every pass has the means of whole rows, as in the other kernels: the launch before has left the
    sums of a row's parts.
    """
    tile = Tiling(0, emitter.vector, STREAM, 1, 1, 1)
    groups = emitter.columns() // emitter.vector
    parts = T.min(groups // STREAM, T.truncdiv(T.int64(SPLIT), rows))
    for number in range(len(emitter.program.levels) + 1):
        fresh = emitter.over(emitter.vector)
        fresh.stores_whole = True
        with _launch(rows, tile, parts) as (row, part, thread):
            sums = _Sums(fresh, T.cast(row, "int64"), thread, T.cast(part, "int64"), parts)
            each = _stretch(sums.edge(sums.part), sums.edge(sums.part + 1), tile, thread)
            _Passes(fresh, row, thread, tile, each, 0).run_one(number, sums)


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

        tail = emitter.over(1)
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


def _stretch(first: Expr, end: Expr, tile: Tiling, thread: Expr) -> Callable[[Body], None]:
    """The groups [first, end), shared out to the threads of a block, one at hand at a time."""

    def each(body: Body) -> None:
        with T.serial((end - first + (tile.threads - 1)) // tile.threads) as step:
            group = T.bind(first + T.cast(step, "int64") * tile.threads + T.cast(thread, "int64"))
            with _only_if([group < end]):
                body(0, group)

    return each


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


class _Sums:
    """Sums of the parts of a row, from one launch to the next.

    They lie in the first output, which the last launch alone fills: a part leaves its sum in the
    columns of every part, so that no block overwrites what another has yet to read.

    Attributes:
        part, parts: the number of the block in its row, and how many share the row.
    """

    def __init__(
        self, emitter: ThreadEmitter, row: Expr, thread: Expr, part: Expr, parts: Expr
    ) -> None:
        self.emitter, self.row, self.thread = emitter, row, thread
        self.part, self.parts = part, parts
        levels = emitter.program.levels
        self.order = [reduction.output for level in levels for reduction in level]

    def edge(self, part: Expr) -> Expr:
        """The first group of a part."""
        groups = self.emitter.columns() // self.emitter.vector
        return T.bind(T.truncdiv(groups * part, self.parts))

    def leave(self, name: str, total: Expr) -> None:
        """Leave this part's sum to every part."""
        with T.If(self.thread < self.parts), T.Then():
            buffer, start = self._place(name, T.cast(self.thread, "int64"))
            T.buffer_store(buffer, total, [start + self.part])

    def take(self, name: str) -> Any:
        """The sums of all parts, one to a thread, as they were left to this part."""
        sums = _zero()
        with T.If(self.thread < self.parts), T.Then():
            buffer, start = self._place(name, self.part)
            T.buffer_store(sums, buffer[start + T.cast(self.thread, "int64")], [0])
        return sums

    def _place(self, name: str, part: Expr) -> tuple[Any, Expr]:
        """The first output as f32, and where the sums lie that were left to `part`."""
        slot = self.emitter.outputs[0]
        line, start = self.emitter.memory(slot, self.row, self.edge(part))
        share = 4 // DTYPES[slot.dtype].numpy.itemsize
        buffer = T.decl_buffer((line.shape[0] // share,), "float32", data=line.data)
        return buffer, start // share + self.order.index(name) * SPLIT


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
        """All of them."""
        emitter, program = self.emitter, self.emitter.program
        self._begin()
        coming = [reduction.input for level in program.levels[1:] for reduction in level]
        late = self._late()
        kept = emitter.frontier([*coming, *late]) if self.chunks and program.levels else []
        early = self._early()
        made = list(dict.fromkeys([*early, *(name for name in kept if name in program.nodes)]))
        for level in program.levels:
            self._means(level, self._over(made, level, kept))
            emitter.resident |= {name: name for name in made if name in (*kept, *early)}
            made = []
        emitter.keep_narrow(kept)  # the last pass needs room for vectors
        self._over(late, (), ())

    def run_one(self, number: int, parts: _Sums) -> None:
        """One of them, over a part of the row, after launches that did those before it."""
        emitter, levels = self.emitter, self.emitter.program.levels
        self._begin()
        for level in levels[:number]:
            self._means(level, {mean.output: parts.take(mean.output) for mean in level})
        early = self._early()
        emitter.resident |= dict(zip(early, early, strict=True)) if number else {}
        if number == len(levels):
            self._over(self._late(), (), ())
            return
        sums = self._over([] if number else early, levels[number], ())
        for name, own in sums.items():
            parts.leave(name, self._total(own))

    def _begin(self) -> None:
        self.emitter.uniform("attribute")
        self.emitter.spread(set(self.emitter.scalars))

    def _early(self) -> list[str]:
        """Outputs the first pass makes."""
        emitter = self.emitter
        return [
            slot.name
            for slot in emitter.outputs[1:]
            if emitter.program.levels and emitter.program.row_free(slot.name)
        ]

    def _late(self) -> list[str]:
        """Outputs the last pass makes."""
        early = self._early()
        return [slot.name for slot in self.emitter.outputs if slot.name not in early]

    def _over(
        self, made: list[str], level: tuple[Reduction, ...], kept: Collection[str]
    ) -> dict[str, Any]:
        """One pass: makes values, stores those that are outputs; the thread's sums for `level`."""
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
        return sums

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
