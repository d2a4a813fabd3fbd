"""Linear maps with packed weights, and what follows them: bias, activation, gated unit.

A weight [K, N] is stored as panels of PANEL columns, [N / PANEL, K, PANEL]: a kernel reads each
panel from front to back, whatever its vectors are. The panels of a gate and of its linear twin
alternate, so that both halves of a gated unit are made together. Where N is no multiple of PANEL
the last panel ends in zeros.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Literal, Self

import numpy as np

from fusenorm.ops.activation import ACTIVATIONS, Activation, Gated, GateLayout
from fusenorm.ops.norm import Norm
from fusenorm.ops.spec import Body, DType, OpSpec, Slot

PANEL = 32
# As many maps of one x as an op computes side by side.
MOST_MAPS = 3


def pack(weight: np.ndarray) -> np.ndarray:
    """[K, N] as panels [N / PANEL, K, PANEL], the last one filled up with zeros."""
    rows, columns = weight.shape
    whole, rest = divmod(columns, PANEL)
    panels = np.zeros((whole + (rest > 0), rows, PANEL), weight.dtype)
    full = weight[:, : whole * PANEL].reshape(rows, whole, PANEL)
    panels[:whole] = full.transpose(1, 0, 2)
    panels[whole:, :, :rest] = weight[:, whole * PANEL :]
    return panels


def pack_gated(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Two [K, N] as alternating panels [2·N / PANEL, K, PANEL]."""
    panels = np.stack([pack(gate), pack(up)], axis=1)
    return panels.reshape(-1, *panels.shape[2:])


def unpack(panels: np.ndarray) -> np.ndarray:
    """Panels as [K, N], N being all columns they have room for."""
    return panels.transpose(1, 0, 2).reshape(panels.shape[1], -1)


