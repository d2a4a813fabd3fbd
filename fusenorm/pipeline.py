"""The pipeline: one list of passes, read top to bottom, and the functions around it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import importlib.metadata
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from fusenorm.errors import BadInput
from fusenorm.model_io import (
    check_operators,
    check_versions,
    load_model,
    parse_model,
    save_model,
    sort_graphs,
)
from fusenorm.ops import DOMAIN, DType, OpSpec, parse
from fusenorm.passes.add_residual import AddResidual
from fusenorm.passes.canonicalize import (
    Canonicalize,
    Cleanup,
    MergeEqual,
    NameDomains,
    RemoveUnused,
)
from fusenorm.passes.centre_residual import CentreResidual
from fusenorm.passes.concat_linear import ConcatLinearMaps
from fusenorm.passes.expose_residual import ExposeResidual
from fusenorm.passes.fold_batch_norm import FoldBatchNorm
from fusenorm.passes.fold_norm import FoldNorm, Pays
from fusenorm.passes.fuse_activation import FuseActivation
from fusenorm.passes.fuse_attention import FuseAttentions
from fusenorm.passes.fuse_glu import FuseGatedUnit
from fusenorm.passes.fuse_linear import FuseLinearMaps
from fusenorm.passes.fuse_norm import FuseNorm
from fusenorm.passes.fuse_residual import FuseResidualNorm
from fusenorm.passes.merge_reshapes import MergeReshapes
from fusenorm.passes.norm_linear import NormLinear
from fusenorm.passes.pattern import node_name
from fusenorm.passes.rewrite import Check, RewritePass, Rule
from fusenorm.passes.share_shapes import ShareShapes
from fusenorm.passes.validate import Validator
from fusenorm.passes.verify_graph import find_problem, verify_graph
from fusenorm.report import PassRecord, Report, Site, collect_regions, collect_sites

if TYPE_CHECKING:
    from fusenorm.artifact import Artifact
    from fusenorm.lower import LibraryInfo, Target

PLUGINS = "fusenorm.rules"
# Elements of what may be a shape, an axis or an index.
SHAPE_SIZE = 8
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """What optimize and compile may do.

    Attributes:
        validate: check every rewrite numerically when it is made.
        limit: stop after this many rewrites (bisecting a difference), None for all.
        rules: rules of your own, tried before the GLU rule; plugins add theirs by themselves.
        fold_batch_norm: the types of weights a BatchNormalization may be folded into. In 16 bits
            they are rounded once more; () folds none.
        centre_residual: compile makes LayerNorms RMSNorms by keeping the residual stream at mean
            zero. Off by default: tensors inside the model get other values, and it saves little.
        fold_norm: the types of packed weights compile may fold a norm's scale and bias into; as
            above.
        concat_linear: compile makes one op of linear maps of one input (queries, keys, values).
        add_residual: compile makes a residual sum the last step of the linear map in front of it.
            Off by default: no measurement told it from the sum in the norm (see AddResidual).
        norm_linear: compile makes a norm the first step of the linear op behind it. Off by default
            likewise; residual norms join only with `add_residual`.
    """

    validate: bool = True
    limit: int | None = None
    rules: tuple[Rule, ...] = ()
    fold_batch_norm: tuple[DType, ...] = ("f32", "f64")
    centre_residual: bool = False
    fold_norm: tuple[DType, ...] = ("f32",)
    concat_linear: bool = True
    add_residual: bool = False
    norm_linear: bool = False


DEFAULTS = Options()


@dataclasses.dataclass(frozen=True)
class Result:
    """An optimised model and what was done to it.

    Attributes:
        model: the model; fused ops are nodes with function bodies, so any runtime runs it.
        report: every site, pass and check.
        source: the file it was read from, None for a model given in memory.
    """

    model: ir.Model
    report: Report
    source: Path | None

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write the portable .onnx, whole or not at all; returns the files written."""
        return save_model(self.model, path)


class FuseMore(RewritePass):
    """The pass of rules from outside this package."""

    name = "fuse_more"


