"""Our ops against onnxruntime's, one thread, in one process: a Markdown table of ratios.

Each session holds a chain of ops behind an IOBinding, so that calling it costs little. The
sessions of one row run alternately; a figure is the median of the rounds. "Of copy" is the rate at
which tensors of 4 MiB and more are read and written, relative to numpy's copy of one in the same
turns.

    python tests/bench/rowkernels.py [--rows 1,16] [--hidden 768] [--ops Gelu] [--rounds 9]
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort

from fusenorm import ops
from fusenorm.lower import Target, build_library

LARGE = 4 << 20
OPSET = 23


@dataclasses.dataclass(frozen=True)
class Case:
    """One op and how else it can be written.

    Attributes:
        name: the row's name.
        op_type: our op.
        ours, standard, contrib: node i of the chain, as ONNX text; reads and makes numbered
            values, with `{i}` and `{j}` = i + 1.
        skip: the chain carries a residual sum `s` beside `y`.
    """

    name: str
    op_type: str
    ours: str
    standard: str
    contrib: str | None
    skip: bool = False

    @property
    def tensors(self) -> int:
        """Tensors of rows an op reads and writes."""
        spec = ops.parse(self.op_type)
        assert spec is not None
        return sum(slot.layout == "row" for slot in (*spec.inputs, *spec.outputs))

    @property
    def vectors(self) -> tuple[str, ...]:
        return tuple(name for name in ("scale", "bias") if name in self.ours)


CASES = (
    Case(
        "skip-LN",
        "SkipLayerNorm_bias",
        "y{j}, s{j} = fusenorm.SkipLayerNorm_bias <epsilon = 1e-5> (s{i}, y{i}, scale, bias)",
        "s{j} = Add (s{i}, y{i})\ny{j} = LayerNormalization <epsilon = 1e-5> (s{j}, scale, bias)",
        "y{j}, m{j}, v{j}, s{j} = com.microsoft.SkipLayerNormalization <epsilon = 1e-5> "
        "(s{i}, y{i}, scale, bias)",
        skip=True,
    ),
    Case(
        "skip-RMS",
        "SkipRMSNorm",
        "y{j}, s{j} = fusenorm.SkipRMSNorm <epsilon = 1e-5> (s{i}, y{i}, scale)",
        "s{j} = Add (s{i}, y{i})\ny{j} = RMSNormalization <epsilon = 1e-5> (s{j}, scale)",
        "y{j}, m{j}, v{j}, s{j} = com.microsoft.SkipSimplifiedLayerNormalization "
        "<epsilon = 1e-5> (s{i}, y{i}, scale)",
        skip=True,
    ),
    Case(
        "LN",
        "LayerNorm_bias",
        "y{j} = fusenorm.LayerNorm_bias <epsilon = 1e-5> (y{i}, scale, bias)",
        "y{j} = LayerNormalization <epsilon = 1e-5> (y{i}, scale, bias)",
        None,
    ),
    Case(
        "RMS",
        "RMSNorm",
        "y{j} = fusenorm.RMSNorm <epsilon = 1e-5> (y{i}, scale)",
        "y{j} = RMSNormalization <epsilon = 1e-5> (y{i}, scale)",
        "y{j} = SimplifiedLayerNormalization <epsilon = 1e-5> (y{i}, scale)",
    ),
    Case(
        "Gelu",
        "Gelu",
        "y{j} = fusenorm.Gelu (y{i})",
        "y{j} = Gelu (y{i})",
        "y{j} = com.microsoft.Gelu (y{i})",
    ),
    Case(
        "Gelu tanh",
        "Gelu_gelu_tanh",
        "y{j} = fusenorm.Gelu_gelu_tanh (y{i})",
        'y{j} = Gelu <approximate = "tanh"> (y{i})',
        "y{j} = com.microsoft.FastGelu (y{i})",
    ),
    Case(
        "SwiGLU",
        "GLU_swish",
        "y{j} = fusenorm.GLU_swish <beta = 1.0> (y{i}, y0)",
        "g{j} = Sigmoid (y{i})\nh{j} = Mul (y{i}, g{j})\ny{j} = Mul (h{j}, y0)",
        "h{j} = com.microsoft.QuickGelu <alpha = 1.0> (y{i})\ny{j} = Mul (h{j}, y0)",
    ),
)


def length(rows: int, hidden: int) -> int:
    """Ops of a chain: a call costs some microseconds; numbers of more would become denormal."""
    return 16 if 4 * rows * hidden >= LARGE else 32


def model(case: Case, node: str, rows: int, hidden: int) -> onnx.ModelProto:
    """A chain of ops; the vectors are initializers."""
    last = length(rows, hidden)
    lines = [node.format(i=i, j=i + 1) for i in range(last)]
    shape = f"float[{rows},{hidden}]"
    inputs = ["y0", "s0"] if case.skip else ["y0"]
    outputs = [f"{name[0]}{last}" for name in inputs]
    text = (
        f'<ir_version: 10, opset_import: ["" : {OPSET}, "com.microsoft" : 1, "fusenorm" : 1]>\n'
        f"chain ({', '.join(f'{shape} {name}' for name in inputs)}) => "
        f"({', '.join(f'{shape} {name}' for name in outputs)})\n{{\n" + "\n".join(lines) + "\n}"
    )
    proto = onnx.parser.parse_model(text)
    random = np.random.default_rng(1)
    for name in case.vectors:
        values = random.uniform(0.8, 1.2, hidden).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return proto


def session(proto: onnx.ModelProto, library: Path, rows: int, hidden: int) -> Callable[[], None]:
    """One run of the model over bound buffers."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(library))
    running = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = running.io_binding()
    random = np.random.default_rng(0)
    for value in running.get_inputs():
        array = (2 + 0.1 * random.standard_normal((rows, hidden))).astype(np.float32)
        binding.bind_ortvalue_input(value.name, ort.OrtValue.ortvalue_from_numpy(array))
    for value in running.get_outputs():
        fresh = np.empty((rows, hidden), np.float32)
        binding.bind_ortvalue_output(value.name, ort.OrtValue.ortvalue_from_numpy(fresh))
    return lambda: running.run_with_iobinding(binding)


