"""Load an artifact into onnxruntime: its model, and the library that runs its fused ops."""

from __future__ import annotations

import os
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from fusenorm.artifact import Library, Stored, open_artifact
from fusenorm.artifact.external import external_locations
from fusenorm.errors import BadInput, SlowerFallback
from fusenorm.runtime.binding import Binding, dtype_of, imported, viewed
from fusenorm.runtime.compatibility import CPU, Compatibility, compatibility
from fusenorm.runtime.metrics import Metrics, Start
from fusenorm.runtime.sealed import sealed_file
from fusenorm.signature import Dim, Signature, Tensor

# onnxruntime's exceptions have no common base but Exception.
ORT_ERRORS: tuple[type[Exception], ...] = tuple(
    value
    for value in vars(_state).values()
    if isinstance(value, type) and issubclass(value, Exception)
)
# What it raises for a model or library it cannot load.
LOAD_ERRORS: tuple[type[Exception], ...] = (*ORT_ERRORS, ValueError)
MOST_THREADS = 1024
# Options that hold a library already: onnxruntime takes one library of a domain per options.
_REGISTERED: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class Session(ort.InferenceSession):  # type: ignore[misc]
    """An onnxruntime.InferenceSession that says what is wrong with its inputs.

    Made by `load`; one session serves any number of threads. Everything of InferenceSession works.
    `run`, `run_async`, `run_with_ort_values` and `run_with_iobinding` check names, types, ranks and
    sizes first, equal symbolic sizes included, and are counted in `metrics`. An input may be an
    array, an OrtValue, or anything with DLPack; none is copied if it lies contiguous on the
    session's device. For outputs in memory of your own use `io_binding`.

    Attributes:
        signature: the model's inputs and outputs.
        library: the ops library in use, None when the model runs as plain ONNX.
        source: the artifact or .onnx it was loaded from.
        metrics: what it has done.
    """

    def __init__(
        self,
        model: str | bytes,
        options: ort.SessionOptions,
        providers: Sequence[Any],
        *,
        library: Library | None,
        source: Path,
    ) -> None:
        super().__init__(model, options, providers=list(providers))
        self.library = library
        self.source = source
        self.signature = Signature(
            tuple(_tensor(node) for node in self.get_inputs()),
            tuple(_tensor(node) for node in self.get_outputs()),
        )
        self.metrics = Metrics(Start(None, fallback=False, seconds=0.0))
        self._overridable = {node.name for node in self.get_overridable_initializers()}
        self._outputs = frozenset(tensor.name for tensor in self.signature.outputs)

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: ort.RunOptions | None = None,
    ) -> Any:
        """As InferenceSession.run: the named outputs (None: all), in order.

        Raises:
            BadInput: an input the model cannot take, or an output it has not.
        """
        call = super().run
        return self._counted(
            output_names, input_feed, lambda feed: call(output_names, feed, run_options)
        )

    def run_with_ort_values(
        self,
        output_names: Sequence[str] | None,
        input_dict_ort_values: Mapping[str, ort.OrtValue],
        run_options: ort.RunOptions | None = None,
    ) -> Any:
        """As InferenceSession.run_with_ort_values: OrtValues in, OrtValues out.

        Raises:
            BadInput: an input the model cannot take, or an output it has not.
        """
        call = super().run_with_ort_values
        return self._counted(
            output_names, input_dict_ort_values, lambda feed: call(output_names, feed, run_options)
        )

    def io_binding(self) -> Binding:
        """As InferenceSession.io_binding: inputs and outputs in memory of the caller's."""
        return Binding(self)

    def run_with_iobinding(
        self, iobinding: Binding, run_options: ort.RunOptions | None = None
    ) -> None:
        """As InferenceSession.run_with_iobinding, for what `io_binding` gave.

        Raises:
            BadInput: an input that is bound is none the model can take, or one is missing.
        """
        call = super().run_with_iobinding
        self._counted(None, iobinding.given, lambda _: call(iobinding, run_options))

    def run_async(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        callback: Callable[..., object],
        user_data: object,
        run_options: ort.RunOptions | None = None,
    ) -> None:
        """As InferenceSession.run_async.

        Raises:
            BadInput: an input the model cannot take, or an output it has not.
        """
        begin = time.perf_counter()
        feed, rows = self._checked(output_names, input_feed)

        def finished(results: Any, data: object, error: str) -> None:
            self.metrics.record(time.perf_counter() - begin, rows, failed=bool(error))
            callback(results, data, error)

        super().run_async(output_names, feed, finished, user_data, run_options)

    def _counted(
        self,
        output_names: Sequence[str] | None,
        feed: Mapping[str, Any],
        call: Callable[[Mapping[str, Any]], Any],
    ) -> Any:
        begin = time.perf_counter()
        try:
            checked, rows = self._checked(output_names, feed)
            result = call(checked)
        except Exception:
            self.metrics.record(time.perf_counter() - begin, 0, failed=True)
            raise
        self.metrics.record(time.perf_counter() - begin, rows)
        return result

    def _checked(
        self, output_names: Sequence[str] | None, feed: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], int]:
        """The feed as onnxruntime takes it, and the first axis of the first input."""
        for name in output_names or ():
            if name not in self._outputs:
                known = ", ".join(tensor.name for tensor in self.signature.outputs)
                raise BadInput(f"output '{name}' is none of the model's: {known}", file=self.source)
        ready = {name: imported(name, value, self.source) for name, value in feed.items()}
        given = {n: viewed(v) for n, v in ready.items() if n not in self._overridable}
        self.signature.check(given, self.source)
        first = given[self.signature.inputs[0].name] if self.signature.inputs else None
        shape: Sequence[int] = getattr(first, "shape", ())
        return ready, shape[0] if len(shape) else 1


