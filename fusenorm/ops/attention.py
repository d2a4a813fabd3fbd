"""Scaled dot-product attention as one op: scores, mask, softmax and the weighted sum of values.

Heads-first tensors are [B, H, S, D], sequence-first ones [B, S, H, D]: each operand's layout is
part of the op, so that the transposes around it are none. Rotary positions turn the rows of q and k
on their way in.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, Self, get_args

import numpy as np

from fusenorm.ops.spec import Body, DType, Layout, OpSpec, Slot

Empty = Literal["nan", "zero", "safe"]
Rotary = Literal["none", "q", "qk"]
Form = Literal["halves", "pairs", "cached"]
_LAYOUTS: dict[str, Layout] = {"h": "heads", "s": "sequence"}


@dataclasses.dataclass(frozen=True)
class Attention(OpSpec):
    """softmax(scale·q·kᵀ + mask)·v for each head of q [B, H, S, D], k [B, H, T, D], v [B, H, T, E].

    Attributes:
        layout: of q, k, v and y, a letter each: `h` heads-first, `s` sequence-first.
        mask: whether a mask is added to the scores, of any shape that broadcasts to [B, H, S, T].
        select: the mask takes the place of the scores instead, wherever it is not 0.
        softcap: the scores become softcap·tanh(scores / softcap) first (arXiv 2408.00118).
        grouped: k and v have fewer heads; each serves as many successive heads of q
            (arXiv 2305.13245).
        empty: what becomes of a row whose scores are all -inf: `nan` as Softmax has it; `zero`;
            `safe`, where every weight that is NaN counts as 0.
        rotary: what is turned by its position first, q or q and k (arXiv 2104.09864): x becomes
            x·cos + x'·sin for tables cos and sin of any shape that broadcasts to [B, 1, S, R],
            R = D, where x' = (-x2, x1) of the halves x = (x1, x2). With k, T = S.
        form: which numbers turn together: `halves`; `pairs`, x1 being the even numbers and x2 the
            odd ones, x' = (-x[1], x[0], -x[3], x[2], …); or `cached`, halves by tables that hold
            every number once, broadcasting to [B, S, R / 2] (ONNX RotaryEmbedding-23).
        partial: the first R numbers of a row turn, the others stay.
        dtype: of every input and output.
    """

    MIN_OPSET: ClassVar[int] = 13  # before, Softmax flattens

    layout: str = "hhhh"
    mask: bool = False
    grouped: bool = False
    empty: Empty = "nan"
    rotary: Rotary = "none"
    form: Form = "halves"
    partial: bool = False
    select: bool = False
    softcap: bool = False
    dtype: DType = "f32"

    @property
    def family(self) -> str:
        return "Attention"

    @property
    def tokens(self) -> tuple[str, ...]:
        flags = {
            "mask": self.mask,
            "grouped": self.grouped,
            self.empty: self.empty != "nan",
            f"rotary_{self.rotary}": self.rotary != "none",
            self.form: self.form != "halves",
            "partial": self.partial,
            "select": self.select,
            "softcap": self.softcap,
        }
        tokens = [self.layout, *(name for name, given in flags.items() if given)]
        tokens += [self.dtype] if self.dtype != "f32" else []
        return tuple(tokens)

    @classmethod
    def variants(cls) -> Iterator[Self]:
        dtypes: tuple[DType, ...] = ("f32", "f64")
        flags = (False, True)
        layouts = ("".join(letters) for letters in itertools.product(_LAYOUTS, repeat=4))
        turns: list[tuple[Rotary, Form, bool]] = [("none", "halves", False)]
        turns += itertools.product(get_args(Rotary)[1:], get_args(Form), flags)
        masks = ((False, False), (True, False), (True, True))
        for layout, (mask, select), grouped, empty, turn, softcap, dtype in itertools.product(
            layouts, masks, flags, get_args(Empty), turns, flags, dtypes
        ):
            yield cls(layout, mask, grouped, empty, *turn, select, softcap, dtype)

    @property
    def inputs(self) -> tuple[Slot, ...]:
        names = zip("qkv", self.layout, strict=False)
        slots = [Slot(name, self.dtype, _LAYOUTS[letter]) for name, letter in names]
        if self.mask:
            slots.append(Slot("mask", self.dtype, "scores"))
        if self.rotary != "none":
            layout: Layout = "cache" if self.form == "cached" else "table"
            slots += [Slot(name, self.dtype, layout) for name in ("cos", "sin")]
        return tuple(slots)

    @property
    def outputs(self) -> tuple[Slot, ...]:
        return (Slot("y", self.dtype, _LAYOUTS[self.layout[3]]),)

    @property
    def attributes(self) -> tuple[str, ...]:
        return ("scale", "softcap") if self.softcap else ("scale",)

    def write(self, body: Body) -> None:
        q, k, v = (
            self._heads_first(body, name, letter)
            for name, letter in zip("qkv", self.layout, strict=False)
        )
        if self.rotary != "none":
            tables = [self._table(body, name) for name in ("cos", "sin")]
            q = self._turned(body, q, "q", *tables)
            k = self._turned(body, k, "k", *tables) if self.rotary == "qk" else k
        if self.grouped:
            k, v = self._repeated(body, q, k, v)
        keys = body.let("keys", f"Transpose <perm: ints = [0, 1, 3, 2]> ({k})")
        product = body.let("product", f"MatMul ({q}, {keys})")
        scale = body.constant("scaling", "@scale", self.dtype)
        scores = body.let("scores", f"Mul ({product}, {scale})")
        if self.softcap:
            cap = body.constant("cap", "@softcap", self.dtype)
            body.let("capped", f"Div ({scores}, {cap})")
            body.let("bent", "Tanh (capped)")
            scores = body.let("soft", f"Mul (bent, {cap})")
        if self.select:
            nothing = body.constant("nothing", 0.0, self.dtype)
            body.let("kept", f"Equal (mask, {nothing})")
            scores = body.let("masked", f"Where (kept, {scores}, mask)")
        elif self.mask:
            scores = body.let("masked", f"Add ({scores}, mask)")
        weights = body.let("weights", f"Softmax <axis: int = -1> ({scores})")
        if self.empty != "nan":
            if self.empty == "safe":
                body.let("none", f"IsNaN ({weights})")
            else:
                body.greatest("greatest", scores)
                body.let("none", "IsInf <detect_positive: int = 0> (greatest)")
            zero = body.constant("zero", 0.0, self.dtype)
            weights = body.let("safe_weights", f"Where (none, {zero}, {weights})")
        if self.layout[3] == "h":
            body.let("y", f"MatMul ({weights}, {v})")
        else:
            body.let("by_head", f"MatMul ({weights}, {v})")
            body.let("y", "Transpose <perm: ints = [0, 2, 1, 3]> (by_head)")

    def _heads_first(self, body: Body, name: str, letter: str) -> str:
        if letter == "h":
            return name
        return body.let(f"{name}_heads", f"Transpose <perm: ints = [0, 2, 1, 3]> ({name})")

    def _table(self, body: Body, name: str) -> str:
        """A table with a column for each number of a row."""
        if self.form != "cached":
            return name
        body.let(f"{name}_heads", "Constant <value_ints: ints = [-3]> ()")
        body.let(f"{name}_half", f"Unsqueeze ({name}, {name}_heads)")
        return body.let(f"{name}_table", f"Concat <axis: int = -1> ({name}_half, {name}_half)")

    def _turned(self, body: Body, x: str, name: str, cos: str, sin: str) -> str:
        """x, or its first numbers, as many as the tables have, turned by their position."""
        near = x
        last = body.let(f"{name}_last", "Constant <value_ints: ints = [-1]> ()")
        if self.partial:
            for part, number in (("begin", 0), ("end", 2**62)):
                body.let(f"{name}_{part}", f"Constant <value_ints: ints = [{number}]> ()")
            body.let(f"{name}_table", f"Shape ({cos})")
            width = body.let(f"{name}_width", f"Slice ({name}_table, {last}, {name}_end)")
            near = body.let(f"{name}_near", f"Slice ({x}, {name}_begin, {width}, {last})")
            far = body.let(f"{name}_far", f"Slice ({x}, {width}, {name}_end, {last})")
        first, second = f"{name}_first", f"{name}_second"
        if self.form == "pairs":
            body.stride(first, near, 0)
            body.stride(second, near, 1)
        else:
            body.halves(first, second, near)
        minus = body.let(f"{name}_minus", f"Neg ({second})")
        if self.form == "pairs":
            for part in (minus, first):
                body.let(f"{part}_one", f"Unsqueeze ({part}, {last})")
            body.let(f"{name}_paired", f"Concat <axis: int = -1> ({minus}_one, {first}_one)")
            body.let(f"{name}_form", f"Shape ({near})")
            body.let(f"{name}_other", f"Reshape ({name}_paired, {name}_form)")
        else:
            body.let(f"{name}_other", f"Concat <axis: int = -1> ({minus}, {first})")
        body.let(f"{name}_by_cos", f"Mul ({near}, {cos})")
        body.let(f"{name}_by_sin", f"Mul ({name}_other, {sin})")
        turned = body.let(f"{name}_turned", f"Add ({name}_by_cos, {name}_by_sin)")
        if self.partial:
            turned = body.let(f"{name}_joined", f"Concat <axis: int = -1> ({turned}, {far})")
        return turned

    def _repeated(self, body: Body, q: str, k: str, v: str) -> tuple[str, str]:
        """k and v with each head as often as there are heads of q for it."""
        for name, number in (("zero_axis", 0), ("head_axis", 1), ("row_axis", 2), ("rank", 4)):
            body.let(name, f"Constant <value_ints: ints = [{number}]> ()")
        counts = []
        for name, value in (("q", q), ("k", k)):
            shape = body.let(f"{name}_shape", f"Shape ({value})")
            counts.append(body.let(f"{name}_count", f"Slice ({shape}, head_axis, row_axis)"))
        body.let("copies", f"Div ({counts[0]}, {counts[1]})")
        body.let(
            "repeats", "Concat <axis: int = 0> (head_axis, head_axis, copies, head_axis, head_axis)"
        )
        repeated = []
        allow_zero = " <allowzero: int = 1>" if body.opset >= 14 else ""
        for name, value in (("k", k), ("v", v)):
            body.let(f"{name}_grouped", f"Unsqueeze ({value}, row_axis)")
            body.let(f"{name}_copied", f"Expand ({name}_grouped, repeats)")
            shape = body.let(f"{name}_whole", f"Shape ({value})")
            body.let(f"{name}_batch", f"Slice ({shape}, zero_axis, head_axis)")
            body.let(f"{name}_rows", f"Slice ({shape}, row_axis, rank)")
            target = f"Concat <axis: int = 0> ({name}_batch, q_count, {name}_rows)"
            body.let(f"{name}_target", target)
            reshape = f"Reshape{allow_zero} ({name}_copied, {name}_target)"
            repeated.append(body.let(f"{name}_repeated", reshape))
        return repeated[0], repeated[1]

    def reference(
        self, inputs: Mapping[str, np.ndarray], attributes: Mapping[str, float]
    ) -> tuple[np.ndarray, ...]:
        q, k, v = (
            np.asarray(inputs[name], np.float64).swapaxes(1, 2 if letter == "s" else 1)
            for name, letter in zip("qkv", self.layout, strict=False)
        )
        if self.rotary != "none":
            cos, sin = (np.asarray(inputs[name], np.float64) for name in ("cos", "sin"))
            if self.form == "cached":
                cos, sin = (np.tile(each[..., None, :, :], 2) for each in (cos, sin))
            q = self._rotate(q, cos, sin)
            k = self._rotate(k, cos, sin) if self.rotary == "qk" else k
        if self.grouped:
            k, v = (np.repeat(each, q.shape[1] // each.shape[1], axis=1) for each in (k, v))
        scores = attributes["scale"] * (q @ k.swapaxes(2, 3))
        if self.softcap:
            scores = attributes["softcap"] * np.tanh(scores / attributes["softcap"])
        if self.mask:
            mask = np.asarray(inputs["mask"], np.float64)
            scores = np.where(mask != 0, mask, scores) if self.select else scores + mask
        with np.errstate(invalid="ignore"):
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
            weights /= weights.sum(axis=-1, keepdims=True)
        if self.empty == "safe":
            weights = np.nan_to_num(weights, nan=0.0)
        elif self.empty == "zero":
            weights = np.where((scores == -np.inf).all(axis=-1, keepdims=True), 0.0, weights)
        y = weights @ v
        return (y if self.layout[3] == "h" else y.swapaxes(1, 2),)

    def _rotate(self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        near, far = np.split(x, [cos.shape[-1]], axis=-1)
        half = near.shape[-1] // 2
        halves = np.s_[..., :half], np.s_[..., half:]
        first, second = (np.s_[..., ::2], np.s_[..., 1::2]) if self.form == "pairs" else halves
        other = np.empty_like(near)
        other[first], other[second] = -near[second], near[first]
        turned = near * cos + other * sin
        return np.concatenate((turned, far), axis=-1) if self.partial else turned

    def with_dtype(self, dtype: DType) -> Self:
        return dataclasses.replace(self, dtype=dtype)
