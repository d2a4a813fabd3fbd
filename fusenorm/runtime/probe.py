"""Repeat an artifact's recorded run in a child process.

A library for another CPU ends in SIGILL, a damaged one in SIGSEGV: the child's end, not ours.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fusenorm.artifact import Library, Stored, open_artifact
from fusenorm.difference import difference

_MOST_SECONDS = 600


def probe(stored: Stored, library: Library | None, providers: Sequence[str]) -> str | None:
    """Why the recorded run does not come out again here, None if it does.

    Args:
        stored: the artifact.
        library: one of its libraries; None for the model without it.
        providers: names of execution providers.
    """
    if stored.manifest["golden"] is None:
        return "cannot be checked: the artifact holds no recorded run"
    variant = "" if library is None else library.variant
    command = [sys.executable, "-m", __name__, os.path.abspath(stored.path), variant, *providers]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            timeout=_MOST_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"cannot be checked: {error}"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"ends in {signal.Signals(-done.returncode).name} in its recorded run"
    said = (done.stdout or done.stderr).strip().splitlines()
    return said[-1] if said else f"exits with {done.returncode} in its recorded run"


def _main(folder: str, variant: str, *providers: str) -> str | None:
    """What the child does: the reason why the run differs, None if it does not."""
    from fusenorm.runtime.session import start

    stored = open_artifact(Path(folder))
    library = next((one for one in stored.libraries if one.variant == variant), None)
    recorded = stored.golden()
    assert recorded is not None
    session = start(stored, library, providers=providers)
    names = [tensor.name for tensor in session.signature.outputs]
    for name, value in zip(names, session.run(names, recorded.inputs), strict=True):
        found = difference(name, recorded.outputs[name], value, recorded.tolerance)
        if not found.ok:
            return f"gives another '{name}' than its recorded run: {found.reason}"
    return None


if __name__ == "__main__":
    failure = _main(*sys.argv[1:])
    if failure is not None:
        print(failure)
        sys.exit(1)
