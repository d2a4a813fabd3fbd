"""Attention kernels against onnxruntime and the machine's own limit, one thread, f32.

python -m tests.bench.attention [--tokens 16,128,512] [--heads 12] [--width 64] [--seconds 3]

Rows first, as a model's linear maps leave them, without a mask, with a causal one of -inf, and with
a bias for every score. onnxruntime runs the op's own body: transposes, products, softmax. A turn is
as many runs as make a gigaflop. The limit, multiply-adds in registers, is measured in the same
turns; a causal mask counts as if every score were computed.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from fusenorm.bench import measure
from fusenorm.lower import Target, build_library
from fusenorm.ops import DOMAIN, Attention
from tests.bench.linear import FLOPS, PEAK, limits, opened

MASKS = ("none", "causal", "bias")
SIDES = ("ours", "onnxruntime")
TURN = 1 << 30


def session(spec: Attention, width: int, library: Path | None) -> ort.InferenceSession:
    """One node of `spec`: its kernel with a library, else its body."""
    names = [slot.name for slot in spec.inputs]
    node = onnx.helper.make_node(spec.op_type, names, ["y"], domain=DOMAIN, scale=width**-0.5)
    values = [onnx.helper.make_tensor_value_info(name, 1, [None] * 4) for name in (*names, "y")]
    graph = onnx.helper.make_graph([node], "attention", values[:-1], values[-1:])
    return opened(graph, spec, library)


def repeat(running: ort.InferenceSession, binding: ort.IOBinding, runs: int) -> None:
    for _ in range(runs):
        running.run_with_iobinding(binding)


def feeds(mask: str, tokens: int, heads: int, width: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    made = {name: random.standard_normal((1, tokens, heads, width), np.float32) for name in "qkv"}
    if mask == "causal":
        made["mask"] = np.where(np.tri(tokens), 0, -np.inf).astype(np.float32)[None, None]
    elif mask == "bias":
        made["mask"] = random.standard_normal((1, heads, tokens, tokens), np.float32)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="16,128,512")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0)
    chosen = parser.parse_args()
    peak = limits()[PEAK]
    specs = {mask: Attention("ssss", mask=mask != "none") for mask in MASKS}
    titles = ["mask", "tokens", *(f"{side} us" for side in SIDES), "onnxruntime / ours", "of peak"]
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch, "attention.so")
        build_library(list(dict.fromkeys(specs.values())), Target.host(), library)
        print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
        for mask, spec in specs.items():
            for tokens in map(int, chosen.tokens.split(",")):
                sides, flops = {PEAK: peak}, 4 * tokens**2 * chosen.heads * chosen.width
                runs = max(1, TURN // flops)
                for side, held in zip(SIDES, (library, None), strict=True):
                    running = session(spec, chosen.width, held)
                    binding = running.io_binding()
                    for name, array in feeds(mask, tokens, chosen.heads, chosen.width).items():
                        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
                    binding.bind_output("y")
                    sides[side] = functools.partial(repeat, running, binding, runs)
                taken = measure(sides, chosen.seconds)
                limit, *turns = (float(np.median(taken[side])) for side in (PEAK, *SIDES))
                ours, other = (turn / runs for turn in turns)
                cells = [mask, f"{tokens}", f"{1e6 * ours:.0f}", f"{1e6 * other:.0f}"]
                cells += [f"{other / ours:.2f}", f"{flops / ours / (FLOPS / limit):.2f}"]
                print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
