"""What this machine can run, and which of an artifact's libraries suits it."""

from __future__ import annotations

import ctypes
import dataclasses
import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from fusenorm.artifact import Cuda, Library
from fusenorm.errors import BadInput

_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclasses.dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU.

    Attributes:
        capability: its compute capability, such as (9, 0).
        driver: the CUDA version its driver supports, such as `12.4`.
    """

    capability: tuple[int, int]
    driver: str

    def __str__(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]} with CUDA {self.driver}"

    def lacks(self, cuda: Cuda) -> str | None:
        """Why it cannot run the code, None if it can."""
        if _version(self.driver) < _version(cuda.driver):
            return f"needs a driver for CUDA {cuda.driver}, this machine's GPU is {self}"
        if any(self._executes(arch) for arch in cuda.archs):
            return None
        if cuda.ptx is not None and self.capability >= _capability(cuda.ptx):
            return None
        held = ", ".join((*cuda.archs, *((f"{cuda.ptx} and newer",) if cuda.ptx else ())))
        return f"needs a GPU of {held}, this machine's is {self}"

    def _executes(self, arch: str) -> bool:
        """Machine code runs on its own major version from its minor version on."""
        major, minor = _capability(arch)
        if arch[-1].isalpha():  # sm_90a: this version only
            return self.capability == (major, minor)
        return self.capability[0] == major and self.capability[1] >= minor


@dataclasses.dataclass(frozen=True)
class Host:
    """A machine.

    Attributes:
        machine: as `platform.machine()` says it.
        features: CPU features as /proc/cpuinfo spells them; None where the system does not say.
        glibc: its version, None where the C library is another one.
        gpus: its NVIDIA GPUs by device number; none unless they were looked for.
    """

    machine: str
    features: frozenset[str] | None
    glibc: str | None
    gpus: tuple[Gpu, ...] = ()

    @classmethod
    def detect(cls, cpuinfo: Path = Path("/proc/cpuinfo"), *, gpus: bool = False) -> Self:
        """This machine.

        Args:
            cpuinfo: where the system lists the CPU's features.
            gpus: look for GPUs; this starts the CUDA driver in the process.
        """
        name, version = platform.libc_ver()
        return cls(
            platform.machine(),
            _cpu_features(cpuinfo),
            version if name == "glibc" else None,
            tuple(_gpus()) if gpus else (),
        )

    def __str__(self) -> str:
        glibc = f"glibc {self.glibc}" if self.glibc else "no glibc"
        return ", ".join((self.machine, glibc, *map(str, self.gpus)))

    def lacks(self, library: Library, device: int = 0) -> str | None:
        """Why this machine cannot run the library, None if it can as far as is known.

        Args:
            library: the library.
            device: number of the GPU, if the library has GPU code.
        """
        if library.machine != self.machine:
            return f"is built for {library.machine}, this machine is {self.machine}"
        if self.features is not None:
            missing = [name for name in library.features if name not in self.features]
            if missing:
                return f"needs CPU features this machine lacks: {', '.join(missing)}"
        if library.glibc is not None and _version(self.glibc) < _version(library.glibc):
            return f"needs glibc {library.glibc}, this machine has {self.glibc or 'none'}"
        if library.cuda is None:
            return None
        if device >= len(self.gpus):
            return f"needs GPU {device}, this machine has {len(self.gpus) or 'none'}"
        return self.gpus[device].lacks(library.cuda)

    def doubts(self, library: Library) -> bool:
        """Whether only a run can tell that this CPU has what the library needs."""
        return self.features is None and bool(library.features)


def choose(libraries: Sequence[Library], host: Host, file: object) -> Library:
    """The first library for the CPU that the host can run.

    Args:
        libraries: best first, at least one.
        host: the machine.
        file: named in the error.

    Raises:
        BadInput: none suits; says what the least demanding one lacks.
    """
    suitable, reason = candidates(libraries, host)
    if suitable:
        return suitable[0]
    raise BadInput(f"{reason}; compile it for this machine", file=file)


def candidates(
    libraries: Sequence[Library], host: Host, device: int | None = None
) -> tuple[list[Library], str]:
    """The libraries a session can use, best first, and why the last of the others cannot be used.

    Args:
        libraries: best first.
        host: the machine.
        device: number of the GPU the session runs on, None for the CPU. A session on a GPU does
            not use a library for the CPU: its tensors would be copied to and fro.
    """
    suitable = []
    reason = ""
    for library in libraries:
        on_gpu = library.cuda is not None
        if on_gpu != (device is not None):
            lack = f"is for {'a GPU' if on_gpu else 'the CPU'}, not for this session's provider"
            reason = reason or f"lib/{library.variant} {lack}"
            continue
        lacking = host.lacks(library, device or 0)
        if lacking is None:
            suitable.append(library)
        else:
            reason = f"lib/{library.variant} {lacking}"
    return suitable, reason


def _cpu_features(cpuinfo: Path) -> frozenset[str] | None:
    if not cpuinfo.exists():
        return None
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return None


def _gpus() -> Iterator[Gpu]:
    """Ask the CUDA driver; nothing where there is none, or it cannot start."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    number = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDriverGetVersion(ctypes.byref(number)):
        return
    version = f"{number.value // 1000}.{number.value % 1000 // 10}"
    if driver.cuDeviceGetCount(ctypes.byref(number)):
        return
    for device in range(number.value):
        major, minor = (ctypes.c_int(), ctypes.c_int())
        for value, attribute in zip((major, minor), _COMPUTE_CAPABILITY, strict=True):
            if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
                return
        yield Gpu((major.value, minor.value), version)


def _capability(arch: str) -> tuple[int, int]:
    """(9, 0) of sm_90, sm_90a or compute_90; the minor version is the last digit."""
    found = re.fullmatch(r"(?:sm|compute)_(\d+)(\d)[a-z]?", arch)
    return (int(found[1]), int(found[2])) if found else (1 << 16, 0)


def _version(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit()) if text else ()
