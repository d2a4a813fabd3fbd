"""What a session has done, for whatever registry a server keeps.

>>> metrics = Metrics(Start("x86-64-v3", fallback=False, seconds=0.2))
>>> metrics.record(0.003, rows=4)
>>> metrics.record(0.0, rows=0, failed=True)
>>> now = metrics.snapshot()
>>> now.runs, now.rows, now.errors, now.buckets[0.005], now.buckets[0.0025]
(1, 4, 1, 1, 0)
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
import math
import threading
from collections.abc import Iterator, Mapping
from typing import NamedTuple

# Upper bounds in seconds, in steps as Prometheus' clients have them.
BUCKETS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1),
    *(0.25, 0.5, 1.0, 2.5, 5.0, 10.0, math.inf),
)
_KEPT = 1024  # records between two additions


@dataclasses.dataclass(frozen=True)
class Start:
    """How a session came to be.

    Attributes:
        variant: of the library in use, None for plain ONNX.
        fallback: whether a library was wanted and none could be used.
        seconds: from the call of `load` to the session.
    """

    variant: str | None
    fallback: bool
    seconds: float


class Sample(NamedTuple):
    """One figure of a family: what follows the family's name, labels, value."""

    suffix: str
    labels: Mapping[str, str]
    value: float


class Family(NamedTuple):
    """Figures of one kind: counter, gauge or histogram."""

    name: str
    kind: str
    samples: list[Sample]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The figures at one moment; all but `start` only grow.

    Attributes:
        start: how the session came to be.
        runs: runs that gave outputs.
        rows: sum over these runs of the first axis of the first input.
        errors: runs that raised, refused inputs included.
        seconds: sum of the runs' times.
        buckets: by upper bound in seconds, the runs that took no longer.
    """

    start: Start
    runs: int
    rows: int
    errors: int
    seconds: float
    buckets: Mapping[float, int]

    def families(self) -> Iterator[Family]:
        """As Prometheus has them, for whatever registry a server keeps."""
        held = {"variant": self.start.variant or "none"}
        for name, kind, value in (
            ("fusenorm_rows_total", "counter", self.rows),
            ("fusenorm_errors_total", "counter", self.errors),
            ("fusenorm_fallback", "gauge", int(self.start.fallback)),
            ("fusenorm_load_seconds", "gauge", self.start.seconds),
        ):
            yield Family(name, kind, [Sample("", held, value)])
        buckets = [
            Sample("_bucket", {**held, "le": "+Inf" if math.isinf(bound) else str(bound)}, count)
            for bound, count in self.buckets.items()
        ]
        sums = [Sample("_sum", held, self.seconds), Sample("_count", held, self.runs)]
        yield Family("fusenorm_run_seconds", "histogram", buckets + sums)

    def prometheus(self, **labels: str) -> str:
        """In Prometheus' text format.

        Args:
            labels: put on every line, such as the model's name and version.
        """
        lines = []
        for family in self.families():
            lines.append(f"# TYPE {family.name} {family.kind}\n")
            for sample in family.samples:
                held = {**labels, **sample.labels}.items()
                text = ",".join(f'{key}="{_escaped(text)}"' for key, text in held)
                lines.append(f"{family.name}{sample.suffix}{{{text}}} {sample.value}\n")
        return "".join(lines)


class Metrics:
    """Counts without making the runs wait for one another.

    A run appends one record, which is atomic; whoever appends the thousandth, or asks, adds them
    up.
    """

    def __init__(self, start: Start) -> None:
        self._start = start
        self._fresh: collections.deque[tuple[float, int, bool]] = collections.deque()
        self._adding = threading.Lock()
        self._counts = [0] * len(BUCKETS)
        self._rows = self._errors = 0
        self._seconds = 0.0

    def record(self, seconds: float, rows: int, failed: bool = False) -> None:
        """Count one run.

        Args:
            seconds: how long it took.
            rows: the first axis of its first input.
            failed: it raised.
        """
        self._fresh.append((seconds, rows, failed))
        if len(self._fresh) > _KEPT and self._adding.acquire(blocking=False):
            try:
                self._add()
            finally:
                self._adding.release()

    def snapshot(self) -> Snapshot:
        """The figures now."""
        with self._adding:
            self._add()
            counts = dict(zip(BUCKETS, itertools.accumulate(self._counts), strict=True))
            return Snapshot(
                self._start, counts[math.inf], self._rows, self._errors, self._seconds, counts
            )

    def _add(self) -> None:
        for _ in range(len(self._fresh)):
            seconds, rows, failed = self._fresh.popleft()
            if failed:
                self._errors += 1
                continue
            self._counts[bisect.bisect_left(BUCKETS, seconds)] += 1
            self._rows += rows
            self._seconds += seconds


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
