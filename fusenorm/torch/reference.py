"""A fused op's function body run node by node in torch: its meaning, and what runs unfused."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fusenorm.kernels import RowProgram, row_program
from fusenorm.ops import DType, OpSpec

DTYPES: Mapping[DType, torch.dtype] = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f64": torch.float64,
}

_OPS: Mapping[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": operator.truediv,
    "Neg": operator.neg,
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Relu": torch.relu,
    "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Erf": torch.erf,
    "Identity": lambda x: x,
}


def reference(
    spec: OpSpec, inputs: Sequence[torch.Tensor], attributes: Sequence[float]
) -> tuple[torch.Tensor, ...]:
    """The op's outputs, every value rounded where the function body rounds it.

    Args:
        spec: a norm or gated unit; need not be among the declared variants.
        inputs: for each of spec.inputs, in its type: rows [..., D], packed [..., 2D], vectors [D].
        attributes: for each of spec.attributes.
    """
    evaluation = Evaluation(row_program(spec), inputs, attributes)
    return tuple(evaluation.value(slot.name) for slot in spec.outputs)


class Evaluation:
    """The values of a function body by name, computed when asked for."""

    def __init__(
        self, program: RowProgram, inputs: Sequence[torch.Tensor], attributes: Sequence[float]
    ) -> None:
        self.program = program
        self.means = {r.output: r.input for level in program.levels for r in level}
        self.known: dict[str, Any] = {
            name: torch.tensor(number, dtype=torch.float32)
            for name, number in zip(program.attributes, attributes, strict=True)
        }
        self.known.update(
            (slot.name, tensor) for slot, tensor in zip(program.inputs, inputs, strict=True)
        )
        for name, view in program.views.items():
            packed = self.known[view.source]
            columns = packed.shape[-1] // 2
            start = view.half * columns + view.offset
            end = packed.shape[-1] if view.stride == 2 else start + columns
            self.known[name] = packed[..., start : end : view.stride]

    def value(self, name: str) -> Any:
        """A tensor, or a float for a literal."""
        if name not in self.known:
            self.known[name] = self._compute(name)
        return self.known[name]

    def _compute(self, name: str) -> Any:
        value = self.program.values[name]
        if value.literal is not None:
            return value.literal
        dtype = DTYPES[value.dtype]
        if name in self.means:
            wide = torch.promote_types(dtype, torch.float32)
            return self.value(self.means[name]).to(wide).mean(-1, keepdim=True).to(dtype)
        node = self.program.nodes[name]
        reads = [self.value(read) for read in node.inputs]
        return reads[0].to(dtype) if node.op == "Cast" else _OPS[node.op](*reads)
