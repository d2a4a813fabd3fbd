"""LayerNorm and RMSNorm, plain or behind a residual sum (pre-norm, post-norm, DeepNorm)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Literal, Self

import numpy as np

from fusenorm.ops.spec import Body, DType, OpSpec, Slot


@dataclasses.dataclass(frozen=True)
class Norm(OpSpec):
    """Normalise the last axis of s, where s is x or the residual sum of x and skip.

    s = alpha·x + beta·(layer_scale∘skip), each factor optional and rounded where the source
    graph rounds. With `centred`, c = s - mean(s), else c = s; then
    y = c / sqrt(mean(c²) + epsilon) · scale + bias. Statistics are f32 and two-pass.

    Shapes: x, skip, y, s are [..., D] (x and skip broadcast over the leading axes); scale,
    bias, layer_scale are [D].

    Attributes:
        centred: LayerNorm (arXiv 1607.06450) rather than RMSNorm (arXiv 1910.07467).
        skip: a residual sum stands in front; the sum is the second output.
        dtype: storage type of x, skip, y and s.
        scale: type of γ, None without one.
        bias: type of β, None without one.
        alpha: x is multiplied by the attribute `alpha` (DeepNorm, arXiv 2203.00555).
        beta: skip is multiplied by the attribute `beta` (residual multipliers).
        layer_scale: skip is multiplied by a vector (LayerScale, arXiv 2103.17239).
        affine: `f32` applies γ and β before the one rounding to `dtype`; `storage` rounds the
            normalised value first, as decomposed 16-bit exports do.
        residual: `storage` rounds every step of the sum to `dtype`; `f32` only its end.
        centre: `storage` rounds the mean and the centred value to `dtype`, as 16-bit exports
            older than the LayerNormalization op do.
    """

    centred: bool = False
    skip: bool = False
    dtype: DType = "f32"
    scale: DType | None = "f32"
    bias: DType | None = None
    alpha: bool = False
    beta: bool = False
    layer_scale: bool = False
    affine: Literal["f32", "storage"] = "f32"
    residual: Literal["storage", "f32"] = "storage"
    centre: Literal["f32", "storage"] = "f32"

    @property
    def family(self) -> str:
        return f"{'Skip' if self.skip else ''}{'Layer' if self.centred else 'RMS'}Norm"

    @property
    def tokens(self) -> tuple[str, ...]:
        tokens: list[str] = [self.dtype] if self.dtype != "f32" else []
        tokens += _slot_tokens("scale", self.scale, self.dtype)
        tokens += _slot_tokens("bias", self.bias, self.dtype)
        tokens += [flag for flag in ("alpha", "beta") if getattr(self, flag)]
        tokens += ["layerscale"] if self.layer_scale else []
        tokens += ["castfirst"] if self.affine == "storage" else []
        tokens += ["sum32"] if self.residual == "f32" else []
        tokens += ["centrefirst"] if self.centre == "storage" else []
        return tuple(tokens)

    @classmethod
    def variants(cls) -> Iterator[Self]:
        flags = (False, True)
        for centred, skip, dtype in itertools.product(flags, flags, ("f32", "f16", "bf16", "f64")):
            sums = itertools.product(flags, flags, flags) if skip else [(False, False, False)]
            for (alpha, beta, layer_scale), affine in itertools.product(sums, _affines(dtype)):
                base = cls(
                    centred,
                    skip,
                    dtype,  # type: ignore[arg-type]
                    **affine,  # type: ignore[arg-type]
                    alpha=alpha,
                    beta=beta,
                    layer_scale=layer_scale,
                )
                yield base
                if skip and dtype in ("f16", "bf16"):
                    yield dataclasses.replace(base, residual="f32")
                if centred and dtype in ("f16", "bf16"):
                    yield dataclasses.replace(base, centre="storage")

    @property
    def inputs(self) -> tuple[Slot, ...]:
        slots = [Slot("x", self.dtype, "row")]
        if self.skip:
            slots.append(Slot("skip", self.dtype, "row"))
        if self.layer_scale:
            slots.append(Slot("layer_scale", self.dtype, "vector"))
        if self.scale:
            slots.append(Slot("scale", self.scale, "vector"))
        if self.bias:
            slots.append(Slot("bias", self.bias, "vector"))
        return tuple(slots)

    @property
    def outputs(self) -> tuple[Slot, ...]:
        y = Slot("y", self.dtype, "row")
        return (y, Slot("s", self.dtype, "row")) if self.skip else (y,)

    @property
    def attributes(self) -> tuple[str, ...]:
        return ("epsilon", *(flag for flag in ("alpha", "beta") if getattr(self, flag)))

    @property
    def alone(self) -> Self:
        """The norm of a residual sum that is given; s is read rounded."""
        return dataclasses.replace(
            self, skip=False, alpha=False, beta=False, layer_scale=False, residual="storage"
        )

    @property
    def stash(self) -> DType:
        """Type of the statistics."""
        return "f64" if self.dtype == "f64" else "f32"

    def write(self, body: Body) -> None:
        h = self._write_sum(body)
        if self.centred and self.centre == "storage":
            body.mean("mean", "s" if self.skip else "x")
            body.let("centred_rounded", f"Sub ({'s' if self.skip else 'x'}, mean)")
            h = body.cast("centred", "centred_rounded", self.dtype, self.stash)
        elif self.centred:
            body.mean("mean", h)
            h = body.let("centred", f"Sub ({h}, mean)")
        body.let("square", f"Mul ({h}, {h})")
        body.mean("variance", "square")
        epsilon = body.constant("eps", "@epsilon", self.stash)
        body.let("shifted", f"Add (variance, {epsilon})")
        body.let("deviation", "Sqrt (shifted)")
        body.let("inverse", "Reciprocal (deviation)")
        value = body.let("normalised", f"Mul ({h}, inverse)")
        at = self.dtype if self.affine == "storage" else self.stash
        value = body.cast("rounded", value, self.stash, at)
        if self.scale:
            scale = body.cast("scale_cast", "scale", self.scale, at)
            value = body.let("scaled", f"Mul ({value}, {scale})")
        if self.bias:
            bias = body.cast("bias_cast", "bias", self.bias, at)
            value = body.let("biased", f"Add ({value}, {bias})")
        body.result("y", body.cast("y_cast", value, at, self.dtype))

    def _write_sum(self, body: Body) -> str:
        """Writes s; returns the name of its value in the statistics' type."""
        if not self.skip:
            return body.cast("h", "x", self.dtype, self.stash)
        at = self.dtype if self.residual == "storage" else self.stash
        x = body.cast("x_cast", "x", self.dtype, at)
        skip = body.cast("skip_cast", "skip", self.dtype, at)
        if self.alpha:
            alpha = body.constant("alpha_value", "@alpha", at)
            x = body.let("x_scaled", f"Mul ({x}, {alpha})")
        if self.layer_scale:
            vector = body.cast("layer_scale_cast", "layer_scale", self.dtype, at)
            skip = body.let("skip_scaled", f"Mul ({skip}, {vector})")
        if self.beta:
            beta = body.constant("beta_value", "@beta", at)
            skip = body.let("skip_weighted", f"Mul ({skip}, {beta})")
        name = "s" if at == self.dtype else "sum"
        body.let(name, f"Add ({x}, {skip})")
        if at == self.dtype:
            return body.cast("h", "s", self.dtype, self.stash)
        body.cast("s", name, at, self.dtype)
        return name

    def reference(
        self, inputs: Mapping[str, np.ndarray], attributes: Mapping[str, float]
    ) -> tuple[np.ndarray, ...]:
        wide = {name: np.asarray(value, np.float64) for name, value in inputs.items()}
        s = wide["x"] * attributes.get("alpha", 1.0)
        if self.skip:
            s = s + attributes.get("beta", 1.0) * wide["skip"] * wide.get("layer_scale", 1.0)
        c = s - s.mean(-1, keepdims=True) if self.centred else s
        y = c / np.sqrt(np.square(c).mean(-1, keepdims=True) + attributes["epsilon"])
        y = y * wide.get("scale", 1.0) + wide.get("bias", 0.0)
        return (y, s) if self.skip else (y,)

    def with_dtype(self, dtype: DType) -> Self:
        return dataclasses.replace(
            self,
            dtype=dtype,
            scale=dtype if self.scale else None,
            bias=dtype if self.bias else None,
            affine="f32",
            residual="storage",
            centre="f32",
        )


def _slot_tokens(name: str, present: DType | None, dtype: DType) -> list[str]:
    if name == "scale":
        if present is None:
            return ["noscale"]
        return [f"{present}scale"] if present != dtype else []
    if present is None:
        return []
    return [f"{present}bias" if present != dtype else "bias"]


def _affines(dtype: str) -> Iterator[dict[str, object]]:
    """Types of γ and β and where they apply: alone, both, mixed with a 16-bit x."""
    yield {"scale": None, "bias": None}
    yield {"scale": None, "bias": dtype}
    if dtype in ("f16", "bf16"):
        yield {"scale": None, "bias": dtype, "affine": "storage"}
    for scale in dict.fromkeys((dtype, "f32")) if dtype != "f64" else (dtype,):
        for bias in (None, scale):
            yield {"scale": scale, "bias": bias}
            if dtype in ("f16", "bf16") and scale == dtype:
                yield {"scale": scale, "bias": bias, "affine": "storage"}
