"""What optimize costs: Markdown tables of seconds and memory against the size of the graph.

    python -m tests.bench.cost [--nodes 1000,10000,100000]
    python -m tests.bench.cost --large    # a model of 7B weights, all zero, in a sparse file

Every row is measured in a process of its own; importing is not counted.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import math
import multiprocessing
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.parser

OPSET = 18
DATA = "weights.bin"
PAGE = 4096


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A Llama-like decoder as an exporter writes it: norms and SwiGLU decomposed, dynamic sizes.

    Attributes:
        layers: how many blocks.
        hidden: width of the residual stream.
        inner: width of the gated unit.
        heads: attention heads.
        vocabulary: rows of the embedding.
        half: f16, the norms' statistics in f32.
    """

    layers: int
    hidden: int = 16
    inner: int = 32
    heads: int = 2
    vocabulary: int = 64
    half: bool = False

    @classmethod
    def of_nodes(cls, nodes: int) -> Decoder:
        """With about that many nodes."""
        one, two = (cls(layers).nodes for layers in (1, 2))
        return cls(max(1, round((nodes - 2 * one + two) / (two - one))))

    @property
    def nodes(self) -> int:
        return len(self._text().splitlines()) - 3

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor of weights."""
        d, f = self.hidden, self.inner
        shapes: dict[str, tuple[int, ...]] = {"embedding": (self.vocabulary, d), "scale": (d,)}
        for i in range(self.layers):
            for name in "qkvo":
                shapes[f"w{name}{i}"] = (d, d)
            shapes |= {f"gate{i}": (d, f), f"up{i}": (d, f), f"down{i}": (f, d)}
            shapes |= {f"attention_scale{i}": (d,), f"mlp_scale{i}": (d,)}
        return {**shapes, "head": (d, self.vocabulary)}

    def model(self) -> onnx.ModelProto:
        """The model with random weights inside."""
        proto = self._bare()
        random = np.random.default_rng(0)
        for name, shape in self.weights.items():
            centre = 1 if len(shape) == 1 else 0
            array = random.normal(centre, 0.1, shape).astype(self._dtype)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        return proto

    def save_sparse(self, folder: Path) -> Path:
        """The model with weights of zeros in a file beside it that takes no room on disk."""
        proto = self._bare()
        end = 0
        for name, shape in self.weights.items():
            kind = onnx.helper.np_dtype_to_tensor_dtype(self._dtype)
            tensor = proto.graph.initializer.add(name=name, dims=shape, data_type=kind)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            length = math.prod(shape) * self._dtype.itemsize
            for key, value in (("location", DATA), ("offset", end), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            end += -(-length // PAGE) * PAGE
        with open(folder / DATA, "wb") as data:
            data.truncate(end)
        path = folder / "model.onnx"
        path.write_bytes(proto.SerializeToString())
        return path

    @property
    def _dtype(self) -> np.dtype:
        return np.dtype(np.float16 if self.half else np.float32)

    def _bare(self) -> onnx.ModelProto:
        """The graph and its small constants."""
        text = self._text()
        if self.half:
            text = text.replace("float[", "float16[")
        proto = onnx.parser.parse_model(text)
        head = self.hidden // self.heads
        constants = {
            "two": np.array(2, np.float32),
            "epsilon": np.array(1e-5, np.float32),
            "root": np.array(head**0.5, self._dtype),
            "last": np.array([-1], np.int64),
            "heads": np.array([0, 0, self.heads, head], np.int64),
            "rows": np.array([0, 0, self.hidden], np.int64),
            "zero": np.array([0], np.int64),
            "half": np.array([head // 2], np.int64),
            "end": np.array([2**31], np.int64),
        }
        for name, array in constants.items():
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        return proto

    def _text(self) -> str:
        lines = ["h0 = Gather(embedding, ids)"]
        for i in range(self.layers):
            lines += self._layer(i)
        lines += self._norm(f"h{self.layers}", "scale", "final")
        lines.append("logits = MatMul(final, head)")
        body = "\n".join(lines)
        return (
            f'<ir_version: 8, opset_import: ["" : {OPSET}]> decoder '
            f"(int64[batch,seq] ids, float[batch,1,seq,seq] mask, "
            f"float[batch,1,seq,{self.hidden // self.heads}] cos, "
            f"float[batch,1,seq,{self.hidden // self.heads}] sin) => "
            f"(float[batch,seq,{self.vocabulary}] logits)\n{{\n{body}\n}}"
        )

    def _layer(self, i: int) -> Iterator[str]:
        yield from self._norm(f"h{i}", f"attention_scale{i}", f"x{i}")
        for name in "qkv":
            yield f"{name}{i} = MatMul(x{i}, w{name}{i})"
            yield f"{name}_split{i} = Reshape({name}{i}, heads)"
            yield f"{name}_heads{i} = Transpose<perm = [0, 2, 1, 3]>({name}_split{i})"
        for name in "qk":
            yield from _rotate(f"{name}_heads{i}", f"{name}_rotated{i}")
        yield f"k_turned{i} = Transpose<perm = [0, 1, 3, 2]>(k_rotated{i})"
        yield f"scores{i} = MatMul(q_rotated{i}, k_turned{i})"
        yield f"scaled{i} = Div(scores{i}, root)"
        yield f"masked{i} = Add(scaled{i}, mask)"
        yield f"weights{i} = Softmax<axis = -1>(masked{i})"
        yield f"mixed{i} = MatMul(weights{i}, v_heads{i})"
        yield f"merged{i} = Transpose<perm = [0, 2, 1, 3]>(mixed{i})"
        yield f"flat{i} = Reshape(merged{i}, rows)"
        yield f"attention{i} = MatMul(flat{i}, wo{i})"
        yield f"m{i} = Add(h{i}, attention{i})"
        yield from self._norm(f"m{i}", f"mlp_scale{i}", f"z{i}")
        yield f"g{i} = MatMul(z{i}, gate{i})"
        yield f"sigmoid{i} = Sigmoid(g{i})"
        yield f"silu{i} = Mul(g{i}, sigmoid{i})"
        yield f"u{i} = MatMul(z{i}, up{i})"
        yield f"gated{i} = Mul(silu{i}, u{i})"
        yield f"mlp{i} = MatMul(gated{i}, down{i})"
        yield f"h{i + 1} = Add(m{i}, mlp{i})"

    def _norm(self, x: str, scale: str, y: str) -> Iterator[str]:
        wide, normalised = x, f"{y}_normalised"
        if self.half:
            wide, normalised = f"{y}_wide", f"{y}_rounded"
            yield f"{wide} = Cast<to = 1>({x})"
        yield f"{y}_square = Pow({wide}, two)"
        yield f"{y}_mean = ReduceMean<keepdims = 1>({y}_square, last)"
        yield f"{y}_shifted = Add({y}_mean, epsilon)"
        yield f"{y}_root = Sqrt({y}_shifted)"
        yield f"{y}_inverse = Reciprocal({y}_root)"
        yield f"{y}_normalised = Mul({wide}, {y}_inverse)"
        if self.half:
            yield f"{y}_rounded = Cast<to = 10>({y}_normalised)"
        yield f"{y} = Mul({scale}, {normalised})"


def _rotate(x: str, y: str) -> Iterator[str]:
    yield f"{y}_cos = Mul({x}, cos)"
    yield f"{y}_first = Slice({x}, zero, half, last)"
    yield f"{y}_second = Slice({x}, half, end, last)"
    yield f"{y}_negative = Neg({y}_second)"
    yield f"{y}_turned = Concat<axis = -1>({y}_negative, {y}_first)"
    yield f"{y}_sin = Mul({y}_turned, sin)"
    yield f"{y} = Add({y}_cos, {y}_sin)"


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one call took.

    Attributes:
        seconds: wall time of the call alone.
        peak: largest resident set of its process, in bytes.
        nodes: of the model it was given.
        fused: sites fused.
    """

    seconds: float
    peak: int
    nodes: int
    fused: int


