"""Which ops, shapes and values kernels are tested on, and what their results must equal."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx
import torch

from fusenorm.kernels import row_program, supports
from fusenorm.ops import DTYPES, FAMILIES, DType, Gated, Norm, OpSpec

ATTRIBUTES = {"epsilon": 1e-5, "alpha": 1.7, "beta": 0.8, "floor": -1.5, "limit": 0.75}
NORM_WIDTHS = (768, 1000, 4096, 8192, 16384, 32768, 65536)
GLU_WIDTHS = (3072, 11008)
FILLS = ("normal", "large mean", "constant", "largest", "nan")
BODY_OPSET = 18


def columns(lanes: int) -> tuple[int, ...]:
    """Row lengths around a vector's width, and some others."""
    return (1, lanes - 1, lanes, lanes + 1, 2 * lanes - 1, 64, 1000)


def supported() -> Iterator[OpSpec]:
    for family in FAMILIES:
        for spec in family.variants():
            if supports(spec) is None:
                yield spec


def pairwise(specs: Iterable[OpSpec] | None = None) -> list[OpSpec]:
    """Few ops that show every pair of field values some op has; FUSENORM_ALL_OPS=1 gives all."""
    every = list(supported() if specs is None else specs)
    if os.environ.get("FUSENORM_ALL_OPS"):
        return every
    chosen: list[OpSpec] = []
    seen: set[object] = set()
    for spec in every:
        fields = [(type(spec), name, value) for name, value in dataclasses.asdict(spec).items()]
        pairs = set(itertools.combinations(fields, 2))
        if not pairs <= seen:
            seen |= pairs
            chosen.append(spec)
    return chosen


def some() -> list[OpSpec]:
    """Every seventh of those ops, where one takes long; FUSENORM_ALL_OPS=1 gives all."""
    return pairwise() if os.environ.get("FUSENORM_ALL_OPS") else pairwise()[::7]


def model_ops() -> dict[OpSpec, tuple[int, ...]]:
    """The ops of real models in every type, with the row lengths they are specialised on."""
    found: dict[OpSpec, tuple[int, ...]] = {}
    dtypes: tuple[DType, ...] = ("f32", "f16", "bf16")
    for dtype in dtypes:
        for centred in (False, True):
            bias = dtype if centred else None
            found[Norm(centred, False, dtype, dtype, bias)] = NORM_WIDTHS
            found[Norm(centred, True, dtype, dtype, bias)] = NORM_WIDTHS
        found[Norm(True, True, dtype, dtype, dtype, alpha=True)] = (768, 4096)
        for layout in ("pair", "gate_up", "interleaved"):
            found[Gated("swish", layout, dtype)] = GLU_WIDTHS
        found[Gated("gelu", dtype=dtype)] = ()
        found[Gated("gelu_tanh", "gate_up", dtype)] = GLU_WIDTHS
    return found


def gpu_ops() -> dict[OpSpec, tuple[int, ...]]:
    """The ops of the tests on a GPU, with the row lengths they are specialised on."""
    return dict.fromkeys(some(), (1, 9, 64, 1000)) | model_ops()


def attributes(spec: OpSpec) -> dict[str, float]:
    return {name: ATTRIBUTES[name] for name in spec.attributes}


def inputs(spec: OpSpec, rows: int, width: int, fill: str) -> dict[str, np.ndarray]:
    """Arrays by input name: [rows, width], packed [rows, 2·width], vectors [width]."""
    random = np.random.default_rng([rows, width, FILLS.index(fill)])
    made = {}
    for slot in spec.inputs:
        info = DTYPES[slot.dtype]
        if slot.layout == "vector":
            made[slot.name] = random.uniform(0.5, 1.5, width).astype(info.numpy)
            continue
        shape = (rows, width * (2 if slot.layout == "packed" else 1))
        values = random.standard_normal(shape)
        if fill == "large mean":
            values += 1000.0 if slot.dtype == "f32" else 20.0
        elif fill == "constant":
            values[:] = 3.25
        elif fill == "largest":
            values = np.sign(values) * (60000.0 if slot.dtype == "f16" else 1e18)
        elif fill == "nan" and values.size:
            values[0, 0] = np.nan
        made[slot.name] = values.astype(info.numpy)
    return made


def misaligned(array: np.ndarray) -> np.ndarray:
    """The same values one element past a 64-byte boundary."""
    return placed(array, array.itemsize)


