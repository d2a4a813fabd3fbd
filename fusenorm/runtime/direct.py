"""Call the kernels of an ops library on arrays, without onnxruntime and without TVM.

>>> kernels = open_library("fusenorm_ops.so")  # doctest: +SKIP
>>> y, s = kernels["SkipRMSNorm"](x, skip, scale, epsilon=1e-5)  # doctest: +SKIP
>>> z = kernels["Linear_gelu_bias_bf16"](x, pack(weight), bias)  # doctest: +SKIP
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import tvm_ffi

from fusenorm.errors import BadInput
from fusenorm.kernels import symbols
from fusenorm.kernels.registers import Tile
from fusenorm.ops import DTYPES, Attention, Linear, OpSpec, Slot, parse
from fusenorm.ops.linear import PANEL
from fusenorm.runtime.sealed import sealed_file

_DLPACK_NAMES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
# Bytes of x laid out at a time: each such part of the rows reads all of a weight.
_BLOCK = 1 << 21


def open_library(path: str | os.PathLike[str]) -> Kernels:
    """Load a library made by `fusenorm.lower.build_library`.

    The caller must know that this CPU has the features the library was built for.

    Raises:
        BadInput: there is no such file, or it cannot be loaded.
    """
    resolved = Path(path).absolute()
    if not resolved.exists():
        raise BadInput("no such library", file=path)
    try:
        return Kernels(resolved, tvm_ffi.load_module(os.fspath(resolved)))
    except (OSError, RuntimeError) as error:
        raise BadInput(f"cannot be loaded: {error}", file=path) from error


def open_content(content: bytes, name: str) -> Kernels:
    """Load a library from its bytes, which nobody can change while they are read.

    Args:
        content: of the file.
        name: of the file.

    Raises:
        BadInput: it cannot be loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, name)  # tvm-ffi goes by the suffix
        link.symlink_to(sealed_file(content, name))
        return open_library(link)


class Kernels:
    """The ops of one library, by op_type."""

    def __init__(self, path: Path, module: Any) -> None:
        self.path = path
        self._module = module

    def __getitem__(self, op_type: str) -> Op | LinearOp:
        """The op.

        Raises:
            KeyError: no such op is declared, the library was built without it, or it is an
                Attention, which takes a host's threads and memory.
        """
        spec = parse(op_type)
        if spec is None:
            raise KeyError(f"no fused op is called {op_type}")
        if isinstance(spec, Attention):
            raise KeyError(f"{op_type} can be called through onnxruntime only")
        functions = [self.function(name) for name in symbols(spec)]
        if isinstance(spec, Linear):
            lanes = cast(int, self.function("fusenorm_lanes")())
            return LinearOp(spec, Tile.of(lanes).rows, *functions)
        return Op(spec, functions[0], functions[-1])

    def function(self, symbol: str) -> Callable[..., object]:
        """A kernel as it is, by one of the names `fusenorm.kernels.symbols` gives.

        Raises:
            KeyError: the library has none of that name.
        """
        try:
            return self._module.get_function(symbol)
        except (AttributeError, RuntimeError) as error:
            raise KeyError(f"{self.path.name} has no kernel {symbol}") from error