def plugin_rules() -> list[Rule]:
    """The rules installed packages offer under the entry point group `fusenorm.rules`.

    Raises:
        BadInput: an entry point cannot be imported or is no rule.
    """
    found = []
    for entry in importlib.metadata.entry_points(group=PLUGINS):
        try:
            made = entry.load()()
        except (ImportError, AttributeError, TypeError) as error:
            raise BadInput(f"rule plugin {entry.name} ({entry.value}): {error}") from error
        if not isinstance(made, Rule):
            raise BadInput(f"rule plugin {entry.name} ({entry.value}) is no fusenorm.passes.Rule")
        found.append(made)
    return found


def passes(options: Options) -> list[ir.passes.PassBase]:
    """THE list of passes, in order."""
    check: Check | None = Validator() if options.validate else None
    budget = [2**31 if options.limit is None else options.limit]
    return [
        Canonicalize(),
        FoldBatchNorm(options.fold_batch_norm, validate=options.validate, budget=budget),
        FuseNorm(check, budget),
        ExposeResidual(),
        FuseResidualNorm(check, budget),
        FuseActivation(check, budget),
        FuseMore((*options.rules, *plugin_rules()), check, budget),
        FuseGatedUnit(check, budget),
        Cleanup(),
    ]


def lowering_passes(
    options: Options, check: Check, pays: Pays | None = None
) -> list[ir.passes.PassBase]:
    """What compile does to the graph around the fused ops, in order: regions with contractions."""
    return [
        ShareShapes(),
        common.DeduplicateInitializersPass(size_limit=SHAPE_SIZE),
        MergeEqual(),
        RemoveUnused(),
        FuseAttentions(check),
        FuseLinearMaps(check),
        *([CentreResidual()] if options.centre_residual else []),
        FoldNorm(options.fold_norm, pays),
        *([ConcatLinearMaps(check)] if options.concat_linear else []),
        *([AddResidual(check)] if options.add_residual else []),
        *([NormLinear(check)] if options.norm_linear else []),
        MergeReshapes(),
        Cleanup(),
    ]


