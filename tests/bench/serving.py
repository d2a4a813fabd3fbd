"""Our Triton backend against a plain onnxruntime model.py, in one server with one config.

`.venv-client/bin/python -m tests.bench.serving`, after `make test-serving` has built it, prints a
table: requests per second and the 99th percentile of their latency as perf_analyzer measures them,
the sides in turns; medians over the rounds.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir

import fusenorm
from fusenorm.artifact import Artifact, open_artifact
from fusenorm.compare import golden
from fusenorm.serving import triton
from tests.serving.servers import BUILD, ROOT, Triton

MODEL = ROOT / "models" / "llama_tiny.onnx"
PERF = BUILD / "triton" / "perf"
CONCURRENCY = (1, 8, 32)
OURS, STACKED, PLAIN = "fusenorm", "onnxruntime-stacked", "onnxruntime"

# What one writes first: a run for every request. STACKED is the same model behind our backend.
PLAIN_MODEL = """
import onnxruntime as ort
import triton_python_backend_utils as pb
from onnxruntime import OrtValue


class TritonPythonModel:
    def initialize(self, args):
        path = f"{args['model_repository']}/{args['model_version']}/model.onnx"
        self.session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        tokens = OrtValue.from_dlpack(pb.get_input_tensor_by_name(request, "tokens"))
        (logits,) = self.session.run_with_ort_values(["logits"], {"tokens": tokens})
        return pb.InferenceResponse([pb.Tensor.from_dlpack("logits", logits)])
"""


class Figures(NamedTuple):
    """What perf_analyzer says: requests per second, and milliseconds."""

    rate: float
    p99: float


def repository(server: Triton, scratch: Path) -> None:
    """The three models, all with the config of ours."""
    compiled = fusenorm.compile(fusenorm.optimize(MODEL)).save(scratch / "ours.fnorm")
    source = Artifact("source", ir.load(MODEL), {}, golden=golden(MODEL))
    unfused = source.save(scratch / "source.fnorm")
    triton.deploy(compiled, server.repo, name=OURS)
    triton.deploy(unfused, server.repo, name=STACKED)
    signature = open_artifact(unfused).signature
    config = triton.Config(PLAIN, triton.BACKEND, signature.inputs, signature.outputs, 32)
    folder = server.repo / PLAIN / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(PLAIN_MODEL)
    (folder / "model.onnx").write_bytes(MODEL.read_bytes())
    text = str(config).replace(f'backend: "{triton.BACKEND}"', 'backend: "python"')
    (folder.parent / "config.pbtxt").write_text(text)


def measure(
    server: Triton, side: str, concurrency: int, data: Path, milliseconds: int, out: Path
) -> Figures:
    command = [PERF / "perf_analyzer", "-m", side, "-u", server.grpc, "-i", "grpc", "-b", "1"]
    command += ["--input-data", data, "--concurrency-range", str(concurrency), "-f", out]
    command += ["-p", str(milliseconds), "-s", "1000", "-r", "3"]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(PERF)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"perf_analyzer: {done.stdout}{done.stderr}")
    with open(out, encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    return Figures(float(row["Inferences/Second"]), float(row["p99 latency"]) / 1000)


def table(found: dict[tuple[int, str], list[Figures]]) -> str:
    lines = [
        "| concurrency | side | requests/s | p99 ms | rate / ours |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (concurrency, side), figures in found.items():
        rate, p99 = (statistics.median(values) for values in zip(*figures, strict=True))
        ours = statistics.median(each.rate for each in found[concurrency, OURS])
        lines.append(f"| {concurrency} | {side} | {rate:.0f} | {p99:.1f} | {rate / ours:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=16, help="tokens of a request")
    parser.add_argument("--milliseconds", type=int, default=1500, help="of one measurement")
    options = parser.parse_args(arguments)
    reason = Triton.missing()
    if reason is not None:
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        tokens = {"content": list(range(options.length)), "shape": [options.length]}
        data = scratch / "data.json"
        data.write_text(json.dumps({"data": [{"tokens": tokens}]}))
        server = Triton(scratch)
        found: dict[tuple[int, str], list[Figures]] = {
            (concurrency, side): []
            for concurrency in CONCURRENCY
            for side in (OURS, STACKED, PLAIN)
        }
        try:
            repository(server, scratch)
            server.start()
            for _ in range(options.rounds):
                for (concurrency, side), figures in found.items():
                    out = scratch / "out.csv"
                    figures.append(
                        measure(server, side, concurrency, data, options.milliseconds, out)
                    )
        finally:
            server.stop()
    print(table(found))


if __name__ == "__main__":
    main()
