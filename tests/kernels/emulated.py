"""CUDA kernels run on the CPU: the exported .cu text compiled against emulation/emulate.h."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm_ffi

from fusenorm.kernels import symbols
from fusenorm.lower.library import cuda_includes, cuda_source
from fusenorm.ops import DTYPES, OpSpec, Slot

EMULATION = Path(__file__).parent / "emulation"
LOWER = Path(__file__).parents[2] / "fusenorm" / "lower"
SHIMS = (LOWER / "tvm_ffi_shim.c", LOWER / "ort_shim.c")
CUDA_DEVICE = 2
# DLPack's type codes.
CODES = {"f16": 2, "f32": 2, "bf16": 4}
GUARD = 64  # bytes before and after a tensor, which kernels must leave alone


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def dltensor(slot: Slot, array: np.ndarray) -> _DLTensor:
    """The array as a tensor of CUDA device 0."""
    whole = ctypes.c_int64 * array.ndim
    info = DTYPES[slot.dtype]
    return _DLTensor(
        array.ctypes.data,
        CUDA_DEVICE,
        0,
        array.ndim,
        CODES[slot.dtype],
        8 * info.numpy.itemsize,
        1,
        whole(*array.shape),
        whole(*(step // array.itemsize for step in array.strides)),
        0,
    )


@dataclasses.dataclass(frozen=True)
class Emulated:
    """A compiled .cu: its functions, callable on numpy arrays.

    Attributes:
        module: holds the functions.
        widest: the bytes of the widest access of the last launch.
        blocks: how many blocks it had.
    """

    module: Any
    widest: Callable[[], int]
    blocks: Callable[[], int]

    def __call__(
        self,
        spec: OpSpec,
        inputs: Sequence[np.ndarray],
        outputs: Sequence[np.ndarray],
        attributes: Mapping[str, float],
    ) -> int:
        """Fill the outputs; the number of bytes of the widest access."""
        name = symbols(spec, "cuda")[len(spec.outputs) - len(outputs)]
        slots = (*spec.inputs, *spec.outputs)
        tensors = [dltensor(*pair) for pair in zip(slots, (*inputs, *outputs), strict=False)]
        pointers = [ctypes.c_void_p(ctypes.addressof(tensor)) for tensor in tensors]
        numbers = [float(attributes[name]) for name in spec.attributes]
        self.module.get_function(name)(*pointers, *numbers)
        return self.widest()


def emulate(specs: Mapping[OpSpec, Sequence[int]], folder: Path) -> Emulated:
    """The CUDA kernels of ops, each specialised on some row lengths, built for this CPU."""
    library = compile_parts(cuda_source(specs, specs), folder, SHIMS[:1])
    exported = ctypes.CDLL(str(library))
    module = tvm_ffi.load_module(str(library))
    return Emulated(module, exported.emulation_widest, exported.emulation_blocks)


def compile_parts(
    text: str, folder: Path, shims: Sequence[Path], options: Sequence[str] = ()
) -> Path:
    """The library of a .cu text and C files, by the host's compilers."""
    compilers = [shutil.which(name) for name in ("c++", "cc")]
    if None in compilers:
        pytest.skip("no C++ compiler")
    (folder / "kernels.cu").write_text(text, encoding="utf-8")
    flags = ["-O1", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-w", *options]
    includes = [f"-I{path}" for path in (EMULATION, *cuda_includes())]
    objects = [folder / "kernels.o", *(folder / f"{shim.stem}.o" for shim in shims)]
    cpp, c = (str(compiler) for compiler in compilers)
    sources = [
        ["-x", "c++", "-std=c++17", *includes, folder / "kernels.cu"],
        *([shim] for shim in shims),
    ]
    for compiler, source, made in zip((cpp, *(c for _ in shims)), sources, objects, strict=True):
        subprocess.run([compiler, *flags, *source, "-c", "-o", made], check=True)
    library = folder / "kernels.so"
    subprocess.run([cpp, "-shared", *objects, "-ldl", "-o", library], check=True)
    return library


class Guarded:
    """A tensor in a wider piece of memory, which nothing may be written to outside of it."""

    def __init__(self, slot: Slot, values: np.ndarray, offset: int = 0, gap: int = 0) -> None:
        """`offset` elements past a 64-byte boundary; rows are `gap` elements apart."""
        line = values.reshape(-1, values.shape[-1])
        stride = line.shape[1] + (gap if values.ndim > 1 else 0)
        size = values.itemsize
        self._memory = np.full(len(line) * stride * size + 4 * GUARD, 0xA5, np.uint8)
        start = -self._memory.ctypes.data % GUARD + GUARD + offset * size
        inside = self._memory[start : start + len(line) * stride * size].view(values.dtype)
        self.array = inside.reshape(len(line), stride)[:, : line.shape[1]]
        self.array[...] = line
        if values.ndim == 1:
            self.array = self.array[0]
        self._before = self._outside()

    def _outside(self) -> np.ndarray:
        kept = self.array.copy()
        self.array[...] = 0
        memory = self._memory.copy()
        self.array[...] = kept
        return memory

    def untouched(self) -> bool:
        """Whether the memory around the tensor is as it was."""
        return np.array_equal(self._outside(), self._before)
