"""The inputs and outputs of a model: names, types, shapes, and the check of what is fed to it.

>>> signature = Signature((Tensor("x", "float32", ("rows", 8)),), ())
>>> print(signature.inputs[0])
float32[rows, 8]
>>> signature.check({"x": np.zeros((2, 7), np.float32)})
Traceback (most recent call last):
fusenorm.errors.BadInput: input 'x' is float32[2, 7]: the model takes float32[rows, 8]
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from fusenorm.errors import BadInput

if TYPE_CHECKING:
    import onnx_ir as ir

Dim = int | str | None
Shape = tuple[int, ...]

# Ops that hand a tensor of indices on without changing its values' range.
_PASS_INDICES = frozenset(
    ("Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Expand", "Transpose")
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One input or output.

    Attributes:
        name: its name in the graph.
        dtype: numpy's name for its element type, `bfloat16` and the like as in ml_dtypes,
            `string`; empty for what is not a tensor (a sequence, an optional).
        shape: per axis a size, the name of a symbolic size, or None for any; None for any rank.
        limit: an integer input's values must be in [0, limit): it indexes that many rows.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...] | None
    limit: int | None = None

    def __str__(self) -> str:
        return f"{self.dtype}{_brackets(self.shape)}"

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy type of its elements."""
        if self.dtype == "string":
            return np.dtype(np.object_)
        if hasattr(np, self.dtype) or self.dtype == "bool":
            return np.dtype(self.dtype)
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, self.dtype))

    @property
    def symbols(self) -> Iterator[str]:
        """Names of its symbolic sizes; those inside an expression count."""
        for dim in self.shape or ():
            if isinstance(dim, str):
                yield from _names(dim)

    def as_dict(self) -> dict[str, object]:
        entry: dict[str, object] = {"name": self.name, "dtype": self.dtype}
        entry["shape"] = None if self.shape is None else list(self.shape)
        if self.limit is not None:
            entry["limit"] = self.limit
        return entry

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Self:
        shape = entry["shape"]
        return cls(
            str(entry["name"]),
            str(entry["dtype"]),
            None if shape is None else tuple(shape),
            entry.get("limit"),
        )


