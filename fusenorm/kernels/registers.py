"""What fits the vector registers and caches of a CPU."""

from __future__ import annotations

import dataclasses
from typing import Literal

Level = Literal["x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64"]

# f32 in a vector.
LANES: dict[Level, int] = {"x86-64-v4": 16, "x86-64-v3": 8, "x86-64-v2": 4, "aarch64": 4}
# Keys of a block of attention.
KEYS = 512


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one pass over K computes: `rows` rows of `vectors` vectors of a panel."""

    lanes: int
    rows: int
    vectors: int

    @classmethod
    def of(cls, lanes: int) -> Tile:
        """The tile whose accumulators, panel vectors and a broadcast fit the registers."""
        return cls(lanes, 14 if lanes == 16 else 6, 2)

    @property
    def width(self) -> int:
        """Output columns."""
        return self.lanes * self.vectors

    @property
    def size(self) -> int:
        """Accumulated numbers."""
        return self.rows * self.width
