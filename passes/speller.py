"""Writes one spelling of a pattern as a graph: the generator behind every rule's tests."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from fusenorm.ops.spec import DTYPES, DType
from fusenorm.passes import facts

WIDTH = 12


class Speller:
    """Builds one spelling of a pattern; every free choice is asked of `pick`."""

    def __init__(
        self,
        choices: Sequence[int],
        opset: int,
        dtype: DType,
        rank: int,
        island: bool = True,
        axes: int = 1,
    ) -> None:
        self.choices = list(choices)
        self.sizes: list[int] = []
        self.taken: list[int] = []
        self.opset = opset
        self.dtype = dtype
        self.rank = rank
        self.island = island
        self.axes = axes
        self.shape = (*(2, 3, 2)[: rank - 1], WIDTH)
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.initializers: list[ir.Value] = []
        self.values: dict[str, ir.Value] = {}

    def pick(self, count: int) -> int:
        position = len(self.sizes)
        self.sizes.append(count)
        choice = self.choices[position] % count if position < len(self.choices) else 0
        self.taken.append(choice)
        return choice

    def constant(self, array: np.ndarray) -> ir.Value:
        name = f"const_{len(self.initializers)}"
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self.initializers.append(value)
        return value

    def number(self, value: float, dtype: DType) -> ir.Value:
        return self.constant(np.array(value, DTYPES[dtype].numpy))

    def typed(self, value: ir.Value, like: ir.Value) -> ir.Value:
        """A scalar constant, kept in f64 until then, in the type of the value it meets."""
        number, dtype = facts.scalar(value), facts.dtype_of(like)
        if number is None or dtype is None or facts.dtype_of(value) in (None, dtype):
            return value
        return self.number(number, dtype)

    def narrowed(self, values: list[ir.Value]) -> list[ir.Value]:
        """Operands of one type: where one is rounded already, the others skip their Cast up."""
        types = {value.dtype for value in values if facts.dtype_of(value) is not None}
        if len(types) < 2:
            return values
        narrow = DTYPES[self.dtype].onnx
        sources = [value if value.dtype == narrow else value.producer() for value in values]
        return [s.inputs[0] if isinstance(s, ir.Node) else s for s in sources]  # type: ignore[misc]

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        dtype: DType | None = None,
        **attributes: object,
    ) -> ir.Value:
        out = ir.val(f"v{len(self.nodes)}")
        out.dtype = DTYPES[dtype or self.dtype].onnx
        node = ir.node(op_type, inputs, attributes=attributes, outputs=[out])  # type: ignore[arg-type]
        self.nodes.append(node)
        return out

    def row(self, name: str, factor: int = 1) -> ir.Value:
        """A graph input [..., factor·WIDTH] of the storage type, bound to `name`."""
        shape = ir.Shape([*self.shape[:-1], factor * WIDTH])
        value = ir.val(name, dtype=DTYPES[self.dtype].onnx, shape=shape)
        self.inputs.append(value)
        self.values[name] = value
        return value

    def vector(self, name: str, size: int = WIDTH) -> None:
        """A constant over the reduced axes, the last one of `size`, bound to `name`.

        Its numbers are unlike 0 and 1 and each other.
        """
        shape = (*self.shape[-self.axes : -1], size)
        array = np.linspace(0.3, 1.7, math.prod(shape)) * (1.1 if name == "scale" else -0.7)
        self.values[name] = self.constant(array.reshape(shape).astype(DTYPES[self.dtype].numpy))

    def matrix(self, name: str, columns: int) -> None:
        """A constant [WIDTH, columns] bound to `name`."""
        array = np.random.default_rng(0).normal(size=(WIDTH, columns))
        self.values[name] = self.constant(array.astype(DTYPES[self.dtype].numpy))

    def scalar(self, name: str, number: float) -> None:
        """A constant scalar bound to `name`."""
        self.values[name] = self.number(number, "f64")

    def split(self, value: ir.Value, part: int) -> ir.Value:
        """One half of the last axis by Split; both halves share one node."""
        key = f"{value.name}_split"
        if f"{key}_0" not in self.values:
            dtype = DTYPES[self.dtype].onnx
            names = [f"{key}_{index}" for index in (0, 1)]
            outputs = [ir.val(name, dtype=dtype) for name in names]
            self.values.update(zip(names, outputs, strict=True))
            attributes: dict[str, int] = {"axis": (-1, self.rank - 1)[self.pick(2)]}
            if self.opset >= 18:
                attributes["num_outputs"] = 2
            self.nodes.append(ir.node("Split", [value], attributes=attributes, outputs=outputs))
        return self.values[f"{key}_{part}"]

    def columns(self, value: ir.Value, part: int, *, interleaved: bool) -> ir.Value:
        """Half of the columns by Slice: one side, or every second one."""
        start, end, step = (
            (part, sys.maxsize, 2) if interleaved else (part * WIDTH, WIDTH * (part + 1), 1)
        )
        bounds = [self.constant(np.array([bound], np.int64)) for bound in (start, end, -1, step)]
        return self.node("Slice", [value, *bounds])

    def model(self, output: ir.Value) -> ir.Model:
        """What was written, as a model with one output."""
        output.name = "out"
        graph = ir.Graph(
            self.inputs,
            [output],
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports={"": self.opset},
            name="spelling",
        )
        return ir.Model(graph, ir_version=8)


def spellings(
    write: Callable[[Speller], ir.Value],
    *,
    opset: int = 18,
    dtype: DType = "f32",
    rank: int = 3,
    island: bool = True,
    axes: int = 1,
    limit: int = 200,
    seed: int = 0,
) -> Iterator[ir.Model]:
    """Models of distinct choices: half of them one option after another, then random mixtures.

    Args:
        write: writes one spelling and returns its value.
        opset: of the models.
        dtype: storage type.
        rank: of the rows.
        island: whether 16-bit spellings compute between Casts to f32 and back.
        axes: how many last axes a reduction goes over.
        limit: how many models at most.
        seed: of the mixtures.
    """
    rng = np.random.default_rng(seed)
    pending: list[list[int]] = [[]]
    seen: set[tuple[int, ...]] = set()
    for _ in range(20 * limit):  # mixtures repeat themselves where there are few spellings
        if not pending or len(seen) == limit:
            return
        systematic = len(seen) < limit // 2
        choices = pending.pop(0) if systematic else list(rng.integers(0, 12, 64))
        speller = Speller(choices, opset, dtype, rank, island, axes)
        output = write(speller)
        taken = tuple(speller.taken)
        if taken in seen:
            continue
        seen.add(taken)
        for position in range(len(choices), len(taken)):
            options = range(1, speller.sizes[position])
            pending += [[*taken[:position], option] for option in options]
        yield speller.model(output)
