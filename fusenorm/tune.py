"""Choice by measurement: does a linear region pay on this machine, or is it left to onnxruntime?"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from fusenorm import __version__, cache
from fusenorm.bench import OURS, measure
from fusenorm.errors import BadInput
from fusenorm.ops import DOMAIN, DTYPES, Linear
from fusenorm.ops.linear import PANEL
from fusenorm.passes.pattern import Refusal, node_name
from fusenorm.passes.rewrite import Check, Rewrite

ROWS = (1, 16, 128)
# A region is left out below this share of onnxruntime's speed; above it noise would decide.
PAYS = 0.9
SECONDS = 0.1
# Weights of a measurement: as many as do not fit a core's own caches, as in a model, or COPIES.
BYTES, COPIES = 1 << 25, 256
OPSET = 18


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the speed of a linear op depends on, but for the rows.

    Attributes:
        op_type: the op.
        panels: shapes of its packed weights.
        rest: columns in the last panel of a ragged one.
    """

    op_type: str
    panels: tuple[tuple[int, ...], ...]
    rest: int = 0

    @classmethod
    def of(cls, op_type: str, inputs: Iterable[ir.Value | None]) -> Self | None:
        """The problem of a node or proposal; None if it is no linear op."""
        spec = Linear.parse(op_type)
        if spec is None:
            return None
        panels, rest = [], 0
        for slot, value in zip(spec.inputs, inputs, strict=True):
            if slot.layout == "row":
                continue
            assert value is not None
            assert value.shape is not None
            shape = tuple(int(size) for size in value.shape)  # type: ignore[arg-type]
            if slot.layout == "panels":
                panels.append(shape)
            elif spec.ragged:
                rest = shape[-1] % PANEL
        return cls(op_type, tuple(panels), rest)


@dataclasses.dataclass(frozen=True)
class Paying:
    """A check of rewrites that refuses what was measured to be slower first.

    Attributes:
        check: proves the others.
        slow: problems left to onnxruntime, with their share of its speed.
    """

    check: Check
    slow: Mapping[Problem, float]

    def __call__(self, rewrite: Rewrite, opset: int) -> Refusal | None:
        return self.refusal(rewrite) or self.check(rewrite, opset)

    def refusal(self, rewrite: Rewrite) -> Refusal | None:
        """Why a rewrite does not pay, proved or not; None if it may."""
        problem = Problem.of(rewrite.spec.op_type, rewrite.inputs)
        if problem is None or problem not in self.slow:
            return None
        share = self.slow[problem]
        detail = f"runs at {share:.2f} of onnxruntime's speed over {ROWS} rows"
        return Refusal("slower", node_name(rewrite.root), detail)


def problems(model: ir.Model) -> list[Problem]:
    """The distinct problems of a lowered model."""
    nodes = (node for graph in model.graphs() for node in graph if node.domain == DOMAIN)
    found = (Problem.of(node.op_type, node.inputs) for node in nodes)
    return list(dict.fromkeys(problem for problem in found if problem is not None))


def slower(model: ir.Model, library: Path, level: str) -> dict[Problem, float]:
    """The problems of `model` whose kernels do not pay: their share of onnxruntime's speed.

    Measured once per machine and version, then remembered under $XDG_CACHE_HOME/fusenorm.

    Args:
        model: lowered.
        library: an ops library this machine can run, with all ops of the model.
        level: the CPU level it was built for.
    """
    known = _read()
    found = {}
    for problem in problems(model):
        key = "|".join((_machine(), level, __version__, ort.__version__, *map(str, _flat(problem))))
        if key not in known:
            known[key] = share(problem, library)
            _write(known)
        if known[key] < PAYS:
            found[problem] = known[key]
    return found


def share(problem: Problem, library: Path) -> float:
    """onnxruntime's time over the kernel's, one thread: the geometric mean over ROWS."""
    spec = Linear.parse(problem.op_type)
    assert spec is not None
    content = _model(spec, problem).SerializeToString()
    ours, plain = _session(content, library), _session(content, None)
    random = np.random.default_rng(0)
    ratios = []
    for rows in ROWS:
        feed = {
            name: random.standard_normal((rows, width)).astype(DTYPES[spec.dtype].numpy)
            for name, width in _widths(spec, problem).items()
        }
        sides = {
            OURS: lambda feed=feed: ours.run(None, feed),
            "onnxruntime": lambda feed=feed: plain.run(None, feed),
        }
        times = measure(sides, SECONDS)
        ratios.append(min(times["onnxruntime"]) / min(times[OURS]))
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _widths(spec: Linear, problem: Problem) -> dict[str, int]:
    """The last axis of each of its rows."""
    panels, inner, _ = problem.panels[0]
    return {"x": inner} | ({"residual": panels * PANEL} if spec.residual else {})


def _model(spec: Linear, problem: Problem) -> onnx.ModelProto:
    """The op side by side with its like, each with random constants of its own."""
    random = np.random.default_rng(0)
    dtype = DTYPES[spec.dtype]
    weights, shapes = iter(problem.panels), {}
    for slot in spec.inputs:
        if slot.layout == "panels":
            shapes[slot.name] = panels = next(weights)
        elif slot.layout == "vector":  # behind its weight
            missing = PANEL - problem.rest if spec.ragged else 0
            shapes[slot.name] = (panels[0] * PANEL // spec.parts - missing,)
    size = sum(map(math.prod, problem.panels)) * dtype.numpy.itemsize
    copies = min(COPIES, 1 + BYTES // size)
    info = onnx.helper.make_tensor_value_info
    nodes, held, outputs = [], [], []
    for copy in range(copies):
        names = {
            slot.name: f"{slot.name}_of_{copy}" if slot.name in shapes else slot.name
            for slot in spec.inputs
        }
        held += [
            onnx.numpy_helper.from_array(
                random.standard_normal(shape, np.float32).astype(dtype.numpy), names[name]
            )
            for name, shape in shapes.items()
        ]
        made = [f"{slot.name}_of_{copy}" for slot in spec.outputs]
        node = onnx.helper.make_node(spec.op_type, list(names.values()), made, domain=DOMAIN)
        node.attribute.extend(onnx.helper.make_attribute(name, 1.0) for name in spec.attributes)
        nodes.append(node)
        outputs += [info(name, int(dtype.onnx), None) for name in made]
    given = [
        info(name, int(dtype.onnx), ["rows", width])
        for name, width in _widths(spec, problem).items()
    ]
    graph = onnx.helper.make_graph(nodes, "ops", given, outputs, held)
    return onnx.helper.make_model(
        graph,
        functions=[spec.function(OPSET)],
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, 1)],
        ir_version=8,
    )


def _session(content: bytes, library: Path | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(os.fspath(library))
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _flat(problem: Problem) -> tuple[object, ...]:
    sizes = (size for panels in problem.panels for size in panels)
    return (problem.op_type, *sizes, *([problem.rest] if problem.rest else []))


def _machine() -> str:
    """The CPU's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _file() -> Path:
    return cache.folder() / "choices.json"


def _read() -> dict[str, float]:
    """What was measured before; nothing if the file is missing or damaged."""
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, BadInput):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, float)}


def _write(known: Mapping[str, float]) -> None:
    """Remember it, where that is possible."""
    with contextlib.suppress(OSError, BadInput):
        path = _file()
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            fresh.write_text(json.dumps(known, indent=1, sort_keys=True), encoding="utf-8")
            fresh.replace(path)
        except OSError:
            fresh.unlink(missing_ok=True)
