"""Whole models: ours against every peer, alternated in one process.

python -m tests.bench [--models bert,llama] [--lengths 1,128] [--threads 1,2] [--against ...]
                      [--type f16]

`make bench` builds the environment with the peers and runs it. Prints Markdown; --plot FILE.svg
draws it. Of f16 models a side is the same model in f32, compiled by us.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch

import fusenorm
from fusenorm.bench import AGAINST, OURS, Row, measure, options, side
from fusenorm.errors import BadInput
from tests.bench.models import ARCHITECTURES, Architecture, Dtype, export, module

TORCH = "torch.compile"
WIDE = "fusenorm in f32"
# OpenMP's and TBB's threads spin for some milliseconds after a run.
PAUSE = 0.02


def floor(model: Path, rows: int, peak: float, bandwidth: float) -> float:
    """Seconds no run can beat: the products with weights at peak rate, or one read of them.

    Args:
        model: its MatMul and Gemm weights are counted.
        rows: tokens.
        peak: flop/s.
        bandwidth: bytes/s.
    """
    graph = onnx.load(model).graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    read = [node.input[1] for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    weights = [held[name] for name in read if name in held]
    flops = 2 * rows * sum(math.prod(tensor.dims) for tensor in weights)
    size = sum(
        math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in weights
    )
    return max(flops / peak, size / bandwidth)


def peak_flops() -> float:
    """The best of onnxruntime's and torch's f32 products [512, 1024] x [1024, 1024], one thread."""
    torch.set_num_threads(1)
    a, b = torch.randn(512, 1024), torch.randn(1024, 1024)
    best = min(_seconds(lambda: torch.mm(a, b)) for _ in range(20))
    return 2 * 512 * 1024 * 1024 / best


def read_bandwidth() -> float:
    """Bytes per second of a sum over 256 MiB, one thread."""
    array = torch.ones(1 << 26)
    return 4 * (1 << 26) / min(_seconds(lambda: array.sum()) for _ in range(10))


def _seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def peers(
    names: list[str],
    architecture: Architecture,
    model: Path,
    feed: Mapping[str, np.ndarray],
    threads: int,
    dtype: Dtype,
) -> Iterator[tuple[str, Callable[[], object]]]:
    """The sides that can run the model; what cannot is told on stderr."""
    for name in names:
        try:
            if name == TORCH:
                yield name, _torch(architecture, feed, threads, dtype)
            else:
                yield name, side(name, model, feed, threads)
        except BadInput as error:
            print(f"{architecture.name}: {name}: {error}", file=sys.stderr)


def _torch(
    architecture: Architecture, feed: Mapping[str, np.ndarray], threads: int, dtype: Dtype
) -> Callable[[], object]:
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    compiled = torch.compile(module(architecture, dtype), mode="default")
    x = torch.from_numpy(feed["x"])

    def run() -> object:
        with torch.inference_mode():
            return compiled(x)

    run()
    return run


def compiled(model: Path) -> Path:
    """The artifact of a model, beside it, made once."""
    folder = model.with_suffix(".fnorm")
    if not folder.exists():
        begun = time.perf_counter()
        fusenorm.compile(fusenorm.optimize(model)).save(folder)
        print(f"{model.stem}: compiled in {time.perf_counter() - begun:.1f} s", file=sys.stderr)
    return folder


def ours(model: Path, threads: int) -> ort.InferenceSession:
    """The compiled model."""
    return fusenorm.load(compiled(model), threads=threads, session_options=options(threads))


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(a.name for a in ARCHITECTURES))
    parser.add_argument("--lengths", default="1,16,128,512")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--against", default=",".join((*AGAINST, TORCH)))
    parser.add_argument("--type", choices=("f32", "f16"), default="f32")
    parser.add_argument("--seconds", type=float, default=15.0, help="per row of the table")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--plot", type=Path)
    chosen = parser.parse_args()
    lengths = [int(length) for length in chosen.lengths.split(",")]
    against = chosen.against.split(",")
    names = against if chosen.type == "f32" else [WIDE, *against]
    peak, bandwidth = peak_flops(), read_bandwidth()
    print(
        f"f32 peak {peak / 1e9:.0f} GFLOP/s, read bandwidth {bandwidth / 1e9:.1f} GB/s (1 thread)"
    )
    table: list[tuple[str, int, list[Row]]] = []
    for threads in (int(count) for count in chosen.threads.split(",")):
        print(f"\n{threads} thread(s), milliseconds: median (quartiles); ratio to ours\n")
        print(f"| model | tokens | floor | ours | {' | '.join(names)} | best peer / ours |")
        print("| --- | --- | --- | --- |" + " --- |" * (len(names) + 1))
        worst: dict[str, list[float]] = {}
        for architecture in ARCHITECTURES:
            if architecture.name not in chosen.models.split(","):
                continue
            model = export(architecture, chosen.folder, chosen.type)
            session = ours(model, threads)
            wide = None
            if chosen.type != "f32":
                wide = ours(export(architecture, chosen.folder), threads)
            for length in architecture.lengths:
                if length not in lengths and not architecture.image:
                    continue
                feed = architecture.feed(length, chosen.type)
                sides = {OURS: partial(session.run, None, feed)}
                if wide is not None:
                    sides[WIDE] = partial(wide.run, None, architecture.feed(length))
                sides.update(peers(against, architecture, model, feed, threads, chosen.type))
                times = measure(sides, chosen.seconds, pause=PAUSE if threads > 1 else 0.0)
                rows = [Row.of(name, taken, times[OURS]) for name, taken in times.items()]
                least = 1e3 * floor(model, length, peak * threads, bandwidth)
                print(_line(architecture.name, length, least, rows, names), flush=True)
                table.append((f"{architecture.name} {length}", threads, rows))
                for row in rows[1:]:
                    worst.setdefault(row.name, []).append(row.relative)
                worst.setdefault("best peer", []).append(_best(rows))
        print()
        for name, ratios in worst.items():
            mean = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))
            print(f"{name} / ours: geometric mean {mean:.2f}, least {min(ratios):.2f}")
    if chosen.plot:
        draw(table, chosen.plot)


def _line(name: str, length: int, least: float, rows: list[Row], names: list[str]) -> str:
    found = {row.name: row for row in rows}
    cells = [_cell(found[OURS])]
    cells += [
        f"{_cell(found[peer])} {found[peer].relative:.2f}" if peer in found else "-"
        for peer in names
    ]
    return f"| {name} | {length} | {least:.1f} | {' | '.join(cells)} | **{_best(rows):.2f}** |"


def _best(rows: list[Row]) -> float:
    """The best peer's time over ours."""
    return min(row.relative for row in rows if row.name not in (OURS, WIDE))


def _cell(row: Row) -> str:
    low, high = row.quartiles
    return f"{row.median:.1f} ({low:.1f}-{high:.1f})"


def draw(table: list[tuple[str, int, list[Row]]], path: Path) -> None:
    """Bars of every peer's time over ours."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    panels = sorted({threads for _, threads, _ in table})
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(12, 4 * len(panels)), squeeze=False)
    for axis, threads in zip(axes[:, 0], panels, strict=True):
        shown = [(label, rows) for label, count, rows in table if count == threads]
        names = list(dict.fromkeys(row.name for _, rows in shown for row in rows[1:]))
        for index, name in enumerate(names):
            heights = [
                next((row.relative for row in rows if row.name == name), 0.0) for _, rows in shown
            ]
            places = [place + 0.8 * index / len(names) for place in range(len(shown))]
            axis.bar(places, heights, 0.8 / len(names), label=name)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(shown)), [label for label, _ in shown], rotation=60)
        axis.set_ylabel("time / ours")
        axis.set_title(f"{threads} thread(s)")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)
