"""Where an op's compiled kernel comes from.

In this order: the artifacts given to `use`; the user's cache (`fusenorm.cache`), where a library
is kept for every op by its declaration, the target and the sources it was built from; a build,
which needs TVM and a C compiler, takes a second or two and goes into the cache. Where none works
out, the op runs node by node in torch: a RuntimeWarning says why, once, and `fallbacks` lists it.
"""

from __future__ import annotations

import functools
import hashlib
import threading
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import fusenorm
from fusenorm import cache
from fusenorm.artifact import open_artifact
from fusenorm.errors import BadInput, FusenormError
from fusenorm.kernels import supports, symbols
from fusenorm.lower import Target, build_library
from fusenorm.ops import OpSpec
from fusenorm.runtime.direct import open_library
from fusenorm.runtime.host import Host, choose

Kernel: TypeAlias = Callable[[Sequence[Any], Sequence[float]], None]
"""Called with 2-D inputs and outputs (vectors 1-D), all of them with rows, and the attributes."""

_SOURCES = ("kernels", "lower", "ops")

_lock = threading.RLock()
_given: list[tuple[Path, frozenset[str]]] = []
_found: dict[tuple[str, str], Kernel | str] = {}


def use(artifact: str | Path) -> None:
    """Take kernels from an artifact first; of several, from the one given last.

    Raises:
        BadInput: it is none, was changed, or holds no library this machine can run.
    """
    stored = open_artifact(artifact)
    if not stored.libraries:
        raise BadInput("holds no library", file=artifact)
    chosen = choose(stored.libraries, Host.detect(), artifact)
    with _lock:
        _given.insert(0, (chosen.path, frozenset(chosen.op_types)))
        _found.clear()


def fallbacks() -> dict[str, str]:
    """Why ops called so far run node by node in torch: `OP_TYPE on DEVICE` to the reason."""
    return {
        f"{op_type} on {device}": kernel
        for (op_type, device), kernel in _found.items()
        if isinstance(kernel, str)
    }


def find(spec: OpSpec, device: str) -> Kernel | str:
    """The kernel of `spec` on `cpu` or `cuda`, or why there is none."""
    key = (spec.op_type, device)
    if key not in _found:
        with _lock:
            if key not in _found:
                _found[key] = _search(spec, device)
    return _found[key]


def _search(spec: OpSpec, device: str) -> Kernel | str:
    try:
        return _load(spec, device)
    except (FusenormError, ImportError) as error:
        reason = str(error)
    warnings.warn(
        f"{spec.op_type} runs node by node in torch on {device}: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )
    return reason


def _load(spec: OpSpec, device: str) -> Kernel:
    if type(spec).parse(spec.op_type) is None:
        raise BadInput(f"no fused op is declared as {spec.op_type}")
    reason = supports(spec)
    if reason:
        raise BadInput(reason)
    for path, op_types in _given:
        if spec.op_type in op_types:
            return _open(path, spec)
    return _open(_built(spec), spec)


def _open(path: Path, spec: OpSpec) -> Kernel:
    function = open_library(path).function(symbols(spec)[0])

    def run(tensors: Sequence[Any], attributes: Sequence[float]) -> None:
        function(*tensors, 0, tensors[0].shape[0], *attributes)

    return run


def _built(spec: OpSpec) -> Path:
    """The library of this op alone, from the cache or built into it."""
    target = Target.host()
    parts = (fusenorm.__version__, metadata.version("apache-tvm"), str(target), spec.op_type)
    key = hashlib.sha256("\n".join((*parts, _sources())).encode()).hexdigest()[:32]
    return cache.library(key, lambda path: build_library([spec], target, path))


@functools.cache
def _sources() -> str:
    """The digest of everything a library is made of."""
    root = Path(fusenorm.__file__).parent
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((root / folder).iterdir()):
            if path.suffix in (".py", ".c", ".h"):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
