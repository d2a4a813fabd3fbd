"""Whole transformers with their modules replaced: the same outputs, the same tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fusenorm.torch
from fusenorm.compare import _tolerance

pytestmark = [pytest.mark.model, pytest.mark.kernel]

LAYERS = 2
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(head_dim=16, **SIZES)),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**SIZES)),
}
EPSILON = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def made(name: str, dtype: torch.dtype) -> nn.Module:
    """The model with seeded weights, its norms' and linear maps' away from where they start."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def logits_and_tokens(model: nn.Module, prompt: torch.Tensor) -> tuple[torch.Tensor, Any]:
    with torch.no_grad():
        logits = model(prompt).logits
    return logits, model.generate(prompt, max_new_tokens=64, do_sample=False)


# Not Phi3 in f16: it is told apart below.
CASES = [(name, dtype) for name in MODELS for dtype in EPSILON]
CASES.remove(("phi3", torch.float16))


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_replaced_model_says_the_same(name: str, dtype: torch.dtype) -> None:
    model = made(name, dtype)
    prompt = torch.randint(2, 256, (2, 12))
    logits, tokens = logits_and_tokens(model, prompt)
    done = fusenorm.torch.replace(model)
    glu = "glu_packed" if name == "phi3" else "glu"
    assert done.counts == {"rms_norm": 2 * LAYERS + 1, glu: LAYERS}, str(done)
    assert all(site.status == "fused" for site in done.sites), str(done)
    fused, fused_tokens = logits_and_tokens(model, prompt)
    assert tokens.shape == (2, 12 + 64)
    assert torch.equal(fused_tokens, tokens)
    error = (fused.double() - logits.double()).abs().max() / logits.double().abs().max()
    # By depth, as `fusenorm.compare` bounds an exported model; 30 nodes to a layer.
    assert error <= _tolerance(EPSILON[dtype], 30 * LAYERS)
    done.undo()
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, logits)


def test_phi3_in_f16_differs_by_the_order_of_a_sum() -> None:
    """One of its tokens is another: the order of roundings is the model's all the same.

    On the model's own activations every value of every fused module is bit for bit the model's,
    but for rows of a norm whose mean of squares, summed in another order, has another last bit in
    f32: with that mean the model's own steps round to what the kernel gives.
    """
    model = made("phi3", torch.float16)
    prompt = torch.randint(2, 256, (2, 12))
    fused = copy.deepcopy(model)
    done = fusenorm.torch.replace(fused)
    differing = []

    def compare(theirs: nn.Module, ours: nn.Module) -> None:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
            made = ours(*inputs)
            for row in (made != y).any(-1).nonzero().tolist():
                at = tuple(row)
                differing.append((module, inputs[0][at], made[at]))

        theirs.register_forward_hook(hook)

    for site in done.sites:
        compare(model.get_submodule(site.module), fused.get_submodule(site.module))
    logits_and_tokens(model, prompt)
    assert len(differing) <= 2  # of 870 rows of norms and 348 of gated units
    for module, x, y in differing:
        assert "Norm" in type(module).__name__
        wide = x.float()
        mean = wide.square().mean()
        means = [torch.nextafter(mean, mean.new_tensor(end)) for end in (0.0, torch.inf)]
        normed = [wide * torch.rsqrt(m + module.variance_epsilon) for m in means]
        assert any(torch.equal(module.weight * x_hat.half(), y) for x_hat in normed)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


def test_compile_and_export_trace_through_a_replaced_model() -> None:
    model = Logits(made("llama", torch.float32))
    done = fusenorm.torch.replace(model)
    prompt = torch.randint(2, 256, (2, 12))
    with torch.no_grad():
        wanted = model(prompt)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(prompt), wanted)
        axes = {"tokens": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
        program = torch.export.export(model, (prompt,), dynamic_shapes=axes)
        other = torch.randint(2, 256, (1, 7))
        assert torch.equal(program.module()(other), model(other))
    ops = [str(node.target) for node in program.graph.nodes if "fusenorm" in str(node.target)]
    assert len(ops) == sum(done.counts.values()) == 3 * LAYERS + 1
