"""The command `fusenorm`.

Exit codes: 0 done, 1 a check failed, 2 bad input or usage. Results go to stdout, as tables or
with --json as one JSON object and nothing else; progress and errors go to stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fusenorm import __version__
from fusenorm.errors import BadInput, CheckFailed, FusenormError
from fusenorm.printing import (
    errors,
    new_table,
    out,
    print_comparison,
    print_json,
    print_latency,
    print_report,
    statuses,
)
from fusenorm.serving import commands

if TYPE_CHECKING:
    from fusenorm.bench import Latency
    from fusenorm.compare import Comparison
    from fusenorm.pipeline import Options, Result

# Models with larger weights are run to compare them only if asked to.
COMPARED_BYTES = 2 << 30

P = ParamSpec("P")
Step = Callable[[str, int, int], None]

app = typer.Typer(
    name="fusenorm",
    help="Fuse norm, GELU and GLU subgraphs of ONNX models into TVM kernels for onnxruntime.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
deploy = typer.Typer(help="Write what an inference server loads.", no_args_is_help=True)
app.add_typer(deploy, name="deploy")

Model = Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The model.")]
Models = Annotated[
    list[Path], typer.Argument(metavar="MODEL.onnx", help="The model; with --ray any number.")
]
Ray = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Compile on this Ray cluster; -o names a folder."),
]
Folder = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder made by optimize.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Where to write.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target", help="cpu (this machine's level), cuda, or levels: x86-64-v2,cuda; repeatable."
    ),
]
NoTune = Annotated[
    bool, typer.Option("--no-tune", help="Take every region, measure none: the same everywhere.")
]
Inputs = Annotated[
    Path | None, typer.Option("--inputs", metavar="IN.npz", help="Arrays by input name.")
]
Dims = Annotated[
    list[str] | None,
    typer.Option("--dim", metavar="NAME=SIZE", help="Size of a symbolic axis; repeatable."),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, max=1024, help="Intra-op threads.")
]
Key = Annotated[
    Path | None,
    typer.Option("--require-signature", metavar="KEY", help="Refuse what this key did not sign."),
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=0, help="Make only the first N rewrites (to bisect).")
]
NoBatchNorm = Annotated[
    bool, typer.Option("--no-fold-batch-norm", help="Fold no BatchNormalization into weights.")
]
NoFoldNorm = Annotated[
    bool, typer.Option("--no-fold-norm", help="Fold no norm's scale and bias into weights.")
]
NoConcat = Annotated[
    bool, typer.Option("--no-concat-linear", help="Keep linear maps of one input apart.")
]
CentreResidual = Annotated[
    bool, typer.Option("--centre-residual", help="Make LayerNorms of a pre-norm model RMSNorms.")
]
AddResidual = Annotated[
    bool, typer.Option("--add-residual", help="Add residuals in the linear maps in front of them.")
]
NormLinear = Annotated[
    bool, typer.Option("--norm-linear", help="Normalise rows in the linear maps that read them.")
]


def main() -> None:
    """Entry point of the `fusenorm` script."""
    _open_streams()
    warnings.showwarning = lambda message, *_: _say(str(message), "warning")
    try:
        app()
    except Exception as error:  # The process ends here: a mistake of ours is one line, too.
        if "--debug" in sys.argv:
            raise
        kind = type(error).__name__
        _say(f"internal error, please report it with what --debug shows: {kind}: {error}")
        sys.exit(2)


def _open_streams() -> None:
    """Where stdin, stdout or stderr was closed, as services do: nothing, not the next file."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
            os.set_inheritable(descriptor, True)
        if getattr(sys, name) is None:
            mode = "w" if descriptor else "r"
            setattr(sys, name, open(descriptor, mode, encoding="utf-8"))  # noqa: SIM115


