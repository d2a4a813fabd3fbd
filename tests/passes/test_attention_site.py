"""What an attention is tried with before it is made, and what its operands must be."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from fusenorm.passes.attention_site import Refused, Site, rewrite_of
from fusenorm.passes.fuse_attention import FuseAttention
from fusenorm.passes.pattern import Miss
from fusenorm.passes.rewrite import Rewrite
from tests.graphs import outcome
from tests.passes.test_rotary import CACHED, NUMBERS, TAIL, WRITTEN

SWAP = "kk = Transpose <perm = [0, 1, 3, 2]> (k)\n"
REST = "d = MatMul (q, kk)\n e = Mul (d, c)\n a = Add (e, m)\n p = Softmax (a)\n y = MatMul (p, v)"
TURN = "qh = Transpose <perm = [0, 2, 1, 3]> (q)\n vh = Transpose <perm = [0, 2, 1, 3]> (v)\n"
TURNED = TURN + SWAP.replace("1, 3, 2", "2, 3, 1")
TURNED += REST.replace("(q, kk)", "(qh, kk)").replace("p, v)", "p, vh)")
STANDARD = "y = Attention <scale = 0.5> (q, k, v, m)"


def made(body: str, inputs: str) -> Rewrite:
    found = outcome(FuseAttention(), body, inputs, constants=NUMBERS, opset=23)
    assert isinstance(found, Rewrite), found
    assert found.rule == "attention"
    return found


@pytest.mark.parametrize(
    ("body", "inputs", "shapes"),
    [
        # one batch of masks is no size of the batch; an empty axis is tried with some
        (SWAP + REST, "float[b,6,s,4] q, float[b,6,t,4] k, float[b,6,t,3] v, float[1,1,s,t] m",
         [(2, 6, 5, 4), (2, 6, 7, 4), (2, 6, 7, 3), (1, 1, 5, 7)]),
        (SWAP + REST, "float[0,6,s,4] q, float[0,6,t,4] k, float[0,6,t,3] v, float[s,t] m",
         [(2, 6, 5, 4), (2, 6, 7, 4), (2, 6, 7, 3), (5, 7)]),
        # as many rows of k as of q; known sizes
        (SWAP + REST, "float[b,6,s,4] q, float[b,6,s,4] k, float[b,6,s,3] v, float[s,s] m",
         [(2, 6, 7, 4), (2, 6, 7, 4), (2, 6, 7, 3), (7, 7)]),
        (SWAP + REST, "float[9,8,s,4] q, float[b,h,t,4] k, float[b,h,11,3] v, float[s,t] m",
         [(9, 8, 5, 4), (9, 8, 11, 4), (9, 8, 11, 3), (5, 11)]),
        (SWAP + REST, "float[b,2,s,4] q, float[b,h,t,4] k, float[b,h,t,3] v, float[s,t] m",
         [(2, 2, 5, 4), (2, 2, 7, 4), (2, 2, 7, 3), (5, 7)]),
        # sizes without a name
        (SWAP + REST, "float[?,6,?,4] q, float[?,6,?,4] k, float[?,6,?,3] v, float[s,t] m",
         [(2, 6, 5, 4), (2, 6, 7, 4), (2, 6, 7, 3), (5, 7)]),
        # heads of different names are as many, unless they are shared
        (SWAP + REST, "float[b,h,s,4] q, float[b,g,t,4] k, float[b,f,t,3] v, float[s,t] m",
         [(2, 6, 5, 4), (2, 6, 7, 4), (2, 6, 7, 3), (5, 7)]),
        (STANDARD, "float[b,h,s,4] q, float[b,g,t,4] k, float[b,g,t,4] v, float[s,t] m",
         [(2, 6, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4), (5, 7)]),
        # widths that nothing tells
        (SWAP + REST, "float[b,6,s,d] q, float[b,6,t,d] k, float[b,6,t,e] v, float[s,t] m",
         [(2, 6, 5, 4), (2, 6, 7, 4), (2, 6, 7, 3), (5, 7)]),
        # rows first
        (TURNED, "float[b,s,h,4] q, float[b,t,h,4] k, float[b,t,h,3] v, float[s,t] m",
         [(2, 5, 6, 4), (2, 7, 6, 4), (2, 7, 6, 3), (5, 7)]),
        # positions: as many as rows of k
        (WRITTEN, "float[b,h,s,8] q, float[b,h,t,8] k, float[b,h,t,3] v, "
         "float[4,1,s,8] cos, float[4,1,s,8] sin",
         [(4, 6, 5, 8), (4, 6, 5, 8), (4, 6, 5, 3), (4, 1, 5, 8), (4, 1, 5, 8)]),
        (CACHED + TAIL, "float[b,6,s,8] q, float[b,6,t,8] k, float[b,6,t,3] v, "
         "float[b,s,4] cos, float[b,s,4] sin",
         [(2, 6, 5, 8), (2, 6, 5, 8), (2, 6, 5, 3), (2, 5, 4), (2, 5, 4)]),
        (CACHED + TAIL, "float[b,6,s,8] q, float[b,6,t,8] k, float[b,6,t,3] v, "
         "float[d,u,4] cos, float[d,u,4] sin",
         [(2, 6, 5, 8), (2, 6, 5, 8), (2, 6, 5, 3), (2, 5, 4), (2, 5, 4)]),
        (CACHED + TAIL, "float[b,h,s,8] q, float[b,h,t,8] k, float[b,h,t,3] v, "
         "float[4,s,4] cos, float[4,s,4] sin",
         [(4, 6, 5, 8), (4, 6, 5, 8), (4, 6, 5, 3), (4, 5, 4), (4, 5, 4)]),
    ],
)  # fmt: skip
def test_shapes_tried(body: str, inputs: str, shapes: list[tuple[int, ...]]) -> None:
    proposal = made(body, inputs)
    assert [proposal.shapes[value] for value in proposal.inputs] == shapes


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        (SWAP + REST, "float[b,6,s,4] q, float[b,6,1,4] k, float[b,6,t,3] v, float[s,t] m"),
        (SWAP + REST, "float[b,6,s,4] q, float[b,6,t,4] k, float[b,6,1,3] v, float[s,t] m"),
        (TURNED, "float[b,s,6,4] q, float[b,1,6,4] k, float[b,t,6,3] v, float[s,t] m"),
        (TURNED, "float[b,s,1,4] q, float[b,t,1,4] k, float[b,1,1,3] v, float[s,t] m"),
    ],
)
def test_one_row_that_might_be_repeated(body: str, inputs: str) -> None:
    found = outcome(FuseAttention(), body, inputs, constants=NUMBERS, opset=23)
    assert isinstance(found, Miss)
    assert found.refusal is not None
    assert (found.refusal.code, found.refusal.node) == ("shapes_not_proved", "y")
    assert found.refusal.detail == "the one row of k or v may be repeated"


def test_a_shape_of_sizes_that_no_operand_has() -> None:
    q = ir.val("q", dtype=ir.DataType.FLOAT, shape=ir.Shape(["b", 2, "s", 4]))
    like = ir.val("like", shape=ir.Shape(["b", 2, "s", 4]))
    given = ir.val("given")
    node = ir.node("MatMul", [q, q])
    site = Site(node, q, q, q, computed={given: like}, nodes=[node])
    rewrite = rewrite_of(node, site)
    assert rewrite.spec.op_type == "Attention_hhhh"
    assert rewrite.computed == {given: (2, 2, 7, 4)}
    for known, sought in (("s", "n"), (None, None)):
        q.shape, like.shape = ir.Shape(["b", 2, known, 4]), ir.Shape(["b", 2, sought, 4])
        with pytest.raises(Refused, match=r"^like has a size found nowhere else") as refused:
            rewrite_of(node, site)
        assert refused.value.refusal.code == "shapes_not_proved"
