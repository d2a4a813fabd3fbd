"""Compile fused ops into one onnxruntime custom-ops library, for the CPU and for CUDA besides."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusenorm.artifact import Cuda
from fusenorm.errors import BadInput
from fusenorm.kernels import Device, supports, symbols
from fusenorm.lower.elf import read_needs
from fusenorm.lower.nvcc import Nvcc, run
from fusenorm.lower.table import table
from fusenorm.lower.target import Target
from fusenorm.ops import OpSpec

_SHIM = Path(__file__).with_name("ort_shim.c")
_FFI_SHIM = Path(__file__).with_name("tvm_ffi_shim.c")
_EXPORTS = "{ global: RegisterCustomOps; __tvm_ffi_*; local: *; };\n"
_CFLAGS = ("-std=c11", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")


@dataclasses.dataclass(frozen=True)
class LibraryInfo:
    """A built library.

    Attributes:
        path: its file.
        op_types: the fused ops it implements, sorted.
        level: its CPU level.
        features: CPU features it uses, as /proc/cpuinfo spells them.
        glibc: least glibc that can load it, None if it asks for none.
        undefined: symbols it takes from other libraries.
        libraries: those libraries.
        cuda: its GPU code, None if it runs on the CPU.
    """

    path: Path
    op_types: tuple[str, ...]
    level: str
    features: tuple[str, ...]
    glibc: str | None
    undefined: tuple[str, ...]
    libraries: tuple[str, ...]
    cuda: Cuda | None = None


def build_library(
    specs: Iterable[OpSpec],
    target: Target,
    path: Path,
    progress: Callable[[str], None] | None = None,
    *,
    columns: Mapping[OpSpec, Iterable[int]] | None = None,
) -> LibraryInfo:
    """Compile `specs` (each op_type once) and link them with the onnxruntime shim.

    Args:
        specs: the ops; at least one.
        target: the CPU level, and whether there are CUDA kernels besides.
        path: the library to write; replaced only when the new one is complete.
        progress: told what is being done.
        columns: row lengths that CUDA kernels are specialised on, by op.

    Returns:
        What was built.

    Raises:
        BadInput: an op has no kernel, there is nothing to build, or no compiler was found.
        FusenormError: a compiler failed.
    """
    distinct = {spec.op_type: spec for spec in specs}
    if not distinct:
        raise BadInput("no fused op to compile")
    for op_type, spec in distinct.items():
        reason = supports(spec)
        if reason:
            raise BadInput(f"{op_type}: {reason}")
    ordered = [distinct[name] for name in sorted(distinct)]
    places: list[tuple[OpSpec, Device]] = [(spec, "cpu") for spec in ordered]
    nvcc = Nvcc.find() if target.kind == "cuda" else None
    if nvcc:
        places += [(spec, "cuda") for spec in ordered if supports(spec, "cuda") is None]
    tell = progress or (lambda text: None)
    compiler = _compiler(target)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fusenorm-") as folder:
        work = Path(folder)
        tell(f"compiling {len(ordered)} kernels for {target}")
        compile_module(ordered, target).write_to_file(os.fspath(work / "kernels.o"), "o")
        (work / "fusenorm_table.h").write_text(table(places, target), encoding="utf-8")
        (work / "exports.map").write_text(_EXPORTS, encoding="utf-8")
        if nvcc:
            tell(f"compiling them for {', '.join(nvcc.cuda.archs)}")
            source = cuda_source(ordered, columns or {})
            (work / "kernels.cu").write_text(source, encoding="utf-8")
            nvcc.compile(work / "kernels.cu", cuda_includes(), work / "cuda.o")
        tell(f"linking {path.name}")
        _link(compiler, nvcc, work)
        # Beside its destination first: a rename is atomic only within one file system.
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        shutil.copyfile(work / "library.so", fresh)
        fresh.replace(path)
    needs = read_needs(path)
    return LibraryInfo(
        path=path,
        op_types=tuple(sorted(distinct)),
        level=target.level,
        features=target.features,
        glibc=needs.glibc,
        undefined=needs.undefined,
        libraries=needs.libraries,
        cuda=nvcc.cuda if nvcc else None,
    )


def _link(compiler: Sequence[str], nvcc: Nvcc | None, work: Path) -> None:
    """library.so of the objects in `work`, by nvcc if it is to hold the CUDA runtime."""
    exports, output = work / "exports.map", work / "library.so"
    options = [*compiler, *_CFLAGS, f"-I{work}"]
    if nvcc is None:
        linking = ("-shared", f"-Wl,--version-script={exports}", "-Wl,-z,noexecstack", "-s")
        run([*options, *linking, _SHIM, work / "kernels.o", "-o", output])
        return
    objects = [work / "kernels.o", work / "cuda.o"]
    for shim in (_SHIM, _FFI_SHIM):
        objects.append(work / f"{shim.stem}.o")
        run([*options, "-c", shim, "-o", objects[-1]])
    nvcc.link(objects, exports, output)


def compile_module(specs: Sequence[OpSpec], target: Target) -> Any:
    """One TVM module with the kernels of `specs`: every function needs nothing but its arguments.

    Raises:
        NotImplementedError: an op has no kernel.
    """
    from fusenorm.kernels import cpu

    return cpu.compile_functions(
        {
            name: function
            for spec in specs
            for name, function in zip(symbols(spec), cpu.cpu(spec, target.level), strict=True)
        },
        target.tvm,
    )


def cuda_source(specs: Iterable[OpSpec], columns: Mapping[OpSpec, Iterable[int]]) -> str:
    """The .cu text with the CUDA kernels of those `specs` that have some."""
    from fusenorm.kernels import cuda

    return cuda.source(
        {
            name: function
            for spec in specs
            if supports(spec, "cuda") is None
            for name, function in zip(
                symbols(spec, "cuda"), cuda.cuda(spec, columns.get(spec, ())), strict=True
            )
        }
    )


def cuda_includes() -> list[str]:
    """Folders of the headers that the .cu text includes."""
    import tvm_ffi

    return list(tvm_ffi.libinfo.include_paths())


def _compiler(target: Target) -> list[str]:
    """The C compiler's command for `target`.

    Raises:
        BadInput: none was found.
    """
    # Told the machine, zig compiles for the least CPU of it; else for the one it runs on.
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", f"{target.machine}-linux-gnu"]
    if target.machine != Target.host().machine:
        if importlib.util.find_spec("ziglang"):
            return zig
        raise BadInput(f"a library for {target.machine} is linked by zig: pip install ziglang")
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    for name in ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return [found]
    if importlib.util.find_spec("ziglang"):
        return zig
    raise BadInput("no C compiler: install gcc or clang, or pip install ziglang")