def _command(function: Callable[P, None], on: typer.Typer = app) -> Callable[P, None]:
    """Register a command whose errors become one line on stderr and an exit code."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except OSError as error:
            if kwargs.get("debug"):
                raise
            where = f"{error.filename}: " if error.filename else ""
            _say(f"{where}{error.strerror or error}")
            raise typer.Exit(2) from error
        except MemoryError as error:
            if kwargs.get("debug"):
                raise
            _say(f"not enough memory: {error}")
            raise typer.Exit(2) from error
        except FusenormError as error:
            if kwargs.get("debug"):
                traceback.print_exc()
            _say(str(error))
            raise typer.Exit(1 if isinstance(error, CheckFailed) else 2) from None

    on.command(no_args_is_help=False)(run)
    return run


for _function in commands.COMMANDS:
    _command(_function, deploy)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"fusenorm {__version__}")
        raise typer.Exit


@_command
def optimize(
    models: Models,
    output: Output = None,
    target: Targets = None,
    emit: Annotated[
        str, typer.Option(help="artifact: a folder with compiled kernels; onnx: one file.")
    ] = "artifact",
    limit: Limit = None,
    no_fold_batch_norm: NoBatchNorm = False,
    no_fold_norm: NoFoldNorm = False,
    no_concat_linear: NoConcat = False,
    centre_residual: CentreResidual = False,
    add_residual: AddResidual = False,
    norm_linear: NormLinear = False,
    no_bench: Annotated[bool, typer.Option("--no-bench", help="Measure no latency.")] = False,
    no_tune: NoTune = False,
    inputs: Inputs = None,
    dim: Dims = None,
    threads: Threads = None,
    ray: Ray = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Fuse, check, compile and save a model; report every site and the latency."""
    from fusenorm import pipeline

    options = _options(
        no_fold_batch_norm,
        no_fold_norm,
        no_concat_linear,
        centre_residual,
        add_residual,
        norm_linear,
        limit,
    )
    if ray is not None:
        if emit != "artifact" or options != pipeline.DEFAULTS or inputs is not None or dim:
            raise BadInput(
                "--ray makes artifacts with every pass: leave --emit, --limit, --inputs, --dim and "
                "the passes out"
            )
        try:
            from fusenorm.fleet import optimize_and_report
        except ImportError as error:
            raise BadInput(f"--ray needs: pip install 'fusenorm[ray]' ({error})") from error
        wanted = ",".join(target or ["cpu"]).split(",")
        optimize_and_report(models, wanted, output or Path(), ray, not no_tune, as_json)
        return
    if len(models) > 1:
        raise BadInput("give one model, or --ray ADDRESS for many")
    (model,) = models
    if emit not in ("artifact", "onnx"):
        raise BadInput(f"--emit is '{emit}': give artifact or onnx")
    dims = _dims(dim)
    destination = output or Path(
        f"{model.stem}.fnorm" if emit == "artifact" else f"{model.stem}.fused.onnx"
    )
    if destination.exists() and model.exists() and destination.samefile(model):
        raise BadInput("the output would overwrite the model: choose another -o", file=destination)
    with _progress(as_json) as step:
        result = pipeline.optimize(model, options=options, progress=step)
        check = _Check(model, destination, inputs, dims)
        latency = None
        if emit == "onnx":
            _save_checked(result, destination, check)
        else:
            artifact = pipeline.compile(
                result,
                target=target or "cpu",
                inputs=inputs,
                dims=dims,
                tune=not no_tune,
                options=options,
                progress=step,
            )
            artifact.save(destination, check=check)
            if check.comparison is not None and not no_bench:
                latency = _latency(
                    destination, model, inputs=inputs, dims=dims, threads=threads, progress=step
                )
    report = result.report.as_dict()
    if as_json:
        outcome = {**check.as_dict(), "latency": None if latency is None else latency.as_dict()}
        print_json({**report, "output": str(destination), **outcome})
        return
    print_report(report)
    check.print()
    if latency is not None:
        print_latency(latency)
    out().print(f"saved {destination}", soft_wrap=True)


