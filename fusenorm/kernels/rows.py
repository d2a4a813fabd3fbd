"""Row kernels: a fused op's function body compiled to serial TIR functions over [begin, end).

Values are f32 in registers; a value the body holds in 16 bits is rounded to them after the node
that makes it. Tensors are contiguous and aligned to their element only.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import tvm.script.ir_builder.tirx as T
from tvm.script.ir_builder import IRBuilder

from fusenorm.kernels import mathfn, streaming
from fusenorm.kernels.mathfn import Expr, Lanes
from fusenorm.kernels.program import Reduction, RowProgram, row_program, symbols
from fusenorm.ops import DTYPES, DType, OpSpec, Slot

_ACCUMULATORS = 4
# Registers an elementwise program sees as one vector: its chain of operations is longer than what a
# core looks ahead.
_SIDE_BY_SIDE = 4
# Bytes of y from which a call is taken for part of an op whose tensors no cache holds: the ops
# library makes up to 64 calls of an op, none as large unless y has 16 MiB or one row is as large.
_LARGE = 256 << 10
# Bytes of the first cache that rows and vectors may take.
_NEAR = 32 << 10
# Bytes of an elementwise input read ahead of their use, and of a cache line.
_AHEAD, _LINE = 4096, 64
# bf16 travels as its bits: TIR's own bf16 turns NaN into zero when it rounds.
BUFFER: dict[DType, str] = {"f16": "float16", "bf16": "uint16", "f32": "float32"}
_SCALAR = Lanes(1)


def functions(spec: OpSpec, lanes: int) -> list[Any]:
    """The PrimFuncs of `spec` with vectors of `lanes` f32, in the order of `symbols`.

    Arguments: the inputs, the outputs, int64 begin and end, then the attributes as float32.
    Tensors are [rows, D], vectors [D], packed ones [rows, 2D]; the range is of rows. The function
    without the second output uses the first as scratch. An output may lie where an input [rows, D]
    lies.
    """
    program = row_program(spec)
    emit = _flat if program.flat else _rows
    name, *rest = symbols(spec)
    made = [emit(program, name, program.outputs, lanes)]
    return made + [emit(program, other, program.outputs[:1], lanes) for other in rest]


def _align(slot: Slot) -> int:
    """Bytes a tensor is surely aligned to: those of an element."""
    return DTYPES[slot.dtype].numpy.itemsize


_UNARY: Mapping[str, Callable[[Lanes, Expr], Expr]] = {
    "Identity": lambda lanes, x: x,
    "Cast": lambda lanes, x: x,
    "Neg": lambda lanes, x: lanes.f32(0.0) - x,
    "Relu": lambda lanes, x: T.Select(x < lanes.f32(0.0), lanes.f32(0.0), x),
    "Sqrt": lambda lanes, x: T.sqrt(x),
    "Reciprocal": lambda lanes, x: lanes.f32(1.0) / x,
    "Sigmoid": mathfn.sigmoid,
    "Tanh": mathfn.tanh,
    "Erf": mathfn.erf,
}
_BINARY: Mapping[str, Callable[[Expr, Expr], Expr]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: a / b,
    "Max": lambda a, b: T.Select(a < b, b, a),
    "Min": lambda a, b: T.Select(b < a, b, a),
}


def widen(lanes: Lanes, dtype: DType, stored: Expr) -> Expr:
    """A stored value as f32."""
    if dtype == "f16":
        return lanes.cast("float32", stored)
    if dtype == "bf16":
        return lanes.from_bits(lanes.shift_left(lanes.cast("uint32", stored), 16))
    return stored


def _bf16_bits(lanes: Lanes, value: Expr) -> Expr:
    """The f32 bits of `value` rounded to bf16, to nearest even; NaN stays a quiet NaN."""
    bits = T.bind(lanes.bits(value))
    odd = lanes.shift_right(bits, 16) & lanes.u32(1)
    rounded = (bits + (odd + lanes.u32(0x7FFF))) & lanes.u32(0xFFFF0000)
    magnitude = bits & lanes.u32(0x7FFFFFFF)
    return T.bind(T.Select(magnitude > lanes.u32(0x7F800000), lanes.u32(0x7FC00000), rounded))


def round_to(lanes: Lanes, dtype: DType, value: Expr) -> Expr:
    """f32 -> dtype -> f32."""
    if dtype == "f16":
        return T.bind(lanes.cast("float32", T.bind(lanes.cast("float16", value))))
    if dtype == "bf16":
        return lanes.from_bits(_bf16_bits(lanes, value))
    return value


def narrow(lanes: Lanes, dtype: DType, value: Expr) -> Expr:
    """f32 as stored."""
    if dtype == "f16":
        return lanes.cast("float16", value)
    if dtype == "bf16":
        return lanes.cast("uint16", lanes.shift_right(_bf16_bits(lanes, value), 16))
    return value


@dataclasses.dataclass(frozen=True)
class Block:
    """`lanes` elements from column `at` of row `row` (None: flat); `mask` in the tail."""

    lanes: Lanes
    row: Expr
    at: Expr
    rest: Expr = None

    def mask(self, first: int = 0, scale: int = 1) -> Expr:
        """Lanes `first`… of `scale`·`rest` valid ones."""
        limit = T.cast(self.rest * scale, "int32")
        return T.get_active_lane_mask(self.lanes.type("bool"), T.int32(first), limit)

    def index(self, at: Expr, vector: bool) -> list[Expr]:
        ramp = T.ramp(at, 1, self.lanes.count)
        return [ramp] if vector or self.row is None else [self.row, ramp]


class Emitter:
    """What the skeletons share: buffers, uniform values, evaluation of elements."""

    unary = _UNARY
    scalar = _SCALAR
    round_to = staticmethod(round_to)

    def __init__(self, program: RowProgram, outputs: tuple[Slot, ...], lanes: Lanes) -> None:
        self.program = program
        self.outputs = outputs
        self.lanes = lanes
        self.slots = {slot.name: slot for slot in (*program.inputs, *program.outputs)}
        self.buffers: dict[str, Any] = {}
        self.scalars: dict[str, Expr] = {}
        self.spreads: dict[str, Expr] = {}
        self.resident: dict[str, str] = {}
        self.streaming = False

    def arguments(self, shape: Callable[[Slot], tuple[Any, ...]]) -> tuple[Expr, Expr]:
        """Declare the parameters; returns begin and end."""
        slots = (*self.program.inputs, *self.outputs)
        handles = [T.arg(slot.name, T.handle()) for slot in slots]
        begin, end = T.arg("begin", T.int64()), T.arg("end", T.int64())
        for name in self.program.attributes:
            self.scalars[name] = T.arg(name, T.float32())
        # Outputs first: their shape defines the symbols the inputs' use.
        for slot, handle in sorted(zip(slots, handles, strict=True), key=self._inputs_last):
            self.buffers[slot.name] = T.match_buffer(
                handle,
                shape(slot),
                BUFFER[slot.dtype],
                align=_align(slot),
            )
        return begin, end

    def flatten(self, count: Expr) -> None:
        """See every tensor as one row of `count` elements."""
        for name, buffer in self.buffers.items():
            slot = self.slots[name]
            self.buffers[name] = T.decl_buffer(
                (count,), BUFFER[slot.dtype], data=buffer.data, align=_align(slot)
            )

    def _inputs_last(self, item: tuple[Slot, Expr]) -> bool:
        return item[0] not in self.outputs

    def uniform(self, kind: str) -> None:
        """Compute the nodes of this kind whose inputs are known by now."""
        for name, node in self.program.nodes.items():
            value = self.program.values[name]
            if value.kind != kind or name in self.scalars:
                continue
            if all(self._scalar(read) is not None for read in node.inputs):
                reads = [self._scalar(read) for read in node.inputs]
                self.scalars[name] = self._apply(self.scalar, name, reads)

    def _scalar(self, name: str) -> Expr | None:
        literal = self.program.values[name].literal
        return self.scalars.get(name) if literal is None else T.float32(literal)

    def _apply(self, lanes: Lanes, name: str, reads: list[Expr]) -> Expr:
        node, dtype = self.program.nodes[name], self.program.values[name].dtype
        unary = self.unary.get(node.op)
        value = unary(lanes, reads[0]) if unary else _BINARY[node.op](reads[0], reads[1])
        if node.op == "Mul" and self.program.rounded and self.program.summand(name):
            value = lanes.fence(value)
        value = lanes.let(value)
        return lanes.let(self.round_to(lanes, dtype, value)) if node.rounds else value

    def spread(self, names: set[str]) -> None:
        """Broadcast the scalars among `names` outside the coming loop."""
        for name in sorted(names & self.scalars.keys()):
            if name not in self.spreads:
                self.spreads[name] = T.bind(self.lanes.spread(self.scalars[name]))

    def element(self, block: Block, name: str, memo: dict[str, Expr]) -> Expr:
        """The f32 lanes of a value."""
        if name in memo:
            return memo[name]
        value = self.program.values[name]
        if value.literal is not None:
            result = block.lanes.f32(value.literal)
        elif name in self.spreads:
            result = self.spreads[name]
        elif name in self.resident:
            result = self._load(block, self.resident[name], value.dtype)
        elif name in self.program.nodes:
            reads = [self.element(block, read, memo) for read in self.program.nodes[name].inputs]
            result = self._apply(block.lanes, name, reads)
        elif name in self.program.views:
            result = self._load_view(block, name, value.dtype)
        else:
            result = self._load(block, name, value.dtype)
        memo[name] = result
        return result

    def apply(self, values: dict[str, Expr]) -> Expr:
        """The first output, from f32 lanes of the inputs."""
        block = Block(self.lanes, None, None)
        return self.element(block, self.outputs[0].name, dict(values))

    def _raw(self, block: Block, name: str, at: Expr, mask: Expr | None) -> Expr:
        index = block.index(at, self.slots[name].layout == "vector")
        buffer = self.buffers[name]
        if mask is None:
            return T.bind(buffer[tuple(index)])
        dtype = block.lanes.type(BUFFER[self.slots[name].dtype])
        return T.bind(T.masked_load(dtype, buffer, *index, mask))

    def _load(self, block: Block, name: str, dtype: DType) -> Expr:
        mask = None if block.rest is None else block.mask()
        return block.lanes.let(widen(block.lanes, dtype, self._raw(block, name, block.at, mask)))

    def _load_view(self, block: Block, name: str, dtype: DType) -> Expr:
        view, count = self.program.views[name], block.lanes.count
        tail = block.rest is not None
        if view.stride == 1:
            at = block.at + self.columns() * view.half
            stored = self._raw(block, view.source, at, block.mask() if tail else None)
        else:
            parts = [
                self._raw(
                    block,
                    view.source,
                    block.at * 2 + part * count,
                    block.mask(part * count, 2) if tail else None,
                )
                for part in (0, 1)
            ]
            picks = [T.int32(2 * lane + view.offset) for lane in range(count)]
            stored = T.bind(T.Shuffle(parts, picks))
        return block.lanes.let(widen(block.lanes, dtype, stored))

    def columns(self) -> Expr:
        """D."""
        return self.buffers[self.outputs[0].name].shape[-1]

    def store(self, block: Block, target: str, value: Expr) -> None:
        slot = self.slots[target]
        stored = T.bind(narrow(block.lanes, slot.dtype, value))
        index, buffer = block.index(block.at, vector=False), self.buffers[target]
        if block.rest is None and self.streaming:
            element = buffer[block.at] if block.row is None else buffer[block.row, block.at]
            streaming.store(block.lanes, slot.dtype, element, stored)
        elif block.rest is None:
            T.buffer_store(buffer, stored, index)
        else:
            T.evaluate(T.masked_store(buffer, stored, *index, block.mask()))

    def fetch_ahead(self, block: Block) -> None:
        """Have what lies some way behind the elements of a block read."""
        for slot in self.program.inputs:
            size = DTYPES[slot.dtype].numpy.itemsize
            for at in range(0, block.lanes.count, _LINE // size):
                prefetch(self.buffers[slot.name][block.at + (at + _AHEAD // size)], level=1)

    def each_size(self, begin: Expr, end: Expr, emit: Callable[[Self], None]) -> None:
        """`emit` twice: for rows (or elements of flat programs) [begin, end) so large that they are
        stored past the caches, and for others and those that lie where an input does.
        """
        dtypes = [slot.dtype for slot in self.outputs]
        with streaming.available(self.lanes, dtypes), T.If(self._large(begin, end)):
            with T.Then():
                inner = self._inner()
                inner.streaming = True
                emit(inner)
                streaming.finish()
            with T.Else():
                emit(self._inner())

    def _large(self, begin: Expr, end: Expr) -> Expr:
        flat = self.program.flat
        count = end - begin if flat else (end - begin) * self.columns()
        large = count >= _LARGE // DTYPES[self.outputs[0].dtype].numpy.itemsize
        if not flat:
            large = T.And(large, self.columns() % self.lanes.count == 0)
        rows = [slot.name for slot in self.program.inputs if slot.layout == "row"]
        for slot in self.outputs:
            first = self._first(slot.name, begin)
            large = T.And(large, streaming.aligned(self.lanes, slot.dtype, first))
            for name in rows:
                large = T.And(large, streaming.apart(first, self._first(name, begin)))
        return large

    def _first(self, name: str, begin: Expr) -> Expr:
        """The first element of row (or, flat, the element) `begin`."""
        buffer = self.buffers[name]
        return buffer[begin] if self.program.flat else buffer[begin, 0]

    def _inner(self) -> Self:
        """Itself, to compute values in a scope of their own."""
        inner = copy.copy(self)
        inner.scalars, inner.spreads = dict(self.scalars), dict(self.spreads)
        inner.resident = dict(self.resident)
        return inner

    def sweep(
        self, row: Expr, begin: Expr, end: Expr, unroll: int, body: Callable[..., None]
    ) -> None:
        """`body(block, u)` over the columns [begin, end): u-fold unrolled, single, masked tail."""
        width = self.lanes.count
        at = begin
        for u in dict.fromkeys((unroll, 1)):
            count = T.bind((end - at) // (width * u))
            with T.serial(count) as k:
                for part in range(u):
                    body(Block(self.lanes, row, at + (k * u + part) * width), part)
            at = T.bind(at + count * (width * u))
        with T.If(end > at), T.Then():
            body(Block(self.lanes, row, at, end - at), 0)


def prefetch(element: Expr, level: int) -> None:
    """Have the element's cache line brought into this level of cache; outside of memory it does
    nothing.
    """
    reading, locality, data = T.int32(0), T.int32(4 - level), T.int32(1)
    where = T.address_of(element)
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", where, reading, locality, data))


@contextmanager
def function(name: str, *, noalias: bool = True) -> Iterator[IRBuilder]:
    """Builds one PrimFunc.

    Args:
        name: its symbol.
        noalias: whether its tensors never share memory.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": noalias})
        yield builder


