# make demo    optimize a small Llama end to end (no torch needed)
# make test    the whole test suite
# make test-cuda-build  every CUDA kernel compiled, inspected and run on the CPU (an hour)
# make lint    ruff and mypy
# make test-olive  the Olive pass, in an environment of its own
# make test-serving  inference servers, each in an environment of its own
# make bench   whole models against onnxruntime, OpenVINO and torch.compile (an hour)
# make clean   remove what these made

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt

.PHONY: demo test test-cuda-build test-olive test-serving lint bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.core
	$(BIN)/fusenorm optimize models/llama_tiny.onnx -o build/demo/llama_tiny.fnorm

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) -m "not cuda and not serving"

test-cuda-build: .venv-cuda/.done
	FUSENORM_ALL_OPS=1 .venv-cuda/bin/python -m pytest -n $(JOBS) -k cuda -m "not cuda" tests/kernels tests/lower
	.venv-cuda/bin/python -m tests.cuda_inspection

test-olive: .venv-olive/.done
	.venv-olive/bin/python -m pytest tests/test_olive.py

test-serving: .venv-mlflow/.done
	.venv-mlflow/bin/python -m pytest -m serving tests/serving/test_mlflow.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv-bench/.done
	.venv-bench/bin/python -m tests.bench --plot build/bench/table.svg

clean:
	rm -rf $(VENV) .venv-olive .venv-mlflow .venv-bench build dist fusenorm.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .venv-cuda

$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	command -v cc || command -v gcc || command -v clang || $(INSTALL) ziglang # a linker
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(INSTALL) -e ".[torch,test,signing]"
	touch $@

.venv-olive/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-olive
	.venv-olive/bin/python -m pip install --quiet -c constraints.txt -e ".[olive]" pytest
	touch $@

.venv-mlflow/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-mlflow
	.venv-mlflow/bin/python -m pip install --quiet -c constraints.txt -e ".[mlflow]" pytest
	touch $@

.venv-cuda/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet -c constraints.txt -e ".[cuda,torch,test]"
	touch $@

.venv-bench/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet -c constraints.txt -e ".[torch,bench]"
	touch $@
