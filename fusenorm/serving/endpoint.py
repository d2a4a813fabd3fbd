"""A served artifact for asyncio servers that speak the Open Inference Protocol."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from onnxruntime import OrtValue

from fusenorm.errors import BadInput
from fusenorm.serving.batching import Batcher
from fusenorm.serving.model import Served
from fusenorm.serving.protocol import Input, Output, datatype, decode


class Endpoint:
    """An artifact, checked, probed and batched.

    Args:
        folder: the artifact.
        threads: onnxruntime's intra-op threads.
        max_batch_size: most rows of a batch, 0 runs every request by itself; None: 32 if the
            model's rows are independent, else 0.

    Raises:
        BadInput: the artifact is damaged, or does not answer as recorded.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        threads: int | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        self.served = Served(folder, threads)
        self.signature = self.served.stored.signature
        wrong = self.served.probe()
        if wrong is not None:
            raise BadInput(f"does not answer as recorded: {wrong}", file=folder)
        self._batcher = Batcher(self.served.session, self.served.batch_size(max_batch_size))

    async def infer(self, inputs: Sequence[Input], outputs: Sequence[str] = ()) -> list[Output]:
        """Answer one request.

        Args:
            inputs: every input of the model.
            outputs: names of those wanted, in order; none: all.

        Raises:
            BadInput: the request is at fault: it names what.
            Exception: one of `ORT_ERRORS`: the server is.
        """
        known = {tensor.name: tensor for tensor in self.signature.outputs}
        for name in outputs:
            if name not in known:
                raise BadInput(f"output '{name}' is none of the model's: {', '.join(known)}")
        values = await self._batcher.infer(self._feed(inputs))
        return [
            Output(name, datatype(known[name]), values[name].numpy()) for name in outputs or known
        ]

    async def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Answer a request of arrays by name with arrays by name.

        Raises:
            BadInput: the request is at fault: it names what.
        """
        feed = {
            name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            for name, array in arrays.items()
        }
        return {name: value.numpy() for name, value in (await self._batcher.infer(feed)).items()}

    def _feed(self, inputs: Sequence[Input]) -> dict[str, OrtValue]:
        known = {tensor.name: tensor for tensor in self.signature.inputs}
        feed: dict[str, OrtValue] = {}
        for given in inputs:
            if given.name not in known:
                raise BadInput(f"input '{given.name}' is none of the model's: {', '.join(known)}")
            if given.name in feed:
                raise BadInput(f"input '{given.name}' is given twice")
            array = decode(known[given.name], given)
            feed[given.name] = OrtValue.ortvalue_from_numpy(array)
        return feed
