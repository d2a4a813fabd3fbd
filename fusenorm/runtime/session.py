"""Load an artifact into onnxruntime: its model, and the library that runs its fused ops."""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from fusenorm.artifact import Library, Stored, open_artifact
from fusenorm.errors import BadInput
from fusenorm.runtime.host import Host, choose
from fusenorm.signature import Dim, Signature, Tensor

# onnxruntime's exceptions have no common base but Exception.
ORT_ERRORS: tuple[type[Exception], ...] = tuple(
    value
    for value in vars(_state).values()
    if isinstance(value, type) and issubclass(value, Exception)
)
# What it raises for a model or library it cannot load.
LOAD_ERRORS: tuple[type[Exception], ...] = (*ORT_ERRORS, ValueError)

_ORT_TYPES = {"float": "float32", "double": "float64"}


MOST_THREADS = 1024
# Options that hold a library already: onnxruntime takes one library of a domain per options.
_REGISTERED: weakref.WeakKeyDictionary[Any, Path] = weakref.WeakKeyDictionary()


def _register(options: ort.SessionOptions, library: Path, source: Path) -> None:
    held = _REGISTERED.get(options)
    if held is None:
        options.register_custom_ops_library(os.fspath(library))
        _REGISTERED[options] = library
    elif held != library:
        raise BadInput(
            f"session_options hold the library of another artifact ({held}): give fresh ones",
            file=source,
        )


class Session(ort.InferenceSession):  # type: ignore[misc]
    """An onnxruntime.InferenceSession that says what is wrong with its inputs.

    Made by `load`. Everything of InferenceSession works; `run` and `run_async` check names,
    types, ranks and sizes first, equal symbolic sizes included.

    Attributes:
        signature: the model's inputs and outputs.
        library: the ops library in use, None when the model runs as plain ONNX.
        source: the artifact or .onnx it was loaded from.
    """

    def __init__(
        self,
        model: Path,
        options: ort.SessionOptions,
        providers: Sequence[Any],
        *,
        library: Library | None,
        source: Path,
    ) -> None:
        super().__init__(os.fspath(model), options, providers=list(providers))
        self.library = library
        self.source = source
        self.signature = Signature(
            tuple(_tensor(node) for node in self.get_inputs()),
            tuple(_tensor(node) for node in self.get_outputs()),
        )
        self._overridable = {node.name for node in self.get_overridable_initializers()}

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
        self._check(output_names, input_feed)
        return super().run(output_names, input_feed, run_options)

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
        self._check(output_names, input_feed)
        super().run_async(output_names, input_feed, callback, user_data, run_options)

    def _check(self, output_names: Sequence[str] | None, feed: Mapping[str, Any]) -> None:
        given = {n: _viewed(v) for n, v in feed.items() if n not in self._overridable}
        self.signature.check(given, self.source)
        known = [tensor.name for tensor in self.signature.outputs]
        for name in output_names or ():
            if name not in known:
                raise BadInput(
                    f"output '{name}' is none of the model's: {', '.join(known)}", file=self.source
                )


def load(
    path: str | os.PathLike[str] | Stored,
    threads: int | None = None,
    session_options: ort.SessionOptions | None = None,
    providers: Sequence[Any] | None = None,
    *,
    library: bool = True,
) -> Session:
    """Load an artifact folder, or a plain .onnx file.

    An artifact is checked against its manifest, then the best library this CPU can run is
    registered, then onnxruntime loads the model.

    Args:
        path: the artifact folder, the .onnx file, or an opened artifact (not checked again).
        threads: onnxruntime's intra-op threads; None leaves `session_options` as it is.
        session_options: used as given; the library is registered in it.
        providers: execution providers, the CPU by default.
        library: False runs an artifact's model as plain ONNX, without its library: slower, but on
            every machine onnxruntime runs on.

    Returns:
        The session.

    Raises:
        BadInput: the path is no artifact or model, the artifact was changed, this CPU lacks a
            feature every library needs, or onnxruntime cannot load the model.
    """
    source = path.path if isinstance(path, Stored) else Path(path)
    options = session_options if session_options is not None else ort.SessionOptions()
    if threads is not None:
        if not 1 <= threads <= MOST_THREADS:
            raise BadInput(f"threads is {threads}: give 1 to {MOST_THREADS}")
        options.intra_op_num_threads = threads
    chosen = None
    model = source
    if isinstance(path, Stored) or source.is_dir():
        stored = path if isinstance(path, Stored) else open_artifact(source)
        model = stored.model
        if library and stored.libraries:
            chosen = choose(stored.libraries, Host.detect(), source)
    elif not source.exists():
        raise BadInput("no such file", file=source)
    try:
        if chosen is not None:
            _register(options, chosen.path.resolve(), source)
        return Session(
            model, options, providers or ["CPUExecutionProvider"], library=chosen, source=source
        )
    except LOAD_ERRORS as error:
        raise BadInput(f"onnxruntime cannot load it: {error}", file=source) from error


@dataclasses.dataclass(frozen=True)
class _View:
    """Type and shape of an input that is no array."""

    dtype: str
    shape: tuple[int, ...]


def _viewed(value: Any) -> Any:
    if isinstance(value, ort.OrtValue) and value.is_tensor():
        return _View(_dtype(value.data_type()), tuple(value.shape()))
    return value


def _dtype(text: str) -> str:
    """Numpy's name for the element type in onnxruntime's `tensor(float)`; '' for no tensor."""
    kind, _, rest = text.partition("(")
    name = rest.removesuffix(")")
    return _ORT_TYPES.get(name, name) if kind == "tensor" else ""


def _tensor(node: Any) -> Tensor:
    dtype = _dtype(node.type)
    if not dtype:
        return Tensor(node.name, "", None)
    shape: tuple[Dim, ...] = tuple(
        dim or None if isinstance(dim, str) else dim for dim in node.shape
    )
    return Tensor(node.name, dtype, shape)
