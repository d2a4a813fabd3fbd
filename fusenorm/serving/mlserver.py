"""The MLServer runtime, and what MLServer loads it from.

    REPO/NAME/model-settings.json   implementation fusenorm.serving.mlserver.Runtime
    REPO/NAME/VERSION/              the artifact as it is

The server's Python needs mlserver, onnxruntime and this package (`pip install --no-deps`). The
same folders serve under KServe, whose MLServer runtime reads them.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from mlserver import MLModel
from mlserver.errors import MLServerError
from mlserver.types import Datatype, InferenceRequest, InferenceResponse, ResponseOutput
from mlserver.utils import get_model_uri

from fusenorm.errors import BadInput
from fusenorm.serving.endpoint import Endpoint
from fusenorm.serving.protocol import Input


class Runtime(MLModel):  # type: ignore[misc]  # mlserver has no types
    """One version of a model."""

    async def load(self) -> bool:
        """Load and probe the artifact.

        Raises:
            MLServerError: it is damaged, or does not answer as recorded.
        """
        extra = self.settings.parameters.extra or {}
        manifest = Path(await get_model_uri(self.settings, wellknown_filenames=["manifest.json"]))
        try:
            self._endpoint = await asyncio.to_thread(Endpoint, manifest.parent, **extra)
        except BadInput as error:
            raise MLServerError(str(error)) from None
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        inputs = [
            Input(given.name, _name(given.datatype), given.shape, list(given.data))
            for given in payload.inputs
        ]
        wanted = [output.name for output in payload.outputs or ()]
        try:
            outputs = await self._endpoint.infer(inputs, wanted)
        except BadInput as error:
            raise MLServerError(error.message) from None
        return InferenceResponse(
            model_name=self.name,
            model_version=Path(self.settings.parameters.uri).name,
            outputs=[ResponseOutput(**output.as_dict()) for output in outputs],
        )


def _name(datatype: Datatype | str) -> str:
    """The protocol's name: gRPC requests hold it, HTTP requests an enumeration."""
    return datatype.value if isinstance(datatype, Datatype) else datatype
