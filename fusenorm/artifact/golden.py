"""A recorded run, and the .npz files that hold arrays."""

from __future__ import annotations

import dataclasses
import io
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fusenorm.errors import BadInput
from fusenorm.signature import Tensor


@dataclasses.dataclass(frozen=True)
class Golden:
    """One recorded run: input and output arrays by name.

    Attributes:
        tolerance: on the difference of an output from a recorded one, relative to the largest.
    """

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    tolerance: float


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as .npz; the same arrays give the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getvalue())


# What a damaged archive or array header makes numpy and zipfile raise.
_NPZ_ERRORS = (
    AttributeError,
    EOFError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_npz(
    path: str | os.PathLike[str], tensors: Sequence[Tensor] = (), content: bytes | None = None
) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz; pickled objects are refused.

    Args:
        path: the file.
        tensors: types numpy's format cannot name (bfloat16 ...) are restored from these.
        content: the file's bytes, where they were read already.

    Raises:
        BadInput: the file is missing or no .npz of plain arrays.
    """
    try:
        # Read here, since np.load leaves a file it cannot read open.
        file = io.BytesIO(Path(path).read_bytes() if content is None else content)
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
            for tensor in tensors:
                array = arrays.get(tensor.name)
                if array is not None and array.dtype.kind == "V" and tensor.dtype:
                    arrays[tensor.name] = array.view(tensor.numpy)
    except _NPZ_ERRORS as error:
        raise BadInput(f"not an .npz of plain arrays ({error})", file=path) from error
    return arrays
