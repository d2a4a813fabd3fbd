"""Run two models on the same inputs and compare their outputs.

The bound (SEMANTICS.md, section 3): single roundings are independent, so the largest difference in
an output, relative to that output's largest value, grows with the root of the model's depth (its
longest chain of nodes, function bodies counted): 4·eps·√depth where the model computes in f32 or
f64, 2·eps·√depth in 16 bits, where only stored values are rounded so coarsely and sums are kept in
f32. Integers and booleans must be equal; NaN and infinities must stand at the same places.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from fusenorm.artifact import Golden, Stored, open_artifact, read_npz
from fusenorm.difference import Difference, difference, is_float
from fusenorm.errors import BadInput
from fusenorm.model_io import load_model
from fusenorm.runtime.session import LOAD_ERRORS, ORT_ERRORS, Session, load
from fusenorm.signature import Signature
from fusenorm.testing import SHAPES, random_inputs, sizes

_COARSE = 2**-12  # between f32 and the 16-bit types
_RUNS = 2  # random runs per comparison
_LEAST_DEPTH = 8  # a decomposed LayerNorm


class CannotRun(BadInput):
    """onnxruntime cannot load a model, or not run it on the inputs it got.

    Attributes:
        path: the model or artifact.
    """

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message, file=path)
        self.path = path


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The verdict over all runs.

    Attributes:
        a: the reference, as given.
        b: what was compared with it.
        outputs: the worst difference per output.
        runs: the symbolic sizes of each run.
        depth: nodes in the longest chain of the deeper model.
        epsilon: of the coarsest type the models compute in.
        tolerance: the bound on every float output's `max_relative`.
    """

    a: str
    b: str
    outputs: tuple[Difference, ...]
    runs: tuple[Mapping[str, int], ...]
    depth: int
    epsilon: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return all(output.ok for output in self.outputs)

    def __str__(self) -> str:
        worst = max(self.outputs, key=lambda output: (not output.ok, output.max_relative))
        verdict = "agree" if worst.ok else f"differ in '{worst.name}': {worst.reason}"
        return (
            f"{self.a} and {self.b} {verdict} "
            f"(max relative {worst.max_relative:.3g}, bound {self.tolerance:.3g})"
        )

    def as_dict(self) -> dict[str, object]:
        return {
            "ok": self.ok,
            "a": self.a,
            "b": self.b,
            "depth": self.depth,
            "epsilon": self.epsilon,
            "tolerance": self.tolerance,
            "runs": [dict(run) for run in self.runs],
            "outputs": [
                {**dataclasses.asdict(output), "shape": list(output.shape), "ok": output.ok}
                for output in self.outputs
            ],
        }


def verify(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str] | None = None,
    inputs: str | os.PathLike[str] | Mapping[str, np.ndarray] | None = None,
    *,
    dims: Mapping[str, int] | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    require_signature: str | os.PathLike[str] | None = None,
) -> Comparison:
    """Compare the outputs of two models, A being the reference.

    A plain .onnx runs with all of onnxruntime's optimisations off, an artifact as it is served:
    with its library. Without `b`, an artifact is compared with its own recorded run.

    Args:
        a: .onnx file or artifact folder.
        b: the same; None for the run recorded in `a`.
        inputs: arrays by name or an .npz of them; else random ones at two shapes.
        dims: sizes of symbolic axes for the random inputs.
        tolerance: on the difference relative to the largest value; None: by depth, see above.
        seed: of the random inputs.
        require_signature: a public key file; artifacts must be signed with its private key.

    Raises:
        CannotRun: onnxruntime cannot load or run one of them.
        BadInput: one cannot be read, the two have different inputs or outputs, an artifact is not
            signed as required, or has no library for this machine.
    """
    pair = (
        _Side(a, require_signature=require_signature),
        _Side(a if b is None else b, require_signature=require_signature),
    )
    epsilon = max(side.epsilon for side in pair)
    depth = max(side.depth for side in pair)
    if tolerance is None:
        tolerance = _tolerance(epsilon, depth)
    runs: list[Mapping[str, int]] = []
    worst: dict[str, Difference] = {}
    for ours, theirs, run in _outputs(pair, b is None, inputs, dims, seed):
        runs.append(run)
        for name, value in ours.items():
            found = difference(name, value, theirs[name], tolerance)
            worst[name] = max(worst.get(name, found), found, key=_badness)
    names = (os.fspath(a), "its recorded run" if b is None else os.fspath(b))
    return Comparison(*names, tuple(worst.values()), tuple(runs), depth, epsilon, tolerance)


