"""MLServer's model repository under KServe's own Python server.

`python -m fusenorm.serving.kserve --repo DIR` serves every model of the repository that
`fusenorm deploy mlserver` wrote; KServe's other options (--http_port, --grpc_port ...) are its
own. On a cluster no such process is needed: KServe's MLServer runtime reads the same folders.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kserve
from kserve import InferInput, InferOutput, InferRequest, InferResponse
from kserve.errors import InvalidInput

from fusenorm.errors import BadInput
from fusenorm.serving.endpoint import Endpoint
from fusenorm.serving.model_settings import MODEL_SETTINGS
from fusenorm.serving.protocol import Input


class Model(kserve.Model):  # type: ignore[misc]  # kserve has no types
    """One model of a repository.

    Args:
        folder: holds its model-settings.json.

    Raises:
        BadInput: its artifact is damaged, or does not answer as recorded.
    """

    def __init__(self, folder: Path) -> None:
        settings = json.loads((folder / MODEL_SETTINGS).read_text(encoding="utf-8"))
        super().__init__(settings["name"])
        self._inputs, self._outputs = settings["inputs"], settings["outputs"]
        parameters = settings["parameters"]
        self._endpoint = Endpoint(folder / parameters["uri"], **parameters["extra"])
        self.ready = True

    async def get_input_types(self) -> list[dict[str, Any]]:
        return list(self._inputs)

    async def get_output_types(self) -> list[dict[str, Any]]:
        return list(self._outputs)

    async def predict(
        self, payload: InferRequest, headers: dict[str, str] | None = None
    ) -> InferResponse:
        """Answer one request.

        Raises:
            InvalidInput: the request is at fault.
        """
        inputs = [
            Input(each.name, each.datatype, each.shape, _data(each)) for each in payload.inputs
        ]
        wanted = [output.name for output in payload.request_outputs or ()]
        try:
            found = await self._endpoint.infer(inputs, wanted)
        except BadInput as error:
            raise InvalidInput(error.message) from None
        outputs = []
        for name, datatype, array in found:
            output = InferOutput(name, list(array.shape), datatype)
            output.set_data_from_numpy(array, binary_data=payload.use_binary_outputs)
            outputs.append(output)
        return InferResponse(payload.id or uuid.uuid4().hex, self.name, outputs)


class Repository(kserve.ModelRepository):  # type: ignore[misc]
    """Models by name; loading one again replaces it once the new one answers."""

    async def load(self, name: str) -> bool:
        folder = Path(self.models_dir, name)
        if not (folder / MODEL_SETTINGS).is_file():
            raise BadInput(f"no model '{name}' in the repository")
        self.update(await asyncio.to_thread(Model, folder))
        return True


def _data(given: InferInput) -> Any:
    """Lists as JSON has them; or the raw bytes, which the SDK keeps where none is meant to look."""
    return given.data if given._raw_data is None else given._raw_data


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve a repository until a signal comes."""
    import argparse

    parser = argparse.ArgumentParser(parents=[kserve.model_server.parser], add_help=False)
    parser.add_argument("--repo", type=Path, required=True, help="what deploy mlserver wrote")
    options = parser.parse_args(arguments)
    try:
        models = [Model(path.parent) for path in sorted(options.repo.glob(f"*/{MODEL_SETTINGS}"))]
    except BadInput as error:
        raise SystemExit(f"error: {error}") from None
    kserve.ModelServer(registered_models=Repository(str(options.repo))).start(models)


if __name__ == "__main__":
    main()
