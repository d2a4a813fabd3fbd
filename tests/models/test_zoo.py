"""The zoo: each formula against torch in float64, each export against torch under onnxruntime."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import models
from models import export as exporting
from models.activations import ACTIVATIONS
from models.export import DTYPES, OPSETS, build, export, main
from models.ffn import (
    GLU_ACTIVATIONS,
    GatedFFN,
    Layout,
    PackedGatedFFN,
    feed_forward,
    swiglu_hidden,
)
from models.norms import BatchNorm, DeepNorm, LayerNorm, RMSNorm, deepnorm_alpha
from models.transformer import (
    Attention,
    Decoder,
    DecoderConfig,
    Encoder,
    EncoderConfig,
    rotary,
    rotate,
)
from models.zoo import ZOO, randomise

pytestmark = pytest.mark.model

SHIPPED = Path(models.__file__).with_name("llama_tiny.onnx")
SHAPES = ((2, 5), (3, 17), (1, 1))
"""(batch, sequence); the first is the shape of the trace."""

ERROR_IN_EPS = {"f32": 16, "f16": 2}
"""Bound of max|err| / max|y|, in eps of the type. onnxruntime computes f16 in f32 on a CPU."""

DYNAMO = (
    "layer_norm",
    "rms_norm",
    "rms_norm_gemma",
    "deep_norm",
    "batch_norm",
    "prenorm_block",
    "postnorm_block",
    "deepnorm_block",
    "sandwich_block",
    "ffn_leaky_relu",
    "ffn_gelu",
    "ffn_gelu_tanh_no_bias",
    "swiglu",
    "swiglu_beta",
    "swiglu_packed",
    "swiglu_packed_up_first",
    "decoder_gemma",
    "encoder",
)
"""What dynamo exports here (it needs seconds where torchscript needs milliseconds)."""


def double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def ort_session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def assert_agrees(name: str, model: onnx.ModelProto, dtype: str = "f32") -> None:
    """The file and the module in float64 (of the same rounded weights) agree at all SHAPES."""
    entry = ZOO[name]
    session = ort_session(model)
    oracle = entry.build().to(DTYPES[dtype]).double()
    for batch, seq in SHAPES:
        inputs = entry.example(batch, seq, seed=1, dtype=DTYPES[dtype])
        feed = {key: x.numpy() for key, x in zip(entry.inputs, inputs, strict=True)}
        (got,) = session.run([entry.output], feed)
        with torch.no_grad():
            want = oracle(*map(double, inputs)).numpy()
        assert got.dtype == {"f32": np.float32, "f16": np.float16}[dtype]
        assert got.shape == want.shape
        bound = ERROR_IN_EPS[dtype] * np.finfo(got.dtype).eps * np.abs(want).max()
        assert np.abs(got - want).max() <= bound, (batch, seq)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# --- formulas, float64 ---------------------------------------------------------------------


def test_layer_norm_is_torch_layer_norm() -> None:
    x = 3.0 * normal(4, 7, 24) + 5.0
    norm = randomise(LayerNorm(24, eps=0.1), seed=1).double()
    assert_same(norm(x), functional.layer_norm(x, (24,), norm.weight, norm.bias, 0.1))
    norm = randomise(LayerNorm(24, eps=0.1, bias=False), seed=1).double()
    assert_same(norm(x), functional.layer_norm(x, (24,), norm.weight, None, 0.1))


@pytest.mark.parametrize("gemma", [False, True])
def test_rms_norm_is_torch_rms_norm(gemma: bool) -> None:
    x = normal(4, 7, 24)
    norm = randomise(RMSNorm(24, eps=0.1, gemma=gemma), seed=1).double()
    weight = norm.weight + 1.0 if gemma else norm.weight
    assert_same(norm(x), functional.rms_norm(x, (24,), weight, 0.1))


def test_rms_norm_rounds_where_llama_and_gemma_round() -> None:
    x = normal(64, 96).half()
    wide = x.float()
    x_hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    llama = randomise(RMSNorm(96), seed=1).half()
    assert torch.equal(llama(x), llama.weight * x_hat.half())
    assert not torch.equal(llama(x), (llama.weight.float() * x_hat).half())
    gemma = randomise(RMSNorm(96, gemma=True), seed=1).half()
    assert torch.equal(gemma(x), (x_hat * (1.0 + gemma.weight.float())).half())
    assert not torch.equal(gemma(x), x_hat.half() * (1.0 + gemma.weight))


def test_f16_norms_do_not_overflow() -> None:
    x = torch.full((1, 64), 60000.0, dtype=torch.float16)
    x[0, ::2] = -60000.0
    assert torch.equal(RMSNorm(64).half()(x).abs(), torch.ones_like(x))
    assert torch.equal(LayerNorm(64).half()(x).abs(), torch.ones_like(x))


def test_deep_norm_scales_x_and_not_f() -> None:
    x, f = normal(3, 16), normal(3, 16, seed=1)
    norm = randomise(LayerNorm(16), seed=1).double()
    want = functional.layer_norm(2.5 * x + f, (16,), norm.weight, norm.bias, norm.eps)
    assert_same(DeepNorm(norm, alpha=2.5)(x, f), want)
    assert deepnorm_alpha(layers=8) == 2.0


def test_batch_norm_is_torch_batch_norm() -> None:
    ours = randomise(BatchNorm(6), seed=1).double()
    theirs = nn.BatchNorm1d(6).double()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for seed in range(2):
        x = 2.0 * normal(4, 5, 6, seed=seed) + 1.0
        assert_same(ours(x), theirs(x.transpose(1, 2)).transpose(1, 2))
    assert_same(ours.running_mean, theirs.running_mean)
    assert_same(ours.running_var, theirs.running_var)
    ours.eval()
    theirs.eval()
    assert_same(ours(x), theirs(x.transpose(1, 2)).transpose(1, 2))


ACTIVATION_ORACLES = {
    "identity": lambda x: x,
    "sigmoid": torch.sigmoid,
    "relu": functional.relu,
    "leaky_relu": lambda x: torch.maximum(x, 0.01 * x),
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "swish": functional.silu,
    "swish_beta": lambda x: x / (1.0 + torch.exp(-1.5 * x)),
    "quick_gelu": lambda x: x / (1.0 + torch.exp(-1.702 * x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_its_formula(name: str) -> None:
    x = torch.linspace(-9.0, 9.0, 501, dtype=torch.float64)
    assert_same(ACTIVATIONS[name]().double()(x), ACTIVATION_ORACLES[name](x))


def test_only_swish_beta_is_trained() -> None:
    trained = [name for name, act in ACTIVATIONS.items() if list(act().parameters())]
    assert trained == ["swish_beta"]


@pytest.mark.parametrize("kind", GLU_ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_glu_gates_with_its_activation_and_packs_both_ways(kind: str, bias: bool) -> None:
    x = normal(3, 8)
    glu = randomise(feed_forward(kind, 8, 12, bias), seed=1).double()
    assert isinstance(glu, GatedFFN)
    act = ACTIVATION_ORACLES[GLU_ACTIVATIONS[kind]]
    hidden = act(functional.linear(x, glu.gate.weight, glu.gate.bias)) * glu.up(x)
    assert_same(glu(x), functional.linear(hidden, glu.down.weight, glu.down.bias))

    orders: dict[Layout, tuple[nn.Linear, nn.Linear]] = {
        "gate_up": (glu.gate, glu.up),
        "up_gate": (glu.up, glu.gate),
    }
    for layout, halves in orders.items():
        packed = feed_forward(kind, 8, 12, bias, layout).double()
        assert isinstance(packed, PackedGatedFFN)
        state = {
            key: value for key, value in glu.state_dict().items() if key[:4] in ("act.", "down")
        }
        for part in ("weight", "bias")[: 1 + bias]:
            state[f"packed.{part}"] = torch.cat([getattr(half, part) for half in halves])
        packed.load_state_dict(state)
        assert_same(packed(x), glu(x))


@pytest.mark.parametrize(
    ("hidden", "multiple_of", "width"),
    [(4096, 256, 11008), (5120, 256, 13824), (96, 32, 256), (64, 32, 192), (3, 1, 8)],
)
def test_swiglu_hidden(hidden: int, multiple_of: int, width: int) -> None:
    assert swiglu_hidden(hidden, multiple_of) == width


def test_blocks_place_the_norm() -> None:
    x = normal(2, 3, 64)
    for name, step in {
        "prenorm_block": lambda b, v: v + b.f(b.norm(v)),
        "postnorm_block": lambda b, v: b.norm(v + b.f(v)),
        "deepnorm_block": lambda b, v: b.deep_norm.norm(4**0.25 * v + b.f(v)),
        "sandwich_block": lambda b, v: v + b.norm_out(b.f(b.norm_in(v))),
    }.items():
        blocks = ZOO[name].build().double()
        first, second = blocks.children()
        assert_same(blocks(x), step(second, step(first, x)))


# --- transformers --------------------------------------------------------------------------


def test_attention_is_torch_attention_with_grouped_heads() -> None:
    config = DecoderConfig(hidden=32, heads=4, kv_heads=2)
    attention = randomise(Attention(config), seed=1).double()
    x = normal(2, 6, 32)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    q, k, v = (
        linear(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        for linear in (attention.q, attention.k, attention.v)
    )
    heads = functional.scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True)
    assert_same(attention(x, causal), attention.o(heads.transpose(1, 2).flatten(2)))


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    q, k = normal(1, 24), normal(1, 24, seed=1)

    def score(m: int, n: int) -> float:
        rotated = [rotate(x, rotary(torch.tensor([p]), 24, 10000.0)) for x, p in ((q, m), (k, n))]
        return float((rotated[0] * rotated[1]).sum())

    assert score(0, 0) == pytest.approx(float((q * k).sum()), rel=1e-12)
    assert score(11, 4) == pytest.approx(score(7, 0), rel=1e-5)
    assert score(4, 11) != pytest.approx(score(7, 0), rel=1e-2)


@pytest.mark.parametrize("name", [name for name in ZOO if name.startswith("decoder")])
def test_decoder_is_causal(name: str) -> None:
    decoder = ZOO[name].build()
    (tokens,) = ZOO[name].example(2, 9)
    changed = tokens.clone()
    changed[:, 6] = (tokens[:, 6] + 1) % 256
    with torch.no_grad():
        before, after = decoder(tokens), decoder(changed)
    torch.testing.assert_close(after[:, :6], before[:, :6])
    assert (after[:, 6:] - before[:, 6:]).abs().amax(-1).min() > 1e-3


def test_gemma_scales_its_embedding() -> None:
    decoder = ZOO["decoder_gemma"].build()
    (tokens,) = ZOO["decoder_gemma"].example()
    seen: list[Tensor] = []
    decoder.layers[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        decoder(tokens)
        want = decoder.embedding(tokens) * 96**0.5
    torch.testing.assert_close(seen, [want])


def test_encoder_does_not_see_padding() -> None:
    encoder = ZOO["encoder"].build()
    tokens, mask = ZOO["encoder"].example(3, 9)
    assert mask.sum(-1).tolist() == [9, 8, 7]
    changed = torch.where(mask == 1, tokens, (tokens + 1) % 256)
    with torch.no_grad():
        before, after = encoder(tokens, mask), encoder(changed, mask)
        unmasked = encoder(tokens, torch.ones_like(mask))
    visible = mask == 1
    torch.testing.assert_close(after[visible], before[visible])
    assert (unmasked[1] - before[1]).abs().max() > 1e-3


def test_config_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="hidden 100"):
        Decoder(DecoderConfig(hidden=100, heads=8))
    with pytest.raises(ValueError, match="4 heads do not share 3"):
        Encoder(EncoderConfig(kv_heads=3))


# --- the zoo -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_every_norm_weight_and_offset_shows(name: str) -> None:
    entry = ZOO[name]
    module, inputs = entry.build(), entry.example(4, 16)
    with torch.no_grad():
        want = module(*inputs)
        assert 0.3 < want.std() < 4.0
        for key, parameter in module.named_parameters():
            if parameter.ndim != 1 or key.endswith(".k.bias"):
                continue  # a bias on k adds the same to every score of a row
            kept = parameter.clone()
            parameter.fill_(0.0 if key.endswith("bias") else 1.0)
            assert (module(*inputs) - want).abs().max() > 1e-2, key
            parameter.copy_(kept)


def test_seed_fixes_weights_and_inputs() -> None:
    entry = ZOO["swiglu"]
    same, other = entry.build(3).state_dict(), entry.build(4).state_dict()
    for key, value in entry.build(3).state_dict().items():
        assert torch.equal(value, same[key])
        assert not torch.equal(value, other[key])
    assert torch.equal(*entry.example(seed=3), *entry.example(seed=3))
    assert not torch.equal(*entry.example(seed=3), *entry.example(seed=4))


# --- exports -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_torchscript_export_agrees(name: str) -> None:
    model = build(name, exporter="torchscript")
    assert_agrees(name, model)


@pytest.mark.parametrize("name", DYNAMO)
def test_dynamo_export_agrees(name: str) -> None:
    assert_agrees(name, build(name, exporter="dynamo"))


@pytest.mark.parametrize(
    ("exporter", "opset"), [(e, o) for e, r in OPSETS.items() for o in (r[0], r[-1])]
)
def test_the_ends_of_the_opset_range(exporter: exporting.Exporter, opset: int) -> None:
    for name in ("rms_norm", "ffn_gelu", "swiglu_packed"):
        model = build(name, exporter=exporter, opset=opset)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
        assert_agrees(name, model)


@pytest.mark.parametrize(
    ("name", "exporter"),
    [
        *product(
            ("layer_norm", "rms_norm", "prenorm_block", "decoder", "encoder"), ["torchscript"]
        ),
        *product(("rms_norm_gemma", "geglu_tanh_packed"), ["dynamo"]),
    ],
)
def test_f16_export_agrees(name: str, exporter: exporting.Exporter) -> None:
    assert_agrees(name, build(name, dtype="f16", exporter=exporter), "f16")


@pytest.mark.parametrize("exporter", OPSETS)
def test_export_is_dynamic_named_and_free_of_traces(exporter: exporting.Exporter) -> None:
    model = build("deep_norm", exporter=exporter)
    for values, names in ((model.graph.input, ["x", "f"]), (model.graph.output, ["y"])):
        assert [value.name for value in values] == names
        for value in values:
            batch, sequence, hidden = value.type.tensor_type.shape.dim
            assert (batch.dim_param, sequence.dim_param) == ("batch", "sequence")
            assert hidden.dim_value == 64
    assert b".py" not in model.SerializeToString()


@pytest.mark.parametrize("exporter", OPSETS)
def test_export_writes_equal_bytes(
    tmp_path: Path, exporter: exporting.Exporter, recwarn: pytest.WarningsRecorder
) -> None:
    paths = [tmp_path / f"{name}.onnx" for name in "abc"]
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        model = export("rms_norm", path, exporter=exporter, seed=seed)
        assert onnx.load(path) == model
    first, second, other = (path.read_bytes() for path in paths)
    assert first == second != other
    assert sorted(tmp_path.iterdir()) == paths  # and no temporary file is left
    assert not recwarn.list


def test_norms_are_exported_decomposed() -> None:
    for exporter in OPSETS:
        ops = Counter(node.op_type for node in build("layer_norm", exporter=exporter).graph.node)
        assert ops["ReduceMean"] == 2
        assert not {"LayerNormalization", "RMSNormalization"} & set(ops)


# --- the shipped model ---------------------------------------------------------------------


def test_shipped_model_agrees_with_torch() -> None:
    assert SHIPPED.stat().st_size <= 2_000_000
    model = onnx.load(SHIPPED)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    assert b".py" not in SHIPPED.read_bytes()
    assert_agrees("decoder", model)


def test_shipped_model_holds_the_sites_of_four_layers() -> None:
    ops = Counter(node.op_type for node in onnx.load(SHIPPED).graph.node)
    assert ops["ReduceMean"] == ops["Pow"] == 9  # two RMSNorms a layer, one before the head
    assert ops["Sigmoid"] == ops["Softmax"] == 4
    assert ops["MatMul"] == 4 * (4 + 2 + 3) + 1


# --- the command line ----------------------------------------------------------------------


def run_module(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=SHIPPED.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def test_unknown_name_is_one_line_and_exit_2(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    done = run_module("-m", "models.export", "swiglue", "-o", str(path))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: swiglue: no such module")
    assert "swiglu" in line.partition("did you mean")[2]
    assert not path.exists()


def test_command_line_exports(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    flags = ["--opset", "19", "--dtype", "f16", "--seed", "0", "-o", str(path)]
    assert main(["rms_norm", *flags]) == 0
    assert capfd.readouterr() == ("", "")
    model = onnx.load(path)
    assert model.opset_import[0].version == 19
    assert_agrees("rms_norm", model, "f16")


@pytest.mark.parametrize(
    ("exporter", "opset", "reason"),
    [
        ("dynamo", 17, "writes opset 18 to 25, not 17"),
        ("torchscript", 21, "writes opset 9 to 20, not 21"),
    ],
)
def test_opset_out_of_range_is_one_line_and_exit_2(
    exporter: str, opset: int, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    arguments = ["glu", "-o", str(path), "--exporter", exporter, "--opset", str(opset)]
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: glu: the {exporter} exporter {reason}\n"
    assert not path.exists()


def test_what_the_exporter_refuses_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.onnx.OnnxExporterError("no such operator\nand a long graph")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    assert main(["glu", "-o", str(tmp_path / "model.onnx")]) == 2
    want = "error: glu: the dynamo exporter failed at opset 18, f32: no such operator\n"
    assert capsys.readouterr().err == want


def test_another_opset_than_asked_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    older = build("glu", opset=18, exporter="torchscript")
    monkeypatch.setattr(exporting, "_run_dynamo", lambda *_: older)
    path = tmp_path / "model.onnx"
    assert main(["glu", "--opset", "19", "-o", str(path)]) == 2
    want = "error: glu: the dynamo exporter wrote opset 18, not 19\n"
    assert capsys.readouterr().err == want
    assert not path.exists()


def test_missing_folder_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "missing" / "model.onnx"
    assert main(["glu", "--exporter", "torchscript", "-o", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert str(path) in line


def test_failed_write_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model.onnx"
    folder.mkdir()
    assert main(["glu", "--exporter", "torchscript", "-o", str(folder)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [folder]


def test_list_names_every_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(ZOO)
    assert all(line.endswith(entry.doc) for line, entry in zip(lines, ZOO.values(), strict=True))


def test_the_package_does_not_import_torch() -> None:
    done = run_module("-c", "import sys, models; print('torch' in sys.modules)")
    assert (done.returncode, done.stdout) == (0, "False\n")
