"""Many models compiled for many targets, each pair a task of a Ray cluster.

Files travel with the tasks, so the nodes need this package but no shared disk. Ray repeats a task
whose node is lost.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import ray

from fusenorm.artifact import MANIFEST, open_artifact
from fusenorm.artifact.external import external_locations
from fusenorm.artifact.place import fresh_folder
from fusenorm.errors import BadInput, CheckFailed, FusenormError
from fusenorm.printing import errors, out, print_json

Files = dict[str, bytes]  # by path relative to a folder


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one model and target.

    Attributes:
        model: the source file.
        target: compiled for.
        output: the artifact, None if there is none.
        error: why not.
    """

    model: Path
    target: str
    output: Path | None
    error: FusenormError | None = None

    def as_dict(self) -> dict[str, object]:
        return {
            "model": str(self.model),
            "target": self.target,
            "output": None if self.output is None else str(self.output),
            "error": None if self.error is None else str(self.error),
        }


def optimize_all(
    models: Sequence[Path], targets: Sequence[str], folder: Path, *, address: str, tune: bool
) -> Iterator[Outcome]:
    """Optimize, compile and check every model for every target.

    Args:
        models: .onnx files, of different names.
        targets: as `fusenorm.compile` takes them, each for an artifact of its own.
        folder: where NAME.fnorm, of several targets NAME.TARGET.fnorm, are written.
        address: of the cluster, as `ray.init` takes it.
        tune: see `fusenorm.compile`.

    Yields:
        The outcomes as they come.

    Raises:
        BadInput: two models of one name, or no cluster at that address.
    """
    names = [model.stem for model in models]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"several models are called {name}: their artifacts would be, too")
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BadInput(f"no Ray cluster: {error}", file=address) from error
    task = ray.remote(num_cpus=1)(_compile)
    waiting = {}
    try:
        for model in models:
            try:
                files = ray.put(_source(model))
            except BadInput as error:
                yield from (Outcome(model, target, None, error) for target in targets)
                continue
            for target in targets:
                waiting[task.remote(files, model.name, target, tune)] = model, target
        while waiting:
            (done,), _ = ray.wait(list(waiting))
            model, target = waiting.pop(done)
            several = f".{target}" if len(targets) > 1 else ""
            yield _collect(done, model, target, folder / f"{model.stem}{several}.fnorm")
    finally:
        ray.shutdown()


def optimize_and_report(
    models: Sequence[Path],
    targets: Sequence[str],
    folder: Path,
    address: str,
    tune: bool,
    as_json: bool,
) -> None:
    """`optimize_all` for the command line: what fails is reported, the others are made.

    Raises:
        BadInput: some could not be made.
        CheckFailed: some are not equal to their source.
    """
    outcomes = []
    for outcome in optimize_all(models, targets, folder, address=address, tune=tune):
        outcomes.append(outcome)
        if outcome.error is not None:
            errors().print(f"error: {outcome.error}", soft_wrap=True)
        elif not as_json:
            out().print(f"saved {outcome.output}", soft_wrap=True)
    if as_json:
        print_json([outcome.as_dict() for outcome in outcomes])
    failed = [outcome.error for outcome in outcomes if outcome.error is not None]
    if failed:
        bad = any(isinstance(error, BadInput) for error in failed)
        text = f"{len(failed)} of {len(outcomes)} failed"
        raise BadInput(text) if bad else CheckFailed(text)


def _collect(task: ray.ObjectRef, model: Path, target: str, output: Path) -> Outcome:
    try:
        result = ray.get(task)
    except ray.exceptions.RayError as error:
        reason = BadInput(f"its task failed: {error}", file=model)
        return Outcome(model, target, None, reason)
    if isinstance(result, FusenormError):
        return Outcome(model, target, None, result)
    with fresh_folder(output, MANIFEST, "a fusenorm artifact") as stage:
        _write(result, stage)
        open_artifact(stage)
    return Outcome(model, target, output)


def _compile(files: Files, name: str, target: str, tune: bool) -> Files | FusenormError:
    """The task: an artifact's files, or what is wrong."""
    from fusenorm import compare, pipeline

    with tempfile.TemporaryDirectory() as scratch:
        source, made = Path(scratch, "source"), Path(scratch, "made")
        _write(files, source)
        try:
            result = pipeline.optimize(source / name)
            pipeline.compile(result, target, tune=tune).save(made)
            comparison = compare.verify(source / name, made)
        except FusenormError as error:
            return type(error)(str(error).replace(f"{source}/", ""))
        if not comparison.ok:
            return CheckFailed(str(comparison).replace(f"{scratch}/", ""))
        return {str(path.relative_to(made)): path.read_bytes() for path in _regular(made)}


def _source(model: Path) -> Files:
    """A model's file and those it keeps weights in."""
    if not model.is_file():
        raise BadInput("no such file", file=model)
    content = model.read_bytes()
    try:
        others = external_locations(content)
    except ValueError as error:
        raise BadInput(f"not an ONNX model ({error})", file=model) from error
    files = {model.name: content}
    for name in others:
        path = model.parent / name
        if not path.resolve().is_relative_to(model.parent.resolve()) or not path.is_file():
            raise BadInput(f"its weights '{name}' are not in its folder", file=model)
        files[name] = path.read_bytes()
    return files


def _write(files: Files, folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _regular(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())
