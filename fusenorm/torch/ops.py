"""The fused ops as torch ops: one row for each name, its schema and the declaration it stands for.

`affine`, `residual`, `centre` and `precision` say where a 16-bit op rounds, `clamp`, `floor`,
`limit` and `plus1` what a gated unit clamps: see `fusenorm.ops.Norm` and `fusenorm.ops.Gated`.
Inputs are [..., D] (packed ones [..., 2D]), vectors [D]; inputs that are not contiguous are
copied. Outputs are new and contiguous. Skip ops return the norm and the residual sum.

A call under grad mode is differentiable: backward runs the op's nodes in torch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

from fusenorm.ops import ACTIVATIONS, DType, Gated, Norm
from fusenorm.torch import kernels
from fusenorm.torch.reference import DTYPES, reference

Family: TypeAlias = Norm | Gated

_LIBRARY = torch.library.Library("fusenorm", "DEF")
_NAMES: Mapping[torch.dtype, DType] = {dtype: name for name, dtype in DTYPES.items()}
_SLOTS = {"weight": "scale", "eps": "epsilon"}  # torch's names for two of ours
_ARGUMENTS = {slot: argument for argument, slot in _SLOTS.items()}


@dataclasses.dataclass(frozen=True)
class Call:
    """A fused op and what it is given.

    Attributes:
        spec: the op.
        inputs: for each of spec.inputs.
        attributes: for each of spec.attributes.
    """

    spec: Family
    inputs: tuple[torch.Tensor, ...]
    attributes: tuple[float, ...]

    def check(self) -> None:
        """Hold the tensors against one another.

        Raises:
            TypeError: a type is none the op can have.
            ValueError: a shape or a device is wrong.
        """
        first, *rest = zip(self.spec.inputs, self.inputs, strict=True)
        x = first[1]
        if not x.dim():
            raise ValueError(f"'{first[0].name}' is a scalar: it needs a last axis")
        if first[0].layout == "packed" and x.shape[-1] % 2:
            raise ValueError(f"'{first[0].name}' holds two halves: its last axis is {x.shape[-1]}")
        for slot, tensor in rest:
            name = _ARGUMENTS.get(slot.name, slot.name)
            if tensor.dtype != DTYPES[slot.dtype]:
                raise TypeError(f"'{name}' is {tensor.dtype}: it must be {x.dtype}")
            wanted = x.shape if slot.layout == "row" else x.shape[-1:]
            if tensor.shape != wanted:
                raise ValueError(f"'{name}' is {list(tensor.shape)}: not {list(wanted)}")
            if tensor.device != x.device:
                raise ValueError(f"'{name}' is on {tensor.device}, not on {x.device}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of every output."""
        *rows, columns = self.inputs[0].shape
        packed = self.spec.inputs[0].layout == "packed"
        return (*rows, columns // 2 if packed else columns)

    def outputs(self) -> tuple[torch.Tensor, ...]:
        """Tensors to write the outputs to."""
        return tuple(self.inputs[0].new_empty(self.shape) for _ in self.spec.outputs)

    def kernel(self) -> kernels.Kernel | str:
        """Its kernel, or why there is none."""
        return kernels.find(self.spec, self.inputs[0].device.type, self.shape[-1])

    def run(self) -> tuple[torch.Tensor, ...]:
        """The outputs, by the kernel if there is one."""
        if 0 in self.shape:
            return self.outputs()
        kernel = self.kernel()
        if isinstance(kernel, str):
            return tuple(out.contiguous() for out in self.reference())
        outputs = self.outputs()
        device = self.inputs[0].device.type
        slots = (*self.spec.inputs, *self.spec.outputs)
        kernel(
            [
                tensor.contiguous() if slot.layout == "vector" else _rows(tensor, device)
                for slot, tensor in zip(slots, (*self.inputs, *outputs), strict=True)
            ],
            self.attributes,
        )
        return outputs

    def reference(self) -> tuple[torch.Tensor, ...]:
        """The outputs, node by node."""
        return reference(self.spec, self.inputs, self.attributes)


def _rows(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """[rows, width], as a view where the kernels of the device can take one."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    strided = device == "cuda" and flat.stride(-1) == 1
    return flat if strided else flat.contiguous()


def _dtype(given: Mapping[str, Any], name: str) -> DType | None:
    tensor = given.get(name)
    if tensor is None:
        return None
    if tensor.dtype not in _NAMES:
        raise TypeError(f"'{name}' is {tensor.dtype}: it must be a float type")
    return _NAMES[tensor.dtype]


# Where a wide op could not round anyway: one spelling of it.
_EXACT = {"affine": "f32", "residual": "storage", "centre": "f32", "precision": "f32"}


@functools.cache
def _spec(base: Family, fields: tuple[tuple[str, Any], ...]) -> Family:
    """`base` with other fields."""
    changed = dict(fields)
    if changed["dtype"] in ("f32", "f64"):
        changed = {name: _EXACT.get(name, value) for name, value in changed.items()}
    return dataclasses.replace(base, **changed)


def _norm_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    flags = ("alpha", "beta", "layer_scale")
    return {
        "dtype": _dtype(given, "x"),
        "scale": _dtype(given, "scale"),
        "bias": _dtype(given, "bias"),
        **{name: given[name] is not None for name in flags if name in given},
        **{name: given[name] for name in ("affine", "residual", "centre") if name in given},
    }


def _gated_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    activation = given.get("activation", "identity")
    if activation not in ACTIVATIONS:
        raise ValueError(f"no activation '{activation}': there are {', '.join(ACTIVATIONS)}")
    options = ("activation", "layout", "precision", "clamp", "plus1")
    dtype = _dtype(given, "gate" if "gate" in given else "x")
    return {"dtype": dtype, **{name: given[name] for name in options if name in given}}


class _TorchOp:
    """One torch op: how it computes, infers shapes and is differentiated."""

    def __init__(self, base: Family, schema: str) -> None:
        arguments = torch._C.parse_schema(schema).arguments
        self.base = base
        self.fields = _norm_fields if isinstance(base, Norm) else _gated_fields
        self.names = [_SLOTS.get(argument.name, argument.name) for argument in arguments]
        self.defaults = {
            name: argument.default_value
            for name, argument in zip(self.names, arguments, strict=True)
            if argument.has_default_value()
        }

    def call(self, *args: Any, **kwargs: Any) -> Call:
        """What the arguments of a call mean."""
        named = {_SLOTS.get(name, name): value for name, value in kwargs.items()}
        given = {**self.defaults, **dict(zip(self.names, args, strict=False)), **named}
        spec = _spec(self.base, tuple(self.fields(given).items()))
        for name in spec.attributes:
            if given[name] is None:
                raise ValueError(f"'{name}' is needed for clamp='{given['clamp']}'")
        inputs = tuple(given[slot.name] for slot in spec.inputs)
        call = Call(spec, inputs, tuple(given[name] for name in spec.attributes))
        call.check()
        return call

    def result(self, outputs: tuple[torch.Tensor, ...]) -> Any:
        return outputs[0] if len(self.base.outputs) == 1 else outputs

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return self.result(self.call(*args, **kwargs).run())

    def fake(self, *args: Any, **kwargs: Any) -> Any:
        return self.result(self.call(*args, **kwargs).outputs())

    def save(
        self, ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
    ) -> None:
        ctx.save_for_backward(*(given for given in inputs if isinstance(given, torch.Tensor)))
        ctx.others = [None if isinstance(given, torch.Tensor) else (given,) for given in inputs]
        ctx.options = keyword_only_inputs

    def backward(self, ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [other[0] if other else next(saved).detach() for other in ctx.others]
        # Arguments left to their defaults are among the inputs, but need no gradient.
        needs = zip(inputs, ctx.needs_input_grad, strict=False)
        wanted = [given for given, need in needs if need]
        with torch.enable_grad():
            for tensor in wanted:
                tensor.requires_grad_()
            outputs = self.call(*inputs, **ctx.options).reference()
        made = iter(torch.autograd.grad(outputs, wanted, gradients))
        return tuple(next(made) if need else None for need in ctx.needs_input_grad)


_OPS: dict[torch._ops.OpOverload, _TorchOp] = {}


def plan(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Call:
    """The fused op that a call of one of the torch ops below means."""
    return _OPS[op].call(*args, **kwargs)


def define(base: Family, schema: str) -> torch._ops.OpOverload:
    """Register a torch op that computes `base` with what a call adds to it.

    Args:
        base: the declaration; types, optional tensors and options come with the call.
        schema: in torch's language.
    """
    op, name = _TorchOp(base, schema), schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, op.run, key)
    qualified = f"fusenorm::{name}"
    torch.library.register_fake(qualified, op.fake, lib=_LIBRARY)
    torch.library.register_autograd(qualified, op.backward, setup_context=op.save, lib=_LIBRARY)
    overload = getattr(torch.ops.fusenorm, name).default
    _OPS[overload] = op
    return overload


rms_norm = define(
    Norm(),
    "rms_norm(Tensor x, Tensor? weight, float eps, Tensor? bias=None, *, str affine='f32')"
    " -> Tensor",
)
layer_norm = define(
    Norm(centred=True),
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, *, str affine='f32',"
    " str centre='f32') -> Tensor",
)
skip_rms_norm = define(
    Norm(skip=True),
    "skip_rms_norm(Tensor x, Tensor skip, Tensor? weight, float eps, Tensor? bias=None,"
    " Tensor? layer_scale=None, *, float? alpha=None, float? beta=None, str affine='f32',"
    " str residual='storage') -> (Tensor, Tensor)",
)
skip_layer_norm = define(
    Norm(centred=True, skip=True),
    "skip_layer_norm(Tensor x, Tensor skip, Tensor? weight, Tensor? bias, float eps,"
    " Tensor? layer_scale=None, *, float? alpha=None, float? beta=None, str affine='f32',"
    " str residual='storage', str centre='f32') -> (Tensor, Tensor)",
)
gelu = define(Gated("gelu"), "gelu(Tensor x, *, str precision='f32') -> Tensor")
gelu_tanh = define(Gated("gelu_tanh"), "gelu_tanh(Tensor x, *, str precision='f32') -> Tensor")
swish = define(Gated("swish"), "swish(Tensor x, float beta=1, *, str precision='f32') -> Tensor")
relu2 = define(Gated("relu2"), "relu2(Tensor x, *, str precision='f32') -> Tensor")
glu = define(
    Gated(layout="pair"),
    "glu(Tensor gate, Tensor up, str activation='swish', float beta=1, *, str precision='f32',"
    " str clamp='none', float? floor=None, float? limit=None, bool plus1=False) -> Tensor",
)
glu_packed = define(
    Gated(layout="gate_up"),
    "glu_packed(Tensor x, str activation='swish', str layout='gate_up', float beta=1, *,"
    " str precision='f32', str clamp='none', float? floor=None, float? limit=None,"
    " bool plus1=False) -> Tensor",
)
