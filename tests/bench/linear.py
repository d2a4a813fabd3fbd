"""Linear kernels against onnxruntime's MatMul and the machine's own limits, one thread.

python -m tests.bench.linear [--rows 1,4,16,128,512] [--shapes 768x3072,3072x768] [--types bf16]

Every product has its own weight, as in a model, so that one row reads weights from memory; all
write the same y, as a model uses the memory of activations again. The limits are measured in the
same turns: multiply-adds in registers, and a sum over 256 MiB. Of bf16 onnxruntime has no product:
its kernels are called directly, beside those of f32 and torch.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import tvm.script.ir_builder.tirx as T  # noqa: N812

from fusenorm.bench import measure
from fusenorm.kernels import cpu
from fusenorm.kernels.mathfn import Lanes
from fusenorm.kernels.rows import function
from fusenorm.lower import Target, build_library
from fusenorm.ops import DOMAIN, DTYPES, DType, Linear, OpSpec
from fusenorm.ops.linear import pack
from fusenorm.runtime.direct import open_library

LANES = Lanes({"x86-64-v4": 16, "x86-64-v3": 8}.get(Target.host().level, 4))
CHAINS = 24
STEPS = 1 << 23  # for tens of milliseconds: after waiting for memory a clock takes some to rise
FLOPS = 2 * CHAINS * LANES.count * STEPS
BYTES = 1 << 28
WEIGHTS = 1 << 27
SIDES = ("ours", "onnxruntime")
BF16_SIDES = ("ours", "ours in f32", "torch")
PEAK, MEMORY = "GFLOP/s in registers", "GB/s from memory"


def limits() -> dict[str, Callable[[], object]]:
    """FLOPS of multiply-adds in registers, and a sum over BYTES of memory."""
    width = LANES.count

    def multiply(y: Any, count: Any) -> None:
        cells = T.alloc_buffer((CHAINS * width,), "float32")
        places = [T.ramp(chain * width, 1, width) for chain in range(CHAINS)]
        for place in places:
            T.buffer_store(cells, y[T.ramp(0, 1, width)], [place])
        factor = T.bind(y[T.ramp(width, 1, width)])
        with T.serial(count):
            for place in places:
                T.buffer_store(cells, cells[place] * factor + factor, [place])
        for place in places:
            T.buffer_store(y, cells[place], [place])

    def add(y: Any, count: Any) -> None:
        cells = T.alloc_buffer((8 * width,), "float32")
        places = [T.ramp(part * width, 1, width) for part in range(8)]
        for place in places:
            T.buffer_store(cells, LANES.f32(0.0), [place])
        with T.serial(count // (8 * width)) as block:
            for part, place in enumerate(places):
                read = y[T.ramp((block * 8 + part) * width, 1, width)]
                T.buffer_store(cells, cells[place] + read, [place])
        for place in places:
            T.buffer_store(y, cells[place], [place])

    made = {}
    for name, body in (("multiply", multiply), ("add", add)):
        with function(name) as builder:
            handle, count = T.arg("y", T.handle()), T.arg("count", T.int64())
            body(T.match_buffer(handle, (T.int64(),), "float32", align=4), count)
        made[name] = builder.get()
    module = cpu.compile_functions(made, Target.host().tvm)
    few, many = np.zeros(1024, np.float32), np.ones(BYTES // 4, np.float32)
    return {
        PEAK: lambda: module["multiply"](few, STEPS),
        MEMORY: lambda: module["add"](many, many.size),
    }


def session(weights: Mapping[str, np.ndarray], library: Path | None) -> ort.InferenceSession:
    """x through every weight, side by side: Linear ops with a library, else MatMul."""
    dtype = next(iter(weights.values())).dtype
    spec = Linear(dtype="f32" if dtype == np.float32 else "f16")
    kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
    ours = library is not None
    nodes = [
        onnx.helper.make_node(
            spec.op_type if ours else "MatMul",
            ["x", name],
            [f"y_{name}"],
            domain=DOMAIN if ours else "",
        )
        for name in weights
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "products",
        [onnx.helper.make_tensor_value_info("x", kind, ["rows", "inner"])],
        [onnx.helper.make_tensor_value_info(f"y_{name}", kind, None) for name in weights],
        [
            onnx.numpy_helper.from_array(pack(array) if ours else array, name)
            for name, array in weights.items()
        ],
    )
    return opened(graph, spec, library)


def opened(graph: onnx.GraphProto, spec: OpSpec, library: Path | None) -> ort.InferenceSession:
    """A graph with ops of `spec` on one thread: their kernels with a library, else their bodies."""
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(DOMAIN, 1)]
    model = onnx.helper.make_model(
        graph, functions=[spec.function(18)], opset_imports=opsets, ir_version=8
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,2,4,16,128,512")
    parser.add_argument("--shapes", default="768x768,768x3072,3072x768,2048x2048,4096x4096")
    parser.add_argument("--types", default="f32,f16,bf16")
    parser.add_argument("--seconds", type=float, default=3.0)
    chosen = parser.parse_args()
    bounds = limits()
    types = chosen.types.split(",")
    cells = [
        (rows, *(int(size) for size in shape.split("x")))
        for shape in chosen.shapes.split(",")
        for rows in (int(count) for count in chosen.rows.split(","))
    ]
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch, "linear.so")
        build_library([Linear(), *(Linear(dtype=dtype) for dtype in types)], Target.host(), library)
        for dtype in types:
            names = BF16_SIDES if dtype == "bf16" else SIDES
            heads = [f"{name} us" for name in names] + [f"{name} / ours" for name in names[1:]]
            titles = ["type", "rows", "K x N", *heads, PEAK, MEMORY, "of peak", "of bandwidth"]
            print(f"\n| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
            for rows, inner, columns in cells:
                print(_line(dtype, rows, inner, columns, library, bounds, chosen.seconds))


def _line(
    dtype: DType,
    rows: int,
    inner: int,
    columns: int,
    library: Path,
    bounds: Mapping[str, Callable[[], object]],
    seconds: float,
) -> str:
    kind = DTYPES[dtype].numpy
    size = inner * columns * kind.itemsize
    random = np.random.default_rng(0)
    weights = {
        f"w{index}": random.standard_normal((inner, columns), np.float32).astype(kind)
        for index in range(max(2, WEIGHTS // size))
    }
    x = random.standard_normal((rows, inner), np.float32).astype(kind)
    make = _called if dtype == "bf16" else _served
    taken = measure({**make(x, weights, library), **bounds}, seconds)
    times = {name: float(np.median(taken[name])) / len(weights) for name in taken}
    flops = FLOPS / (times.pop(PEAK) * len(weights))
    bandwidth = BYTES / (times.pop(MEMORY) * len(weights))
    ours, *others = times.values()
    cells = [dtype, f"{rows}", f"{inner} x {columns}"]
    cells += [f"{1e6 * time:.0f}" for time in times.values()]
    cells += [f"{other / ours:.2f}" for other in others]
    cells += [f"{flops / 1e9:.0f}", f"{bandwidth / 1e9:.1f}"]
    cells.append(f"{2 * rows * inner * columns / ours / flops:.2f}")
    return f"| {' | '.join((*cells, f'{size / ours / bandwidth:.2f}'))} |"


def _served(
    x: np.ndarray, weights: Mapping[str, np.ndarray], library: Path
) -> dict[str, Callable[[], object]]:
    """The sides inside onnxruntime."""
    columns = next(iter(weights.values())).shape[1]
    y = ort.OrtValue.ortvalue_from_numpy(np.empty((len(x), columns), x.dtype))
    sides = {}
    for name, held in zip(SIDES, (library, None), strict=True):
        running = session(weights, held)
        binding = running.io_binding()
        binding.bind_cpu_input("x", x)
        for output in running.get_outputs():
            binding.bind_ortvalue_output(output.name, y)
        sides[name] = functools.partial(running.run_with_iobinding, binding)
    return sides


def _called(
    x: np.ndarray, weights: Mapping[str, np.ndarray], library: Path
) -> dict[str, Callable[[], object]]:
    """The sides without onnxruntime."""
    import torch

    torch.set_num_threads(1)
    kernels = open_library(library)
    packed = [pack(array) for array in weights.values()]
    wide = [array.astype(np.float32) for array in packed]
    # A map's weight is [N, K] in torch.
    plain = [torch.from_numpy(array.T.astype(np.float32)).bfloat16() for array in weights.values()]
    rows = torch.from_numpy(x.astype(np.float32)).bfloat16()
    bf16, f32 = (kernels[Linear(dtype=dtype).op_type] for dtype in ("bf16", "f32"))
    calls = (
        lambda: [bf16(x, weight) for weight in packed],
        lambda: [f32(x.astype(np.float32), weight) for weight in wide],
        lambda: [torch.nn.functional.linear(rows, weight) for weight in plain],
    )
    return dict(zip(BF16_SIDES, calls, strict=True))


if __name__ == "__main__":
    main()