def _flat(program: RowProgram, name: str, outputs: tuple[Slot, ...], lanes: int) -> Any:
    emitter = Emitter(program, outputs, Lanes(lanes * _SIDE_BY_SIDE))
    with function(name, noalias=False) as builder:
        rows, columns = T.int64(), T.int64()
        begin, end = emitter.arguments(lambda slot: (rows, columns))
        emitter.flatten(rows * columns)
        emitter.uniform("attribute")
        emitter.spread(set(emitter.scalars))

        first, last = begin * columns, end * columns

        def emit(inner: Emitter) -> None:
            def body(block: Block, part: int) -> None:
                inner.fetch_ahead(block)
                memo: dict[str, Expr] = {}
                for slot in outputs:
                    inner.store(block, slot.name, inner.element(block, slot.name, memo))

            inner.sweep(None, first, last, 1, body)

        emitter.each_size(first, last, emit)
    return builder.get()


def _rows(program: RowProgram, name: str, outputs: tuple[Slot, ...], lanes: int) -> Any:
    emitter = RowEmitter(program, outputs, Lanes(lanes))
    with function(name, noalias=False) as builder:
        rows, columns, pair = T.int64(), T.int64(), T.int64()
        shapes = {"row": (rows, columns), "vector": (columns,), "packed": (rows, pair)}
        begin, end = emitter.arguments(lambda slot: shapes[slot.layout])
        emitter.uniform("attribute")
        emitter.allocate()

        def emit(inner: RowEmitter) -> None:
            with T.serial(begin, end) as row:
                inner.row(row, end)

        emitter.each_size(begin, end, emit)
    return builder.get()


