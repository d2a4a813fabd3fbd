"""An artifact as an MLflow model: the folder `fusenorm deploy mlflow` writes, and what loads it.

    DIR/MLmodel       names this module as loader, and the signature
    DIR/NAME.fnorm    the artifact as it is, beside it NAME.fnorm.sig if it was signed

>>> model = mlflow.pyfunc.load_model("DIR", model_config={"threads": 2})  # doctest: +SKIP
>>> model.predict({"tokens": tokens})["logits"]  # doctest: +SKIP
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusenorm.artifact import open_artifact
from fusenorm.artifact.place import fresh_folder
from fusenorm.errors import BadInput
from fusenorm.runtime.session import Session, load
from fusenorm.signature import Tensor

MLMODEL = "MLmodel"


def deploy(artifact: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Write a model folder: whole or not at all. The same artifact gives the same bytes.

    Args:
        artifact: the artifact folder.
        output: the folder; must not exist, or be such a folder, which is replaced.

    Returns:
        The folder.

    Raises:
        BadInput: the artifact is damaged, has an input or output MLflow has no type for, or the
            folder cannot be written.
    """
    stored = open_artifact(artifact)
    source = stored.path.resolve()
    specs = {
        "inputs": json.dumps([_spec(tensor) for tensor in stored.signature.inputs]),
        "outputs": json.dumps([_spec(tensor) for tensor in stored.signature.outputs]),
    }
    # YAML takes JSON's strings as they are.
    lines = (
        "flavors:",
        "  python_function:",
        f"    loader_module: {__name__}",
        f"    data: {json.dumps(source.name)}",
        "signature:",
        *(f"  {kind}: {json.dumps(text)}" for kind, text in specs.items()),
        "",
    )
    with fresh_folder(output, MLMODEL, "an MLflow model") as stage:
        shutil.copytree(source, stage / source.name)
        open_artifact(stage / source.name)
        signature = source.with_name(f"{source.name}.sig")
        if signature.is_file():
            shutil.copyfile(signature, stage / signature.name)
        (stage / MLMODEL).write_text("\n".join(lines), encoding="utf-8")
    return Path(output)


class Model:
    """What MLflow calls: arrays by name in, arrays by name out.

    Attributes:
        session: the loaded artifact.
    """

    def __init__(self, session: Session) -> None:
        self.session = session

    def predict(
        self,
        model_input: np.ndarray | Mapping[str, np.ndarray],
        params: Mapping[str, Any] | None = None,
    ) -> dict[str, np.ndarray]:
        """Run the model.

        Args:
            model_input: arrays by input; an array alone where there is one input.
            params: MLflow hands them on; the model takes none.

        Raises:
            BadInput: inputs the model cannot take.
        """
        inputs = [tensor.name for tensor in self.session.signature.inputs]
        outputs = [tensor.name for tensor in self.session.signature.outputs]
        if isinstance(model_input, Mapping):
            feed = model_input
        elif len(inputs) == 1:
            feed = {inputs[0]: model_input}
        else:
            raise BadInput(
                f"give a dict of arrays by name: {', '.join(inputs)}", file=self.session.source
            )
        return dict(zip(outputs, self.session.run(outputs, feed), strict=True))


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> Model:
    """MLflow's entry point.

    Args:
        path: the artifact folder.
        model_config: `mlflow.pyfunc.load_model`'s; taken as keyword arguments of `fusenorm.load`.
    """
    return Model(load(path, **(model_config or {})))


def _spec(tensor: Tensor) -> dict[str, object]:
    """A tensor as MLflow's schema has it.

    Raises:
        BadInput: MLflow has no type for it.
    """
    shape: Sequence[object] | None = tensor.shape
    if not tensor.dtype or not hasattr(np, tensor.dtype) or shape is None:
        raise BadInput(f"'{tensor.name}' is {tensor}: MLflow takes arrays of numpy's own types")
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    return {
        "name": tensor.name,
        "type": "tensor",
        "tensor-spec": {"dtype": tensor.dtype, "shape": sizes},
    }