@contextlib.contextmanager
def _collector_at_rest() -> Iterator[None]:
    """The cyclic collector would walk a large graph over and over and free next to nothing."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@_collector_at_rest()
def optimize(
    model: str | os.PathLike[str] | onnx.ModelProto | ir.Model | Any,
    *,
    args: tuple[Any, ...] | None = None,
    dynamic_shapes: Any = None,
    options: Options = DEFAULTS,
    progress: Progress | None = None,
) -> Result:
    """Fuse what can be fused, proving each rewrite, and report every site.

    Args:
        model: a path, an onnx ModelProto, an onnx_ir Model (left untouched: a copy is made), or
            a torch.nn.Module, which is exported first.
        args: example inputs, for a torch module only.
        dynamic_shapes: which of their dimensions vary, as torch.export takes it.
        options: see Options.
        progress: called with (pass name, passes done, passes in all).

    Raises:
        BadInput: the model cannot be read, or holds an operator ONNX does not have.
    """
    work, source = _read(model, args, dynamic_shapes)
    file = source or work.graph.name
    problem = find_problem(work)
    if problem is not None:
        raise BadInput(problem.detail, file=file, node=problem.node)
    NameDomains()(work)
    check_operators(work, file)
    _check_own_functions(work, file)
    outputs = [value.name for value in work.graph.outputs]
    before = {
        "file": source.name if source else None,
        "opset": work.opset_imports.get("", 0),
        "ir_version": work.ir_version,
        "nodes": work.graph.num_nodes(),
        "sha256": _sha256(source) if source else None,
    }
    records = []
    steps = passes(options)
    for index, step in enumerate(steps):
        name = str(getattr(step, "name", type(step).__name__))
        if progress:
            progress(name, index, len(steps))
        start = time.perf_counter()
        try:
            changed = step(work).modified
        except ir.passes.PassError as error:
            raise BadInput(f"{name} cannot handle it: {error.__cause__}", file=file) from error
        verify_graph(work, name, outputs)
        seconds = time.perf_counter() - start
        records.append(PassRecord(name, changed, round(seconds, 4), work.graph.num_nodes()))
    if progress:
        progress("done", len(steps), len(steps))
    sites = collect_sites(work)
    failed = [site.output for site in sites if site.reason == "check_failed"]
    checks = {
        "graph": "verified after every pass",
        "rewrites_validated": sum(s.status == "fused" for s in sites) if options.validate else 0,
        "rolled_back": failed,
    }
    after = {"ir_version_after": work.ir_version, "nodes_after": work.graph.num_nodes()}
    return Result(work, Report({**before, **after}, sites, records, checks), source)


def explain(
    model: str | os.PathLike[str] | onnx.ModelProto | ir.Model,
    *,
    options: Options = DEFAULTS,
    progress: Progress | None = None,
) -> Report:
    """Every candidate site of a model, fused or refused, without writing anything."""
    return optimize(model, options=options, progress=progress).report


def _read(
    model: Any, args: tuple[Any, ...] | None, dynamic_shapes: Any
) -> tuple[ir.Model, Path | None]:
    """A model of our own to work on, and the file it came from."""
    if isinstance(model, str | os.PathLike):
        return load_model(model), Path(model)
    if isinstance(model, ir.Model):
        work = model.clone()
        sort_graphs(work)
        return work, None
    if isinstance(model, onnx.ModelProto):
        check_versions(model)
        work = parse_model(model)
        sort_graphs(work)
        return work, None
    if hasattr(model, "forward"):
        if args is None:
            raise BadInput("optimizing a torch module needs example inputs: args=(...)")
        from fusenorm.export import export_module

        return export_module(model, args, dynamic_shapes), None
    raise BadInput(f"cannot optimize a {type(model).__name__}: give a path, a model or a module")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fused_specs(model: ir.Model) -> list[OpSpec]:
    """The distinct fused ops of a model, in order of first use."""
    found: dict[str, OpSpec] = {}
    for graph in model.graphs():
        for node in graph:
            if node.domain == DOMAIN and node.op_type not in found:
                spec = parse(node.op_type)
                if spec is None:
                    raise BadInput(f"unknown fused op {node.op_type}", node=node.name)
                found[node.op_type] = spec
    return list(found.values())


def row_lengths(model: ir.Model) -> dict[OpSpec, set[int]]:
    """The known lengths of the rows each fused op of a model is used on."""
    found: dict[OpSpec, set[int]] = {spec: set() for spec in fused_specs(model)}
    for graph in model.graphs():
        for node in graph:
            spec = parse(node.op_type) if node.domain == DOMAIN else None
            shape = node.outputs[0].shape
            if spec is not None and shape and isinstance(shape[-1], int):
                found[spec].add(shape[-1])
    return found


def compile(
    model: Result | str | os.PathLike[str] | onnx.ModelProto | ir.Model,
    target: str | Sequence[str] = "cpu",
    *,
    inputs: str | os.PathLike[str] | Mapping[str, np.ndarray] | None = None,
    dims: Mapping[str, int] | None = None,
    tune: bool = True,
    options: Options = DEFAULTS,
    progress: Progress | None = None,
) -> Artifact:
    """Lower the fused ops of a model to a kernel library per target and pack them with it.

    Args:
        model: what optimize returned, or anything it takes (which is optimised first).
        target: `cpu` for this machine's level, a level such as `x86-64-v3`, or `cuda` for GPUs
            (no GPU is needed here); several in a list or joined by commas. The weights are packed
            once for all, or not at all with `cuda` among them: there, products of matrices are
            left to onnxruntime.
        inputs: arrays by name, or an .npz of them, for the recorded run; else random ones.
        dims: sizes of symbolic axes for random inputs.
        tune: leave regions to onnxruntime that are measured to run slower here; False takes all,
            so that equal models give equal artifacts on every machine.
        options: see Options.
        progress: called with (step, steps done, steps in all).

    Returns:
        The artifact; `.save(folder)` writes it.

    Raises:
        BadInput: the target is unknown, no compiler is to be had, or the model cannot run.
    """
    result = (
        model if isinstance(model, Result) else optimize(model, options=options, progress=progress)
    )
    from fusenorm.artifact import Artifact, Library, Source
    from fusenorm.compare import CannotRun, golden
    from fusenorm.lower import Target
    from fusenorm.tune import Paying, slower

    asked = target if isinstance(target, str) else ",".join(target)
    targets = Target.parse_all(asked)
    only_cpu = all(one.kind == "cpu" for one in targets)
    with tempfile.TemporaryDirectory() as scratch:
        paying = Paying(Validator(), {})
        model, regions = (
            lower_regions(result.model, paying, options, paying.refusal)
            if only_cpu
            else (result.model, [])
        )
        built: dict[Target, LibraryInfo | None] = {}
        best = next((one for one in targets if only_cpu and one.runs_here), None)
        while tune and best is not None:
            library = built[best] = _build(model, best, Path(scratch, f"{best}.so"))
            slow = slower(model, library.path, best.level) if library else {}
            if slow.keys() <= paying.slow.keys():  # those left are ops of the model as it came
                break
            # What is left out may leave regions that were not measured.
            paying = dataclasses.replace(paying, slow={**paying.slow, **slow})
            model, regions = lower_regions(result.model, paying, options, paying.refusal)
            built.clear()
        for one in targets:
            if one not in built:
                built[one] = _build(model, one, Path(scratch, f"{one}.so"))
        ordered = (built[one] for one in targets)
        libraries = [Library.of(library) for library in ordered if library is not None]
        if progress:
            progress("record a golden run", 1, 1)
        portable = Path(scratch, "model.onnx")
        save_model(model, portable)
        recorded = None
        try:
            recorded = golden(portable, inputs=inputs, dims=dims)
        except CannotRun as error:
            if only_cpu or not _in_bf16(model):
                message = error.message.replace(f"Load model from {portable} failed:", "")
                node = _foreign_node(model)
                raise BadInput(
                    message, file=result.source or result.model.graph.name, node=node
                ) from error
    summary = result.report.model
    return Artifact(
        name=result.source.stem if result.source else str(result.model.graph.name or "model"),
        model=model,
        report={**result.report.as_dict(), "regions": [site.as_dict() for site in regions]},
        libraries=libraries,
        target=asked,
        source=Source(summary["sha256"], summary["opset"], summary["ir_version"]),
        golden=recorded,
    )


def _in_bf16(model: ir.Model) -> bool:
    """Whether fused ops are in bf16, which onnxruntime runs on GPUs alone."""
    return any(slot.dtype == "bf16" for spec in fused_specs(model) for slot in spec.outputs)


def _build(model: ir.Model, target: Target, path: Path) -> LibraryInfo | None:
    """The library of a model's fused ops, None if it has none."""
    from fusenorm.kernels import supports
    from fusenorm.lower import build_library

    columns = {spec: found for spec, found in row_lengths(model).items() if supports(spec) is None}
    return build_library(columns, target, path, columns=columns) if columns else None


