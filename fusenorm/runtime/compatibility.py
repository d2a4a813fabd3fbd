"""Whether an artifact runs here as compiled, only as plain ONNX, or not at all."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Literal

import onnxruntime as ort

from fusenorm.artifact import Library, Stored, open_artifact
from fusenorm.errors import BadInput
from fusenorm.runtime.host import Host, candidates
from fusenorm.runtime.probe import probe

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"


@dataclasses.dataclass(frozen=True)
class Compatibility:
    """The answer.

    Attributes:
        status: `ok`: runs as compiled; `fallback`: model.onnx runs, slower, without a library;
            `no`: it must not or cannot be loaded.
        reason: a sentence that names what the artifact needs and what this machine has.
        library: the one that `load` would take.
    """

    status: Literal["ok", "fallback", "no"]
    reason: str
    library: Library | None = None

    @property
    def variant(self) -> str | None:
        """The library's folder below lib/."""
        return None if self.library is None else self.library.variant

    def as_dict(self) -> dict[str, object]:
        return {"status": self.status, "reason": self.reason, "variant": self.variant}


def compatibility(
    path: str | os.PathLike[str] | Stored,
    providers: Sequence[Any] | None = None,
    *,
    check: bool = False,
    host: Host | None = None,
) -> Compatibility:
    """Say how `load` would run an artifact here, without loading it.

    Args:
        path: the artifact folder, or an opened artifact (not checked again).
        providers: execution providers as `load` takes them, the CPU by default.
        check: repeat the recorded run with the library, in a child process. This is always done
            where the system does not say which features the CPU has.
        host: the machine, this one by default.
    """
    try:
        stored = path if isinstance(path, Stored) else open_artifact(path)
    except BadInput as error:
        return Compatibility("no", str(error))
    wanted = [entry if isinstance(entry, str) else entry[0] for entry in providers or [CPU]]
    known = ort.get_available_providers()
    usable = [name for name in wanted if name in known]
    if not usable:
        lacking = f"asks for {', '.join(wanted)}; this onnxruntime has {', '.join(known)}"
        return Compatibility("no", lacking)
    device = _device(providers or ()) if CUDA in usable else None
    host = host or Host.detect(gpus=device is not None)
    if not host.gpus:  # onnxruntime goes on to the next provider
        device = None
    suitable, reason = candidates(stored.libraries, host, device)
    for library in suitable:
        if check or host.doubts(library):
            failure = probe(stored, library, usable)
            if failure is not None:
                reason = f"lib/{library.variant} {failure}"
                continue
        needs = ", ".join((library.machine, *library.features))
        needs += f", glibc {library.glibc}" if library.glibc else ""
        return Compatibility(
            "ok", f"lib/{library.variant} needs {needs}; this machine has it: {host}", library
        )
    failure = probe(stored, None, usable) if check else None
    if failure is not None:
        return Compatibility("no", f"model.onnx {failure}; this machine: {host}")
    if not stored.libraries:
        return Compatibility("ok", "holds no fused op and needs no library")
    return Compatibility(
        "fallback", f"{reason} ({host}); model.onnx runs without the library, slower"
    )


def _device(providers: Sequence[Any]) -> int:
    """The GPU the CUDA provider is asked to use."""
    for entry in providers:
        if not isinstance(entry, str) and entry[0] == CUDA:
            return int(entry[1].get("device_id", 0))
    return 0
