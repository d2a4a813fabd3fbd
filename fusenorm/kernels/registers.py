"""What fits the vector registers and caches of a CPU."""

from __future__ import annotations

import dataclasses
from typing import Literal

from fusenorm.ops import Linear

Level = Literal["x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64"]

# f32 in a vector.
LANES: dict[Level, int] = {"x86-64-v4": 16, "x86-64-v3": 8, "x86-64-v2": 4, "aarch64": 4}
# Keys of a block of attention.
KEYS = 512


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one pass over K computes: `rows` rows of `vectors` vectors of each of `parts` panels.

    parts: 2 for a gated unit (gate and up), else 1.
    """

    lanes: int
    rows: int
    vectors: int
    parts: int

    @classmethod
    def of(cls, spec: Linear, lanes: int) -> Tile:
        """The tile whose accumulators, panel vectors and a broadcast fit the registers."""
        parts = 2 if spec.gated else 1
        if lanes == 16:
            return cls(lanes, 6 if spec.gated else 14, 2, parts)
        return cls(lanes, 6, 2 // parts, parts)

    @property
    def width(self) -> int:
        """Output columns."""
        return self.lanes * self.vectors

    @property
    def columns(self) -> int:
        """Accumulated columns."""
        return self.width * self.parts
