"""Models of usual shapes with seeded random weights, six layers deep, and their exports."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch.export import Dim

Dtype = Literal["f32", "f16"]

LAYERS = 6
WORDS = 8000
_LLAMA = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": WORDS,
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One model.

    Attributes:
        name: of the table's row.
        make: the module.
        image: whether it takes images of 224 x 224 instead of token ids.
    """

    name: str
    make: Callable[[], torch.nn.Module]
    image: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """Sequence lengths it is measured at; an image has its own."""
        return (197,) if self.image else (1, 16, 128, 512)

    def feed(self, length: int, dtype: Dtype = "f32") -> dict[str, np.ndarray]:
        """One input: {"x": int64[1, length]}, or an image {"x": [1, 3, 224, 224]} of the dtype."""
        random = np.random.default_rng(length)
        if self.image:
            image = random.standard_normal((1, 3, 224, 224))
            return {"x": image.astype(np.float16 if dtype == "f16" else np.float32)}
        return {"x": random.integers(0, WORDS, (1, length))}


def _config(kind: str, **settings: Any) -> Any:
    return getattr(transformers, f"{kind}Config")(**settings)


ARCHITECTURES = (
    Architecture(
        "bert",
        lambda: transformers.BertModel(_config("Bert", num_hidden_layers=LAYERS)),
    ),
    Architecture("gpt2", lambda: transformers.GPT2Model(_config("GPT2", n_layer=LAYERS))),
    Architecture("llama", lambda: transformers.LlamaModel(_config("Llama", **_LLAMA))),
    Architecture("qwen2", lambda: transformers.Qwen2Model(_config("Qwen2", **_LLAMA))),
    Architecture("gemma", lambda: transformers.GemmaModel(_config("Gemma", head_dim=64, **_LLAMA))),
    Architecture(
        "t5",
        lambda: transformers.T5EncoderModel(
            _config(
                "T5",
                d_model=768,
                d_kv=64,
                d_ff=2048,
                num_layers=LAYERS,
                num_heads=12,
                feed_forward_proj="gated-gelu",
                vocab_size=WORDS,
            )
        ),
    ),
    Architecture(
        "vit",
        lambda: transformers.ViTModel(_config("ViT", num_hidden_layers=LAYERS)),
        image=True,
    ),
)


class _Hidden(torch.nn.Module):
    """The last hidden state of a model without a cache."""

    def __init__(self, model: torch.nn.Module, image: bool) -> None:
        super().__init__()
        self.model = model
        self.image = image
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        named = {"pixel_values": x} if self.image else {"input_ids": x}
        return self.model(**named).last_hidden_state


def module(architecture: Architecture, dtype: Dtype = "f32") -> torch.nn.Module:
    """The model with weights of seed 0."""
    torch.manual_seed(0)
    made = _Hidden(architecture.make().eval(), architecture.image).eval()
    return made.half() if dtype == "f16" else made


def export(architecture: Architecture, folder: Path, dtype: Dtype = "f32") -> Path:
    """The model as ONNX, opset 18, dynamic batch and length; made once."""
    path = folder / f"{architecture.name}{'' if dtype == 'f32' else '_f16'}.onnx"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    example = torch.from_numpy(architecture.feed(16, dtype)["x"]).repeat(
        2, *([1] * (3 if architecture.image else 1))
    )
    made = module(architecture, dtype)
    axes = {0: Dim("batch", max=64)} | ({} if architecture.image else {1: Dim("seq", max=512)})
    fresh = path.with_suffix(".tmp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                made, (example,), str(fresh), dynamic_shapes={"x": axes},
                input_names=["x"], opset_version=18, external_data=False, verbose=False,
                dynamo=True,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError:  # T5's attention views a transposed tensor
            torch.onnx.export(
                made, (example,), str(fresh), dynamo=False, opset_version=17,
                input_names=["x"], dynamic_axes={"x": {0: "batch", 1: "seq"}},
            )  # fmt: skip
    fresh.replace(path)
    return path