@dataclasses.dataclass(frozen=True)
class Linear(OpSpec):
    """act(x·W + b), or the gated unit act(x·W + b)∘(x·V + c), W and V constant and packed.

    Several plain maps of one x, such as queries, keys and values, are one op with an output each:
    y_i = x·W_i + b_i. A single plain map may end in a residual sum: y = (x·W + b) + alpha·residual,
    where residual has the shape of y, and is rounded wherever two nodes would. With a `norm`, each
    of these reads x normalised over its last axis.

    Attributes:
        activation: a row of ACTIVATIONS.
        gated: whether a linear twin multiplies the activated gate (arXiv 2002.05202).
        bias: whether biases are added.
        dtype: of every input and output; products are summed in f32 and rounded to it.
        precision: of the activation in 16 bits, as in Gated.
        maps: how many there are; more than one only without activation.
        residual: a further row is added to a single map without activation.
        alpha: that row is multiplied by the attribute `alpha` (DeepNorm, arXiv 2203.00555).
        norm: an RMSNorm or LayerNorm of x in front, without scale and bias; its statistics are
            f32, its result is rounded to dtype.
        ragged: of a single map with a bias: N is the length of the bias, and the last panel holds
            what is left.
    """

    activation: str = "identity"
    gated: bool = False
    bias: bool = False
    dtype: DType = "f32"
    precision: Literal["f32", "storage"] = "f32"
    maps: int = 1
    residual: bool = False
    alpha: bool = False
    norm: Literal["none", "rms", "ln"] = "none"
    ragged: bool = False

    @property
    def row(self) -> Activation:
        return ACTIVATIONS[self.activation]

    @property
    def family(self) -> str:
        return "LinearGLU" if self.gated else "Linear"

    @property
    def tokens(self) -> tuple[str, ...]:
        tokens = [f"{self.maps}maps"] if self.maps > 1 else []
        tokens += [self.activation] if self.gated or self.activation != "identity" else []
        tokens += [flag for flag in ("bias", "ragged", "residual", "alpha") if getattr(self, flag)]
        tokens += [self.norm] if self.norm != "none" else []
        tokens += [self.dtype] if self.dtype != "f32" else []
        tokens += ["stepwise"] if self.precision == "storage" else []
        return tuple(tokens)

    @classmethod
    def variants(cls) -> Iterator[Self]:
        for spec in cls._of_rows_as_they_are():
            yield spec
            yield dataclasses.replace(spec, norm="rms")
            yield dataclasses.replace(spec, norm="ln")

    @classmethod
    def _of_rows_as_they_are(cls) -> Iterator[Self]:
        dtypes: tuple[DType, ...] = ("f32", "f16", "bf16", "f64")
        for name, gated, bias, dtype in itertools.product(
            ACTIVATIONS, (False, True), (False, True), dtypes
        ):
            for ragged in (False, True) if bias else (False,):
                yield cls(name, gated, bias, dtype, ragged=ragged)
                if dtype in ("f16", "bf16") and name != "identity":
                    yield cls(name, gated, bias, dtype, "storage", ragged=ragged)
            if name == "identity" and not gated:
                for maps in range(2, MOST_MAPS + 1):
                    yield cls(name, gated, bias, dtype, maps=maps)
                for alpha in (False, True):
                    yield cls(name, gated, bias, dtype, residual=True, alpha=alpha)

    @classmethod
    def ending_in(cls, unit: Gated, *, bias: bool, ragged: bool = False) -> Self | None:
        """The op that ends in this activation or gated unit, if there is one."""
        if unit != Gated(unit.activation, unit.layout, unit.dtype, unit.precision):
            return None
        gated = unit.layout != "none"
        spec = cls(unit.activation, gated, bias, unit.dtype, unit.precision, ragged=ragged)
        return spec if cls.parse(spec.op_type) == spec else None

    @property
    def one(self) -> Self:
        """The op of each of its maps alone."""
        return dataclasses.replace(self, maps=1)

    @property
    def products(self) -> Self:
        """What each of its maps does to rows that are normalised already."""
        return dataclasses.replace(self, maps=1, norm="none")

    @property
    def prologue(self) -> Norm | None:
        """The norm in front, as an op over rows."""
        if self.norm == "none":
            return None
        return Norm(centred=self.norm == "ln", dtype=self.dtype, scale=None)

    @property
    def parts(self) -> int:
        """Panels a panel of y is made of: gate and up, or one."""
        return 2 if self.gated else 1

    @property
    def plain(self) -> bool:
        """Whether it is x·W + b of one map, W in whole panels, and nothing else."""
        return self == Linear(bias=self.bias, dtype=self.dtype)

    @property
    def unit(self) -> Gated:
        """What follows the sums, as an op over rows."""
        layout: GateLayout = "pair" if self.gated else "none"
        return Gated(self.activation, layout, self.dtype, self.precision)

    @property
    def inputs(self) -> tuple[Slot, ...]:
        slots = [Slot("x", self.dtype, "row")]
        biases = ("gate_bias", "up_bias") if self.gated else ("bias",)
        for end in self._ends:
            slots.append(Slot(f"weight{end}", self.dtype, "panels"))
            if self.bias:
                slots += [Slot(f"{name}{end}", self.dtype, "vector") for name in biases]
        slots += [Slot("residual", self.dtype, "row")] if self.residual else []
        return tuple(slots)

    @property
    def outputs(self) -> tuple[Slot, ...]:
        return tuple(Slot(f"y{end}", self.dtype, "row") for end in self._ends)

    @property
    def _ends(self) -> tuple[str, ...]:
        """What the names of a map's slots end in."""
        return ("",) if self.maps == 1 else tuple(f"_{index}" for index in range(self.maps))

    @property
    def attributes(self) -> tuple[str, ...]:
        own = (*self.row.attributes, *(("alpha",) if self.alpha else ()))
        return own if self.prologue is None else (*own, *self.prologue.attributes)

    def write(self, body: Body) -> None:
        if self.prologue is not None:
            self.prologue.write(body)
            body.result("rows", "y")
        matrix = body.let("matrix", "Constant <value_ints: ints = [0, -1]> ()")
        if not self.gated:
            for end in self._ends:
                by_row = body.let(
                    f"by_row{end}", f"Transpose <perm: ints = [1, 0, 2]> (weight{end})"
                )
                weight = body.let(f"matrix_weight{end}", f"Reshape ({by_row}, {matrix})")
                weight = self._columns(body, weight, "bias")
                value = self._product(body, f"product{end}", weight, f"bias{end}")
                body.result(f"y{end}", self._summed(body, self._activated(body, value)))
            return
        body.let("by_row", "Transpose <perm: ints = [1, 0, 2]> (weight)")
        body.let("pairs", f"Constant <value_ints: ints = [0, -1, {2 * PANEL}]> ()")
        body.let("by_pair", "Reshape (by_row, pairs)")
        body.halves("gate_panels", "up_panels", "by_pair")
        weights = {}
        for name in ("gate", "up"):
            weight = body.let(f"{name}_weight", f"Reshape ({name}_panels, {matrix})")
            weights[name] = self._columns(body, weight, f"{name}_bias")
        gate, up = (self._product(body, name, weights[name], f"{name}_bias") for name in weights)
        body.let("y", f"Mul ({self._activated(body, gate)}, {up})")

    def _columns(self, body: Body, weight: str, bias: str) -> str:
        """The columns of an unpacked weight that are none of the last panel's zeros."""
        if not self.ragged:
            return weight
        for name, number in (("first", 0), ("column_axis", 1), ("last_axis", -1), ("end", 2**62)):
            body.let(f"{bias}_{name}", f"Constant <value_ints: ints = [{number}]> ()")
        body.let(f"{bias}_shape", f"Shape ({bias})")
        count = body.let(f"{bias}_size", f"Slice ({bias}_shape, {bias}_last_axis, {bias}_end)")
        places = f"{bias}_first, {count}, {bias}_column_axis"
        return body.let(f"{weight}_columns", f"Slice ({weight}, {places})")

    def _activated(self, body: Body, value: str) -> str:
        exact = self.precision == "storage" or self.dtype == "f64" or self.activation == "identity"
        at: DType = self.dtype if exact else "f32"
        wide = body.cast("act_wide", value, self.dtype, at)
        return body.cast("act_rounded", self.row.write(body, wide, at), at, self.dtype)

    def _summed(self, body: Body, value: str) -> str:
        if not self.residual:
            return value
        row = "residual"
        if self.alpha:
            alpha = body.constant("alpha_value", "@alpha", self.dtype)
            row = body.let("residual_scaled", f"Mul (residual, {alpha})")
        return body.let("sum", f"Add ({value}, {row})")

    def _product(self, body: Body, name: str, weight: str, bias: str) -> str:
        rows = "x" if self.prologue is None else "rows"
        value = body.let(name, f"MatMul ({rows}, {weight})")
        return body.let(f"{name}_biased", f"Add ({value}, {bias})") if self.bias else value

    def reference(
        self, inputs: Mapping[str, np.ndarray], attributes: Mapping[str, float]
    ) -> tuple[np.ndarray, ...]:
        wide = {name: np.asarray(value, np.float64) for name, value in inputs.items()}
        numbers = dict(attributes)
        if self.prologue is not None:
            own = {name: numbers.pop(name) for name in self.prologue.attributes}
            (wide["x"],) = self.prologue.reference({"x": wide["x"]}, own)
        if not self.gated:
            products = (
                self._multiplied(wide["x"], wide[f"weight{end}"], wide.get(f"bias{end}"))
                for end in self._ends
            )
            if self.residual:
                row = numbers.get("alpha", 1.0) * wide["residual"]
                return tuple(product + row for product in products)
            return tuple(self.row.numpy(product, **numbers) for product in products)
        panels = wide["weight"]
        gate = self._multiplied(wide["x"], panels[0::2], wide.get("gate_bias"))
        up = self._multiplied(wide["x"], panels[1::2], wide.get("up_bias"))
        return (self.row.numpy(gate, **numbers) * up,)

    def _multiplied(self, x: np.ndarray, panels: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        y = x @ unpack(panels)
        return y if bias is None else y[..., : bias.shape[-1]] + bias

    def with_dtype(self, dtype: DType) -> Self:
        return dataclasses.replace(self, dtype=dtype, precision="f32")
