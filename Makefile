# make demo    optimize a small Llama end to end (no torch needed)
# make test    the whole test suite
# make lint    ruff and mypy
# make clean   remove what these made

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.core
	$(BIN)/fusenorm optimize models/llama_tiny.onnx -o build/demo/llama_tiny.fnorm

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) -m "not cuda and not serving"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist fusenorm.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	command -v cc || command -v gcc || command -v clang || $(INSTALL) ziglang # a linker
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(INSTALL) -e ".[torch,test]"
	touch $@
