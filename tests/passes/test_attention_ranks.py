"""Attention whose heads are no axis of their own: three axes, or heads in groups."""

from __future__ import annotations

import itertools

import onnx
import pytest

from fusenorm.passes.fuse_attention import FuseAttention
from tests.graphs import model, proposed
from tests.passes.test_fuse_attention import fuse
from tests.passes.test_rotary import HALVES, NUMBERS, SUM

# By rank, the orders in which rows come first, and heads again.
ORDERS = {3: ([1, 0, 2], [1, 0, 2]), 5: ([0, 3, 1, 2, 4], [0, 2, 3, 1, 4])}
LETTERS = ["".join(letters) for letters in itertools.product("hs", repeat=4)]


def dims(letter: str, *sizes: object) -> str:
    """[..., heads, rows, columns] of a heads-first or sequence-first operand."""
    *heads, rows, columns = sizes
    order = [*heads, rows] if letter == "h" else [rows, *heads]
    lead = ["b"] if len(sizes) == 4 else []
    return ",".join(map(str, [*lead, *order, columns]))


def heads(rank: int, name: str) -> tuple[object, ...]:
    return ("h",) if rank == 3 else (2, 3 if name == "q" else 1)


def written(rank: int, letters: str, mask: str = "", turn: bool = False) -> tuple[str, str, str]:
    """Body, inputs and output of an attention whose operands and y have these layouts."""
    first, back = ORDERS[rank]
    last = [*range(rank - 2), rank - 1, rank - 2]
    lines, inputs, names = [], [], []
    for name, letter, rows, columns in zip("qkv", letters, "stt", (8, 8, 5), strict=False):
        rows = "s" if turn else rows
        inputs.append(f"float[{dims(letter, *heads(rank, name), rows, columns)}] {name}")
        if letter == "s":
            lines.append(f"{name}h = Transpose <perm = {back}> ({name})")
            name += "h"
        if turn and not name.startswith("v"):
            lines.append((HALVES + SUM).format(name))
            name += "t"
        names.append(name)
    q, k, v = names
    lines += [f"kk = Transpose <perm = {last}> ({k})", f"d = MatMul ({q}, kk)"]
    lines.append("e = Mul (d, c)\n a = Add (e, m)" if mask else "a = Mul (d, c)")
    lines.append("p = Softmax <axis = -1> (a)")
    if letters[3] == "s":
        lines.append(f"o = MatMul (p, {v})\n y = Transpose <perm = {first}> (o)")
    else:
        lines.append(f"y = MatMul (p, {v})")
    inputs += [f"float[{mask}] m"] * bool(mask) + ["float[s,8] cos", "float[s,8] sin"] * turn
    out = f"float[{dims(letters[3], *heads(rank, 'q'), 's', 5)}] y"
    return "\n".join(lines), ", ".join(inputs), out


def fused(body: str, inputs: str, out: str) -> tuple[onnx.ModelProto, list[str], set[str]]:
    used = {name: array for name, array in NUMBERS.items() if f" {name}" in body.replace("(", " ")}
    return fuse(model(body, inputs, out, constants=used))


@pytest.mark.parametrize("letters", LETTERS)
def test_three_axes(letters: str) -> None:
    for mask in ("", "h,s,t", "1,s,t", "s,t", "t"):
        after, found, codes = fused(*written(3, letters, mask))
        assert (found, codes) == ([f"Attention_{letters}{'_mask' if mask else ''}"], set())
        kinds = [node.op_type for node in after.graph.node]
        assert kinds.count("Unsqueeze") == 3
        assert kinds.count("Squeeze") == 1
    _, found, codes = fused(*written(3, letters, turn=True))
    assert (found, codes) == ([f"Attention_{letters}_rotary_qk"], set())


@pytest.mark.parametrize("mask", ["", "s,t", "t", "1,s,t", "1,1,s,t"])
def test_heads_in_groups(mask: str) -> None:
    after, found, codes = fused(*written(5, "ssss", mask))
    assert (found, codes) == ([f"Attention_ssss{'_mask' if mask else ''}_grouped"], set())
    assert [node.op_type for node in after.graph.node].count("Reshape") == 4


