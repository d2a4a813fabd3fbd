"""CUDA kernels: for every fused op the TIR functions that launch them, as one CUDA source.

A built library exports, per op and dtype, the functions `symbols(spec, "cuda")` names:
`fusenorm_cuda_OPTYPE` and, for ops with two outputs, `fusenorm_cuda_OPTYPE__nosum`, which leaves
the second out. They are called as tvm-ffi functions (`tvm_ffi.load_module`):

    arguments   the inputs, the outputs, then the attributes as floats, in the order of the
                declaration: (x, skip, scale, y, s, epsilon)
    tensors     DLPack tensors on one CUDA device, of the declared dtypes (bf16 as bfloat16):
                rows [rows, D], packed [rows, 2D], vectors [D]; rows lie at any stride, their
                elements side by side; any alignment, any D, any number of rows, none included
    outputs     made by the caller, no input overlaps them; y also holds what the launches of one
                call have to tell one another
    stream      TVMFFIEnvGetStream of tvm_ffi, where the process has it loaded
    errors      wrong types, shapes and devices raise before anything runs

A call only launches (several kernels where few long rows are shared out to blocks): it neither
waits nor allocates, so it can be captured in a CUDA graph.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# tvm_ffi would import torch, which it does not need here.
os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")

import tvm
import tvm.script.ir_builder.tirx as T
from tvm.script.ir_builder import IRBuilder

from fusenorm.kernels.blocks import flat, resident, split, streaming
from fusenorm.kernels.mathfn import Expr
from fusenorm.kernels.program import RowProgram, row_program, supports, symbols
from fusenorm.kernels.rows import function
from fusenorm.kernels.threads import (
    ELEMENT,
    PRELUDE,
    SPLIT,
    ThreadEmitter,
    Tiling,
    access,
    fits,
    widest,
)
from fusenorm.ops import DTYPES, OpSpec, Slot

MOST_ROWS = 2**31 - 1  # blocks of a launch


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compute an op.

    Attributes:
        name: what tables call it.
        vector: columns a thread moves at once, where every tensor is aligned for that.
        tile: of a kernel for one D, None for one that takes any.
        flat: it takes the tensors as one line of elements.
        kernels: launched one after another; of several, each has many blocks to a row.
    """

    name: str
    vector: int
    tile: Tiling | None = None
    flat: bool = False
    kernels: int = 1


def variants(spec: OpSpec, columns: Iterable[int]) -> list[Variant]:
    """The kernels of `spec` for some row lengths and for any, in the order they are tried.

    Every function of the op has them, as its CUDA kernels `SYMBOL_kernel[_n]` in this order.
    """
    program = row_program(spec)
    full = widest(program)
    if program.flat:
        made = [Variant("flat", full, flat=True), Variant("flat single", 1, flat=True)]
        return [*made, Variant("any D single", 1)]
    tiles = [Tiling.of(program, width) for width in sorted(set(columns))]
    fixed = [Variant(f"D={tile.columns}", tile.vector, tile) for tile in tiles if tile]
    if None in tiles:
        fixed.append(Variant("long D, few rows", full, kernels=len(program.levels) + 1))
    return [*fixed, Variant("any D", full), Variant("any D single", 1)]


def cuda(spec: OpSpec, columns: Iterable[int] = ()) -> list[Any]:
    """The PrimFuncs of `spec`, in the order of `symbols(spec, "cuda")`.

    Args:
        spec: the op; one with a row program.
        columns: row lengths to have kernels of their own; other rows are read once per pass. With
            one among them that no block can hold, there are kernels that share out long rows.

    Raises:
        NotImplementedError: the op has no CUDA kernel; `supports` says why.
    """
    reason = supports(spec, "cuda")
    if reason:
        raise NotImplementedError(reason)
    program = row_program(spec)
    name, *rest = symbols(spec, "cuda")
    forms = [(name, program.outputs), *((other, program.outputs[:1]) for other in rest)]
    choices = variants(spec, columns)
    return [_host(program, name, outputs, choices) for name, outputs in forms]


def source(functions: Mapping[str, Any]) -> str:
    """PrimFuncs by symbol as the text of one .cu file: kernels and the host code around them."""
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_80"}, host={"kind": "cuda_host"})
    config = {
        "tirx.disable_cse_tir": True,
        "tirx.disable_storage_rewrite": True,
        "tirx.UnrollLoop": {"explicit_unroll": False},
    }
    # Nothing here is larger than it need be, and looking takes three quarters of the time.
    disabled = ["s_tir.CompactBufferAllocation"]
    with tvm.transform.PassContext(config=config, disabled_pass=disabled):
        module = tvm.tirx.build(tvm.IRModule(dict(functions)), target=target)
    return PRELUDE + str(tvm.backend.cuda.export_cuda_host(module))