def placed(array: np.ndarray, offset: int) -> np.ndarray:
    """The same values this many bytes past a 64-byte boundary."""
    raw = np.empty(array.nbytes + 64 + offset, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    view = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def evaluate(spec: OpSpec, values: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """The body node by node, each value rounded to its type."""
    known: dict[str, np.ndarray] = dict(values)
    numbers = attributes(spec)
    with np.errstate(all="ignore"):
        for node in spec.function(BODY_OPSET).node:
            results = _node(node, known, numbers)
            known.update(zip(node.output, results, strict=True))
    return tuple(known[slot.name] for slot in spec.outputs)


def _node(
    node: onnx.NodeProto, known: dict[str, np.ndarray], numbers: dict[str, float]
) -> tuple[np.ndarray, ...]:
    reads = [known[name] for name in node.input]
    given = {
        item.name: onnx.helper.get_attribute_value(item)
        for item in node.attribute
        if not item.ref_attr_name
    }
    if node.op_type == "Constant":
        item = node.attribute[0]
        if item.ref_attr_name:
            return (np.asarray(numbers[item.ref_attr_name], np.float32),)
        return (np.asarray(given[item.name], np.float32 if item.name == "value_float" else int),)
    if node.op_type == "Cast":
        return (reads[0].astype(onnx.helper.tensor_dtype_to_np_dtype(given["to"])),)
    if node.op_type == "Split":
        return tuple(np.split(reads[0], 2, axis=-1))
    if node.op_type == "Slice":
        return (reads[0][..., int(reads[1][0]) :: int(reads[4][0])],)
    dtype = reads[0].dtype
    wide = np.float64 if dtype.itemsize == 4 else np.float32
    result = _OPS[node.op_type](*(read.astype(wide) for read in reads))
    return (np.asarray(result).astype(dtype),)


_OPS = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Sqrt": np.sqrt,
    "Neg": np.negative,
    "Clip": lambda x, low, high: np.minimum(np.maximum(x, low), high),
    "Reciprocal": lambda x: 1 / x,
    "Identity": lambda x: x,
    "Relu": lambda x: np.maximum(x, 0),
    "Tanh": np.tanh,
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Erf": lambda x: torch.erf(torch.from_numpy(np.ascontiguousarray(x))).numpy(),
    "ReduceMean": lambda x, axes: x.astype(np.float64).mean(-1, keepdims=True),
}


def f32_bound(spec: OpSpec, values: dict[str, np.ndarray], reference: np.ndarray) -> np.ndarray:
    """4·eps·(1 + |mean|/std)·(scale of y), per row (SEMANTICS §3)."""
    scale = np.maximum(1.0, np.nanmax(np.abs(reference), axis=-1, keepdims=True, initial=0))
    spread = 1.0
    if "epsilon" in spec.attributes:
        # The sum before the norm is a sum of rows of the same kind.
        rows = [
            values[slot.name].astype(np.float64) for slot in spec.inputs if slot.layout == "row"
        ]
        total = sum(2 * np.abs(row) for row in rows)
        parts = spec.reference(values, attributes(spec))
        s = parts[1] if len(parts) == 2 else rows[0]
        deviation = np.sqrt(s.var(-1, keepdims=True) + ATTRIBUTES["epsilon"])
        if not getattr(spec, "centred", False):
            deviation = np.sqrt(np.square(s).mean(-1, keepdims=True) + ATTRIBUTES["epsilon"])
        spread = 1 + total.max(-1, keepdims=True, initial=0) / deviation
    return 4 * np.finfo(np.float32).eps * spread * scale


def ulps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance in representable 16-bit numbers; 0 where both are NaN."""
    ordered = []
    for array in (a, b):
        bits = array.view(np.int16).astype(np.int32)
        ordered.append(np.where(bits < 0, -(bits & 0x7FFF), bits))
    both_nan = np.isnan(a.astype(np.float32)) & np.isnan(b.astype(np.float32))
    return np.where(both_nan, 0, np.abs(ordered[0] - ordered[1]))


def check(
    spec: OpSpec, values: dict[str, np.ndarray], made: Sequence[np.ndarray], fill: str
) -> None:
    """What a kernel made of `values` against the oracle."""
    if spec.dtype == "f32":
        check_f32(spec, values, made)
    else:
        check_16(spec, values, made, fill)


def check_f32(spec: OpSpec, values: dict[str, np.ndarray], made: Sequence[np.ndarray]) -> None:
    with np.errstate(all="ignore"):
        references = spec.reference(values, attributes(spec))
    for array, reference in zip(made, references, strict=True):
        unknown = np.isnan(reference)
        assert np.array_equal(np.isnan(array), unknown)
        error = np.abs(array.astype(np.float64) - reference)
        valid = ~unknown.any(-1)
        bound = np.broadcast_to(f32_bound(spec, values, reference), reference.shape)
        assert (error <= bound)[valid].all(), float((error / bound)[valid].max())


def check_16(
    spec: OpSpec, values: dict[str, np.ndarray], made: Sequence[np.ndarray], fill: str
) -> None:
    expected = evaluate(spec, values)
    for array, graph in zip(made, expected, strict=True):
        distance = ulps(array, graph)
        # A share needs many elements and different ones; behind a large mean, the last bit of
        # that mean already shifts more than it allows.
        few = distance.size < 3000 or fill not in ("normal", "nan")
        assert few or (distance == 0).mean() >= 0.998
        with np.errstate(all="ignore"):
            error = np.abs(array.astype(np.float64) - graph.astype(np.float64))
            slack = f32_bound(spec, values, graph.astype(np.float64))
            if getattr(spec, "affine", "f32") == "storage":
                # One step of the normalised value, however little of it the bias leaves.
                slack = slack + DTYPES[spec.dtype].epsilon * (
                    np.abs(graph.astype(np.float64)) + 1.5
                )
            close = error <= np.broadcast_to(slack, error.shape)
        assert ((distance <= row_program(spec).roundings) | close).all(), int(distance.max())
