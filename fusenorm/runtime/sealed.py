"""Bytes as a file nobody can change: what the dynamic loader opens is what was checked.

The path of a file in an artifact folder can name other bytes a moment after they were hashed, so a
library is opened from a copy in memory that the kernel seals against writing. The copy's descriptor
stays open as long as the process: the loader knows a library by its path, and a descriptor used
again would give it the older library for a new one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading

_OPEN: dict[str, int] = {}
_OPENING = threading.Lock()


def sealed_file(content: bytes, name: str) -> str:
    """The path of a sealed copy, the same for the same bytes.

    Args:
        content: the bytes.
        name: shown by the system, as in /proc/PID/maps.

    Raises:
        OSError: there is no memory for it.
    """
    digest = hashlib.sha256(content).hexdigest()
    with _OPENING:
        if digest not in _OPEN:
            descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            with open(descriptor, "wb", closefd=False) as file:
                file.write(content)
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
            _OPEN[digest] = descriptor
        return f"/proc/self/fd/{_OPEN[digest]}"