@dataclasses.dataclass(frozen=True)
class Op:
    """One fused op, callable on C-contiguous CPU arrays: numpy or anything with DLPack.

    Attributes:
        spec: its declaration.
    """

    spec: OpSpec
    _kernel: Callable[..., object]
    _without_sum: Callable[..., object]

    def __call__(
        self, *inputs: Any, with_sum: bool = True, **attributes: float
    ) -> np.ndarray | tuple[np.ndarray, ...]:
        """Compute the op.

        Args:
            inputs: [..., D] for rows (all of one shape), [D] for vectors, [..., 2D] packed.
            with_sum: whether the second output, where there is one, is made too.
            attributes: every float attribute of the op.

        Returns:
            The output, or the outputs if there are two; numpy arrays [..., D].

        Raises:
            TypeError: the number of inputs, an attribute or a dtype is wrong.
            ValueError: a shape is wrong, or an input is not contiguous or not on the CPU.
        """
        arrays = _arrays(self.spec, inputs, attributes)
        shape = self._shape(arrays)
        outputs = self.spec.outputs if with_sum else self.spec.outputs[:1]
        results = [np.empty(shape, DTYPES[slot.dtype].numpy) for slot in outputs]
        columns = shape[-1]
        rows = math.prod(shape[:-1])
        if rows and columns:
            function = self._kernel if with_sum else self._without_sum
            function(
                *(_by_row(slot, arrays[slot.name], rows) for slot in self.spec.inputs),
                *(_by_row(slot, y, rows) for slot, y in zip(outputs, results, strict=True)),
                0,
                rows,
                *(float(attributes[name]) for name in self.spec.attributes),
            )
        return tuple(results) if len(self.spec.outputs) == 2 else results[0]

    def _shape(self, arrays: dict[str, np.ndarray]) -> tuple[int, ...]:
        """The outputs' shape, after checking the inputs against one another."""
        first = self.spec.inputs[0]
        shape = tuple(arrays[first.name].shape)
        if not shape:
            raise ValueError(f"'{first.name}' is a scalar: it needs a last axis")
        if first.layout == "packed":
            if shape[-1] % 2:
                raise ValueError(f"'{first.name}' holds two halves: its last axis is {shape[-1]}")
            shape = (*shape[:-1], shape[-1] // 2)
        for slot in self.spec.inputs[1:]:
            wanted = shape if slot.layout == "row" else shape[-1:]
            if arrays[slot.name].shape != wanted:
                got = list(arrays[slot.name].shape)
                raise ValueError(f"'{slot.name}' is {got}: it must be {list(wanted)}")
        return shape


@dataclasses.dataclass(frozen=True)
class LinearOp:
    """A fused op of linear maps, called like an `Op`, on one thread.

    Attributes:
        spec: its declaration.
        height: the most rows of its kernel's tiles.
    """

    spec: Linear
    height: int
    _multiply: Callable[..., object]
    _lay_out: Callable[..., object]

    def __call__(self, *inputs: Any, **attributes: float) -> np.ndarray | tuple[np.ndarray, ...]:
        """Compute the op.

        Args:
            inputs: x [..., K], then for each map its weight as panels (fusenorm.ops.linear.pack,
                for a gated unit pack_gated) and its biases [N], then residual [..., N] if the op
                adds one.
            attributes: every float attribute of the op.

        Returns:
            The output, or an output for each of several maps; numpy arrays [..., N].

        Raises:
            TypeError: the number of inputs, an attribute or a dtype is wrong.
            ValueError: a shape is wrong, or an input is not contiguous or not on the CPU.
        """
        arrays = _arrays(self.spec, inputs, attributes)
        first, *slots = self.spec.inputs
        x = arrays[first.name]
        if not x.ndim:
            raise ValueError(f"'{first.name}' is a scalar: it needs a last axis")
        *leading, _ = x.shape
        each = len(slots) // self.spec.maps
        maps = [slots[at : at + each] for at in range(0, len(slots), each)]
        columns = [self._columns(own, arrays, x.shape) for own in maps]
        dtype = DTYPES[self.spec.dtype].numpy
        results = tuple(np.empty((*leading, width), dtype) for width in columns)
        rows = math.prod(leading)
        if rows:
            reads = [{slot: arrays[slot.name] for slot in own} for own in maps]
            made = zip(self.spec.outputs, results, strict=True)
            outputs = [_by_row(slot, y, rows) for slot, y in made]
            self._compute(_by_row(first, x, rows), reads, outputs, attributes)
        return results if self.spec.maps > 1 else results[0]

    def _columns(
        self, slots: Sequence[Slot], arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]
    ) -> int:
        """N of a map of x of this shape, after checking what it reads: its weight first."""
        *leading, inner = shape
        parts = self.spec.parts
        weight, *others = (arrays[slot.name] for slot in slots)
        if weight.ndim != 3 or weight.shape[1:] != (inner, PANEL) or weight.shape[0] % parts:
            count = "even" if self.spec.gated else "any"
            raise ValueError(
                f"'{slots[0].name}' is {list(weight.shape)}: it must be [{count}, {inner}, {PANEL}]"
            )
        panels = weight.shape[0] // parts
        columns = panels * PANEL
        if self.spec.ragged:
            columns = others[0].size
            if math.ceil(columns / PANEL) != panels:
                raise ValueError(
                    f"'{slots[0].name}' has {panels} panels of {PANEL} columns: "
                    f"'{slots[1].name}' must have as many numbers but for the last panel's"
                )
        for slot, other in zip(slots[1:], others, strict=True):
            wanted = (*leading, columns) if slot.layout == "row" else (columns,)
            if other.shape != wanted:
                got = list(other.shape)
                raise ValueError(f"'{slot.name}' is {got}: it must be {list(wanted)}")
        return columns

    def _compute(
        self,
        x: np.ndarray,
        reads: Sequence[Mapping[Slot, np.ndarray]],
        outputs: Sequence[np.ndarray],
        attributes: Mapping[str, float],
    ) -> None:
        """Lay out the rows of x, a block at a time, and multiply them with each map's weight."""
        rows, inner = x.shape
        prologue = self.spec.prologue
        first = [] if prologue is None else [float(attributes[n]) for n in prologue.attributes]
        numbers = [float(attributes[name]) for name in self.spec.products.attributes]
        block = self.height * max(1, _BLOCK // (4 * (inner + 1) * self.height))
        tiles = np.empty((min(block, rows) + 1) * inner, np.float32)
        wide = []
        if self.spec.dtype != "f32":
            wide = [np.empty(inner * PANEL * self.spec.parts, np.float32)]
        for begin in range(0, rows, block):
            part = slice(begin, min(begin + block, rows))
            shape = self._tiles(part.stop - begin)
            self._lay_out(x[part], tiles, *shape, *first)
            for own, y in zip(reads, outputs, strict=True):
                panels = math.ceil(y.shape[1] / PANEL)
                given = (
                    _by_row(slot, array, rows)[part] if slot.layout == "row" else _bits(slot, array)
                    for slot, array in own.items()
                )
                self._multiply(tiles, *given, y[part], *wide, *shape, 0, panels, *numbers)

    def _tiles(self, rows: int) -> tuple[int, int, int, int]:
        """The height of tiles, how many have two rows more, the first of them and the last."""
        count = math.ceil(rows / self.height)
        if rows == 1:
            return 1, 0, 0, count
        half, taller = divmod(math.ceil(rows / 2), count)
        return 2 * half, taller, 0, count


def _arrays(
    spec: OpSpec, inputs: Sequence[Any], attributes: Mapping[str, float]
) -> dict[str, np.ndarray]:
    """The inputs by name, after checking that nothing is missing."""
    if len(inputs) != len(spec.inputs):
        names = ", ".join(slot.name for slot in spec.inputs)
        raise TypeError(f"{spec.op_type} takes {names}; {len(inputs)} inputs were given")
    if set(attributes) != set(spec.attributes):
        wanted = ", ".join(spec.attributes) or "none"
        raise TypeError(f"{spec.op_type} takes these attributes, all of them: {wanted}")
    named = zip(spec.inputs, inputs, strict=True)
    return {slot.name: _array(slot, value) for slot, value in named}


def _array(slot: Slot, value: Any) -> np.ndarray:
    """`value` as a numpy array over the same memory, 16-bit floats of bf16 as uint16."""
    dtype = DTYPES[slot.dtype].numpy
    if isinstance(value, np.ndarray):
        if value.dtype != dtype:
            raise TypeError(f"'{slot.name}' is {value.dtype}: it must be {dtype}")
        if not value.flags.c_contiguous:
            raise ValueError(f"'{slot.name}' is not contiguous")
        return value
    if not hasattr(value, "__dlpack__"):
        raise TypeError(f"'{slot.name}' is {type(value).__name__}: give an array or DLPack tensor")
    tensor = tvm_ffi.from_dlpack(value)
    if str(tensor.dtype) != _DLPACK_NAMES[slot.dtype]:
        raise TypeError(f"'{slot.name}' is {tensor.dtype}: it must be {dtype}")
    if tensor.device.type != "cpu":
        raise ValueError(f"'{slot.name}' is on {tensor.device}: it must be on the CPU")
    if not tensor.is_contiguous():
        raise ValueError(f"'{slot.name}' is not contiguous")
    shape = tuple(tensor.shape)
    return _over(tensor.data_ptr(), math.prod(shape), dtype).reshape(shape)


def _over(address: int, count: int, dtype: np.dtype) -> np.ndarray:
    """An array over memory that somebody else keeps alive."""
    if not count:
        return np.empty(0, dtype)
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return np.frombuffer(memoryview(memory), dtype)


def _by_row(slot: Slot, array: np.ndarray, rows: int) -> np.ndarray:
    """[rows, width] or the vector, as a kernel takes it."""
    bits = _bits(slot, array)
    return bits if slot.layout == "vector" else bits.reshape(rows, -1)


def _bits(slot: Slot, array: np.ndarray) -> np.ndarray:
    """`array` as a kernel takes it: writable, and bf16 as its bits."""
    dtype = np.dtype(np.uint16) if slot.dtype == "bf16" else array.dtype
    if not array.flags.writeable:
        array = _over(array.ctypes.data, array.size, array.dtype).reshape(array.shape)
    return array.view(dtype)
