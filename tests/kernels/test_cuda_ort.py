"""The custom ops of the CUDA provider on emulated kernels, registered as the CPU provider's."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusenorm.lower import Target
from fusenorm.lower.library import cuda_source
from fusenorm.lower.table import table
from fusenorm.ops import Gated, Norm, OpSpec
from tests.kernels.emulated import SHIMS, compile_parts
from tests.lower.test_onnxruntime import SHAPES, Shapes, model, same, session, values

pytestmark = pytest.mark.kernel

SPECS: tuple[OpSpec, ...] = (
    Norm(True, True, bias="f32"),
    Gated("swish", "pair"),
    Gated("gelu"),
    Gated("swish", "gate_up"),
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("provider")
    places = [(spec, "cuda") for spec in SPECS]
    (folder / "fusenorm_table.h").write_text(table(places, Target.host()), encoding="utf-8")
    text = cuda_source(SPECS, dict.fromkeys(SPECS, (20, 40, 20000)))
    return compile_parts(text, folder, SHIMS, ["-DCUDA_PROVIDER=NULL", f"-I{folder}"])


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op_type)
@pytest.mark.parametrize(
    "shape", [(2, 3, 40), (7, 13), (0, 8), (2, 0, 8), (1, 1, 5000), (1, 2, 20000)], ids=str
)
def test_with_the_library_as_without(spec: OpSpec, shape: tuple[int, ...], library: Path) -> None:
    content, feed = model(spec), values(spec, shape)
    mine = session(content, library).run(None, feed)
    same(spec, mine, session(content, None).run(None, feed))


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS[:2], ids=lambda spec: spec.op_type)
def test_leading_axes_broadcast(spec: OpSpec, shapes: Shapes, library: Path) -> None:
    if isinstance(spec, Gated):
        shapes = {"gate": shapes["x"], "up": shapes["skip"]}
    feed = values(spec, (20,), shapes)
    mine = session(model(spec), library).run(None, feed)
    same(spec, mine, session(model(spec), None).run(None, feed))


def test_an_unused_sum_and_constant_vectors(library: Path) -> None:
    feed = values(SPECS[0], (5, 33))
    held = {name: feed[name] for name in ("scale", "bias")}
    whole = session(model(SPECS[0]), library).run(["y"], feed)
    rest = {name: feed[name] for name in feed if name not in held}
    (mine,) = session(model(SPECS[0], vectors=held, unused=True), library).run(None, rest)
    assert mine.tobytes() == whole[0].tobytes()


def test_both_rows_of_the_table_have_their_provider() -> None:
    places = [(SPECS[2], "cpu"), (SPECS[2], "cuda")]
    text = table(places, Target.host())
    assert "OP_COUNT = 2" in text
    assert "#define HAS_CUDA 1" in text
    assert '"Gelu", __tvm_ffi_fusenorm_Gelu, __tvm_ffi_fusenorm_Gelu, CPU' in text
    assert '"Gelu", __tvm_ffi_fusenorm_cuda_Gelu, __tvm_ffi_fusenorm_cuda_Gelu, CUDA' in text