def measure(model: Path, output: Path | None = None) -> Cost:
    """Optimise a file in a new process; write the portable model if there is an `output`."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, model, output).result()


def _measure(model: Path, output: Path | None) -> Cost:
    import fusenorm

    optimize = fusenorm.optimize  # imports what it needs
    start = time.perf_counter()
    result = optimize(model)
    if output is not None:
        result.save(output)
    seconds = time.perf_counter() - start
    # ru_maxrss counts what the process was forked from, too.
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10
    report = result.report
    return Cost(seconds, peak, report.model["nodes"], sum(report.counts.values()))


def by_size(sizes: list[int]) -> Iterator[str]:
    """A row for each number of nodes."""
    yield "| nodes | seconds | µs per node | peak MiB | sites fused |"
    yield "|---:|---:|---:|---:|---:|"
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            onnx.save(Decoder.of_nodes(size).model(), path)
            cost = measure(path)
        yield (
            f"| {cost.nodes} | {cost.seconds:.2f} | {cost.seconds / cost.nodes * 1e6:.0f} "
            f"| {cost.peak / 2**20:.0f} | {cost.fused} |"
        )


def large() -> Iterator[str]:
    """A row for each way to use a model of 7B weights: explain it, save it here or elsewhere."""
    yield "| weights | output | seconds | peak MiB | sites fused |"
    yield "|---|---|---:|---:|---:|"
    for half in (False, True):
        decoder = Decoder(32, 4096, 11008, 32, 32000, half)
        with tempfile.TemporaryDirectory() as folder:
            path = decoder.save_sparse(Path(folder))
            Path(folder, "elsewhere").mkdir()
            size = Path(folder, DATA).stat().st_size / 1e9
            outputs = {"none": None, "beside": "out.onnx", "another folder": "elsewhere/out.onnx"}
            for name, output in outputs.items():
                cost = measure(path, Path(folder, output) if output else None)
                yield (
                    f"| {size:.1f} GB of {'f16' if half else 'f32'} | {name} | {cost.seconds:.2f} "
                    f"| {cost.peak / 2**20:.0f} | {cost.fused} |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", default="1000,10000,100000")
    parser.add_argument("--large", action="store_true")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.nodes.split(",")]
    for line in large() if arguments.large else by_size(sizes):
        print(line, flush=True)


if __name__ == "__main__":
    main()
