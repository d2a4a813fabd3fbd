"""The library inside onnxruntime: the same file with and without it, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

import fusenorm
from fusenorm.lower import Target, build_library
from fusenorm.ops import DOMAIN, DTYPES, Gated, Norm, OpSpec
from tests import graphs

pytestmark = pytest.mark.kernel

OPSET = 18
ATTRIBUTES = {"epsilon": 1e-5, "alpha": 1.7, "beta": 0.8}
SPECS: tuple[OpSpec, ...] = (
    Norm(),
    Norm(True, True, bias="f32"),
    Norm(skip=True),
    Norm(skip=True, alpha=True, beta=True, layer_scale=True),
    Norm(True, True, "f16", "f16", "f16"),
    Norm(dtype="f16", scale="f32"),
    Gated("gelu"),
    Gated("gelu_tanh"),
    Gated("swish"),
    Gated("swish", "pair"),
    Gated("gelu", "gate_up"),
    Gated("relu", "up_gate", "f16"),
    Gated("swish", "interleaved"),
)
LEVELS = (
    ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
)
INVALID = (ort.capi.onnxruntime_pybind11_state.InvalidArgument,)
Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ort") / "ops.so"
    build_library([*SPECS, Norm(True, True, "bf16", "bf16")], Target.host(), path)
    return path


def model(
    spec: OpSpec,
    *,
    vectors: dict[str, np.ndarray] | None = None,
    unused: bool = False,
    opset: int = OPSET,
    **extra: float,
) -> bytes:
    """One fused node and its function; `vectors` become initializers, the rest inputs."""
    held = vectors or {}
    outputs = [slot.name for slot in spec.outputs]
    listed = ["y", ""] if unused else outputs
    numbers = {name: ATTRIBUTES[name] for name in spec.attributes} | extra
    numbers = {name: value for name, value in numbers.items() if value is not None}
    reads = [slot.name for slot in spec.inputs]
    node = helper.make_node(spec.op_type, reads, listed, "the_node", domain=DOMAIN, **numbers)

    def info(name: str, dtype: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, int(DTYPES[dtype].onnx), None)

    graph = helper.make_graph(
        [node],
        "graph",
        [info(slot.name, slot.dtype) for slot in spec.inputs if slot.name not in held],
        [info(slot.name, slot.dtype) for slot in spec.outputs if slot.name in listed],
        [onnx.numpy_helper.from_array(array, name) for name, array in held.items()],
    )
    proto = helper.make_model(
        graph,
        functions=[spec.function(opset)],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    return proto.SerializeToString()


def session(
    content: bytes,
    library: Path | None,
    level: ort.GraphOptimizationLevel = ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    threads: int = 1,
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def values(
    spec: OpSpec, shape: tuple[int, ...], shapes: Shapes | None = None
) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    made = {}
    for slot in spec.inputs:
        usual = {
            "row": shape,
            "vector": shape[-1:],
            "packed": (*shape[:-1], 2 * shape[-1]),
        }[slot.layout]
        given = (shapes or {}).get(slot.name, usual)
        made[slot.name] = random.standard_normal(given).astype(DTYPES[slot.dtype].numpy)
    return made


def same(spec: OpSpec, mine: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    tolerance = 2e-6 if spec.dtype == "f32" else 4e-3
    for a, b in zip(mine, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        scale = max(1.0, float(np.abs(b.astype(np.float64)).max(initial=0)))
        assert (
            np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0) <= tolerance * scale
        )


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: str(level).rsplit(".", 1)[-1])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op_type)
def test_with_the_library_as_without(spec: OpSpec, level: object, library: Path) -> None:
    content = model(spec)
    feed = values(spec, (2, 3, 40))
    mine = session(content, library, level).run(None, feed)
    same(spec, mine, session(content, None, level).run(None, feed))


@pytest.mark.parametrize("opset", [13, 17, 20, 23])
def test_any_opset(opset: int, library: Path) -> None:
    for spec in SPECS[:2]:
        content, feed = model(spec, opset=opset), values(spec, (4, 24))
        mine = session(content, library).run(None, feed)
        same(spec, mine, session(content, None).run(None, feed))


def test_kernels_run_not_bodies(library: Path, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    running = ort.InferenceSession(model(SPECS[1]), options, providers=["CPUExecutionProvider"])
    running.run(None, values(SPECS[1], (2, 8)))
    assert f'"op_name" : "{SPECS[1].op_type}"' in Path(running.end_profiling()).read_text()


@pytest.mark.parametrize("spec", [spec for spec in SPECS if len(spec.outputs) == 2], ids=str)
def test_an_unused_sum(spec: OpSpec, library: Path) -> None:
    feed = values(spec, (5, 33))
    (mine,) = session(model(spec, unused=True), library).run(None, feed)
    whole = session(model(spec), library).run(["y"], feed)
    assert np.array_equal(mine, whole[0])


def test_constant_vectors(library: Path) -> None:
    spec = SPECS[1]
    feed = values(spec, (7, 48))
    held = {name: feed.pop(name) for name in ("scale", "bias")}
    mine = session(model(spec, vectors=held), library).run(None, feed)
    same(spec, mine, session(model(spec), library).run(None, feed | held))


SHAPES = [
    {"x": (2, 3, 4, 20), "skip": (4, 20)},
    {"x": (4, 20), "skip": (2, 3, 4, 20)},
    {"x": (2, 1, 4, 20), "skip": (2, 3, 4, 20)},
    {"x": (2, 3, 1, 20), "skip": (1, 3, 4, 20)},
    {"x": (2, 3, 4, 20), "skip": (20,)},
    {"x": (1, 20), "skip": (5, 20)},
    {"x": (2, 1, 3, 1, 20), "skip": (1, 4, 1, 2, 20)},
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("spec", [SPECS[1], SPECS[9]], ids=lambda spec: spec.op_type)
def test_leading_axes_broadcast(spec: OpSpec, shapes: Shapes, threads: int, library: Path) -> None:
    if isinstance(spec, Gated):
        shapes = {"gate": shapes["x"], "up": shapes["skip"]}
    feed = values(spec, (20,), shapes)
    mine = session(model(spec), library, threads=threads).run(None, feed)
    same(spec, mine, session(model(spec), None).run(None, feed))


@pytest.mark.parametrize("spec", [SPECS[1], SPECS[6], SPECS[9], SPECS[12]], ids=lambda s: s.op_type)
@pytest.mark.parametrize("shape", [(70, 1000), (1, 1, 100_003), (3, 50_000), (4000, 24)], ids=str)
def test_two_threads_compute_what_one_does(
    spec: OpSpec, shape: tuple[int, ...], library: Path
) -> None:
    feed = values(spec, shape)
    one = session(model(spec), library, threads=1).run(None, feed)
    two = session(model(spec), library, threads=2).run(None, feed)
    same(spec, two, session(model(spec), None).run(None, feed))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_large_broadcasts_in_parallel(library: Path) -> None:
    feed = values(SPECS[1], (64,), {"x": (9, 300, 64), "skip": (300, 64)})
    mine = session(model(SPECS[1]), library, threads=2).run(None, feed)
    same(SPECS[1], mine, session(model(SPECS[1]), None).run(None, feed))


@pytest.mark.parametrize("spec", [SPECS[1], SPECS[6], SPECS[10]], ids=lambda spec: spec.op_type)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_no_rows(spec: OpSpec, shape: tuple[int, ...], library: Path) -> None:
    for array in session(model(spec), library).run(None, values(spec, shape)):
        assert array.shape == shape


@pytest.mark.parametrize(
    ("spec", "shapes", "message"),
    [
        (SPECS[1], {"skip": (2, 3, 7)}, "'skip' has another last axis"),
        (SPECS[1], {"skip": (2, 3, 1)}, "'skip' has another last axis"),
        (SPECS[1], {"skip": (2, 5, 8)}, "'skip' cannot broadcast"),
        (SPECS[1], {"scale": (1,)}, "'scale' is not a vector"),
        (SPECS[1], {"scale": (3, 8)}, "'scale' is not a vector"),
        (SPECS[1], {"bias": (1, 1, 1, 8)}, "'bias' is not a vector"),
        (SPECS[0], {"x": ()}, "'x' is a scalar"),
        (SPECS[9], {"up": (2, 3, 1)}, "'up' has another last axis"),
        (SPECS[10], {"x": (2, 3, 9)}, "'x' has an odd last axis"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_shapes_that_are_refused(spec: OpSpec, shapes: Shapes, message: str, library: Path) -> None:
    running = session(model(spec), library)
    with pytest.raises(INVALID, match=message) as caught:
        running.run(None, values(spec, (2, 3, 8), shapes))
    assert f"fusenorm:{spec.op_type} (node 'the_node')" in str(caught.value)


@pytest.mark.parametrize("shape", [(8,), (1, 8)])
def test_vectors_may_have_leading_ones(shape: tuple[int, ...], library: Path) -> None:
    feed = values(SPECS[1], (2, 3, 8), {"scale": shape})
    mine = session(model(SPECS[1]), library).run(None, feed)
    same(SPECS[1], mine, session(model(SPECS[1]), None).run(None, feed))


def test_a_missing_attribute_is_refused(library: Path) -> None:
    with pytest.raises(Exception, match="needs the float attribute 'epsilon'"):
        session(model(SPECS[1], epsilon=None), library)  # type: ignore[arg-type]


def test_another_ops_attribute_is_refused(library: Path) -> None:
    with pytest.raises(Exception, match="does not take the attribute 'alpha'"):
        session(model(SPECS[1], alpha=2.0), library)


def test_bf16_sessions_are_created(library: Path) -> None:
    assert session(model(Norm(True, True, "bf16", "bf16")), library).get_outputs()


def test_shapes_are_inferred_through_the_op(library: Path, tmp_path: Path) -> None:
    """A symbol stays the same symbol, an unknown size does not become -1."""
    spec = SPECS[2]
    node = helper.make_node(
        spec.op_type, ["x", "skip", "scale"], ["t", ""], domain=DOMAIN, epsilon=1e-5
    )
    graph = helper.make_graph(
        [node, helper.make_node("Identity", ["t"], ["y"])],
        "graph",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", None, 8]),
            helper.make_tensor_value_info("skip", TensorProto.FLOAT, ["batch", None, 8]),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, [8]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    proto = helper.make_model(
        graph,
        functions=[spec.function(OPSET)],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    running = session(proto.SerializeToString(), library)
    shape = running.get_outputs()[0].shape
    assert shape[0] == "batch"
    assert not isinstance(shape[1], int)
    assert shape[2] == 8
    running.run(
        None,
        {name: np.ones((2, 3, 8), np.float32) for name in ("x", "skip")}
        | {"scale": np.ones(8, np.float32)},
    )


@pytest.mark.parametrize(
    ("options", "between"),
    [
        (fusenorm.Options(add_residual=True), {"LayerNorm_noscale", "Linear_relu_bias"}),
        (fusenorm.Options(add_residual=True, norm_linear=True), {"Linear_relu_bias_ln"}),
    ],
    ids=["sums", "sums and norms"],
)
def test_a_residual_stream_runs_from_map_to_map(
    tmp_path: Path, options: fusenorm.Options, between: set[str]
) -> None:
    """Two blocks, compiled: what is left between the maps are norms of one row, or nothing."""
    body = "\n".join(
        f"""p{i} = MatMul (n{i}, up{i})\n a{i} = Relu (p{i})\n f{i} = MatMul (a{i}, down{i})
        s{i + 1} = Add (s{i}, f{i})\n n{i + 1} = LayerNormalization (s{i + 1}, g, g)"""
        for i in range(2)
    )
    random = np.random.default_rng(0)
    sizes = {"g": (32,), "up0": (32, 96), "up1": (32, 96), "down0": (96, 32), "down1": (96, 32)}
    constants = {name: random.standard_normal(s).astype(np.float32) for name, s in sizes.items()}
    proto = graphs.model(
        f"n0 = LayerNormalization (s0, g, g)\n{body}",
        "float[b,s,32] s0",
        "float[b,s,32] n2",
        constants=constants,
    )
    compiled = fusenorm.compile(fusenorm.optimize(proto), tune=False, options=options)
    kinds = {node.op_type for node in compiled.model.graph}
    assert kinds == {"Linear_residual", "LayerNorm_bias", *between}
    running = fusenorm.load(compiled.save(tmp_path / "blocks.fnorm"), threads=2)
    for rows in ((1, 1), (2, 9), (5, 40)):
        feed = {"s0": random.standard_normal((*rows, 32)).astype(np.float32)}
        (want,), (made,) = graphs.run(proto, feed), running.run(None, feed)
        np.testing.assert_allclose(made, want, rtol=0, atol=1e-5 * float(np.abs(want).max()))


def test_two_sessions_share_the_library(library: Path) -> None:
    content, feed = model(SPECS[0]), values(SPECS[0], (3, 8))
    first, second = session(content, library), session(content, library)
    expected = first.run(None, feed)
    del first
    assert np.array_equal(second.run(None, feed)[0], expected[0])


def stream(depth: int, rows: int, columns: int) -> bytes:
    """A residual stream: `depth` SkipRMSNorms, each of the sum and the result of the last; then
    the largest number of each row of both.
    """
    spec = SPECS[2]
    nodes = [
        helper.make_node(
            spec.op_type,
            [f"s{i}", f"y{i}", "scale"],
            [f"y{i + 1}", f"s{i + 1}"],
            domain=DOMAIN,
            epsilon=1e-5,
        )
        for i in range(depth)
    ]
    nodes += [
        helper.make_node("ReduceMax", [f"{name}{depth}", "last"], [name]) for name in ("s", "y")
    ]
    shape = [rows, columns]
    graph = helper.make_graph(
        nodes,
        "stream",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("s0", "y0")],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, 1]) for name in ("s", "y")],
        [
            onnx.numpy_helper.from_array(np.linspace(0.5, 1.5, columns, dtype=np.float32), "scale"),
            onnx.numpy_helper.from_array(np.array([-1]), "last"),
        ],
    )
    proto = helper.make_model(
        graph,
        functions=[spec.function(OPSET)],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    return proto.SerializeToString()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_stream_in_place(library: Path, threads: int) -> None:
    content = stream(5, 300, 520)
    random = np.random.default_rng(0)
    feed = {name: random.standard_normal((300, 520)).astype(np.float32) for name in ("s0", "y0")}
    kept = {name: array.copy() for name, array in feed.items()}
    mine = session(content, library, threads=threads).run(None, feed)
    same(SPECS[2], mine, session(content, None).run(None, feed))
    assert all(np.array_equal(feed[name], kept[name]) for name in feed)


MEMORY = """
import sys
import numpy as np, onnxruntime as ort

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

options = ort.SessionOptions()
options.enable_cpu_mem_arena = options.enable_mem_pattern = False
options.intra_op_num_threads = 1
options.register_custom_ops_library(sys.argv[2])
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feed = {name: np.ones((4096, 2048), np.float32) for name in ("s0", "y0")}
before = peak()
session.run(None, feed)
print((peak() - before) * 1024 / feed["s0"].nbytes)
"""


def test_a_stream_needs_no_memory_of_its_own(library: Path, tmp_path: Path) -> None:
    """Of five pairs of tensors only the first takes memory."""
    path = tmp_path / "stream.onnx"
    path.write_bytes(stream(5, 4096, 2048))
    command = [sys.executable, "-c", MEMORY, str(path), str(library)]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(made.stdout) < 2.5
