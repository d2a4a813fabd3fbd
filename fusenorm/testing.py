"""Inputs for checks and benchmarks, made from a model's signature alone."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from fusenorm.errors import BadInput
from fusenorm.signature import Dim, Signature, Tensor, resolve

# (size of leading symbolic axes, size of the others), in the order a model is tried at: an
# exporter may have baked a size in without declaring it.
SHAPES = (
    (2, 8),
    (1, 5),
    *((leading, other) for other in (1, 7, 10, 12, 16, 32, 64, 77, 128, 224) for leading in (2, 1)),
)


def sizes(
    signature: Signature,
    given: Mapping[str, int] | None = None,
    *,
    leading: int = SHAPES[0][0],
    other: int = SHAPES[0][1],
) -> dict[str, int]:
    """A size for every symbolic axis, one per name.

    Args:
        signature: whose symbols are bound.
        given: sizes that are fixed already.
        leading: size of the symbols that stand at axis 0 of an input.
        other: size of the rest.

    Raises:
        BadInput: `given` names no axis of the model.
    """
    given = given or {}
    for name in given:
        if name not in signature.symbols:
            known = ", ".join(signature.symbols) or "none"
            raise BadInput(f"no symbolic axis '{name}': the model's are {known}")
    first = {dim for tensor in signature.inputs for dim in (tensor.shape or ())[:1]}
    automatic = {name: leading if name in first else other for name in signature.symbols}
    return {**automatic, **given}


def random_inputs(
    signature: Signature, dims: Mapping[str, int], seed: int = 0
) -> dict[str, np.ndarray]:
    """Random values for every input; the same for the same arguments.

    Floats are standard normal. Integers are uniform in [0, limit) where the graph reveals what
    they index; else masks (by name) are one, positions (by name) count up along the last axis,
    the rest is 0 or 1. Booleans are true in masks, else random.

    Args:
        signature: names, types, shapes.
        dims: symbol to size, as `sizes` makes them.
        seed: of the random values.

    Returns:
        Input name to array.

    Raises:
        BadInput: an input that is no tensor of numbers, or has no rank.
    """
    return {tensor.name: _values(tensor, dims, seed) for tensor in signature.inputs}


def _values(tensor: Tensor, dims: Mapping[str, int], seed: int) -> np.ndarray:
    if not tensor.dtype or tensor.dtype == "string":
        raise BadInput(f"input '{tensor.name}' is no tensor of numbers: give an .npz of inputs")
    axes: tuple[Dim, ...] = tensor.shape if tensor.shape is not None else ()
    shape = resolve(axes, dims)
    random = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    dtype, name = tensor.numpy, tensor.name.lower()
    if dtype.kind == "b":
        return np.ones(shape, dtype) if "mask" in name else random.random(shape) < 0.5
    if dtype.kind not in "iu":
        return random.standard_normal(shape).astype(dtype)
    if tensor.limit is not None:
        return random.integers(0, tensor.limit, shape).astype(dtype)
    if "mask" in name:
        return np.ones(shape, dtype)
    if "position" in name and shape:
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
    return random.integers(0, 2, shape).astype(dtype)
