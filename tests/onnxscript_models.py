"""The models inside onnxscript's wheel, and what they are known to contain.

`python -m tests.onnxscript_models [NAME ...]` prints the table of sites found against the truth.

Most come with random weights of the real model's size. Vocabularies and inner widths are divided
by SHRINK here (phi4 has 7 GB, more than one protobuf message holds), hidden and head sizes kept.
Left out: _test_models.py, which holds no graph but exports one by torch, with an argument that
torch 2.13 does not take.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx_ir as ir

import fusenorm
from fusenorm.compare import Difference, difference
from fusenorm.report import Report
from fusenorm.signature import Signature
from fusenorm.testing import random_inputs, sizes
from tests.corpus import Counts, found
from tests.graphs import run

PACKAGE = "onnxscript.rewriter.models"
LARGE, SHRINK = 8000, 160
ROWS = 300  # the smallest vocabulary left
BOUND = 4e-6  # of an output's largest value, as for the graphs of the pass tests


@dataclasses.dataclass(frozen=True)
class Model:
    """One model of the package.

    Attributes:
        module: where it is.
        factory: makes the object that has the graph and perhaps inputs.
        truth: its sites, counted by reading the module.
    """

    module: str
    factory: str
    truth: Counts


MODELS = {
    # Pre-norm, embedding → norm; RMSNorm and SwiGLU of two products.
    "smollm_1": Model("_smollm_1", "smollm_test_1", Counts(3, 2, 0, 1, 0)),
    "smollm_2": Model("_smollm_2", "smollm_test_2", Counts(3, 2, 0, 1, 0)),
    # Post-norm; the sum of embeddings and positions is normalised, too.
    "bart_encoder": Model("_bart_encoder", "bart_encoder_test", Counts(5, 5, 2, 0, 0)),
    # Pre-norm; two convolutions with GELU in front.
    "whisper_encoder": Model("_whisper_encoder", "whisper_encoder_test", Counts(3, 3, 3, 0, 0)),
    "whisper_decoder": Model("_whisper_decoder", "whisper_decoder_test", Counts(4, 4, 1, 0, 0)),
    # Attention and FFN side by side, both added to the stream at once; GELU by tanh.
    "phi2": Model("_phi2lm", "phi2lm_test", Counts(2, 1, 1, 0, 0)),
    # Gate and up packed in one product, then Split.
    "phi4": Model("_phi4lm", "phi4lm_test", Counts(5, 4, 0, 2, 0)),
    "rotary_1": Model("_rotary_embedding_models", "test_case_1", Counts(0, 0, 0, 0, 0)),
    "rotary_2": Model("_rotary_embedding_models", "test_case_2", Counts(0, 0, 0, 0, 0)),
    "rotary_partial": Model(
        "_rotary_embedding_models", "partial_rotary_test_case", Counts(0, 0, 0, 0, 0)
    ),
}


def load(name: str) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model and inputs for it: its own, or random ones where it has none."""
    entry = MODELS[name]
    with _small_weights():
        case: Any = getattr(importlib.import_module(f"{PACKAGE}.{entry.module}"), entry.factory)()
        proto = ir.to_proto(case.get_onnx_model())
        feeds = case.get_ort_inputs() if hasattr(case, "get_ort_inputs") else None
    _shrink(proto.graph)
    if feeds is None:
        signature = Signature.of_model(ir.from_proto(proto))
        feeds = random_inputs(signature, sizes(signature))
    ids = {name for name, array in feeds.items() if array.dtype.kind == "i"}
    return proto, {name: feeds[name] % ROWS if name in ids else feeds[name] for name in feeds}


def _shrink(graph: onnx.GraphProto) -> None:
    """The sizes declared, and those written into constants, become those of the weights."""
    for value in (*graph.value_info, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_value"):
                dim.dim_value = _smaller(dim.dim_value)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.t.data_type == onnx.TensorProto.INT64:
                array = onnx.numpy_helper.to_array(attribute.t)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(np.vectorize(_smaller)(array)))


def _smaller(size: int) -> int:
    return size // SHRINK if LARGE < size < 2**31 else size


@contextlib.contextmanager
def _small_weights() -> Iterator[None]:
    """numpy.random.rand gives fewer numbers, in matrices centred ones: norms see no large mean."""
    rng = np.random.default_rng(0)

    def rand(*shape: int) -> np.ndarray:
        small = tuple(map(_smaller, shape))
        array = rng.random(small, np.float32)
        if len(small) > 1:
            array -= 0.5
            array *= (12 / small[-1]) ** 0.5
        return array

    with mock.patch("numpy.random.rand", rand):
        yield


def worst_difference(
    proto: onnx.ModelProto, after: onnx.ModelProto, feeds: dict[str, np.ndarray]
) -> Difference:
    """Of all outputs, under onnxruntime with optimisation off."""
    pairs = zip(proto.graph.output, run(proto, feeds), run(after, feeds), strict=True)
    found = [difference(output.name, a, b, BOUND) for output, a, b in pairs]
    return max(found, key=lambda output: (not output.ok, output.max_relative))


def optimised(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, Report]:
    result = fusenorm.optimize(proto)
    return ir.to_proto(result.model), result.report


def table(names: list[str]) -> Iterator[str]:
    """Markdown: truth and found as norm/skip/activation/GLU/plain, then the statuses."""
    yield (
        "| model | nodes | truth n/s/a/g/p | found n/s/a/g/p | fused | native | refused "
        "| largest difference |"
    )
    yield "|---|---:|---|---|---:|---:|---|---:|"
    for name in names:
        proto, feeds = load(name)
        after, report = optimised(proto)
        status = collections.Counter(site.status for site in report.sites)
        why = collections.Counter(s.reason for s in report.sites if s.status == "refused")
        wanted, got = (
            "/".join(map(str, dataclasses.astuple(counts)))
            for counts in (MODELS[name].truth, found(report))
        )
        refused = ", ".join(f"{count} {code}" for code, count in why.items()) or "0"
        mark = "" if wanted == got else " *"
        worst = worst_difference(proto, after, feeds).max_relative
        yield (
            f"| {name} | {report.model['nodes']} | {wanted} | {got}{mark} | {status['fused']} "
            f"| {status['native']} | {refused} | {worst:.1e} |"
        )


if __name__ == "__main__":
    for line in table(sys.argv[1:] or list(MODELS)):
        print(line, flush=True)