@_command
def explain(
    model: Model,
    expect: Annotated[
        int | None, typer.Option(min=0, help="Exit with 1 unless this many sites are fused.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Every site that could be fused: fused, native, or refused with the reason and node."""
    from fusenorm import pipeline

    report = pipeline.explain(model).as_dict()
    if as_json:
        print_json(report)
    else:
        print_report(report)
    fused = statuses(report)["fused"]
    if expect is not None and fused != expect:
        raise CheckFailed(f"{fused} sites fused, {expect} expected", file=model)


@_command
def verify(
    a: Annotated[Path, typer.Argument(metavar="A", help="Reference: .onnx or artifact.")],
    b: Annotated[
        Path | None, typer.Argument(metavar="[B]", help="Compared; else A's recorded run.")
    ] = None,
    inputs: Inputs = None,
    dim: Dims = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Relative to the largest value; else by depth.")
    ] = None,
    require_signature: Key = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare the outputs of two models, libraries included; exit with 1 if they differ."""
    from fusenorm import compare

    comparison = compare.verify(
        a,
        b,
        inputs,
        dims=_dims(dim),
        tolerance=tolerance,
        require_signature=require_signature,
    )
    if as_json:
        print_json(comparison.as_dict())
    else:
        print_comparison(comparison)
    if not comparison.ok:
        raise CheckFailed(str(comparison))


@_command
def bench(
    path: Annotated[Path, typer.Argument(metavar="ARTIFACT|MODEL.onnx")],
    model: Annotated[
        Path | None, typer.Option(metavar="MODEL.onnx", help="The artifact's source model.")
    ] = None,
    against: Annotated[
        str, typer.Option(help="Comma-separated sides.")
    ] = "onnxruntime,onnxruntime-noskip",
    inputs: Inputs = None,
    dim: Dims = None,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(min=0, help="How long to measure.")] = 4.0,
    require_signature: Key = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Latency against onnxruntime, measured in turns in one run."""
    from fusenorm import pipeline

    with _progress(as_json) as step, tempfile.TemporaryDirectory() as scratch:
        folder = path
        if not path.is_dir():
            folder, model = Path(scratch, path.stem), path
            pipeline.compile(pipeline.optimize(path, progress=step), progress=step).save(folder)
        latency = _latency(
            folder,
            model,
            against=against.split(","),
            inputs=inputs,
            dims=_dims(dim),
            threads=threads,
            seconds=seconds,
            require_signature=require_signature,
            progress=step,
        )
    if as_json:
        print_json(latency.as_dict())
    else:
        print_latency(latency)


@_command
def compile(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="A fused model.")],
    output: Output = None,
    target: Targets = None,
    no_fold_batch_norm: NoBatchNorm = False,
    no_fold_norm: NoFoldNorm = False,
    no_concat_linear: NoConcat = False,
    centre_residual: CentreResidual = False,
    add_residual: AddResidual = False,
    norm_linear: NormLinear = False,
    no_tune: NoTune = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compile the fused ops of an already fused model into an artifact."""
    from fusenorm import pipeline

    destination = output or Path(f"{model.stem}.fnorm")
    options = _options(
        no_fold_batch_norm,
        no_fold_norm,
        no_concat_linear,
        centre_residual,
        add_residual,
        norm_linear,
    )
    with _progress(as_json) as step:
        artifact = pipeline.compile(
            model, target=target or "cpu", tune=not no_tune, options=options, progress=step
        )
        check = _Check(model, destination, None, {})
        artifact.save(destination, check=check)
    if as_json:
        print_json({"output": str(destination), "target": artifact.target, **check.as_dict()})
    else:
        check.print()
        out().print(f"saved {destination}", soft_wrap=True)


@_command
def run(
    artifact: Folder,
    inputs: Annotated[Path, typer.Option("--inputs", metavar="IN.npz", help="Arrays by name.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT.npz", help="Save the outputs.")
    ] = None,
    threads: Threads = None,
    no_library: Annotated[
        bool, typer.Option("--no-library", help="Run as plain ONNX, without compiled kernels.")
    ] = False,
    no_fallback: Annotated[
        bool, typer.Option("--no-fallback", help="Fail where no library suits this machine.")
    ] = False,
    require_signature: Key = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run an artifact once on the arrays of an .npz."""
    from fusenorm.artifact import read_npz, write_npz
    from fusenorm.runtime.session import ORT_ERRORS, load

    session = load(
        artifact,
        threads,
        library=not no_library,
        fallback=not no_fallback,
        require_signature=require_signature,
    )
    feed = read_npz(inputs, session.signature.inputs)
    try:
        values = session.run(None, feed)
    except ORT_ERRORS as error:
        raise BadInput(
            f"onnxruntime cannot run it on these inputs ({error})", file=inputs
        ) from error
    names = [tensor.name for tensor in session.signature.outputs]
    results = dict(zip(names, values, strict=True))
    if output is not None:
        write_npz(output, results)
    shapes = {name: f"{value.dtype}{list(value.shape)}" for name, value in results.items()}
    if as_json:
        print_json({"outputs": shapes, "saved": None if output is None else str(output)})
        return
    table = new_table("output", "type", "min", "mean", "max")
    for name, value in results.items():
        wide = value.astype("float64")
        spread = (wide.min(), wide.mean(), wide.max()) if wide.size else ()
        table.add_row(name, shapes[name], *(f"{number:.6g}" for number in spread))
    out().print(table)


@_command
def inspect(
    artifact: Folder,
    require_signature: Key = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check an artifact's files and say what it holds, and whether it runs here."""
    from fusenorm.artifact import open_artifact
    from fusenorm.runtime.compatibility import compatibility
    from fusenorm.runtime.host import Host

    stored = open_artifact(artifact, require_signature=require_signature)
    host = Host.detect(gpus=any(library.cuda for library in stored.libraries))
    lacks = {library.variant: host.lacks(library) for library in stored.libraries}
    found = compatibility(stored)
    if as_json:
        print_json({**stored.manifest, "lacks": lacks, "compatibility": found.as_dict()})
        return
    table = new_table("name", "value")
    table.add_row("compatibility", f"{found.status}: {found.reason}")
    for key in ("name", "target"):
        table.add_row(key, str(stored.manifest[key]))
    for key, value in (*stored.manifest["source"].items(), *stored.manifest["versions"].items()):
        table.add_row(key, str(value))
    for tensor in stored.signature.inputs:
        table.add_row("input", f"{tensor.name}: {tensor}")
    for tensor in stored.signature.outputs:
        table.add_row("output", f"{tensor.name}: {tensor}")
    for library in stored.libraries:
        table.add_row("library", f"{library.variant}: {lacks[library.variant] or 'runs here'}")
        table.add_row("fused ops", ", ".join(library.op_types))
    for entry in stored.manifest["files"]:
        table.add_row("file", f"{entry['path']}  {entry['size']} bytes")
    out().print(table)


@_command
def pack(
    artifact: Folder,
    oci: Annotated[bool, typer.Option("--oci", help="As an OCI image layout (ModelPack).")] = False,
    output: Output = None,
    require_signature: Key = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Pack an artifact to be pushed to a registry."""
    from fusenorm.artifact.oci import pack_oci

    if not oci:
        raise BadInput("pack needs a format: give --oci")
    destination = output or Path(f"{artifact.resolve().name}.oci")
    digest = pack_oci(artifact, destination, require_signature=require_signature)
    if as_json:
        print_json({"output": str(destination), "digest": digest})
    else:
        out().print(f"saved {destination} ({digest})", soft_wrap=True)


@_command
def rules(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the rewrite rules, or print one rule's documentation."""
    from fusenorm.passes import RULES

    chosen = [rule for rule in RULES if name in (None, rule.name)]
    if not chosen:
        raise BadInput(f"no rule '{name}': {', '.join(rule.name for rule in RULES)}")
    if as_json:
        print_json(
            {
                "rules": [
                    {"name": r.name, "summary": r.summary, "documentation": r.documentation}
                    for r in chosen
                ]
            }
        )
    elif name is not None:
        typer.echo(chosen[0].documentation)
    else:
        table = new_table("rule", "what it does")
        for rule in chosen:
            table.add_row(rule.name, rule.summary)
        out().print(table)


def _say(message: str, kind: str = "error") -> None:
    line = " ".join(f"{kind}: {message}".split())
    errors().print(line, soft_wrap=True)


class _Check:
    """Compares what was made with its source; called before it is put in place.

    A source that onnxruntime itself cannot run on random inputs is not compared, nor one with
    large weights unless inputs are given, nor one compiled for other machines: the reason is
    reported, and the rewrites were still validated one by one.
    """

    def __init__(
        self, model: Path, destination: Path, inputs: Path | None, dims: Mapping[str, int]
    ) -> None:
        self.model, self.destination = model, destination
        self.inputs, self.dims = inputs, dims
        self.comparison: Comparison | None = None
        self.reason: str | None = None

    def affordable(self, result: Result) -> bool:
        """Whether both models are run; `reason` says why not."""
        from fusenorm.model_io import weight_bytes

        size = weight_bytes(result.model)
        if size <= COMPARED_BYTES or self.inputs is not None:
            return True
        self.reason = f"weights of {size / 1e9:.1f} GB: give --inputs to run both models"
        return False

    def __call__(self, made: Path) -> None:
        from fusenorm import compare
        from fusenorm.runtime.compatibility import compatibility

        if made.is_dir():
            found = compatibility(made)
            if found.status != "ok":
                self.reason = found.reason
                return
        try:
            comparison = compare.verify(self.model, made, self.inputs, dims=self.dims)
        except compare.CannotRun as error:
            if error.path != self.model or self.inputs is not None:
                raise
            self.reason = str(error)
            return
        self.comparison = dataclasses.replace(comparison, b=str(self.destination))
        if not comparison.ok:
            raise CheckFailed(f"{self.comparison}; nothing was saved")

    def as_dict(self) -> dict[str, object]:
        comparison = None if self.comparison is None else self.comparison.as_dict()
        return {"comparison": comparison, "not_compared": self.reason}

    def print(self) -> None:
        if self.comparison is not None:
            print_comparison(self.comparison)
        else:
            out().print(f"not compared with its source: {self.reason}", soft_wrap=True)


def _save_checked(result: Result, destination: Path, check: _Check) -> None:
    """Save a portable model; files appear only once the check has passed."""
    if not destination.parent.is_dir():
        raise BadInput(f"no such folder: {destination.parent}", file=destination)
    if destination.is_dir():
        raise BadInput("is a folder: give a file name", file=destination)
    if check.affordable(result):
        with tempfile.TemporaryDirectory(prefix=".fusenorm.", dir=destination.parent) as scratch:
            result.save(Path(scratch, destination.name))
            check(Path(scratch, destination.name))
    result.save(destination)


def _latency(folder: Path, model: Path | None, **arguments: Any) -> Latency:
    from fusenorm.bench import bench as measure

    return measure(folder, model, **arguments)


def _options(
    no_fold_batch_norm: bool,
    no_fold_norm: bool,
    no_concat_linear: bool,
    centre_residual: bool,
    add_residual: bool,
    norm_linear: bool,
    limit: int | None = None,
) -> Options:
    from fusenorm.pipeline import DEFAULTS

    return dataclasses.replace(
        DEFAULTS,
        limit=limit,
        fold_batch_norm=() if no_fold_batch_norm else DEFAULTS.fold_batch_norm,
        fold_norm=() if no_fold_norm else DEFAULTS.fold_norm,
        concat_linear=not no_concat_linear,
        centre_residual=centre_residual,
        add_residual=add_residual,
        norm_linear=norm_linear,
    )


def _dims(given: Sequence[str] | None) -> dict[str, int]:
    found = {}
    for text in given or ():
        name, _, size = text.partition("=")
        if not name or not size.isdecimal():
            raise BadInput(f"--dim is '{text}': give NAME=SIZE")
        found[name] = int(size)
    return found


@contextlib.contextmanager
def _progress(as_json: bool) -> Iterator[Step | None]:
    """A callback that draws bars on stderr; None where nobody looks."""
    if as_json or not sys.stderr.isatty():
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=errors(), transient=True) as progress:
        task = progress.add_task("")

        def step(stage: str, done: int, total: int) -> None:
            progress.update(task, description=stage, completed=done, total=total)

        yield step
