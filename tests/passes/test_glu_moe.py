"""The gated units of mixtures of experts, as exporters write them and as transformers has them."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import fusenorm
from tests.graphs import model, rows, run, same

HALF = "g, u = Split<axis = 2, num_outputs = 2>(h)"
SILU = "s = Sigmoid(g)\na = Mul(g, s)\nk = Mul(a, u)\n"
GPT_OSS = """
  g0 = Slice(h, zero, end, last, two)
  u0 = Slice(h, one, end, last, two)
  g = Clip(g0, "", high)
  u = Clip(u0, low, high)
  b = Mul(g, alpha)
  s = Sigmoid(b)
  a = Mul(g, s)
  u1 = Add(u, shift)
  k = Mul(u1, a)
"""
# x [n, 6], experts [n, 2] (the router's choice); four experts of width 8.
FORMS = {
    # Every expert on every token: [4, n, 6] x [4, 6, 16] + [4, 1, 16].
    "dense": "e = Expand(x, stack)\np = MatMul(e, w)\nh = Add(p, bias)\n{unit}y = MatMul(k, down)",
    # The weights of each token's experts: [2n, 1, 6] x [2n, 6, 16].
    "batched": """
      flat = Reshape(experts, minus)
      chosen = Gather<axis = 0>(w, flat)
      biases = Gather<axis = 0>(bias, flat)
      x3 = Unsqueeze(x, axis1)
      pairs = Concat<axis = 1>(x3, x3)
      tokens = Reshape(pairs, rows1)
      p = MatMul(tokens, chosen)
      h = Add(p, biases)
      {unit}
      back = Gather<axis = 0>(down, flat)
      y = MatMul(k, back)
    """,
    # The same with the vector on the right, the weights transposed: [2n, 16, 6] x [2n, 6, 1].
    "squeezed": """
      flat = Reshape(experts, minus)
      turned = Transpose<perm = [0, 2, 1]>(w)
      chosen = Gather<axis = 0>(turned, flat)
      x3 = Unsqueeze(x, axis1)
      pairs = Concat<axis = 1>(x3, x3)
      tokens = Reshape(pairs, columns)
      p = MatMul(chosen, tokens)
      h = Squeeze(p, last)
      {unit}
      k3 = Unsqueeze(k, axis1)
      back = Gather<axis = 0>(down, flat)
      y = MatMul(k3, back)
    """,
    # The tokens of one expert at a time.
    "loop": """
      here = Gather<axis = 0>(x, hits)
      w0 = Gather<axis = 0>(w, first)
      b0 = Gather<axis = 0>(bias, first)
      p = MatMul(here, w0)
      h = Add(p, b0)
      {unit}
      d0 = Gather<axis = 0>(down, first)
      y = MatMul(k, d0)
    """,
}
CONSTANTS = {
    "w": rows(4, 6, 16),
    "bias": rows(4, 1, 16, seed=1),
    "down": rows(4, 8, 6, seed=2),
    "stack": [4, 1, 1],
    "minus": [-1],
    "rows1": [-1, 1, 6],
    "columns": [-1, 6, 1],
    "axis1": [1],
    "hits": [1, 0, 2],
    "first": 0,
    "zero": [0],
    "one": [1],
    "two": [2],
    "end": [2**62],
    "last": [-1],
    "high": np.float32(7),
    "low": np.float32(-7),
    "alpha": np.float32(1.702),
    "shift": np.float32(1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("unit", "kind"),
    [
        (f"{HALF}\n{SILU}", "GLU_swish_gate_up"),
        (GPT_OSS, "GLU_swish_clampgate_plus1_interleaved"),
    ],
)
def test_experts_as_exporters_write_them(form: str, unit: str, kind: str) -> None:
    if form in ("squeezed", "loop"):
        unit = unit.replace("axis = 2", "axis = -1")
    body = FORMS[form].format(unit=unit)
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    used = {name: np.asarray(value) for name, value in CONSTANTS.items() if name in words}
    routed = "" if "experts" not in words else ", int64[n,2] experts"
    proto = model(body, f"float[n,6] x{routed}", "float[p,q,6] y", constants=used)
    if form == "loop":
        proto.graph.output[0].type.tensor_type.shape.dim.pop()
    feeds = {"x": rows(5, 6)}
    if routed:
        feeds["experts"] = np.array([[0, 1], [3, 2], [1, 2], [0, 3], [2, 1]])
    report = same(proto, feeds)
    assert [(site.status, site.attributes["kind"]) for site in report.sites] == [("fused", kind)]


# (module and class of transformers, what its gated unit becomes)
EXPERTS = [
    ("mixtral", "Mixtral", "GLU_swish_gate_up"),
    ("qwen2_moe", "Qwen2Moe", "GLU_swish_gate_up"),
    ("qwen3_moe", "Qwen3Moe", "GLU_swish_gate_up"),
    ("olmoe", "Olmoe", "GLU_swish_gate_up"),
    ("deepseek_v3", "DeepseekV3", "GLU_swish_gate_up"),
    ("gpt_oss", "GptOss", "GLU_swish_clampgate_plus1_interleaved"),
    ("deepseek_v4", "DeepseekV4", "GLU_swish_clampgate_gate_up"),
]
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 12,
    "moe_intermediate_size": 12,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
}


@pytest.mark.model
@pytest.mark.parametrize(("name", "prefix", "kind"), EXPERTS, ids=[case[0] for case in EXPERTS])
def test_the_experts_of_transformers(name: str, prefix: str, kind: str) -> None:
    torch = pytest.importorskip("torch")
    module, inputs = _experts(name, prefix, torch)
    dynamic = tuple({0: torch.export.Dim("tokens")} for _ in inputs)
    result = fusenorm.optimize(module, args=inputs, dynamic_shapes=dynamic)
    sites = [(site.status, site.attributes["kind"]) for site in result.report.sites]
    assert sites == [("fused", kind)]
    names = [str(value.name) for value in result.model.graph.inputs]
    feeds = {key: value.numpy() for key, value in zip(names, inputs, strict=True)}
    (got,) = run(ir.to_proto(result.model), feeds)
    with torch.no_grad():
        wanted = module(*inputs).numpy()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def _experts(name: str, prefix: str, torch: Any) -> tuple[Any, tuple[Any, ...]]:
    """A module of experts with random weights, and tokens, chosen experts and their weights."""
    package = pytest.importorskip(f"transformers.models.{name}")
    code = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    config = getattr(package, f"{prefix}Config")()
    for key, size in SIZES.items():
        if hasattr(config, key):
            setattr(config, key, size)
    config._experts_implementation = "batched_mm"
    module = getattr(code, f"{prefix}Experts")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 1.0, generator=generator)
    tokens = torch.randn(6, SIZES["hidden_size"], generator=generator)
    chosen = torch.randint(SIZES["num_experts"], (6, 2), generator=generator)
    return module, (tokens, chosen, torch.rand(6, 2, generator=generator))
