"""What this machine can run, and which of an artifact's libraries suits it."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from fusenorm.artifact import Library
from fusenorm.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Host:
    """A machine.

    Attributes:
        machine: as `platform.machine()` says it.
        features: CPU features as /proc/cpuinfo spells them.
        glibc: its version, None where the C library is another one.
    """

    machine: str
    features: frozenset[str]
    glibc: str | None

    @classmethod
    def detect(cls, cpuinfo: Path = Path("/proc/cpuinfo")) -> Self:
        """This machine."""
        name, version = platform.libc_ver()
        features: frozenset[str] = frozenset()
        if cpuinfo.exists():
            for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
                key, _, value = line.partition(":")
                if key.strip() in ("flags", "Features"):
                    features = frozenset(value.split())
                    break
        return cls(platform.machine(), features, version if name == "glibc" else None)

    def lacks(self, library: Library) -> str | None:
        """Why this machine cannot run the library, None if it can."""
        if library.machine != self.machine:
            return f"is built for {library.machine}, this machine is {self.machine}"
        missing = [name for name in library.features if name not in self.features]
        if missing:
            return f"needs CPU features this machine lacks: {', '.join(missing)}"
        if library.glibc is not None and _version(self.glibc) < _version(library.glibc):
            return f"needs glibc {library.glibc}, this machine has {self.glibc or 'none'}"
        return None


def choose(libraries: Sequence[Library], host: Host, file: object) -> Library:
    """The first library the host can run.

    Args:
        libraries: best first, at least one.
        host: the machine.
        file: named in the error.

    Raises:
        BadInput: none suits; says what the least demanding one lacks.
    """
    reason = None
    for library in libraries:
        reason = host.lacks(library)
        if reason is None:
            return library
    raise BadInput(
        f"lib/{libraries[-1].level} {reason}; load it with library=False "
        "(plain onnxruntime, slower) or compile it for this machine",
        file=file,
    )


def _version(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit()) if text else ()
