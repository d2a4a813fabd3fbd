"""Equal claims are proved once, and claims are equal only if nothing a proof reads differs."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import fusenorm
from fusenorm.passes import Canonicalize, FuseNorm, Validator, validate
from fusenorm.passes.pattern import Refusal
from fusenorm.passes.rewrite import Rewrite
from fusenorm.passes.validate import Claim, find_flaw
from tests.bench.cost import Decoder
from tests.graphs import fused_ops, model

LAYER_NORM = """
  m = ReduceMean<axes = [-1]>(x)
  c = Sub(x, m)
  q = Mul(c, c)
  v = ReduceMean<axes = [-1]>(q)
  e = Add(v, eps)
  r = Sqrt(e)
  n = Div(c, r)
  a = Mul(n, gamma)
  y = Add(a, beta)
"""


def constants(width: int = 8, eps: float = 1e-5, dtype: type = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "eps": np.array(eps, dtype),
        "gamma": random.uniform(1.0, 1.5, width).astype(dtype),
        "beta": random.uniform(1.0, 1.5, width).astype(dtype),
    }


def graph(
    body: str = LAYER_NORM, shape: str = "float[b,s,8]", opset: int = 13, **changed: np.ndarray
) -> onnx.ModelProto:
    return model(body, f"{shape} x", f"{shape} y", opset=opset, constants=constants() | changed)


def proposal(proto: onnx.ModelProto) -> Rewrite:
    """The rewrite a norm rule proposes for a graph."""
    found: list[Rewrite] = []

    def record(rewrite: Rewrite, opset: int) -> Refusal:
        found.append(rewrite)
        return Refusal("recorded", "", "")

    FuseNorm(record)(Canonicalize()(ir.from_proto(proto)).model)
    return max(found, key=lambda rewrite: len(rewrite.nodes))


def key(proto: onnx.ModelProto) -> object:
    return Claim.of(proposal(proto), proto.opset_import[0].version).key


def test_names_and_the_numbers_of_scale_and_bias_do_not_matter() -> None:
    renamed = LAYER_NORM.replace("m = ", "mean = ").replace("(x, m)", "(x, mean)")
    other = graph(renamed, gamma=constants()["gamma"][::-1].copy(), beta=constants()["gamma"])
    assert key(graph()) == key(other)


WIDE = "float[b,s,16]"
HALF = {name: array.astype(np.float16) for name, array in constants().items()}


@pytest.mark.parametrize(
    "other",
    [
        graph(eps=np.array(1e-6, np.float32)),
        graph(eps=np.array([1e-5], np.float32)),
        graph(LAYER_NORM.replace("Mul(c, c)", "Pow(c, two)"), two=np.array(2, np.float32)),
        graph(LAYER_NORM.replace("Mul(n, gamma)", "Mul(gamma, n)")),
        graph(LAYER_NORM.replace("Add(a, beta)", "Add(a, gamma)")),
        graph(LAYER_NORM.replace("[-1]", "[2]")),
        graph(shape="float[b,8]"),
        graph(shape=WIDE, **constants(16)),
        graph(shape="float16[b,s,8]", **HALF),
        graph(gamma=10 * constants()["gamma"]),
        graph(gamma=constants()["gamma"].reshape(1, 8)),
        graph(gamma=np.array(2, np.float32)),
        graph(opset=14),
    ],
    ids=[
        "epsilon", "rank of epsilon", "operator", "order", "operand", "attribute", "rank",
        "width", "type", "magnitude", "shape of scale", "scalar scale", "opset",
    ],
)  # fmt: skip
def test_what_a_proof_reads_makes_another_claim(other: onnx.ModelProto) -> None:
    assert key(graph()) != key(other)


def test_a_made_up_scale_counts_by_its_numbers() -> None:
    two, three = (graph(gamma=np.array(number, np.float32)) for number in (2, 3))
    assert key(two) != key(three)


def wrong(right: Rewrite) -> list[Rewrite]:
    x, gamma, beta = right.inputs
    return [
        dataclasses.replace(right, attributes={"epsilon": 1e-4}),
        dataclasses.replace(right, spec=dataclasses.replace(right.spec, centred=False)),
        dataclasses.replace(right, inputs=(x, beta, gamma)),
    ]


@pytest.mark.parametrize("number", [0.0, 1.0])
def test_plain_weights_hide_nothing(number: float) -> None:
    """Scale and bias all 0, or all 1, make most mistakes vanish on the very constants."""
    plain = np.full(8, number, np.float32)
    right = proposal(graph(gamma=plain, beta=plain.copy()))
    check = Validator()
    assert check(right, 13) is None
    for rewrite in wrong(right):
        refusal = check(rewrite, 13)
        assert refusal is not None
        assert refusal.code == "check_failed"
        assert refusal.node == "y"
    assert check(right, 13) is None


def test_a_refusal_is_remembered_and_names_its_own_node() -> None:
    check = Validator()
    names = []
    for name in ("y", "z"):
        proto = model(
            LAYER_NORM.replace("y = ", f"{name} = "),
            "float[b,s,8] x",
            f"float[b,s,8] {name}",
            opset=13,
            constants=constants(),
        )
        refusal = check(wrong(proposal(proto))[0], 13)
        assert refusal is not None
        names.append(refusal.node)
    assert names == ["y", "z"]


def test_layers_of_one_shape_are_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = []

    def counting(claim: Claim, seed: int) -> str | None:
        evaluated.append(claim)
        return find_flaw(claim, seed)

    monkeypatch.setattr(validate, "find_flaw", counting)
    counts = []
    for layers in (2, 6):
        evaluated.clear()
        report = fusenorm.optimize(Decoder(layers).model()).report
        assert len(fused_ops(report)) == 3 * layers + 1
        counts.append(len(evaluated))
    assert counts[0] == counts[1]
