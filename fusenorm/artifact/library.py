"""One ops library of an artifact and the machine it needs."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from fusenorm.errors import BadInput

_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}


@dataclasses.dataclass(frozen=True)
class Cuda:
    """The GPU code in a library.

    Attributes:
        archs: what it holds machine code for, such as `sm_80`; `sm_90a` runs on 9.0 alone.
        ptx: what it holds PTX for, such as `compute_90`, compiled by the driver for newer GPUs.
        driver: least CUDA version the driver must support, such as `12.4`.
    """

    archs: tuple[str, ...]
    ptx: str | None = None
    driver: str | None = None

    def as_dict(self) -> dict[str, object]:
        return {"archs": list(self.archs), "ptx": self.ptx, "driver": self.driver}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Self:
        ptx, driver = entry["ptx"], entry["driver"]
        return cls(
            tuple(str(arch) for arch in entry["archs"]),
            None if ptx is None else str(ptx),
            None if driver is None else str(driver),
        )


class Built(Protocol):
    """What `fusenorm.lower.build_library` returns, as far as an artifact reads it."""

    @property
    def path(self) -> Path: ...
    @property
    def op_types(self) -> Sequence[str]: ...
    @property
    def level(self) -> str: ...
    @property
    def features(self) -> Sequence[str]: ...
    @property
    def glibc(self) -> str | None: ...
    @property
    def cuda(self) -> Cuda | None: ...


@dataclasses.dataclass(frozen=True)
class Library:
    """One ops library and the machine it needs.

    Attributes:
        level: name of its CPU level.
        machine: as `platform.machine()` says it.
        features: CPU features it uses, as /proc/cpuinfo spells them.
        glibc: least version of glibc, None if it needs none.
        op_types: the fused ops it implements.
        path: its file.
        cuda: its GPU code, None if it runs on the CPU.
        content: its bytes when freshly built, so that the file need not outlive the build.
    """

    level: str
    machine: str
    features: tuple[str, ...]
    glibc: str | None
    op_types: tuple[str, ...]
    path: Path
    cuda: Cuda | None = None
    content: bytes = dataclasses.field(default=b"", repr=False)

    @property
    def variant(self) -> str:
        """What tells it from the artifact's other libraries; also its folder below lib/."""
        return self.level if self.cuda is None else f"{self.level}-cuda"

    @classmethod
    def of(cls, built: Built) -> Self:
        """Describe a freshly built library.

        Raises:
            BadInput: the file is not an ELF object of a known machine.
        """
        content = Path(built.path).read_bytes()
        if content[:4] != b"\x7fELF" or len(content) < 20:
            raise BadInput("not an ELF library", file=built.path)
        (number,) = struct.unpack_from("<H", content, 18)
        if number not in _ELF_MACHINES:
            raise BadInput(f"built for an unknown machine ({number})", file=built.path)
        return cls(
            built.level,
            _ELF_MACHINES[number],
            tuple(sorted(built.features)),
            built.glibc,
            tuple(sorted(built.op_types)),
            Path(built.path),
            built.cuda,
            content,
        )

    def as_dict(self, path: str) -> dict[str, object]:
        return {
            "path": path,
            "level": self.level,
            "machine": self.machine,
            "features": list(self.features),
            "glibc": self.glibc,
            "op_types": list(self.op_types),
            "cuda": None if self.cuda is None else self.cuda.as_dict(),
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any], folder: Path) -> Self:
        """A library as the manifest of `folder` has it."""
        glibc, cuda = entry["glibc"], entry["cuda"]
        return cls(
            str(entry["level"]),
            str(entry["machine"]),
            tuple(str(name) for name in entry["features"]),
            None if glibc is None else str(glibc),
            tuple(str(name) for name in entry["op_types"]),
            folder / str(entry["path"]),
            None if cuda is None else Cuda.from_dict(cuda),
        )
