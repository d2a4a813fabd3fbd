"""For tests, yours and ours: inputs made from a signature, and a rule against its spellings."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fusenorm.errors import BadInput
from fusenorm.ops.spec import DTYPES, DType
from fusenorm.signature import Dim, Signature, Tensor, resolve

if TYPE_CHECKING:
    import onnx

    from fusenorm.passes.rewrite import Rule
    from fusenorm.passes.speller import Speller

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
        chances = np.zeros(shape) if "mask" in name else random.random(shape)
        return np.asarray(chances < 0.5)  # of no axes, a comparison gives no array
    if dtype.kind not in "iu":
        return random.standard_normal(shape).astype(dtype)
    if tensor.limit is not None:
        return random.integers(0, tensor.limit, shape).astype(dtype)
    if "mask" in name:
        return np.ones(shape, dtype)
    if "position" in name and shape:
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
    return random.integers(0, 2, shape).astype(dtype)


def check_rule(
    rule: Rule,
    op: str,
    *,
    opsets: Sequence[int] = (13, 18, 23),
    dtype: DType = "f32",
    limit: int = 40,
    seed: int = 0,
) -> int:
    """Hold a rule against every spelling of its own pattern.

    Each spelling must become exactly one fused site of `op`, pass onnx's checker and keep its
    outputs under onnxruntime with optimisation off.

    Args:
        rule: the rule; it runs along with the built-in ones.
        op: the site it must become, as reports name it.
        opsets: the opsets to spell it in.
        dtype: storage type of the graphs.
        limit: spellings per opset.
        seed: of the random inputs.

    Returns:
        How many spellings were checked.

    Raises:
        AssertionError: naming the first spelling that fails, as ONNX text.
    """
    import onnx
    import onnx_ir as ir

    from fusenorm.passes.speller import spellings
    from fusenorm.pipeline import Options, optimize

    def write(speller: Speller) -> ir.Value:
        rule.example(speller)
        return rule.pattern.spell(speller)

    count = 0
    for opset in opsets:
        for model in spellings(write, opset=opset, dtype=dtype, limit=limit):
            source = ir.to_proto(model)
            result = optimize(source, options=Options(rules=(rule,)))
            text = f"{rule.name} at opset {opset}:\n{onnx.printer.to_text(source)}"
            sites = [(site.op, site.status, site.reason) for site in result.report.sites]
            if sites != [(op, "fused", None)]:
                raise AssertionError(f"{sites} in {text}")
            after = ir.to_proto(result.model)
            onnx.checker.check_model(after)
            feeds = random_inputs(Signature.of_model(model), {}, seed)
            _agree(_outputs(source, feeds), _outputs(after, feeds), DTYPES[dtype].epsilon, text)
            count += 1
    return count


def _outputs(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, dict(feeds))


def _agree(
    wanted: Sequence[np.ndarray], got: Sequence[np.ndarray], epsilon: float, text: str
) -> None:
    for a, b in zip(wanted, got, strict=True):
        wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
        error = float(np.abs(wide_a - wide_b).max(initial=0))
        scale = float(np.abs(wide_a).max(initial=0))
        # Four roundings of the largest value, with the room a cancelling mean takes.
        if not error <= 32 * epsilon * max(scale, 1e-3):
            raise AssertionError(f"outputs differ by {error:.2e} of {scale:.2e} in {text}")
