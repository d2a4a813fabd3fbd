"""Where an op's compiled kernel comes from.

In this order: the artifacts given to `use`; the user's cache (`fusenorm.cache`), where a library
is kept for every op by its declaration, the target and the sources it was built from; a build into
that cache, which needs TVM and a C compiler and takes a second or two. CUDA kernels are built for
one row length each, with nvcc (`pip install 'fusenorm[cuda]'`), in some ten seconds. Where none
works out, the op runs node by node in torch: a RuntimeWarning says why, once, and `fallbacks`
lists it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TypeAlias

import torch

import fusenorm
from fusenorm import cache
from fusenorm.artifact import Library, open_artifact
from fusenorm.errors import BadInput, FusenormError
from fusenorm.kernels import Device, supports, symbols
from fusenorm.lower import Target, build_library
from fusenorm.ops import OpSpec
from fusenorm.runtime.direct import Kernels, open_content, open_library
from fusenorm.runtime.host import Host, candidates

Kernel: TypeAlias = Callable[[Sequence[torch.Tensor], Sequence[float]], None]
"""Called with 2-D inputs, then outputs (vectors 1-D), all of them with rows, and the attributes."""

_SOURCES = ("kernels", "lower", "ops")
_PART = 1 << 16  # elements that are worth a thread

_lock = threading.RLock()
_given: list[dict[Device, tuple[Library, Kernels]]] = []
_found: dict[tuple[str, Device, int], Kernel | str] = {}


def use(artifact: str | Path) -> None:
    """Take kernels from an artifact first; of several, from the one given last.

    Raises:
        BadInput: it is none, was changed, or holds no library this machine can run.
    """
    stored = open_artifact(artifact)
    host = Host.detect(gpus=any(library.cuda for library in stored.libraries))
    on_cpu = [dataclasses.replace(library, cuda=None) for library in stored.libraries]
    sides: list[tuple[Device, Sequence[Library], int | None]] = [
        ("cpu", on_cpu, None),  # a library for GPUs has the kernels for the CPU too
        ("cuda", stored.libraries, 0),
    ]
    taken: dict[Device, tuple[Library, Kernels]] = {}
    reason = "holds no library"
    for device, libraries, number in sides:
        suitable, lacking = candidates(libraries, host, number)
        reason = lacking or reason
        for library in suitable[:1]:
            content = stored.read(library.path)
            taken[device] = library, open_content(content, library.path.name)
    if not taken:
        raise BadInput(reason, file=artifact)
    with _lock:
        _given.insert(0, taken)
        _found.clear()


def fallbacks() -> dict[str, str]:
    """Why ops called so far run node by node in torch: `OP_TYPE on DEVICE` to the reason."""
    return {
        f"{op_type} on {device}": kernel
        for (op_type, device, _), kernel in _found.items()
        if isinstance(kernel, str)
    }


def find(spec: OpSpec, device: Device, columns: int) -> Kernel | str:
    """The kernel of `spec` on a kind of device, or why there is none.

    Args:
        spec: the op.
        device: `cpu` or `cuda`.
        columns: the row length; a kernel for another one is correct too, but slower.
    """
    key = (spec.op_type, device, columns if device == "cuda" else 0)
    if key not in _found:
        with _lock:
            if key not in _found:
                _found[key] = _search(spec, device, columns)
    return _found[key]


def _search(spec: OpSpec, device: Device, columns: int) -> Kernel | str:
    try:
        function = _library(spec, device, columns).function(symbols(spec, device)[0])
    except (FusenormError, ImportError) as error:
        reason = str(error)
        warnings.warn(
            f"{spec.op_type} runs node by node in torch on {device}: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return reason
    return functools.partial(_on_cpu if device == "cpu" else _on_cuda, function)


def _on_cpu(
    function: Callable[..., object], tensors: Sequence[torch.Tensor], attributes: Sequence[float]
) -> None:
    """Run a kernel on ranges of rows, on up to as many threads as torch uses."""
    rows = tensors[-1].shape[0]
    parts = max(1, min(torch.get_num_threads(), rows, tensors[-1].numel() // _PART))
    edges = [rows * part // parts for part in range(parts + 1)]
    *others, own = itertools.pairwise(edges)
    running = [_pool().submit(function, *tensors, *part, *attributes) for part in others]
    function(*tensors, *own, *attributes)
    for run in running:
        run.result()


@functools.cache
def _pool() -> concurrent.futures.Executor:
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "fusenorm")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def _on_cuda(
    function: Callable[..., object], tensors: Sequence[torch.Tensor], attributes: Sequence[float]
) -> None:
    # The stream is torch's current one: tvm-ffi asks the first tensor's exporter for it.
    with torch.cuda.device(tensors[0].device):
        function(*tensors, *attributes)


def _library(spec: OpSpec, device: Device, columns: int) -> Kernels:
    """The library to take the op's kernel from.

    Raises:
        FusenormError: there is none and none can be built.
    """
    if type(spec).parse(spec.op_type) is None:
        raise BadInput(f"no fused op is declared as {spec.op_type}")
    reason = supports(spec, device)
    if reason:
        raise BadInput(reason)
    for taken in _given:
        if device in taken and spec.op_type in taken[device][0].op_types:
            return taken[device][1]
    return open_library(_built(spec, device, columns))


def _built(spec: OpSpec, device: Device, columns: int) -> Path:
    """The library of this op alone, from the cache or built into it."""
    target = Target.parse(device)
    lengths = {spec: [columns]} if device == "cuda" else {}
    parts = (
        fusenorm.__version__,
        metadata.version("apache-tvm"),
        target,
        spec.op_type,
        *lengths.values(),
    )
    text = "\n".join(str(part) for part in (*parts, _sources()))
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    return cache.library(key, lambda path: build_library([spec], target, path, columns=lengths))


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
