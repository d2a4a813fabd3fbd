from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from typer.testing import CliRunner, Result

from fusenorm import __version__, cli, compare, pipeline
from fusenorm.artifact import Library, read_npz
from fusenorm.errors import BadInput
from fusenorm.pipeline import DEFAULTS, Options


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def one_line(result: Result, code: int) -> str:
    """The one line an error is, after checking the exit code."""
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="module")
def garbage(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("garbage") / "garbage.onnx"
    path.write_bytes(b"\xff" * 100)
    return str(path)


@pytest.fixture(scope="module")
def optimized(llama, tmp_path_factory) -> Result:
    """optimize --emit onnx --json of the demo model."""
    path = tmp_path_factory.mktemp("optimized") / "out.onnx"
    return invoke("optimize", llama, "--emit", "onnx", "-o", path, "--json")


def test_optimize_json_is_one_object(optimized) -> None:
    assert optimized.exit_code == 0
    report = json.loads(optimized.stdout)
    assert {"model", "sites", "counts", "checks", "passes", "output"} <= report.keys()
    assert {"op", "status", "reason", "nodes", "output"} <= report["sites"][0].keys()
    assert report["counts"] == {"RMSNorm": 1, "SkipRMSNorm": 8, "GLU": 4}
    assert optimized.stderr == ""


def test_optimize_emits_a_portable_model(optimized, llama) -> None:
    path = json.loads(optimized.stdout)["output"]
    source, fused = onnx.load(llama), onnx.load(path)
    assert [(entry.domain, entry.version) for entry in source.opset_import] == [
        (entry.domain, entry.version) for entry in fused.opset_import if entry.domain != "fusenorm"
    ]
    ort.InferenceSession(path)
    result = invoke("verify", llama, path)
    assert result.exit_code == 0
    assert "agrees" in result.stdout


def test_optimize_report_for_people(llama, tmp_path) -> None:
    result = invoke("optimize", llama, "--emit", "onnx", "-o", tmp_path / "out.onnx")
    assert result.exit_code == 0
    assert "13 sites: 13 fused, 0 native, 0 refused" in result.stdout
    assert "SkipRMSNorm" in result.stdout


@pytest.mark.kernel
def test_optimize_to_an_artifact(llama, tmp_path) -> None:
    folder = tmp_path / "llama.fnorm"
    result = invoke("optimize", llama, "-o", folder, "--json", "--threads", "1")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["comparison"]["ok"]
    assert report["latency"]["rows"][0]["name"] == "fusenorm"
    assert invoke("verify", folder).exit_code == 0
    assert invoke("verify", llama, folder).exit_code == 0
    manifest = json.loads(invoke("inspect", folder, "--json").stdout)
    assert manifest["libraries"]
    assert set(manifest["lacks"].values()) == {None}


def test_optimize_never_overwrites_its_input(llama) -> None:
    line = one_line(invoke("optimize", llama, "--emit", "onnx", "-o", llama), 2)
    assert "the output would overwrite the model" in line


@pytest.mark.parametrize("emit", ["onnx", pytest.param("artifact", marks=pytest.mark.kernel)])
def test_nothing_is_saved_if_the_check_fails(llama, tmp_path, monkeypatch, emit) -> None:
    def shifted(self, inputs, run=compare._Side.run):
        outputs = run(self, inputs)
        return outputs if self.path == llama else {k: v + 1 for k, v in outputs.items()}

    monkeypatch.setattr(compare._Side, "run", shifted)
    out = tmp_path / "out"
    line = one_line(invoke("optimize", llama, "--emit", emit, "-o", out), 1)
    assert f"{llama} and {out} differ in 'logits'" in line
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_cannot_run_is_said_to_be_unchecked(tmp_path) -> None:
    text = """<ir_version: 8, opset_import: ["": 18]> g (float[n] x) => (float[a, b] y) {
        shape = Constant <value_ints: ints = [5, 26]> ()
        rows = Reshape (x, shape)
        gate = Sigmoid (rows)
        y = Mul (rows, gate)
    }"""
    model, out = tmp_path / "baked.onnx", tmp_path / "out.onnx"
    onnx.save(onnx.parser.parse_model(text), model)
    arguments = ("optimize", model, "--emit", "onnx", "-o", out, "--json")
    report = json.loads(invoke(*arguments).stdout)
    assert report["comparison"] is None
    assert "give sizes with --dim" in report["not_compared"]
    assert out.exists()
    report = json.loads(invoke(*arguments, "--dim", "n=130").stdout)
    assert report["comparison"]["ok"]
    assert report["comparison"]["b"] == str(out)
    np.savez(tmp_path / "in.npz", x=np.ones(4, np.float32))
    line = one_line(invoke(*arguments, "--inputs", tmp_path / "in.npz"), 2)
    assert "onnxruntime cannot run it on these inputs" in line


def test_explain_expects(llama) -> None:
    assert invoke("explain", llama, "--expect", 13).exit_code == 0
    line = one_line(invoke("explain", llama, "--expect", 12), 1)
    assert "llama_tiny.onnx: 13 sites fused, 12 expected" in line


def test_explain_json_equals_optimize(llama, optimized) -> None:
    explained = json.loads(invoke("explain", llama, "--json").stdout)
    assert explained["sites"] == json.loads(optimized.stdout)["sites"]


@pytest.mark.parametrize("command", ["optimize", "explain", "compile", "bench"])
@pytest.mark.parametrize("kind", ["missing", "garbage"])
def test_bad_models_are_one_line(command, kind, garbage, tmp_path) -> None:
    path = garbage if kind == "garbage" else tmp_path / "missing.onnx"
    assert str(path) in one_line(invoke(command, path), 2)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_bad_artifacts_are_one_line(command, tmp_path) -> None:
    assert "not a fusenorm artifact" in one_line(invoke(command, tmp_path), 2)


def test_verify_exits_with_1_on_a_mismatch(fused, tmp_path) -> None:
    model = onnx.load(fused)
    model.graph.node[-1].attribute[0].f = 1.0
    other = tmp_path / "other.onnx"
    onnx.save(model, other)
    result = invoke("verify", fused, other, "--json")
    assert "differ in 'y'" in one_line(result, 1)
    assert json.loads(result.stdout)["ok"] is False


def test_verify_takes_inputs_and_sizes(fused, feed, tmp_path) -> None:
    np.savez(tmp_path / "in.npz", **feed)
    given = json.loads(
        invoke("verify", fused, fused, "--inputs", tmp_path / "in.npz", "--json").stdout
    )
    assert given["outputs"][0]["shape"] == [2, 3, 8]
    sized = invoke("verify", fused, fused, "--dim", "seq=3", "--dim", "batch=1", "--json")
    assert json.loads(sized.stdout)["runs"] == [{"batch": 1, "seq": 3}]
    line = one_line(invoke("verify", fused, fused, "--dim", "seq"), 2)
    assert "--dim is 'seq': give NAME=SIZE" in line
    assert "no symbolic axis 'x'" in one_line(invoke("verify", fused, fused, "--dim", "x=1"), 2)


def test_run_saves_outputs(folder, feed, tmp_path) -> None:
    np.savez(tmp_path / "in.npz", **feed)
    inputs, output = tmp_path / "in.npz", tmp_path / "out.npz"
    result = invoke("run", folder, "--inputs", inputs, "-o", output, "--json")
    assert json.loads(result.stdout)["outputs"] == {"y": "float32[2, 3, 8]"}
    assert read_npz(output)["y"].shape == (2, 3, 8)
    assert "float32[2, 3, 8]" in invoke("run", folder, "--inputs", inputs).stdout
    del feed["ids"]
    np.savez(inputs, **feed)
    assert "input 'ids' is missing" in one_line(invoke("run", folder, "--inputs", inputs), 2)


def test_a_fallback_is_one_warning(artifact, feed, tmp_path, root) -> None:
    library = Library("v2", "x86_64", ("quantum",), None, (), tmp_path, content=b"\x7fELF")
    folder = dataclasses.replace(artifact, libraries=[library]).save(tmp_path / "quantum.fnorm")
    np.savez(tmp_path / "in.npz", **feed)
    command = [sys.executable, "-m", "fusenorm", "run", folder, "--inputs", tmp_path / "in.npz"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "float32[2, 3, 8]" in done.stdout
    assert done.stderr.startswith(f"warning: {folder}: lib/v2 ")
    assert done.stderr.count("\n") == 1
    arguments = ("run", folder, "--inputs", tmp_path / "in.npz", "--no-fallback")
    assert "lib/v2 " in one_line(invoke(*arguments), 2)


def test_bench_measures_an_artifact(folder, fused) -> None:
    result = invoke("bench", folder, "--model", fused, "--seconds", 0, "--json")
    rows = json.loads(result.stdout)["rows"]
    assert [row["name"] for row in rows] == ["fusenorm", "onnxruntime", "onnxruntime-noskip"]
    table = invoke("bench", folder, "--seconds", 0, "--against", "onnxruntime").stdout
    assert "1.00×" in table
    line = one_line(invoke("bench", folder, "--against", "abacus"), 2)
    assert "cannot measure against 'abacus'" in line


def test_inspect(folder) -> None:
    assert "ids: int32[batch, seq]" in invoke("inspect", folder).stdout
    assert json.loads(invoke("inspect", folder, "--json").stdout)["name"] == "fused"


def test_rules_document_themselves() -> None:
    rules = json.loads(invoke("rules", "--json").stdout)["rules"]
    names = [rule["name"] for rule in rules]
    assert len(set(names)) == len(names) > 0
    table = invoke("rules").stdout
    for rule in rules:
        assert rule["name"] in table
        assert invoke("rules", rule["name"]).stdout.strip() == rule["documentation"].strip()
    assert "no rule 'nonsense'" in one_line(invoke("rules", "nonsense"), 2)


def test_usage_errors_exit_with_2(llama) -> None:
    assert invoke("frobnicate").exit_code == 2
    assert invoke("optimize").exit_code == 2
    assert "--emit is 'gold'" in one_line(invoke("optimize", llama, "--emit", "gold"), 2)


@pytest.mark.parametrize("command", ["optimize", "compile"])
@pytest.mark.parametrize(
    ("flag", "changed"),
    [
        ("--no-fold-batch-norm", {"fold_batch_norm": ()}),
        ("--no-fold-norm", {"fold_norm": ()}),
        ("--no-concat-linear", {"concat_linear": False}),
        ("--centre-residual", {"centre_residual": True}),
        ("--add-residual", {"add_residual": True}),
        ("--norm-linear", {"norm_linear": True}),
        (None, {}),
    ],
)
def test_passes_are_switched(llama, monkeypatch, command, flag, changed) -> None:
    """The flag reaches optimize and compile, and nothing but its pass changes."""
    seen = []

    def stop(*_: object, options: Options, **__: object) -> None:
        seen.append(options)
        raise BadInput("stopped")

    optimized = pipeline.optimize(llama) if command == "optimize" else None
    monkeypatch.setattr(pipeline, "compile", stop)
    if optimized is not None:

        def optimize(*_: object, options: Options, **__: object) -> pipeline.Result:
            seen.append(options)
            return optimized

        monkeypatch.setattr(pipeline, "optimize", optimize)
    flags = [] if flag is None else [flag]
    one_line(invoke(command, llama, *flags), 2)
    assert set(seen) == {dataclasses.replace(DEFAULTS, **changed)}


def test_ray_takes_every_pass(llama) -> None:
    result = invoke("optimize", llama, "--ray", "local", "--no-fold-norm")
    assert "every pass" in one_line(result, 2)


def test_ray_is_an_extra(llama, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "fusenorm.fleet", raising=False)
    result = invoke("optimize", llama, "--ray", "local")
    assert "pip install 'fusenorm[ray]'" in one_line(result, 2)


def test_debug_shows_the_traceback(garbage) -> None:
    result = invoke("explain", garbage, "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


def test_as_a_module(root) -> None:
    command = [sys.executable, "-m", "fusenorm"]
    output = subprocess.run(
        [*command, "--version"], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert output == f"fusenorm {__version__}\n"


def test_closed_streams_are_no_error(root, llama) -> None:
    command = [sys.executable, "-m", "fusenorm", "explain", str(llama), "--expect", "13"]
    script = 'exec "$@" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", script, "sh", *command], cwd=root).returncode == 0
    command[-1] = "12"
    assert subprocess.run(["sh", "-c", script, "sh", *command], cwd=root).returncode == 1


def test_a_mistake_of_ours_is_one_line(monkeypatch, capsys) -> None:
    def fail() -> None:
        raise KeyError("oops")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(sys, "argv", ["fusenorm"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["fusenorm", "--debug"])
    with pytest.raises(KeyError):
        cli.main()


def test_progress_is_only_for_terminals(monkeypatch) -> None:
    with cli._progress(as_json=False) as step:
        assert step is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with cli._progress(as_json=True) as step:
        assert step is None
    with cli._progress(as_json=False) as step:
        assert step is not None
        step("fuse", 1, 2)
