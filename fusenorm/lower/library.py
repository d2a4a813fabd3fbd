"""Compile fused ops into one onnxruntime custom-ops library."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fusenorm.artifact import Cuda
from fusenorm.errors import BadInput, FusenormError
from fusenorm.kernels import supports, symbols
from fusenorm.lower.elf import read_needs
from fusenorm.lower.table import table
from fusenorm.lower.target import Target
from fusenorm.ops import OpSpec

_SHIM = Path(__file__).with_name("ort_shim.c")
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
    specs: Sequence[OpSpec],
    target: Target,
    path: Path,
    progress: Callable[[str], None] | None = None,
) -> LibraryInfo:
    """Compile `specs` (each op_type once) and link them with the onnxruntime shim.

    Args:
        specs: the ops; at least one.
        target: the CPU level.
        path: the library to write; replaced only when the new one is complete.
        progress: told what is being done.

    Returns:
        What was built.

    Raises:
        BadInput: an op has no kernel, there is nothing to build, or no C compiler was found.
        FusenormError: the C compiler failed.
    """
    distinct = {spec.op_type: spec for spec in specs}
    if not distinct:
        raise BadInput("no fused op to compile")
    for op_type, spec in distinct.items():
        reason = supports(spec)
        if reason:
            raise BadInput(f"{op_type}: {reason}")
    ordered = [distinct[name] for name in sorted(distinct)]
    tell = progress or (lambda text: None)
    compiler = _compiler(target)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fusenorm-") as folder:
        work = Path(folder)
        tell(f"compiling {len(ordered)} kernels for {target}")
        compile_module(ordered, target).write_to_file(os.fspath(work / "kernels.o"), "o")
        tell(f"linking {path.name}")
        (work / "fusenorm_table.h").write_text(table(ordered, target), encoding="utf-8")
        (work / "exports.map").write_text(_EXPORTS, encoding="utf-8")
        _run(
            [
                *compiler,
                *_CFLAGS,
                f"-I{work}",
                "-shared",
                "-Wl,--version-script=" + os.fspath(work / "exports.map"),
                "-Wl,-z,noexecstack",
                "-s",
                os.fspath(_SHIM),
                os.fspath(work / "kernels.o"),
                "-o",
                os.fspath(work / "library.so"),
            ]
        )
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
    )


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


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BadInput(f"cannot run the C compiler {command[0]}: {error.strerror}") from error
    if done.returncode:
        raise FusenormError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