def load(
    path: str | os.PathLike[str] | Stored,
    threads: int | None = None,
    session_options: ort.SessionOptions | None = None,
    providers: Sequence[Any] | None = None,
    *,
    library: bool = True,
    fallback: bool = True,
    check: bool = False,
    require_signature: str | os.PathLike[str] | None = None,
) -> Session:
    """Load an artifact folder, or a plain .onnx file.

    An artifact is checked against its manifest, then the best library this machine can run is
    registered, then onnxruntime loads the model. Where no library can run, the model runs as plain
    ONNX, with a `fusenorm.errors.SlowerFallback` warning of one line.

    Args:
        path: the artifact folder, the .onnx file, or an opened artifact (not checked again).
        threads: onnxruntime's intra-op threads; None leaves `session_options` as it is.
        session_options: used as given; the library is registered in it.
        providers: execution providers, the CPU by default.
        library: False runs an artifact's model as plain ONNX, without its library and without a
            warning: slower, but on every machine onnxruntime runs on.
        fallback: False demands the library.
        check: repeat the recorded run first, in a child process. This is always done where the
            system does not say which features the CPU has; `fusenorm verify` is the full check.
        require_signature: a public key file; the artifact must be signed with its private key.

    Returns:
        The session.

    Raises:
        BadInput: the path is no artifact or model, the artifact was changed or is not signed as
            required, no library can run here and `fallback` is False, or onnxruntime cannot load
            the model.
    """
    begin = time.perf_counter()
    options = session_options if session_options is not None else ort.SessionOptions()
    if threads is not None:
        if not 1 <= threads <= MOST_THREADS:
            raise BadInput(f"threads is {threads}: give 1 to {MOST_THREADS}")
        options.intra_op_num_threads = threads
    if not isinstance(path, Stored) and not Path(path).is_dir():
        if require_signature is not None:
            raise BadInput("only an artifact can be signed, not a model", file=path)
        return _plain(Path(path), options, providers, begin)
    if isinstance(path, Stored) and require_signature is None:
        stored = path
    else:
        folder = path.path if isinstance(path, Stored) else path
        stored = open_artifact(folder, require_signature=require_signature)
    found = _choose(stored, providers, fallback, check) if library else None
    chosen = None if found is None else found.library
    try:
        session = start(stored, chosen, options, providers)
    except BadInput:
        if stored is path or stored.in_place:
            raise
        return load(  # what took its place
            path,
            threads,
            session_options,
            providers,
            library=library,
            fallback=fallback,
            check=check,
            require_signature=require_signature,
        )
    slower = found is not None and found.status == "fallback"
    variant = None if chosen is None else chosen.variant
    session.metrics = Metrics(Start(variant, slower, time.perf_counter() - begin))
    return session


def _choose(
    stored: Stored, providers: Sequence[Any] | None, fallback: bool, check: bool
) -> Compatibility:
    """The library to load, or the permission to do without, which is warned about."""
    found = compatibility(stored, providers, check=check)
    if found.status == "no":
        raise BadInput(found.reason, file=stored.path)
    if found.status == "fallback":
        if not fallback:
            raise BadInput(f"{found.reason}; compile it for this machine", file=stored.path)
        # Seen where `load` is called.
        warnings.warn(f"{stored.path}: {found.reason}", SlowerFallback, stacklevel=3)
    return found


def start(
    stored: Stored,
    library: Library | None,
    options: ort.SessionOptions | None = None,
    providers: Sequence[Any] | None = None,
) -> Session:
    """A session of an opened artifact with one of its libraries, whether this machine suits or not.

    onnxruntime gets the bytes that were checked, not the paths they were read from; weights beside
    the model it maps from the folder, which must still be the one that was checked.

    Raises:
        BadInput: the artifact was changed or replaced since it was opened, or onnxruntime cannot
            load it.
    """
    options = options if options is not None else ort.SessionOptions()
    model = stored.read(stored.model)
    if external_locations(model):
        options.add_session_config_entry(_WEIGHTS_FOLDER, os.path.abspath(stored.path))
    try:
        if library is not None:
            sealed = sealed_file(stored.read(library.path), library.path.name)
            _register(options, sealed, stored.path)
        session = Session(model, options, providers or [CPU], library=library, source=stored.path)
    except LOAD_ERRORS as error:
        raise BadInput(f"onnxruntime cannot load it: {error}", file=stored.path) from error
    if not stored.in_place:
        raise BadInput("was replaced while it was loaded: open it again", file=stored.path)
    return session


def _plain(
    model: Path, options: ort.SessionOptions, providers: Sequence[Any] | None, begin: float
) -> Session:
    if not model.exists():
        raise BadInput("no such file", file=model)
    try:
        session = Session(os.fspath(model), options, providers or [CPU], library=None, source=model)
    except LOAD_ERRORS as error:
        raise BadInput(f"onnxruntime cannot load it: {error}", file=model) from error
    session.metrics = Metrics(Start(None, False, time.perf_counter() - begin))
    return session


def _register(options: ort.SessionOptions, library: str, source: Path) -> None:
    held = _REGISTERED.get(options)
    if held is None:
        options.register_custom_ops_library(library)
        _REGISTERED[options] = library
    elif held != library:
        raise BadInput(
            "session_options hold the library of another artifact: give fresh ones", file=source
        )


def _tensor(node: Any) -> Tensor:
    dtype = dtype_of(node.type)
    if not dtype:
        return Tensor(node.name, "", None)
    shape: tuple[Dim, ...] = tuple(
        dim or None if isinstance(dim, str) else dim for dim in node.shape
    )
    return Tensor(node.name, dtype, shape)
