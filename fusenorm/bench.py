"""Latency of an artifact against other runtimes, measured alternately in one process."""

from __future__ import annotations

import dataclasses
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from fusenorm.artifact import Stored, open_artifact, read_npz, sha256
from fusenorm.errors import BadInput
from fusenorm.runtime.session import LOAD_ERRORS, ORT_ERRORS, load
from fusenorm.testing import SHAPES, random_inputs, sizes

Progress = Callable[[str, int, int], None]

# onnxruntime optimizers left out by the side of this name.
DISABLED: dict[str, tuple[str, ...]] = {
    "onnxruntime": (),
    "onnxruntime-noskip": ("SkipLayerNormFusion", "EmbedLayerNormFusion"),
}
# What a model can be measured against; the last two need their packages.
AGAINST = (*DISABLED, "onnxruntime-transformers", "openvino")
OURS = "fusenorm"

# Tried in this order, as in fusenorm.testing: the first one that runs is measured.
BENCH_SHAPES = ((1, 128), *SHAPES)


@dataclasses.dataclass(frozen=True)
class Row:
    """One side of the table.

    Attributes:
        name: what ran.
        median: milliseconds per run.
        fastest: milliseconds of the quickest run.
        relative: its median over ours; 1 for ours.
        quartiles: milliseconds of the first and third quartile.
    """

    name: str
    median: float
    fastest: float
    relative: float
    quartiles: tuple[float, float]

    @classmethod
    def of(cls, name: str, taken: Sequence[float], ours: Sequence[float]) -> Row:
        """The row of a side that took so many seconds each time."""
        median = statistics.median(taken)
        low, _, high = statistics.quantiles(taken, n=4)
        return cls(
            name,
            1e3 * median,
            1e3 * min(taken),
            median / statistics.median(ours),
            (1e3 * low, 1e3 * high),
        )


@dataclasses.dataclass(frozen=True)
class Latency:
    """The table and how it was measured.

    Attributes:
        rows: ours first.
        rounds: runs per side, taken in turns.
        threads: intra-op threads of every side, None for onnxruntime's default.
        shapes: input shapes.
    """

    rows: tuple[Row, ...]
    rounds: int
    threads: int | None
    shapes: Mapping[str, tuple[int, ...]]

    def as_dict(self) -> dict[str, object]:
        return {
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "unit": "ms",
            "rounds": self.rounds,
            "threads": self.threads,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }


