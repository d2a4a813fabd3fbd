"""The tree against the rules it is laid out by."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

HEAVY = {"tvm", "tvm_ffi", "torch", "onnxruntime", "onnx", "onnx_ir"}

# module prefix -> the fusenorm modules it may import, the closest prefix counts
MAY_IMPORT = {
    "fusenorm.errors": (),
    "fusenorm.signature": ("errors",),
    "fusenorm.model_io": ("errors",),
    "fusenorm.artifact": ("errors", "signature", "model_io"),
    "fusenorm.ops": ("errors",),
    "fusenorm.passes": ("errors", "ops"),
    "fusenorm.kernels": ("errors", "ops"),
    "fusenorm.lower": ("errors", "ops", "kernels", "artifact"),
    "fusenorm.difference": (),
    "fusenorm.runtime": ("errors", "signature", "artifact", "difference"),
    "fusenorm.runtime.direct": ("errors", "ops", "kernels", "runtime.sealed"),
    "fusenorm.cache": ("errors", "artifact"),
    "fusenorm.torch": "errors cache ops passes kernels lower artifact runtime".split(),
    "fusenorm.olive": ("pipeline",),
    "fusenorm.serving": ("errors", "signature", "difference", "artifact", "runtime"),
}
# module prefix -> packages from outside it must not import at all
MUST_NOT_IMPORT = {
    "fusenorm.ops": {"tvm", "tvm_ffi", "torch", "onnxruntime"},
    "fusenorm.passes": {"tvm", "tvm_ffi", "torch"},
    "fusenorm.kernels": {"onnx_ir", "onnxruntime", "torch"},
    "fusenorm.artifact": {"tvm", "tvm_ffi", "torch", "onnxruntime"},
    "fusenorm.runtime": {"tvm", "torch", "onnx_ir"},
    "fusenorm.torch": {"tvm", "tvm_ffi", "onnxruntime"},
    "fusenorm.pipeline": {"tvm", "tvm_ffi"},
    "fusenorm.cli": {"tvm", "tvm_ffi", "torch", "onnx_ir"},
}


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    for top, name in ((root / "fusenorm", "fusenorm"), (root / "passes", "fusenorm.passes")):
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top).with_suffix("").parts
            if name == "fusenorm" and parts[0] == "passes":
                continue
            yield ".".join((name, *(part for part in parts if part != "__init__"))), path


def imports(path: Path) -> Iterator[str]:
    """Absolute names a file imports, inside functions and for type checking too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "fusenorm":
                yield from (f"fusenorm.{alias.name}" for alias in node.names)
            else:
                yield node.module


def rule(table: dict[str, object], module: str) -> object | None:
    keys = [key for key in table if module == key or module.startswith(f"{key}.")]
    return table[max(keys, key=len)] if keys else None


def under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def test_packages_are_the_tree(root: Path) -> None:
    with open(root / "pyproject.toml", "rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    found = {
        ".".join(path.parent.relative_to(root).parts)
        for path in (root / "fusenorm").rglob("__init__.py")
    }
    assert sorted(found | {"fusenorm.passes"}) == listed


def test_passes_is_one_tree(root: Path) -> None:
    link = root / "fusenorm" / "passes"
    assert link.is_symlink()
    assert link.readlink() == Path("../passes")


def test_layers_import_downwards(root: Path) -> None:
    wrong = []
    for module, path in modules(root):
        allowed = rule(MAY_IMPORT, module)
        if allowed is None:
            continue
        own = module if module in MAY_IMPORT else ".".join(module.split(".")[:2])
        prefixes = (own, *(f"fusenorm.{name}" for name in allowed))
        wrong += [
            f"{module} imports {name}"
            for name in imports(path)
            if name.startswith("fusenorm.") and name != "fusenorm.__version__"
            if not under(name, prefixes)
        ]
    assert wrong == []


def test_layers_keep_out_of_other_packages(root: Path) -> None:
    wrong = [
        f"{module} imports {name}"
        for module, path in modules(root)
        for name in imports(path)
        if name.split(".")[0] in (rule(MUST_NOT_IMPORT, module) or ())
        and module != "fusenorm.runtime.direct"
    ]
    assert wrong == []


def test_olive_is_for_its_pass_only(root: Path) -> None:
    used = {
        module: {name.split(".")[0] for name in imports(path)} for module, path in modules(root)
    }
    assert [module for module, names in used.items() if "olive" in names] == ["fusenorm.olive"]


def loaded_after(code: str, root: Path) -> set[str]:
    """Top-level packages in sys.modules after running `code` in a fresh interpreter."""
    script = (
        f"import sys\n{code}\nprint('\\n'.join({{name.split('.')[0] for name in sys.modules}}))"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    return set(output.split())


def test_importing_fusenorm_is_light(root: Path) -> None:
    assert loaded_after("import fusenorm, fusenorm.cli", root) & HEAVY == set()


def test_the_runtime_needs_no_compiler(root: Path) -> None:
    code = "import fusenorm; fusenorm.load"
    assert loaded_after(code, root) & (HEAVY - {"onnxruntime"}) == set()


def test_the_torch_ops_need_neither_compiler_nor_onnxruntime(root: Path) -> None:
    code = "import fusenorm.torch"
    assert loaded_after(code, root) & {"tvm", "onnxruntime"} == set()


def test_optimising_to_onnx_needs_no_compiler(root: Path) -> None:
    code = "import fusenorm; fusenorm.explain('models/llama_tiny.onnx')"
    assert loaded_after(code, root) & {"tvm", "tvm_ffi", "torch"} == set()


def test_public_names_resolve() -> None:
    import fusenorm

    assert {name for name in fusenorm.__all__ if not hasattr(fusenorm, name)} == set()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fusenorm.nonsense


def test_constraints_pin_every_dependency(root: Path) -> None:
    pins = re.findall(r"^([A-Za-z0-9_.-]+)==", (root / "constraints.txt").read_text(), re.M)
    pinned = {name.lower().replace("_", "-") for name in pins}
    with open(root / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    extras = itertools.chain(*project["optional-dependencies"].values())
    wanted = [*project["dependencies"], *extras]
    names = {re.split(r"[<>=!~\[; ]", text)[0].lower().replace("_", "-") for text in wanted}
    assert names <= pinned