@dataclasses.dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a model, in order."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def symbols(self) -> tuple[str, ...]:
        """Names of the inputs' symbolic sizes, in order of appearance."""
        return tuple(dict.fromkeys(name for tensor in self.inputs for name in tensor.symbols))

    def check(self, feed: Mapping[str, object], file: object = None) -> None:
        """Refuse what the model cannot take: names, types, ranks, sizes, unequal symbols.

        Args:
            feed: input name to array; anything with `dtype` and `shape` is looked at.
            file: named in the error.

        Raises:
            BadInput: the input and both sides of the difference.
        """
        known = {tensor.name: tensor for tensor in self.inputs}
        for name in feed:
            if name not in known:
                raise BadInput(
                    f"input '{name}' is none of the model's: {', '.join(known)}", file=file
                )
        sizes: dict[str, tuple[int, str]] = {}
        for tensor in self.inputs:
            if tensor.name not in feed:
                raise BadInput(f"input '{tensor.name}' is missing: give {tensor}", file=file)
            _check_tensor(tensor, feed[tensor.name], sizes, file)

    def as_dict(self) -> dict[str, object]:
        return {
            "inputs": [tensor.as_dict() for tensor in self.inputs],
            "outputs": [tensor.as_dict() for tensor in self.outputs],
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Self:
        return cls(
            tuple(Tensor.from_dict(tensor) for tensor in entry["inputs"]),
            tuple(Tensor.from_dict(tensor) for tensor in entry["outputs"]),
        )

    @classmethod
    def of_model(cls, model: ir.Model) -> Self:
        """The signature of a graph; inputs with a default (initializers) are left out."""
        graph = model.graph
        inputs = [value for value in graph.inputs if value.name not in graph.initializers]
        return cls(
            tuple(dataclasses.replace(_tensor(value), limit=_limit(value)) for value in inputs),
            tuple(_tensor(value) for value in graph.outputs),
        )


def resolve(shape: tuple[Dim, ...], sizes: Mapping[str, int], default: int = 1) -> Shape:
    """A shape with its symbols replaced.

    Args:
        shape: may hold sums, differences and products of symbols, as exporters write them.
        sizes: symbol to size.
        default: the size of unnamed axes.

    Raises:
        BadInput: a symbol without a size, or an expression that cannot be read.
    """
    return tuple(
        default if dim is None else dim if isinstance(dim, int) else _evaluate(dim, sizes)
        for dim in shape
    )


def _check_tensor(
    tensor: Tensor, value: object, sizes: dict[str, tuple[int, str]], file: object
) -> None:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if not tensor.dtype or shape is None or dtype is None:
        return

    def refused(more: str = "") -> BadInput:
        given = f"{_dtype_name(dtype)}{_brackets(tuple(shape))}"
        return BadInput(
            f"input '{tensor.name}' is {given}: the model takes {tensor}{more}", file=file
        )

    if _dtype_name(dtype) != tensor.dtype:
        raise refused()
    if tensor.shape is None:
        return
    if len(shape) != len(tensor.shape):
        raise refused()
    for dim, size in zip(tensor.shape, shape, strict=True):
        if isinstance(dim, int) and dim != size:
            raise refused()
        if isinstance(dim, str) and dim.isidentifier():
            first, owner = sizes.setdefault(dim, (size, tensor.name))
            if first != size:
                raise refused(f", and {dim} is {first} in '{owner}'")


@functools.lru_cache(256)  # numpy takes microseconds to name one
def _dtype_name(dtype: Hashable) -> str:
    if isinstance(dtype, np.dtype) and dtype.kind in "OUS":
        return "string"
    return str(dtype)


def _brackets(shape: tuple[Dim, ...] | None) -> str:
    if shape is None:
        return ""
    return f"[{', '.join('?' if dim is None else str(dim) for dim in shape)}]"


def _names(expression: str) -> Iterator[str]:
    if expression.isidentifier():
        yield expression
        return
    try:
        tree = ast.parse(expression, mode="eval")
    except SyntaxError:
        yield expression
        return
    yield from (node.id for node in ast.walk(tree) if isinstance(node, ast.Name))


def _evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    if expression in sizes:
        return sizes[expression]

    def value(node: ast.expr) -> int:
        match node:
            case ast.Name(id=name) if name in sizes:
                return sizes[name]
            case ast.Constant(value=int(number)):
                return number
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return value(left) - value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return value(left) * value(right)
            case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
                return value(left) // value(right)
        raise BadInput(f"no size for axis '{expression}': give one for each of its names")

    try:
        return value(ast.parse(expression, mode="eval").body)
    except SyntaxError:
        raise BadInput(f"no size for axis '{expression}'") from None


def _tensor(value: ir.Value) -> Tensor:
    name = value.name or ""
    dtype = "" if value.dtype is None else value.dtype.name
    if not hasattr(value.type, "dtype") or value.type is None or dtype == "":
        return Tensor(name, "", None)
    dtype = "string" if dtype == "STRING" else str(value.dtype.numpy())  # type: ignore[union-attr]
    shape: tuple[Dim, ...] | None = None
    if value.shape is not None:
        shape = tuple(dim if isinstance(dim, int) else dim.value or None for dim in value.shape)
    return Tensor(name, dtype, shape)


def _limit(value: ir.Value) -> int | None:
    """How many rows an integer input indexes: through Cast and the like to Gather's data."""
    if value.dtype is None or not value.dtype.is_integer():
        return None
    found: list[int] = []
    waiting, seen = [value], {value}
    while waiting:
        for node, index in waiting.pop().uses():
            if node.op_type in _PASS_INDICES and index == 0:
                fresh = [output for output in node.outputs if output not in seen]
                seen.update(fresh)
                waiting += fresh
            elif node.op_type == "Gather" and index == 1:
                data = node.inputs[0]
                axis = node.attributes.get_int("axis", 0)
                if data is not None and data.shape is not None and axis < len(data.shape):
                    rows = data.shape[axis]
                    found += [rows] if isinstance(rows, int) else []
    return min(found, default=None)
