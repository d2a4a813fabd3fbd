"""The Triton backend `fusenorm`: `fusenorm deploy triton --backends DIR` copies it to
DIR/fusenorm/model.py, with the modules it imports beside it. The server's Python needs
onnxruntime, nothing else.

Tensors cross into and out of the stub by DLPack only: pybind11's numpy bridge in Triton before
24.12 corrupts data silently under numpy 2.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import triton_python_backend_utils as pb  # the server's own
from onnxruntime import OrtValue

from fusenorm.errors import BadInput
from fusenorm.runtime.metrics import Metrics
from fusenorm.serving.batching import Outcome, run_all
from fusenorm.serving.model import Served


class TritonPythonModel:
    """One instance of a model; Triton calls it from one thread."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"], args["model_version"])
        self._served = Served(folder)
        wrong = self._served.probe()
        if wrong is not None:
            raise BadInput(f"does not answer as recorded: {wrong}", file=folder)
        metrics = config["parameters"].get("metrics", {}).get("string_value") == "true"
        self._registry = _Registry(self._served.session.metrics, args) if metrics else None
        self._stack = config["max_batch_size"] > 0
        self._inputs = [tensor.name for tensor in self._served.stored.signature.inputs]

    def is_ready(self) -> bool:
        """Whether the recorded inputs still give the recorded outputs (Triton from 26.03 asks)."""
        return self._served.probe() is None

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        feeds = [
            {name: _take(pb.get_input_tensor_by_name(request, name)) for name in self._inputs}
            for request in requests
        ]
        outcomes = run_all(self._served.session, feeds, stack=self._stack)
        if self._registry is not None:
            self._registry.update()
        return [_response(outcome) for outcome in outcomes]


def _take(tensor: Any) -> OrtValue:
    """A request's tensor over the same memory."""
    return OrtValue.from_dlpack(tensor)


def _response(outcome: Outcome) -> Any:
    if isinstance(outcome, BadInput):
        error = pb.TritonError(outcome.message, pb.TritonError.INVALID_ARG)
        return pb.InferenceResponse(error=error)
    if isinstance(outcome, Exception):
        return pb.InferenceResponse(error=pb.TritonError(str(outcome), pb.TritonError.INTERNAL))
    return pb.InferenceResponse(
        [pb.Tensor.from_dlpack(name, value) for name, value in outcome.items()]
    )


class _Registry:
    """A session's figures in the server's metrics.

    Every figure set is a message to the server, so those that changed follow once a second, with
    the next batch.
    """

    _SECONDS = 1.0

    def __init__(self, metrics: Metrics, args: Mapping[str, str]) -> None:
        self._metrics = metrics
        self._labels = {
            "model": args["model_name"],
            "version": args["model_version"],
            # Two processes with equal labels share a metric, and the server ends in SIGSEGV when
            # the first of them goes away.
            "instance": f"{args['model_instance_name']}-{os.getpid()}",
        }
        self._families: dict[str, Any] = {}  # the server drops a metric whose family is gone
        self._held: dict[tuple[str, str], tuple[Any, float]] = {}
        self._due = 0.0
        self.update()

    def update(self) -> None:
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + self._SECONDS
        for family in self._metrics.snapshot().families():
            gauge = family.kind == "gauge"
            kind = pb.MetricFamily.GAUGE if gauge else pb.MetricFamily.COUNTER
            for sample in family.samples:
                name = family.name + sample.suffix
                key = (name, sample.labels.get("le", ""))
                if key not in self._held:
                    self._held[key] = self._metric(name, kind, sample.labels), 0.0
                metric, before = self._held[key]
                if sample.value == before:
                    continue
                # A counter can only be added to.
                if gauge:
                    metric.set(sample.value)
                else:
                    metric.increment(sample.value - before)
                self._held[key] = metric, sample.value

    def _metric(self, name: str, kind: Any, labels: Mapping[str, str]) -> Any:
        if name not in self._families:
            self._families[name] = pb.MetricFamily(name=name, description=name, kind=kind)
        return self._families[name].Metric(labels={**self._labels, **labels})
