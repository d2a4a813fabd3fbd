"""Single ops on a GPU against torch, torch.compile and Liger, as shares of a copy's speed.

    python -m tests.bench --cuda [--ops rms,swiglu] [--dtypes bf16] [--out build/bench-cuda]
    python -m tests.bench --cuda --device cpu --quick    # the same code without a GPU

Every side moves the bytes an op cannot do without; a copy of as many bytes, measured in the same
rounds, is the ceiling. Inputs and outputs rotate through more memory than the second-level cache
holds. Sides take turns; a figure is the median of the rounds. Up to 64 rows a side is a CUDA graph
of its calls, so that a figure is a kernel's time and not Python's.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

import fusenorm.torch

Run = Callable[[], object]
Function = Callable[..., Any]

ELEMENTS = 1 << 26
GRAPH_ROWS = 64
MOST_SETS = 1024  # of buffers: enough launches for one graph
EPSILON = 1e-5
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
OURS, COPY = "ours", "copy"


@dataclasses.dataclass(frozen=True)
class Op:
    """What is measured.

    Attributes:
        rows: how many [rows, D] tensors it reads.
        vectors: how many [D] tensors it reads, behind them.
        written: how many [rows, D] tensors it writes.
        ours, eager: the op; eager is also what torch.compile compiles.
        liger: its function among liger_kernel.transformers.functional's and how to call it.
    """

    rows: int
    vectors: int
    written: int
    ours: Function
    eager: Function
    liger: tuple[str, Callable[[Function], Function]] | None = None


def _add_rms(x: Tensor, skip: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + skip
    return functional.rms_norm(total, weight.shape, weight, EPSILON), total


def _layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm(x, weight.shape, weight, bias, EPSILON)


OPS = {
    "rms": Op(
        1, 1, 1,
        lambda x, w: fusenorm.torch.rms_norm(x, w, EPSILON),
        lambda x, w: functional.rms_norm(x, w.shape, w, EPSILON),
        ("liger_rms_norm", lambda f: lambda x, w: f(x, w, EPSILON, 0.0, "none", False)),
    ),
    "skip-rms": Op(
        2, 1, 2,
        lambda x, skip, w: fusenorm.torch.skip_rms_norm(x, skip, w, EPSILON),
        _add_rms,
        (
            "liger_fused_add_rms_norm",
            lambda f: lambda x, skip, w: f(x, skip, w, EPSILON, 0.0, "none", False),
        ),
    ),
    "ln": Op(
        1, 2, 1,
        lambda x, w, b: fusenorm.torch.layer_norm(x, w, b, EPSILON),
        _layer,
        ("liger_layer_norm", lambda f: lambda x, w, b: f(x, w, b, EPSILON)),
    ),
    "swiglu": Op(
        2, 0, 1,
        fusenorm.torch.glu,
        lambda gate, up: functional.silu(gate) * up,
        ("liger_swiglu", lambda f: f),
    ),
    "gelu": Op(1, 0, 1, fusenorm.torch.gelu, functional.gelu),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        op: a key of OPS.
        dtype: a key of DTYPES.
        rows, hidden: the shape.
    """

    op: str
    dtype: str
    rows: int
    hidden: int

    @property
    def bytes(self) -> int:
        """The least that must move."""
        op = OPS[self.op]
        moved = (op.rows + op.written) * self.rows + op.vectors
        return moved * self.hidden * DTYPES[self.dtype].itemsize

    @property
    def goal(self) -> float | None:
        """The share of a copy's speed to reach; a few rows are bound by their launch instead."""
        if self.rows <= GRAPH_ROWS:
            return None
        return next(share for limit, share in _GOALS if self.hidden <= limit)

    def __str__(self) -> str:
        return f"{self.op} {self.dtype} {self.rows} x {self.hidden}"


_GOALS = ((256, 0.6), (512, 0.75), (1024, 0.85), (32768, 0.92), (math.inf, 0.85))