def _host(
    program: RowProgram, name: str, outputs: tuple[Slot, ...], choices: Sequence[Variant]
) -> Any:
    """Checks the arguments and launches the first kernel that takes them."""
    with function(name) as builder:
        buffers, attributes = _arguments(program, outputs)
        rows, columns = buffers[outputs[0].name].shape
        slots = {slot.name: slot for slot in (*program.inputs, *outputs)}
        shaped = [slot for slot in slots.values() if slot.layout != "vector"]
        side_by_side = functools.reduce(
            T.And, [buffers[slot.name].strides[0] == columns for slot in shaped]
        )

        def launch(variant: Variant) -> None:
            width = columns if variant.tile is None else T.int64(variant.tile.columns)
            emitter = ThreadEmitter(program, outputs, buffers, attributes, width, variant.vector)
            if variant.flat:
                flat(emitter, rows * columns)
            elif variant.tile:
                resident(emitter, rows, variant.tile)
            elif variant.kernels > 1:
                split(emitter, rows)
            else:
                streaming(emitter, rows)

        def takes(variant: Variant) -> Expr:
            checks = [_aligned(slots.values(), buffers, variant.vector)]
            if variant.tile:
                checks.insert(0, columns == variant.tile.columns)
            elif variant.flat:
                checks.insert(0, T.Or(rows == 1, side_by_side))
            elif variant.vector > 1:
                checks.insert(0, columns % variant.vector == 0)
            if variant.kernels > 1:
                checks += [columns > fits(program), rows <= SPLIT // 2]
            return functools.reduce(T.And, checks)

        most = T.Assert(rows <= MOST_ROWS, f"at most {MOST_ROWS} rows")
        with most, T.If(rows * columns > 0), T.Then():
            _first(choices, takes, launch)
    return builder.get()


def _first(
    choices: Sequence[Variant],
    takes: Callable[[Variant], Expr],
    launch: Callable[[Variant], None],
) -> None:
    """`launch` the first choice that `takes`; the last one takes everything."""
    head, *rest = choices
    if not rest:
        launch(head)
        return
    with T.If(takes(head)):
        with T.Then():
            launch(head)
        with T.Else():
            _first(rest, takes, launch)


def _arguments(
    program: RowProgram, outputs: tuple[Slot, ...]
) -> tuple[dict[str, Any], dict[str, Expr]]:
    """Declare the parameters: tensors by name, attributes by name."""
    slots = (*program.inputs, *outputs)
    handles = {slot.name: T.arg(slot.name, T.handle()) for slot in slots}
    attributes = {name: T.arg(name, T.float32()) for name in program.attributes}
    rows, columns = (IRBuilder.name(name, T.int64()) for name in ("rows", "columns"))
    shapes = {"row": (rows, columns), "vector": (columns,), "packed": (rows, columns * 2)}
    buffers = {}
    # Outputs first: their shape defines the symbols the inputs' use.
    for slot in sorted(slots, key=lambda slot: slot not in outputs):
        strides = None if slot.layout == "vector" else [T.int64(), T.int64(1)]
        buffer = T.match_buffer(
            handles[slot.name],
            shapes[slot.layout],
            ELEMENT[slot.dtype],
            strides=strides,
            align=DTYPES[slot.dtype].numpy.itemsize,
        )
        buffers[slot.name] = IRBuilder.name(slot.name, buffer)
    return buffers, attributes


def _aligned(slots: Iterable[Slot], buffers: Mapping[str, Any], vector: int) -> Expr:
    """Whether every row of every tensor begins where its groups can be moved in pieces."""
    checks = []
    for slot in slots:
        size, mask = DTYPES[slot.dtype].numpy.itemsize, access(slot, vector) - 1
        place = T.call_pure_extern(
            "uint64", f"fusenorm_address_{slot.dtype}", buffers[slot.name].data
        )
        if slot.layout != "vector":
            place = T.bitwise_or(place, T.cast(buffers[slot.name].strides[0] * size, "uint64"))
        checks.append(T.bitwise_and(place, T.uint64(mask)) == T.uint64(0))
    return functools.reduce(T.And, checks)