def alternate(runs: Sequence[Callable[[], None]], rounds: int, least: float = 2e-3) -> list[float]:
    """Median seconds per run of each, taken in turns of at least `least` seconds."""
    counts = []
    for run in runs:
        run()
        start = time.perf_counter()
        run()
        counts.append(max(1, int(least / (time.perf_counter() - start))))
    samples: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, count, sample in zip(runs, counts, samples, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                run()
            sample.append((time.perf_counter() - start) / count)
    return [statistics.median(sample) for sample in samples]


def measure(
    cases: Iterable[Case], rows: Sequence[int], hidden: Sequence[int], rounds: int
) -> list[str]:
    """The table's lines."""
    lines = [
        "| op | rows x hidden | ours µs/op | standard / ours | contrib / ours | of copy |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    chosen = tuple(cases)
    best: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "bench.so"
        specs = [spec for case in chosen if (spec := ops.parse(case.op_type))]
        build_library(specs, Target.host(), library)
        for case in chosen:
            for count in rows:
                for width in hidden:
                    nodes = [node for node in (case.ours, case.standard, case.contrib) if node]
                    runs = [
                        session(model(case, node, count, width), library, count, width)
                        for node in nodes
                    ]
                    source = np.ones((count, width), np.float32)
                    target = np.empty_like(source)
                    runs.append(partial(np.copyto, target, source))
                    *times, copy = alternate(runs, rounds)
                    ours, *others = (taken / length(count, width) for taken in times)
                    best.append(min(others) / ours)
                    ratios = [f"{other / ours:.2f}" for other in others]
                    ratios += ["-"] * (2 - len(ratios))
                    of_copy = case.tensors / 2 * copy / ours
                    ratios.append(f"{of_copy:.2f}" if source.nbytes >= LARGE else "-")
                    lines.append(
                        f"| {case.name} | {count} x {width} | {1e6 * ours:.2f} | "
                        + " | ".join(ratios)
                        + " |"
                    )
    for case in chosen:
        cells = [line.split(" | ") for line in lines if line.startswith(f"| {case.name} |")]
        for name, place in (("standard nodes", 3), ("contrib op", 4)):
            ratios = [float(cell[place]) for cell in cells if cell[place] != "-"]
            if ratios:
                lines.append(_summary(f"{case.name}, {name}", ratios))
    return [*lines, _summary("all, the faster of both", best)]


def _summary(name: str, ratios: Sequence[float]) -> str:
    mean = statistics.geometric_mean(ratios)
    return f"\n{name}: least {min(ratios):.2f}, geometric mean {mean:.2f}, most {max(ratios):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,16,128,2048")
    parser.add_argument("--hidden", default="768,1024,4096,1000")
    parser.add_argument("--ops", default=",".join(case.name for case in CASES))
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    chosen = [case for case in CASES if case.name in given.ops.split(",")]
    rows = [int(text) for text in given.rows.split(",")]
    hidden = [int(text) for text in given.hidden.split(",")]
    print("\n".join(measure(chosen, rows, hidden, given.rounds)))


if __name__ == "__main__":
    main()
