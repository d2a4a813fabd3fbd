"""A loaded artifact as every adapter serves it: session, batch axis, inference probe."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from fusenorm.artifact import Stored, open_artifact
from fusenorm.difference import difference
from fusenorm.errors import BadInput
from fusenorm.runtime.session import Session, load
from fusenorm.serving.protocol import batch_symbol

MAX_BATCH_SIZE = 32


class Served:
    """An artifact that answers requests.

    Args:
        folder: the artifact.
        threads: onnxruntime's intra-op threads.

    Attributes:
        stored: its folder, checked.
        session: its model, loaded.

    Raises:
        BadInput: it is damaged or cannot be loaded.
    """

    def __init__(self, folder: str | os.PathLike[str], threads: int | None = None) -> None:
        self.stored: Stored = open_artifact(folder)
        self.session: Session = load(self.stored, threads)
        self._golden = self.stored.golden()

    def probe(self) -> str | None:
        """Run the recorded inputs: None if the outputs are as recorded, else what is wrong."""
        if self._golden is None:
            return None
        try:
            found = self._run(self._golden.inputs)
        except Exception as error:  # whatever it is, the model does not answer
            return f"{type(error).__name__}: {error}"
        return _differs(self._golden.outputs, found, self._golden.tolerance)

    def batch_size(self, wanted: int | None) -> int:
        """Most rows of a batch, 0 where requests are not stacked.

        Args:
            wanted: None: 32 if the rows are independent, else 0.

        Raises:
            BadInput: more than 0 is wanted and the rows are not independent.
        """
        if wanted == 0:
            return 0
        if self.batches():
            return wanted or MAX_BATCH_SIZE
        if wanted:
            raise BadInput(
                "the rows of a batch are not independent: leave its size out or give 0",
                file=self.stored.path,
            )
        return 0

    def batches(self) -> bool:
        """Whether rows along the first axis are independent: requests may be stacked.

        The recorded inputs and a shuffled copy are run as one batch and row by row; without a
        recording nothing is known, and nothing is stacked.
        """
        if batch_symbol(self.stored.signature) is None or self._golden is None:
            return False
        whole = {name: _with_shuffled(array) for name, array in self._golden.inputs.items()}
        rows = len(next(iter(whole.values())))
        alone = [
            self._run({name: array[row : row + 1] for name, array in whole.items()})
            for row in range(rows)
        ]
        stacked = {name: np.concatenate([each[name] for each in alone]) for name in alone[0]}
        # Either side may be off the truth by the tolerance.
        return _differs(self._run(whole), stacked, 2 * self._golden.tolerance) is None

    def _run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [tensor.name for tensor in self.stored.signature.outputs]
        return dict(zip(names, self.session.run(None, arrays), strict=True))


def _with_shuffled(array: np.ndarray) -> np.ndarray:
    """[rows, ...] followed by as many rows of the same values in another order."""
    return np.concatenate([array, array[..., ::-1] if array.ndim > 1 else array])


def _differs(
    wanted: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], tolerance: float
) -> str | None:
    """What is wrong with the first output that differs."""
    for name, array in wanted.items():
        outcome = difference(name, array, found[name], tolerance)
        if not outcome.ok:
            return f"output '{name}' is not as recorded: {outcome.reason}"
    return None