def golden(
    model: str | os.PathLike[str],
    inputs: str | os.PathLike[str] | Mapping[str, np.ndarray] | None = None,
    *,
    dims: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Golden:
    """Run a model once, with onnxruntime's optimisations off, for the record.

    Args:
        model: .onnx file or artifact folder; an artifact runs without its library.
        inputs: arrays by name or an .npz of them; else random ones.
        dims: sizes of symbolic axes for the random inputs.
        seed: of the random inputs.

    Raises:
        CannotRun: onnxruntime cannot load it, or not run it on these inputs.
        BadInput: it cannot be read.
    """
    side = _Side(model, library=False)
    tolerance = _tolerance(side.epsilon, side.depth)
    if inputs is None:
        feed, outputs, _ = next(_random_runs(side, dims, seed))
        return Golden(feed, outputs, tolerance)
    given = _given(inputs, side.signature)
    return Golden(given, side.run(given), tolerance)


class _Side:
    """One of the models compared."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        library: bool = True,
        require_signature: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = Path(path)
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised
        stored = (
            open_artifact(self.path, require_signature=require_signature)
            if self.path.is_dir()
            else None
        )
        if stored is None or not library:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        model = load_model(self.path if stored is None else stored.model)
        self.session = self._load(stored or self.path, options, library)
        self.signature = Signature.of_model(model)
        self.depth = max(_LEAST_DEPTH, _depth(model))
        self.epsilon = _epsilon(model, self.signature)
        self.golden = None if stored is None else stored.golden()

    def _load(self, what: Path | Stored, options: ort.SessionOptions, library: bool) -> Session:
        try:
            return load(what, session_options=options, library=library, fallback=False)
        except BadInput as error:
            if isinstance(error.__cause__, LOAD_ERRORS):
                raise CannotRun(
                    f"onnxruntime cannot load it: {error.__cause__}", self.path
                ) from error
            raise

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [tensor.name for tensor in self.session.signature.outputs]
        try:
            values = self.session.run(None, inputs)
        except ORT_ERRORS as error:
            raise CannotRun(
                f"onnxruntime cannot run it on these inputs ({error}); "
                "give sizes with --dim NAME=SIZE or inputs with --inputs FILE.npz",
                self.path,
            ) from error
        for name, value in zip(names, values, strict=True):
            if not isinstance(value, np.ndarray) or value.dtype.kind in "OSU":
                raise CannotRun(f"output '{name}' is no tensor of numbers: not compared", self.path)
        return dict(zip(names, values, strict=True))


def _outputs(
    pair: Sequence[_Side],
    recorded: bool,
    inputs: str | os.PathLike[str] | Mapping[str, np.ndarray] | None,
    dims: Mapping[str, int] | None,
    seed: int,
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray], Mapping[str, int]]]:
    a, b = pair
    if recorded:
        if a.golden is None:
            raise BadInput("holds no recorded run: give a second model", file=a.path)
        yield dict(a.golden.outputs), a.run(a.golden.inputs), {}
        return
    for what in ("inputs", "outputs"):
        ours, theirs = ([t.name for t in getattr(side.signature, what)] for side in pair)
        if sorted(ours) != sorted(theirs):
            raise BadInput(f"{what} are {theirs}, not {ours} as in {a.path}", file=b.path)
    if inputs is None:
        for feed, values, run in _random_runs(a, dims, seed):
            yield values, b.run(feed), run
    else:
        feed = _given(inputs, a.signature)
        yield a.run(feed), b.run(feed), {}


def _given(
    inputs: str | os.PathLike[str] | Mapping[str, np.ndarray], signature: Signature
) -> Mapping[str, np.ndarray]:
    return inputs if isinstance(inputs, Mapping) else read_npz(inputs, signature.inputs)


def _random_runs(
    side: _Side, dims: Mapping[str, int] | None, seed: int
) -> Iterator[tuple[Mapping[str, np.ndarray], dict[str, np.ndarray], Mapping[str, int]]]:
    """Inputs, outputs and sizes of a run at the first shapes of SHAPES the model can run."""
    done: list[Mapping[str, int]] = []
    refusal: CannotRun | None = None
    for number, (leading, other) in enumerate(SHAPES):
        bound = sizes(side.signature, dims, leading=leading, other=other)
        if bound in done:
            continue
        feed = random_inputs(side.signature, bound, seed + number)
        try:
            outputs = side.run(feed)
        except CannotRun as error:
            refusal = refusal or error
            continue
        yield feed, outputs, bound
        done.append(bound)
        if len(done) == _RUNS:
            return
    if refusal is not None and not done:
        raise refusal


def _tolerance(epsilon: float, depth: int) -> float:
    """The bound of this module's docstring."""
    return (4 if epsilon < _COARSE else 2) * epsilon * math.sqrt(depth)


def _badness(found: Difference) -> tuple[bool, float]:
    return (not found.ok, found.max_relative)


def _epsilon(model: ir.Model, signature: Signature) -> float:
    """Of the coarsest float type among weights, inputs and outputs."""
    dtypes = {tensor.numpy for tensor in (*signature.inputs, *signature.outputs) if tensor.dtype}
    dtypes |= {
        value.dtype.numpy()
        for value in model.graph.initializers.values()
        if value.dtype is not None and value.dtype.is_floating_point()
    }
    found = [float(ml_dtypes.finfo(dtype).eps) for dtype in dtypes if is_float(dtype)]
    return max(found, default=float(np.finfo(np.float32).eps))


def _depth(model: ir.Model) -> int:
    """Nodes in the longest chain; a node with a body or subgraphs counts as their depth."""
    functions: dict[tuple[str, str, str], int] = {}

    def chain(nodes: Iterable[ir.Node]) -> int:
        longest: dict[ir.Value, int] = {}
        deepest = 0
        for node in nodes:
            before = max((longest.get(value, 0) for value in node.inputs if value), default=0)
            depth = before + weight(node)
            longest.update(dict.fromkeys(node.outputs, depth))
            deepest = max(deepest, depth)
        return deepest

    def weight(node: ir.Node) -> int:
        identifier = node.op_identifier()
        if identifier in model.functions:
            if identifier not in functions:
                functions[identifier] = chain(model.functions[identifier])
            return functions[identifier]
        bodies = [
            attribute.as_graph()
            for attribute in node.attributes.values()
            if attribute.type == ir.AttributeType.GRAPH
        ]
        return 1 + max((chain(body) for body in bodies), default=0)

    return chain(model.graph)