def bench(
    artifact: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    *,
    against: Sequence[str] = tuple(DISABLED),
    inputs: str | os.PathLike[str] | None = None,
    dims: Mapping[str, int] | None = None,
    threads: int | None = None,
    seconds: float = 2.0,
    require_signature: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Latency:
    """Measure an artifact against the model it was made from.

    Args:
        artifact: the folder.
        model: the source .onnx; without it, the artifact's own model runs as plain ONNX, which
            onnxruntime cannot fuse back as well as the source.
        against: rows of AGAINST.
        inputs: an .npz of inputs; else random ones.
        dims: sizes of symbolic axes for the random inputs.
        threads: intra-op threads of every side.
        seconds: how long to measure, all sides together.
        require_signature: a public key file; the artifact must be signed with its private key.
        progress: called with (side, done, total).

    Raises:
        BadInput: an unknown side, a model that is not the artifact's source, inputs it cannot take.
    """
    unknown = [name for name in against if name not in AGAINST]
    if unknown:
        raise BadInput(f"cannot measure against '{unknown[0]}': one of {', '.join(AGAINST)}")
    stored = open_artifact(artifact, require_signature=require_signature)
    source = stored.manifest["source"]["sha256"]
    if model is not None and source is not None and sha256(Path(model)) != source:
        raise BadInput(f"is not the model {stored.name} was made from", file=model)
    session = load(stored, threads, options(threads), fallback=False)
    feed = (
        read_npz(inputs, stored.signature.inputs)
        if inputs is not None
        else _feed(session, stored, dims)
    )
    sides = {OURS: lambda: session.run(None, feed)}
    for name in against:
        sides[name] = side(name, Path(model) if model is not None else stored.model, feed, threads)
    try:
        times = measure(sides, seconds, progress)
    except ORT_ERRORS as error:
        raise BadInput(
            f"onnxruntime cannot run it on these inputs ({error})", file=artifact
        ) from error
    rows = (Row.of(name, taken, times[OURS]) for name, taken in times.items())
    shapes = {name: tuple(array.shape) for name, array in feed.items()}
    return Latency(tuple(rows), len(times[OURS]), threads, shapes)


def measure(
    sides: Mapping[str, Callable[[], object]],
    seconds: float,
    progress: Progress | None = None,
    *,
    pause: float = 0.0,
) -> dict[str, list[float]]:
    """Time callables in turns, so that a slow moment of the machine meets all of them.

    Each round has an order of its own: what one side leaves behind meets every other one.

    Args:
        sides: name to what is timed; each runs three times before.
        seconds: how long to measure, all sides together.
        progress: called with ("measure", done, total) in rounds.
        pause: seconds before each run, for the threads of the last side to stop spinning; after it
            the side runs once untimed, which wakes its own.

    Returns:
        Name to seconds per call, equally many for each, at least 5.
    """
    for side in sides.values():
        side()
    started = time.perf_counter()
    for _ in range(2):
        for side in sides.values():
            side()
    per_round = (time.perf_counter() - started) / (1 if pause else 2) + pause * len(sides)
    rounds = max(5, min(1000, int(seconds / max(per_round, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in sides}
    order, shuffle = list(sides.items()), random.Random(0).shuffle
    for number in range(rounds):
        shuffle(order)
        for name, side in order:
            if pause:
                time.sleep(pause)
                side()
            begun = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - begun)
        if progress is not None:
            progress("measure", number + 1, rounds)
    return times


def _feed(
    session: ort.InferenceSession, stored: Stored, dims: Mapping[str, int] | None
) -> dict[str, np.ndarray]:
    """Random inputs of the first shape the model runs at."""
    refusal: Exception | None = None
    for leading, other in BENCH_SHAPES:
        bound = sizes(stored.signature, dims, leading=leading, other=other)
        feed = random_inputs(stored.signature, bound)
        try:
            session.run(None, feed)
        except ORT_ERRORS as error:
            refusal = refusal or error
            continue
        return feed
    raise BadInput(
        f"onnxruntime cannot run it on random inputs ({refusal}); "
        "give sizes with --dim NAME=SIZE or inputs with --inputs FILE.npz",
        file=stored.path,
    )


def options(threads: int | None) -> ort.SessionOptions:
    """Options of every onnxruntime session that is measured.

    Its threads are pinned, as onnxruntime pins those of its default number only: left alone, two of
    them share a CPU for a whole run now and then.
    """
    made = ort.SessionOptions()
    made.log_severity_level = 4  # what goes wrong is raised
    # Idle threads of one side must not spin while another is measured, only within its runs.
    made.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        made.intra_op_num_threads = threads
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        if 1 < threads <= len(cpus):  # the first thread is the caller's
            places = ";".join(str(cpu + 1) for cpu in cpus[1:threads])
            made.add_session_config_entry("session.intra_op_thread_affinities", places)
    return made


def side(
    name: str, model: Path, feed: Mapping[str, np.ndarray], threads: int | None
) -> Callable[[], object]:
    """What runs `model` on `feed` once, by the runtime called `name`.

    Raises:
        BadInput: the runtime is not installed, or cannot load the model.
    """
    if name == "openvino":
        return _openvino(model, feed, threads)
    if name == "onnxruntime-transformers":
        return _transformers(model, feed, threads)
    session = _plain(os.fspath(model), threads, DISABLED[name], model)
    return lambda: session.run(None, feed)


def _plain(
    source: str | bytes, threads: int | None, disabled: Sequence[str], model: Path
) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(
            source,
            options(threads),
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(disabled),
        )
    except LOAD_ERRORS as error:
        raise BadInput(f"onnxruntime cannot load it: {error}", file=model) from error


def _transformers(
    model: Path, feed: Mapping[str, np.ndarray], threads: int | None
) -> Callable[[], object]:
    """onnxruntime after the graph optimizer of its own `transformers` package."""
    try:
        from onnxruntime.transformers import optimizer
    except ImportError as error:
        raise BadInput(f"onnxruntime.transformers cannot be imported: {error}") from error
    try:
        better = optimizer.optimize_model(os.fspath(model), "bert", opt_level=0)
    except Exception as error:  # it raises whatever a pass of it trips over
        raise BadInput(
            f"onnxruntime.transformers cannot optimize it: {error}", file=model
        ) from error
    session = _plain(better.model.SerializeToString(), threads, (), model)
    return lambda: session.run(None, dict(feed))


def _openvino(
    model: Path, feed: Mapping[str, np.ndarray], threads: int | None
) -> Callable[[], object]:
    """OpenVINO in f32, compiled for the shapes of `feed`."""
    try:
        import openvino
    except ImportError as error:
        raise BadInput("openvino is not installed: pip install openvino") from error
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = str(threads)
    try:
        network = openvino.Core().read_model(os.fspath(model))
        network.reshape({name: list(array.shape) for name, array in feed.items()})
        request = openvino.Core().compile_model(network, "CPU", settings).create_infer_request()
        request.infer(dict(feed))
    except RuntimeError as error:
        raise BadInput(f"openvino cannot run it: {error}", file=model) from error
    return lambda: request.infer(dict(feed))