def cases(ops: Sequence[str], dtypes: Sequence[str], elements: int, quick: bool) -> list[Case]:
    """Rows of many lengths, `elements` in all, then few rows."""
    lengths = (64, 1000) if quick else tuple(1 << power for power in range(8, 18))
    shapes = [(elements // hidden, hidden) for hidden in lengths]
    few = ((1, 64),) if quick else tuple((rows, 4096) for rows in (1, 4, 16, 64))
    return [Case(op, dtype, *shape) for op in ops for dtype in dtypes for shape in (*shapes, *few)]


class Device(Protocol):
    """What times runs."""

    name: str
    cache: int

    def capture(self, run: Run) -> Run:
        """The same work without the time its launches take."""
        ...

    def seconds(self, run: Run) -> float:
        """How long a run takes."""
        ...


class Cpu:
    """The machine itself; for trying this file out."""

    name = "cpu"
    cache = 1 << 20

    def capture(self, run: Run) -> Run:
        return run

    def seconds(self, run: Run) -> float:
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun


class Gpu:
    """The current CUDA device."""

    name = "cuda"

    def __init__(self) -> None:
        self.cache = torch.cuda.get_device_properties(0).L2_cache_size

    def capture(self, run: Run) -> Run:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def seconds(self, run: Run) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end)


def set_count(case: Case, device: Device) -> int:
    """How many sets of buffers fill the cache four times."""
    return min(MOST_SETS, math.ceil(4 * device.cache / case.bytes))


def buffers(case: Case, device: Device) -> list[list[Tensor]]:
    """Sets of inputs."""
    op, dtype = OPS[case.op], DTYPES[case.dtype]
    shapes = [(case.rows, case.hidden)] * op.rows + [(case.hidden,)] * op.vectors
    return [
        [torch.randn(shape, device=device.name, dtype=dtype) for shape in shapes]
        for _ in range(set_count(case, device))
    ]


def rotate(function: Function, sets: Sequence[Sequence[Tensor]], times: int) -> Run:
    """Call the function on every set, `times` over; the last outputs of each set stay alive."""
    held: list[Any] = [None] * len(sets)

    def run() -> None:
        for _ in range(times):
            for index, given in enumerate(sets):
                held[index] = function(*given)

    return run


def copy_of(case: Case, device: Device) -> Function:
    """A copy of half the case's bytes, which moves as many; it looks at no argument."""
    shape = (set_count(case, device), 2, case.bytes // 2)
    pairs = itertools.cycle(torch.empty(shape, dtype=torch.uint8, device=device.name))

    def copy(*_: Tensor) -> None:
        source, target = next(pairs)
        target.copy_(source)

    return copy


def sides(case: Case, device: Device, names: Sequence[str]) -> Iterator[tuple[str, Function]]:
    """What runs the case; what cannot is told on stderr."""
    op = OPS[case.op]
    for name in (COPY, OURS, *names):
        try:
            yield name, _SIDES[name](case, device, op)
        except (ImportError, AttributeError) as error:
            print(f"{case}: {name}: {error}", file=sys.stderr)


def _compiled(case: Case, device: Device, op: Op) -> Function:
    torch._dynamo.reset()
    return torch.compile(op.eager, mode="max-autotune-no-cudagraphs", dynamic=False)


def _liger(case: Case, device: Device, op: Op) -> Function:
    if op.liger is None:
        raise ImportError("has no such op")
    from liger_kernel.transformers import functional as liger

    name, adapt = op.liger
    return adapt(getattr(liger, name))


_SIDES: dict[str, Callable[[Case, Device, Op], Function]] = {
    COPY: lambda case, device, op: copy_of(case, device),
    OURS: lambda case, device, op: op.ours,
    "torch": lambda case, device, op: op.eager,
    "torch.compile": _compiled,
    "liger": _liger,
}
PEERS = tuple(name for name in _SIDES if name not in (COPY, OURS))


def measure(case: Case, device: Device, names: Sequence[str], rounds: int) -> dict[str, float]:
    """Median seconds per call of every side, in turns."""
    sets = buffers(case, device)
    times = max(1, 16 // len(sets))
    runs = {}
    with torch.inference_mode():
        for name, function in sides(case, device, names):
            run = rotate(function, sets, times)
            run()  # compiles, allocates, warms up
            run()
            runs[name] = device.capture(run) if case.rows <= GRAPH_ROWS else run
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                taken[name].append(device.seconds(run) / (times * len(sets)))
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


@dataclasses.dataclass(frozen=True)
class Row:
    """A measured case: seconds per call by side."""

    case: Case
    seconds: dict[str, float]

    @property
    def share(self) -> float:
        """Of a copy's speed."""
        return self.seconds[COPY] / self.seconds[OURS]

    @property
    def missed(self) -> list[str]:
        """What is slower than it should be: the goal, and every peer but eager torch."""
        goal, ours = self.case.goal, self.seconds[OURS]
        short = [f"{goal:.2f} of copy"] if goal is not None and self.share < goal else []
        rivals = ("torch.compile", "liger")
        return short + [name for name in rivals if self.seconds.get(name, math.inf) < ours]

    def line(self, names: Sequence[str]) -> str:
        """Of the Markdown table."""
        ours = self.seconds[OURS]
        ratios = [
            f"{self.seconds[name] / ours:.2f}" if name in self.seconds else "-" for name in names
        ]
        rate = self.case.bytes / ours / 1e9
        cells = (
            self.case.op, self.case.dtype, f"{self.case.rows} x {self.case.hidden}",
            f"{1e6 * ours:.2f}", f"{rate:.0f}", f"{self.share:.2f}",
            "-" if self.case.goal is None else f"{self.case.goal:.2f}",
            *ratios, ", ".join(self.missed) or "",
        )  # fmt: skip
        return f"| {' | '.join(cells)} |"


def table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Markdown."""
    head = ["op", "type", "rows x hidden", "ours µs", "GB/s", "share of copy", "goal"]
    head += [f"{name} / ours" for name in names] + ["missed"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    lines += [row.line(names) for row in rows]
    for name in names:
        ratios = [row.seconds[name] / row.seconds[OURS] for row in rows if name in row.seconds]
        if ratios:
            mean = statistics.geometric_mean(ratios)
            lines.append(f"\n{name} / ours: geometric mean {mean:.2f}, least {min(ratios):.2f}")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Share of a copy's speed against the row length, one panel for each op and type."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((row.case.op, row.case.dtype) for row in rows))
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(8, 3 * len(panels)), squeeze=False)
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        shown = [row for row in rows if (row.case.op, row.case.dtype) == panel]
        shown = [row for row in shown if row.case.goal is not None]
        for name in dict.fromkeys(name for row in shown for name in row.seconds):
            points = [
                (row.case.hidden, row.seconds[COPY] / row.seconds[name])
                for row in shown
                if name in row.seconds
            ]
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set_xscale("log", base=2)
        axis.set_ylabel("share of copy")
        axis.set_title(" ".join(panel))
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--against", default=",".join(PEERS))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="few small shapes, few rounds")
    parser.add_argument("--artifact", type=Path, help="take our kernels from it")
    parser.add_argument("--out", type=Path, default=Path("build/bench-cuda"))
    given = parser.parse_args(arguments)
    if given.artifact:
        fusenorm.torch.use(given.artifact)
    device: Device = Gpu() if given.device == "cuda" else Cpu()
    names = given.against.split(",")
    elements = 1 << 16 if given.quick else ELEMENTS
    rounds = 3 if given.quick else given.rounds
    given.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in cases(given.ops.split(","), given.dtypes.split(","), elements, given.quick):
        rows.append(Row(case, measure(case, device, names, rounds)))
        print(rows[-1].line(names), flush=True)
        # What is known so far outlives an interruption.
        (given.out / "table.md").write_text(_title(device) + table(rows, names), encoding="utf-8")
        results = [{**dataclasses.asdict(row.case), "seconds": row.seconds} for row in rows]
        (given.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    try:
        draw(rows, given.out / "plot.svg")
    except ImportError:
        print("no matplotlib: no plot", file=sys.stderr)
    for op_type, reason in fusenorm.torch.fallbacks().items():
        print(f"{op_type} ran without a kernel: {reason}", file=sys.stderr)


def _title(device: Device) -> str:
    gpu = torch.cuda.get_device_name() if device.name == "cuda" else "the CPU"
    return f"{gpu}, torch {torch.__version__}\n\n"


if __name__ == "__main__":
    main()