def test_heads_in_groups_that_turn() -> None:
    _, found, codes = fused(*written(5, "ssss", "s,s", turn=True))
    assert (found, codes) == (["Attention_ssss_mask_grouped_rotary_qk"], set())


def test_heads_in_groups_with_heads_of_their_own() -> None:
    body, inputs, out = written(5, "ssss")
    _, found, codes = fused(body, inputs.replace("t,2,1,", "t,2,3,"), out)
    assert (found, codes) == (["Attention_ssss"], set())


def test_one_head_without_a_batch_for_all() -> None:
    body, inputs, out = written(3, "hhhh")
    inputs = inputs.replace("h,s", "6,s").replace("h,t", "1,t")
    _, found, codes = fused(body, inputs, out.replace("h,s", "6,s"))
    assert (found, codes) == (["Attention_hhhh_grouped"], set())


@pytest.mark.parametrize(
    ("rank", "letters", "mask", "old", "new", "found"),
    [
        # groups that are not one axis with their heads
        *((5, letters, "", "", "", "rank") for letters in LETTERS if letters != "ssss"),
        (5, "ssss", "", "2,3,8] q", "g,3,8] q", "rank"),
        (5, "ssss", "", "2,3,8] q", "2,h,8] q", "rank"),
        (5, "ssss", "", "t,2,1,5] v", "t,2,3,5] v", "rank"),
        (5, "ssss", "", "t,2,1,", "t,1,1,", "rank"),
        (5, "ssss", "", "1,5] v", "1,e] v", "rank"),
        (5, "ssss", "", "8]", "e]", "rank"),
        (5, "ssss", "", "8]", "0]", "rank"),
        # masks that differ between them
        (5, "ssss", "3,s,t", "", "", "rank"),
        (5, "ssss", "2,1,s,t", "", "", "rank"),
        (5, "ssss", "1,1,1,s,t", "", "", "rank"),
        # operands of other ranks
        (3, "hhhh", "", "h,t,8] k", "b,h,t,8] k", "keys"),
        (3, "hhhh", "", "h,t,5] v", "t,5] v", "rank"),
        (3, "hhhh", "", "h,t,5] v", "b,h,t,5] v", "rank"),
        (3, "hhhh", "b,h,s,t", "", "", "rank"),
    ],
)
def test_refused(rank: int, letters: str, mask: str, old: str, new: str, found: str) -> None:
    body, inputs, _ = written(rank, letters, mask)
    if found == "keys":
        body = body.replace("perm = [0, 2, 1]", "perm = [0, 1, 3, 2]")
    inputs = inputs.replace(old, new)
    assert proposed(FuseAttention(), body, inputs, constants=NUMBERS) == found


@pytest.mark.parametrize(
    ("rank", "table", "found"),
    [
        *((5, table, "ssss_grouped_rotary_qk") for table in ("1,s,8", "1,1,s,8")),
        *((5, table, "") for table in ("b,1,s,8", "2,1,s,8")),
        *((3, table, "ssss_rotary_qk") for table in ("8", "1,s,8")),
        (3, "h,s,8", "hhss"),
    ],
)
def test_tables_of_other_ranks(rank: int, table: str, found: str) -> None:
    body, inputs, _ = written(rank, "ssss", turn=True)
    inputs = inputs.replace("float[s,8]", f"float[{table}]")
    kind = proposed(FuseAttention(), body, inputs, constants=NUMBERS)
    assert kind == (f"Attention_{found}" if found else "rank")


def test_the_standard_rotary_embedding_of_three_axes_counts_heads_otherwise() -> None:
    body, inputs, _ = written(3, "hhhh")
    body = "qt = RotaryEmbedding <num_heads = 1> (q, cos, sin)\n" + body.replace("(q,", "(qt,")
    inputs += ", float[s,4] cos, float[s,4] sin"
    found = proposed(FuseAttention(), body, inputs, constants=NUMBERS, opset=23)
    assert found == "Attention_hhhh"
