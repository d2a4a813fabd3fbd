"""Row kernels for CUDA: a fused op's function body on the threads of a block.

A thread owns groups of `vector` neighbouring columns; they move in pieces of up to 16 bytes.
Every value is f32 in registers; one the body holds in 16 bits is rounded to them where it is made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import tvm.script.ir_builder.tirx as T

from fusenorm.kernels.mathfn import Expr, Lanes
from fusenorm.kernels.program import RowProgram
from fusenorm.kernels.rows import Block, Emitter
from fusenorm.ops import DTYPES, DType, Slot

ELEMENT: Mapping[DType, str] = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
ACCESS = 16  # bytes a thread moves at once
STORE, KEEP = "fusenorm_store", "fusenorm_keep"  # functions of `PRELUDE`
# Where the address is not known to be one of few, nvcc takes a plain store to pieces. And it keeps
# f32 values made of a row, in twice the registers, unless it has to think that the row has changed.
PRELUDE = f"""#include <cuda_runtime.h>
template <typename T>
static __device__ __forceinline__ void {STORE}(T* to, const T* from) {{
  __stwb(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(from));
}}
template <typename T>
static __device__ __forceinline__ void {KEEP}(T* pair) {{
  asm volatile("" : "+r"(*reinterpret_cast<unsigned*>(pair)));
}}
"""
WARP = 32
BLOCK = 128  # threads of a block that holds several rows
STREAM = 512  # threads of a block that reads its row again
SPLIT = 256  # blocks that share few long rows
FLAT = 256  # threads of a block without rows
WIDE = 512  # threads of a row at most, so that a multiprocessor has two blocks at work
MOST_THREADS = 1024  # where a row needs them
KEPT = 24  # columns a thread keeps, as a rule
MOST_CHUNKS = 4  # groups a thread keeps
BUSY = 1024  # threads a multiprocessor holds at least, with 64 registers each


@dataclasses.dataclass(frozen=True)
class Thread(Lanes):
    """One value per thread, named through a register."""

    count: int = 1

    def let(self, value: Expr) -> Expr:
        cell = T.alloc_buffer((1,), "float32", scope="local")
        T.buffer_store(cell, value, [0])
        return T.bind(cell[0])

    def fence(self, value: Expr) -> Expr:
        """The compiler is told to contract nothing."""
        return value


def _call(name: str) -> Callable[[Lanes, Expr], Expr]:
    return lambda lanes, x: lanes.let(T.call_pure_extern("float32", name, x))


def _sigmoid(lanes: Lanes, x: Expr) -> Expr:
    e = T.call_pure_extern("float32", "expf", lanes.f32(0.0) - x)
    return lanes.let(lanes.f32(1.0) / (e + lanes.f32(1.0)))


_UNARY: Mapping[str, Callable[[Lanes, Expr], Expr]] = {
    **Emitter.unary,
    "Sigmoid": _sigmoid,
    "Tanh": _call("tanhf"),
    "Erf": _call("erff"),
}


def _round_to(lanes: Lanes, dtype: DType, value: Expr) -> Expr:
    if dtype == "f32":
        return value
    return T.bind(lanes.cast("float32", T.bind(lanes.cast(ELEMENT[dtype], value))))


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the columns of a row lie on the threads of a block.

    Attributes:
        columns: D.
        vector: neighbouring columns of one group.
        threads: threads per row.
        chunks: groups per thread.
        rows: rows per block.
        parts: blocks per row.
    """

    columns: int
    vector: int
    threads: int
    chunks: int
    rows: int
    parts: int

    @classmethod
    def of(cls, program: RowProgram, columns: int) -> Tiling | None:
        """None: the row does not fit into the registers of one block."""
        vector = math.gcd(columns, widest(program))
        groups = columns // vector
        most, chunks = (WIDE, min(MOST_CHUNKS, KEPT // vector)) if program.levels else (FLAT, 2)
        threads = min(most, _power_of_two(groups / chunks))
        if program.levels:
            if groups > MOST_CHUNKS * threads:
                threads = MOST_THREADS
            chunks, parts = math.ceil(groups / threads), 1
            if chunks * vector * threads > fits(program):
                return None
        else:
            chunks = min(chunks, math.ceil(groups / threads))
            parts = math.ceil(groups / (threads * chunks))
        return cls(columns, vector, threads, chunks, max(1, BLOCK // threads), parts)

    @property
    def groups(self) -> int:
        return self.columns // self.vector

    @property
    def ragged(self) -> bool:
        """Whether some threads have no group in the last chunk."""
        return self.groups != self.threads * self.chunks * self.parts


def widest(program: RowProgram) -> int:
    """Columns of a full group: 16 bytes of the narrowest row."""
    rows = [slot for slot in (*program.inputs, *program.outputs) if slot.layout != "vector"]
    return ACCESS // min(DTYPES[slot.dtype].numpy.itemsize for slot in rows)


def fits(program: RowProgram) -> int:
    """The longest row that stays in registers: 16K columns, 32K of 16 bits."""
    return 4096 * widest(program)


def _power_of_two(least: float) -> int:
    """The smallest power of two that is not below `least`."""
    return 1 << max(0, math.ceil(math.log2(least)))


def access(slot: Slot, vector: int) -> int:
    """Bytes of the pieces in which groups of a tensor move: what it must be aligned to."""
    return min(ACCESS, vector * DTYPES[slot.dtype].numpy.itemsize)


@dataclasses.dataclass
class Registers:
    """Values of one thread, of all its groups or of the one at hand."""

    buffer: Any
    whole: bool


class ThreadEmitter(Emitter):
    """What one thread computes of its groups.

    Attributes:
        at: the chunk and the lane of the element at hand.
        stores_whole: groups are stored by `PRELUDE`, which keeps their 16 bytes together.
    """

    unary = _UNARY
    scalar = Thread()
    round_to = staticmethod(_round_to)

    def __init__(
        self,
        program: RowProgram,
        outputs: tuple[Slot, ...],
        buffers: Mapping[str, Any],
        attributes: Mapping[str, Expr],
        width: Expr,
        vector: int,
    ) -> None:
        super().__init__(program, outputs, Thread())
        self.width = width
        self.vector = vector
        self.buffers.update(buffers)
        self.scalars.update(attributes)
        self.held: dict[str, Registers] = {}
        self.at: tuple[Expr, Expr] = (0, 0)
        self.stores_whole = False

    def columns(self) -> Expr:
        return self.width

    # What is in registers

    def hold(self, name: str, chunks: int = 0) -> None:
        """Registers for a value: of `chunks` groups, or of the one at hand."""
        packed = name in self.slots and self.slots[name].layout == "packed"
        dtype = self.slots[name].dtype if packed else self.program.values[name].dtype
        size = self.vector * max(chunks, 1) * (2 if packed else 1)
        buffer = T.alloc_buffer((size,), ELEMENT[dtype], scope="local")
        self.held[name] = Registers(buffer, chunks > 0)

    def keep(self, name: str, value: Expr) -> None:
        """Put an element into its registers."""
        registers, dtype = self.held[name], self.program.values[name].dtype
        stored = value if dtype == "f32" else self.lanes.cast(ELEMENT[dtype], value)
        T.buffer_store(registers.buffer, stored, [self._place(registers)])

    def keep_narrow(self, names: Iterable[str]) -> None:
        """Have 16-bit values of all groups stay as they are until now."""
        for name in names:
            buffer = self.held[name].buffer
            if self.vector > 1 and buffer.dtype != "float32":
                for pair in range(0, int(buffer.shape[0]), 2):
                    T.evaluate(T.call_extern("void", KEEP, T.address_of(buffer[pair])))

    def _place(self, registers: Registers, stride: int = 1) -> Expr:
        chunk, lane = self.at
        return ((chunk if registers.whole else 0) * self.vector + lane) * stride

    def _load(self, block: Block, name: str, dtype: DType) -> Expr:
        registers = self.held[name]
        stored = registers.buffer[self._place(registers)]
        return block.lanes.let(block.lanes.cast("float32", stored))

    def _load_view(self, block: Block, name: str, dtype: DType) -> Expr:
        view = self.program.views[name]
        if view.stride == 1:
            return self._load(block, name, dtype)
        registers = self.held[view.source]
        stored = registers.buffer[self._place(registers, view.stride) + view.offset]
        return block.lanes.let(block.lanes.cast("float32", stored))

    # Between memory and registers

    def memory(self, slot: Slot, row: Expr, group: Expr) -> tuple[Any, Expr]:
        """A tensor as one line of elements, and where the group begins in it."""
        buffer = self.buffers[slot.name]
        if slot.layout == "vector":
            size, start = buffer.shape[0], group
        else:
            stride = buffer.strides[0]
            size, start = buffer.shape[0] * stride, row * (stride // self.vector) + group
        return T.decl_buffer((size,), ELEMENT[slot.dtype], data=buffer.data), start * self.vector

    def pieces(self, slot: Slot, count: int) -> Iterable[tuple[int, int]]:
        """(first, length) of the pieces `count` elements move in."""
        length = access(slot, self.vector) // DTYPES[slot.dtype].numpy.itemsize
        return [(first, length) for first in range(0, count, length)]

    def fetch(self, name: str, row: Expr, group: Expr, chunk: Expr) -> None:
        """Load a group of an input or of a part of a packed one into its registers."""
        registers = self.held[name]
        chunk = chunk if registers.whole else 0
        view = self.program.views.get(name)
        slot = self.slots[view.source if view else name]
        count = self.vector * (2 if slot.layout == "packed" and not view else 1)
        column = T.cast(group, "int64")
        if view:
            column = column + self.columns() // self.vector * view.half
        line, start = self.memory(slot, row, column * (count // self.vector))
        for first, length in self.pieces(slot, count):
            value = line[_span(start + first, length)]
            T.buffer_store(registers.buffer, value, [_span(chunk * count + first, length)])

    def put(self, name: str, row: Expr, group: Expr, chunk: Expr) -> None:
        """Store a group of an output from its registers."""
        registers = self.held[name]
        line, start = self.memory(self.slots[name], row, T.cast(group, "int64"))
        first_of_chunk = (chunk if registers.whole else 0) * self.vector
        for first, length in self.pieces(self.slots[name], self.vector):
            if self.stores_whole and length > 1:
                pointers = (line[start + first], registers.buffer[first_of_chunk + first])
                T.evaluate(T.call_extern("void", STORE, *(T.address_of(at) for at in pointers)))
                continue
            value = registers.buffer[_span(first_of_chunk + first, length)]
            T.buffer_store(line, value, [_span(start + first, length)])

    def over(self, vector: int) -> ThreadEmitter:
        """The same from the start, over groups of `vector` columns."""
        attributes = {name: self.scalars[name] for name in self.program.attributes}
        return ThreadEmitter(
            self.program, self.outputs, self.buffers, attributes, self.width, vector
        )

    # What a pass needs

    def holds_whole(self, name: str) -> bool:
        """Whether registers hold the value for all groups of the thread."""
        return name in self.held and self.held[name].whole

    def is_vector(self, name: str) -> bool:
        return name in self.slots and self.slots[name].layout == "vector"

    def leaves(self, targets: Iterable[str]) -> list[str]:
        """The values a pass loads to compute `targets`, each once."""
        found: dict[str, None] = {}

        def walk(name: str) -> None:
            value = self.program.values[name]
            if value.literal is not None or name in self.scalars or name in found:
                return
            if name in self.program.nodes and name not in self.resident:
                for read in self.program.nodes[name].inputs:
                    walk(read)
            else:
                found[self.resident.get(name, name)] = None

        for target in targets:
            walk(target)
        views = self.program.views
        return list(
            dict.fromkeys(self._register_of(name) if name in views else name for name in found)
        )

    def _register_of(self, name: str) -> str:
        view = self.program.views[name]
        return name if view.stride == 1 else view.source

    def frontier(self, targets: Iterable[str]) -> list[str]:
        """Values of the row that a first pass can make and `targets` are computed from."""
        found: dict[str, None] = {}

        def walk(name: str) -> None:
            node = self.program.nodes.get(name)
            if self.program.values[name].kind != "element":
                return
            if self.program.row_free(name):
                if self._of_rows(name):
                    found[self._stored(name)] = None
            elif node is not None:
                for read in node.inputs:
                    walk(read)

        for target in targets:
            walk(target)
        return list(found)

    def _of_rows(self, name: str) -> bool:
        """Whether a value depends on more than vectors."""
        node = self.program.nodes.get(name)
        if node is not None:
            return any(self._of_rows(read) for read in node.inputs)
        return name in self.program.views or (name in self.slots and not self.is_vector(name))

    def _stored(self, name: str) -> str:
        """The narrowest value `name` is a copy of."""
        node = self.program.nodes.get(name)
        while node is not None and node.op in ("Cast", "Identity"):
            if self.program.values[node.inputs[0]].dtype == "f32":
                break
            name = node.inputs[0]
            node = self.program.nodes.get(name)
        return name


def _span(start: Expr, length: int) -> Expr:
    return start if length == 1 else T.ramp(start, 1, length)
