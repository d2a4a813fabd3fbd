"""The machines an ops library can be built for."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal, Self

from fusenorm.errors import BadInput
from fusenorm.kernels.registers import Level

_V2 = ("cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3")
_V3 = (*_V2, "abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave")
_V4 = (*_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
_FEATURES: dict[Level, tuple[str, ...]] = {
    "x86-64-v4": _V4,
    "x86-64-v3": _V3,
    "x86-64-v2": _V2,
    "aarch64": ("asimd",),
}
_CPUINFO = Path("/proc/cpuinfo")


@dataclasses.dataclass(frozen=True)
class Target:
    """One CPU level, alone or below CUDA's GPUs.

    Attributes:
        kind: the kind of device.
        level: the x86-64 psABI level, or aarch64.
    """

    kind: Literal["cpu", "cuda"] = "cpu"
    level: Level = "x86-64-v3"

    @classmethod
    def host(cls) -> Self:
        """The best level this machine runs.

        Raises:
            BadInput: there is none.
        """
        for level in _FEATURES:
            target = cls("cpu", level)
            if target.runs_here:
                return target
        raise BadInput(f"no CPU level suits this {platform.machine()} machine")

    @classmethod
    def parse(cls, text: str) -> Self:
        """`cpu` or `cuda` (with this machine's level), or a level by name.

        Raises:
            BadInput: neither.
        """
        if text == "cpu":
            return cls.host()
        if text == "cuda":
            return cls("cuda", cls.host().level)
        for level in _FEATURES:
            if text == level:
                return cls("cpu", level)
        raise BadInput(f"unknown target '{text}': give cpu, cuda or one of {', '.join(_FEATURES)}")

    @classmethod
    def parse_all(cls, texts: str | Iterable[str]) -> list[Self]:
        """Several targets, each once, the most demanding first.

        Args:
            texts: what `parse` takes, also joined by commas.

        Raises:
            BadInput: one is unknown.
        """
        given = [texts] if isinstance(texts, str) else texts
        found = {cls.parse(part.strip()) for text in given for part in text.split(",")}
        levels = list(_FEATURES)
        return sorted(found, key=lambda target: (target.kind, levels.index(target.level)))

    @property
    def machine(self) -> str:
        """As `platform.machine()` says it."""
        return "aarch64" if self.level == "aarch64" else "x86_64"

    @property
    def features(self) -> tuple[str, ...]:
        """CPU features the level needs, as /proc/cpuinfo spells them."""
        return _FEATURES[self.level]

    @property
    def runs_here(self) -> bool:
        """Whether this machine can run a library of this level."""
        return self.machine == _machine() and not self.missing_features(_flags())

    def missing_features(self, flags: Collection[str]) -> tuple[str, ...]:
        """The features that are not among `flags`."""
        return tuple(feature for feature in self.features if feature not in flags)

    @property
    def tvm(self) -> dict[str, object]:
        """The target as TVM takes it."""
        if self.level == "aarch64":
            return {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "generic"}
        return {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": self.level}

    def __str__(self) -> str:
        return self.level if self.kind == "cpu" else f"{self.level}-cuda"


def _machine() -> str:
    """The machine in Linux's spelling."""
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def _flags() -> frozenset[str]:
    """The CPU features of this machine; empty where the system does not list them."""
    if not _CPUINFO.exists():
        return frozenset()
    for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
