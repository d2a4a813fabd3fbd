"""Export a module of the zoo to ONNX, with dynamic batch and sequence.

python -m models.export decoder -o decoder.onnx --opset 18 --dtype f32 --exporter dynamo
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from models.zoo import DYNAMIC_AXES, ZOO, Entry

Exporter = Literal["dynamo", "torchscript"]

DTYPES = {"f32": torch.float32, "f16": torch.float16}
OPSETS: dict[Exporter, range] = {"dynamo": range(18, 26), "torchscript": range(9, 21)}
"""What each exporter writes itself. Dynamo leaves an older opset at 18 without an error."""


class ExportError(Exception):
    """One line for the user: what cannot be exported, and what can."""


def export(
    name: str,
    path: str | Path,
    *,
    opset: int = 18,
    dtype: str = "f32",
    exporter: Exporter = "dynamo",
    seed: int = 0,
) -> onnx.ModelProto:
    """Write the module ``name`` with weights drawn from ``seed`` to ``path``, and return it.

    Equal arguments and versions give equal bytes. The file appears whole or not at all.
    """
    model = build(name, opset=opset, dtype=dtype, exporter=exporter, seed=seed)
    _write(Path(path), model.SerializeToString(deterministic=True))
    return model


def build(
    name: str, *, opset: int = 18, dtype: str = "f32", exporter: Exporter = "dynamo", seed: int = 0
) -> onnx.ModelProto:
    """As ``export``, without a file."""
    entry = _entry(name)
    allowed = OPSETS[exporter]
    if opset not in allowed:
        raise ExportError(
            f"{name}: the {exporter} exporter writes opset {allowed[0]} to {allowed[-1]}, "
            f"not {opset}"
        )
    module = entry.build(seed).to(DTYPES[dtype])
    inputs = entry.example(seed=seed, dtype=DTYPES[dtype])
    run = _run_dynamo if exporter == "dynamo" else _run_torchscript
    try:
        with _quiet():
            model = run(entry, module, inputs, opset)
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(
            f"{name}: the {exporter} exporter failed at opset {opset}, {dtype}: {reason}"
        ) from error
    written = model.opset_import[0].version
    if written != opset:
        raise ExportError(f"{name}: the {exporter} exporter wrote opset {written}, not {opset}")
    _drop_traces(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def _entry(name: str) -> Entry:
    if name not in ZOO:
        near = get_close_matches(name, ZOO, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "--list prints the names"
        raise ExportError(f"{name}: no such module in the zoo; {hint}")
    return ZOO[name]


def _run_dynamo(
    entry: Entry, module: nn.Module, inputs: tuple[Tensor, ...], opset: int
) -> onnx.ModelProto:
    axes = {axis: Dim(label) for axis, label in DYNAMIC_AXES.items()}
    program = torch.onnx.export(
        module,
        inputs,
        input_names=list(entry.inputs),
        output_names=[entry.output],
        dynamic_shapes=(axes,) * len(inputs),
        opset_version=opset,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    assert program is not None  # it is None only for the torchscript exporter
    model: onnx.ModelProto = program.model_proto
    return model


def _run_torchscript(
    entry: Entry, module: nn.Module, inputs: tuple[Tensor, ...], opset: int
) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        torch.onnx.export(
            module,
            inputs,
            path,
            input_names=list(entry.inputs),
            output_names=[entry.output],
            dynamic_axes=dict.fromkeys((*entry.inputs, entry.output), DYNAMIC_AXES),
            opset_version=opset,
            dynamo=False,
        )
        return onnx.load(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on torchvision, deprecations and axis names.

    A TracerWarning (a size baked into the graph) is none of these and stays.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        logger.setLevel(level)


def _drop_traces(model: onnx.ModelProto) -> None:
    """Drop the stack traces that dynamo attaches: they hold file names of this machine."""
    graph = model.graph
    annotated: list[Any] = [model, graph, *graph.node, *graph.value_info, *graph.initializer]
    annotated += [*graph.input, *graph.output]
    for item in annotated:
        item.ClearField("metadata_props")
        item.ClearField("doc_string")


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.export", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", metavar="NAME", nargs="?", help="a module of the zoo")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: NAME.onnx")
    parser.add_argument("--opset", type=int, default=18, help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="f32", help="default: %(default)s")
    parser.add_argument("--exporter", choices=OPSETS, default="dynamo", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the weights; default: %(default)s")
    parser.add_argument("--list", action="store_true", help="print the names and leave")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done, 2 bad usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.list:
        width = max(map(len, ZOO))
        for name, entry in ZOO.items():
            print(f"{name:<{width}}  {entry.doc}")
        return 0
    if options.name is None:
        parser.error("NAME is missing; --list prints the names")
    path = options.output or Path(f"{options.name}.onnx")
    try:
        export(
            options.name,
            path,
            opset=options.opset,
            dtype=options.dtype,
            exporter=options.exporter,
            seed=options.seed,
        )
    except (ExportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