class RowEmitter(Emitter):
    """One pass over the row per reduction level, then one that writes the outputs."""

    def allocate(self) -> None:
        size = self.lanes.count * _ACCUMULATORS
        self.accumulators = {
            reduction.output: T.alloc_buffer((size,), "float32")
            for level in self.program.levels
            for reduction in level
        }

    def row(self, row: Expr, end: Expr) -> None:
        """One row, while parts of the next one are read."""
        self.measure(row, self._early())
        late = [slot.name for slot in self.outputs if slot.name not in self.resident]
        zero = T.int64(0)
        near = T.And(self._short(), row + 1 < end)
        following = row + 1 if self.streaming else T.bind(row + T.Select(near, T.int64(1), zero))

        def body(block: Block, part: int) -> None:
            self._fetch(following, block)
            memo: dict[str, Expr] = {}
            values = {name: self.element(block, name, memo) for name in late}
            for name, value in values.items():
                self.store(block, name, value)

        self.sweep(row, T.int64(0), self.columns(), 1, body)

    def measure(self, row: Expr, stores: Mapping[str, str]) -> None:
        """Compute what is one number of a row; the first pass stores `stores`."""
        self.spread(set(self.scalars))
        for level in self.program.levels:
            self._reduce(row, level, stores)
            self.resident |= stores
            stores = {}
            self.uniform("row")
            self.spread(set(self.scalars))

    def _short(self) -> Expr:
        """Whether two rows of the inputs fit the first cache, beside the vectors."""
        sizes = {"row": 2, "vector": 1, "packed": 4}
        inputs = self.program.inputs
        size = sum(sizes[slot.layout] * DTYPES[slot.dtype].numpy.itemsize for slot in inputs)
        return self.columns() <= _NEAR // size

    def _fetch(self, row: Expr, block: Block) -> None:
        """Have the same columns of another row read."""
        for slot in self.program.inputs:
            if slot.layout == "row":
                level = 2 if self.streaming else 1
                prefetch(self.buffers[slot.name][row, block.at], level)

    def _early(self) -> dict[str, str]:
        """Values the first pass stores, later passes load, and where: s in s, else s in y.

        An s that they do not load is made of what they do, which it must not overwrite.
        """
        if self.streaming or not self.program.levels:
            return {}
        first = self.outputs[0]
        early = {}
        for slot in self.program.outputs:
            if slot != first and self.program.uses(slot.name) and self.program.row_free(slot.name):
                if slot in self.outputs:
                    early[slot.name] = slot.name
                elif slot.dtype == first.dtype:
                    early[slot.name] = first.name
        return early

    def _reduce(self, row: Expr, level: tuple[Reduction, ...], stores: Mapping[str, str]) -> None:
        """Means of `level`; the same pass stores `stores`."""
        width, zero = self.lanes.count, self.lanes.f32(0.0)
        for reduction in level:
            for part in range(_ACCUMULATORS):
                index = [T.ramp(part * width, 1, width)]
                T.buffer_store(self.accumulators[reduction.output], zero, index)

        def body(block: Block, part: int) -> None:
            memo: dict[str, Expr] = {}
            for name, target in stores.items():
                self.store(block, target, self.element(block, name, memo))
            for reduction in level:
                value = self.element(block, reduction.input, memo)
                if block.rest is not None:
                    value = T.Select(block.mask(), value, zero)
                accumulator = self.accumulators[reduction.output]
                index = T.ramp(part * width, 1, width)
                T.buffer_store(accumulator, accumulator[index] + value, [index])

        self.sweep(row, T.int64(0), self.columns(), _ACCUMULATORS, body)
        for reduction in level:
            total = self._total(self.accumulators[reduction.output])
            mean = _SCALAR.let(total / T.cast(self.columns(), "float32"))
            dtype = self.program.values[reduction.output].dtype
            self.scalars[reduction.output] = _SCALAR.let(round_to(_SCALAR, dtype, mean))

    def _total(self, accumulator: Any) -> Expr:
        """Sum of all lanes, as a tree of halves."""
        size = self.lanes.count * _ACCUMULATORS
        while size > 2:
            size //= 2
            lanes = min(size, self.lanes.count)
            for part in range(0, size, lanes):
                low, high = T.ramp(part, 1, lanes), T.ramp(size + part, 1, lanes)
                T.buffer_store(accumulator, accumulator[low] + accumulator[high], [low])
        return T.bind(accumulator[0] + accumulator[1])
