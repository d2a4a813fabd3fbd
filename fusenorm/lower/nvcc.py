"""NVIDIA's compiler: where it is, and what is asked of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from fusenorm.artifact import Cuda
from fusenorm.errors import BadInput, FusenormError

ARCHS = ("sm_80", "sm_90", "sm_100")
PTX = "compute_100"
# No contraction: an op of the body is an op of the GPU, as in the graph. Division and root are
# IEEE's by default.
FLAGS = ("-O3", "-std=c++17", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden")
# Of generated code: statements without effect, variables that are not used.
QUIET = ("-diag-suppress", "174,177,550")


@dataclasses.dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler.

    Attributes:
        path: the program.
        release: its CUDA version, such as `13.0`.
    """

    path: Path
    release: str

    @classmethod
    def find(cls) -> Self:
        """The first there is of: $FUSENORM_NVCC, the wheel nvidia-cuda-nvcc in this environment,
        nvcc on the PATH, /usr/local/cuda.

        Raises:
            BadInput: there is none, or it does not run.
        """
        found = (
            os.environ.get("FUSENORM_NVCC")
            or _wheel()
            or shutil.which("nvcc")
            or shutil.which("/usr/local/cuda/bin/nvcc")
        )
        if not found:
            raise BadInput(
                "no CUDA compiler: pip install 'fusenorm[cuda]', install the CUDA toolkit, "
                "or set FUSENORM_NVCC"
            )
        path = Path(found)
        release = re.search(r"release (\d+\.\d+)", run([path, "--version"]))
        if release is None:
            raise BadInput("is no nvcc: it does not say its version", file=path)
        return cls(path, release[1])

    @property
    def cuda(self) -> Cuda:
        """What it compiles for."""
        return Cuda(ARCHS, PTX, self.release)

    def compile(self, source: Path, includes: Sequence[str], output: Path) -> str:
        """Compile a .cu file to an object for every architecture; what ptxas said of it."""
        return run([*self._command(includes), "-c", source, "-o", output])

    def kernels(self, source: Path, includes: Sequence[str], folder: Path) -> tuple[str, str]:
        """Compile a .cu file's kernels alone, without what launches them.

        Args:
            source: the file.
            includes: folders of the headers it includes.
            folder: for intermediate files.

        Returns:
            What ptxas said, and the PTX text for the first architecture.
        """
        kept = ("-keep", "-keep-dir", folder, "-fatbin", "-o", folder / "kernels.fatbin")
        said = run([*self._command(includes), *kept, source])
        arch = ARCHS[0].replace("sm", "compute")
        return said, (folder / f"{source.stem}.{arch}.ptx").read_text(encoding="utf-8")

    def _command(self, includes: Sequence[str]) -> list[str | Path]:
        """What compiles for every architecture."""
        targets = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in ARCHS]
        targets.append(f"-gencode=arch={PTX},code={PTX}")
        paths = [f"-I{path}" for path in includes]
        return [self.path, *FLAGS, *QUIET, "-Xptxas=-v", *targets, *paths]

    def link(self, objects: Sequence[Path], exports: Path, output: Path) -> None:
        """Link a shared library with the CUDA runtime inside."""
        options = (f"--version-script={exports}", "-znoexecstack", "-s")
        linker = [f"-Xlinker={option}" for option in options]
        # The wheel's nvcc looks in lib64, but the wheels' libraries are in lib.
        libraries = f"-L{self.path.resolve().parent.parent / 'lib'}"
        command = (self.path, "-shared", "-cudart=static", libraries)
        run([*command, *linker, *objects, "-o", output])


def _wheel() -> Path | None:
    """nvcc of the wheel nvidia-cuda-nvcc, which lies in a namespace package nvidia.cuXX."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True):
            return path
    return None


def run(command: Sequence[str | Path]) -> str:
    """Run a compiler; its output and what it said.

    Raises:
        BadInput: it cannot be run.
        FusenormError: it failed.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BadInput(f"cannot be run: {error.strerror}", file=command[0]) from error
    if done.returncode:
        raise FusenormError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout + done.stderr
