"""The C table of a library's ops that ort_shim.c includes."""

from __future__ import annotations

from collections.abc import Sequence

from fusenorm.kernels import Device, row_program, symbols
from fusenorm.kernels.registers import KEYS, LANES, Tile
from fusenorm.lower.target import Target
from fusenorm.ops import DTYPES, FAMILIES, Attention, Linear, OpSpec, Slot


def table(places: Sequence[tuple[OpSpec, Device]], target: Target) -> str:
    """The text of fusenorm_table.h: a row for every op and device it has kernels for."""
    names = [name for spec, device in places for name in symbols(spec, device)]
    known = sorted(
        {name for family in FAMILIES for s in family.variants() for name in s.attributes}
    )
    declarations = "\n".join(
        f"extern int __tvm_ffi_{name}(void*, const Argument*, int32_t, Argument*);"
        for name in names
    )
    strays = ", ".join(f'"{name}"' for name in (*known, "axis", "stash_type"))
    rows = "\n".join(_row(spec, device, target) for spec, device in places)
    x86 = int(target.level[-1]) if target.machine == "x86_64" else 0
    return (
        f"{declarations}\n"
        f'#define LEVEL "{target.level}"\n'
        f"#define X86_LEVEL {x86}\n"
        f"#define LANES {LANES[target.level]}\n"
        f"#define HAS_CUDA {int(any(device == 'cuda' for _, device in places))}\n"
        f"enum {{ OP_COUNT = {len(places)}, KEY_BLOCK = {KEYS} }};\n"
        f"static const char* const KNOWN_ATTRIBUTES[] = {{{strays}}};\n"
        f"static const Op OPS[OP_COUNT] = {{\n{rows}\n}};\n"
    )


def _row(spec: OpSpec, device: Device, target: Target) -> str:
    kernels = [f"__tvm_ffi_{name}" for name in symbols(spec, device)]
    numbers = (
        _parts(spec),
        _tile(spec, target),
        _norm(spec),
        int(isinstance(spec, Linear) and spec.ragged),
        _turns(spec),
        len(spec.inputs),
        len(spec.outputs),
        len(spec.attributes),
    )
    attributes = ", ".join(f'"{name}"' for name in spec.attributes) or "0"
    return (
        f'  {{"{spec.op_type}", {kernels[0]}, {kernels[-1]}, {device.upper()}, {_kind(spec)}, '
        f"{', '.join(str(number) for number in numbers)},\n"
        f"   {{{', '.join(_slot(slot) for slot in spec.inputs)}}},\n"
        f"   {{{', '.join(_slot(slot) for slot in spec.outputs)}}}, {{{attributes}}}}},"
    )


def _kind(spec: OpSpec) -> str:
    if isinstance(spec, Linear):
        return "LINEAR"
    if isinstance(spec, Attention):
        return "ATTENTION"
    return "FLAT" if row_program(spec).flat else "ROWS"


def _parts(spec: OpSpec) -> int:
    if isinstance(spec, Linear):
        return spec.parts
    return 2 if isinstance(spec, Attention) and spec.grouped else 1


def _tile(spec: OpSpec, target: Target) -> int:
    """Rows a linear kernel takes at a time."""
    return Tile.of(LANES[target.level]).rows if isinstance(spec, Linear) else 1


def _norm(spec: OpSpec) -> int:
    """How many of a linear op's attributes are those of the norm in front."""
    prologue = spec.prologue if isinstance(spec, Linear) else None
    return 0 if prologue is None else len(prologue.attributes)


def _turns(spec: OpSpec) -> str:
    """What rotary positions turn in an attention."""
    if not isinstance(spec, Attention) or spec.rotary == "none":
        return "0"
    flags = [f"TURNS_{name.upper()}" for name in spec.rotary]
    return " | ".join(flags + ["PARTIAL"] * spec.partial)


def _slot(slot: Slot) -> str:
    info = DTYPES[slot.dtype]
    return f'{{"{slot.name}", {int(info.onnx)}, {info.numpy.itemsize}, {slot.layout.upper()}}}'