def lower_regions(
    model: ir.Model,
    check: Check | None = None,
    options: Options = DEFAULTS,
    pays: Pays | None = None,
) -> tuple[ir.Model, list[Site]]:
    """A copy of `model` with its regions made, each proved by `check`, and what became of each.

    Those whose proof is not that of a rewrite are left out where they do not pay.
    """
    work = model.clone()
    # Where only fused ops are left, a model need not say which standard their bodies are in.
    standards = [function.opset_imports.get("", 0) for function in work.functions.values()]
    work.opset_imports.setdefault("", max(standards, default=0))
    outputs = [value.name for value in work.graph.outputs]
    for step in lowering_passes(options, check or Validator(), pays):
        step(work)
        verify_graph(work, str(getattr(step, "name", type(step).__name__)), outputs)
    return work, collect_regions(work)


def _check_own_functions(model: ir.Model, file: object) -> None:
    """A function of our domain in the file must be the one this version declares."""
    for (domain, name, _), function in model.functions.items():
        if domain != DOMAIN:
            continue
        spec = parse(name)
        opset = function.opset_imports.get("", model.opset_imports.get("", 0))
        own = ir.serde.deserialize_function(spec.function(opset)) if spec else None
        if own is None or _meaning(function) != _meaning(own):
            raise BadInput(
                f"function {DOMAIN}::{name} is not what fusenorm declares: it was made by "
                "another version or another tool; optimize the original model",
                file=file,
            )


def _meaning(function: ir.Function) -> list[tuple[object, ...]]:
    """What a function computes: its nodes without names and documentation."""
    return [
        (
            node.op_identifier(),
            [value.name if value is not None else None for value in node.inputs],
            [value.name for value in node.outputs],
            sorted(str(attribute) for attribute in node.attributes.values()),
        )
        for node in function
    ]


def _foreign_node(model: ir.Model) -> str | None:
    """The first node of a domain neither ONNX, onnxruntime nor the model itself defines."""
    known = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc")
    for node in model.graph.all_nodes():
        if node.domain not in known and node.op_identifier() not in model.functions:
            return f"{node_name(node)} ({node.domain}:{node.op_type})"
    return None
