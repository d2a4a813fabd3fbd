# make demo    optimize a small Llama end to end (no torch needed)
# make test    the whole test suite
# make test-cuda-build  every CUDA kernel compiled, inspected and run on the CPU (over an hour)
# make lint    ruff and mypy
# make test-olive  the Olive pass, in an environment of its own
# make test-serving  the adapters on real servers, each in an environment of its own
# make bench   whole models against onnxruntime, OpenVINO and torch.compile (an hour)
# make gpu-bundle  build/fusenorm-gpu.tar.gz: kernels, tests and benchmark for a GPU machine
# make clean   remove what these made

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt

.PHONY: demo test test-cuda-build test-olive test-serving lint bench gpu-bundle clean
.DELETE_ON_ERROR:

demo: $(VENV)/.core
	$(BIN)/fusenorm optimize models/llama_tiny.onnx -o build/demo/llama_tiny.fnorm

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not cuda and not serving"

test-cuda-build: .venv-cuda/.done
	FUSENORM_ALL_OPS=1 .venv-cuda/bin/python -m pytest -n $(JOBS) --dist loadgroup -k cuda -m "not cuda" tests/kernels tests/lower
	.venv-cuda/bin/python -m tests.cuda_inspection

test-olive: .venv-olive/.done
	.venv-olive/bin/python -m pytest tests/test_olive.py

SERVERS := build/triton/.done .venv-triton/.done .venv-mlserver/.done .venv-kserve/.done

# A server that cannot be had is skipped, which its tests say.
test-serving: .venv-client/.done .venv-mlflow/.done
	-$(MAKE) --keep-going $(SERVERS) .venv-ray/.done
	.venv-client/bin/python -m pytest -m serving tests/serving/test_triton.py tests/serving/test_mlserver.py tests/serving/test_kserve.py
	if test -e .venv-ray/.done; then .venv-ray/bin/python -m pytest -m serving tests/serving/test_ray.py; else echo "skipped: Ray could not be installed"; fi
	.venv-mlflow/bin/python -m pytest -m serving tests/serving/test_mlflow.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv-bench/.done
	.venv-bench/bin/python -m tests.bench --plot build/bench/table.svg

gpu-bundle: .venv-cuda/.done
	.venv-cuda/bin/python -m tests.gpu_bundle

clean:
	rm -rf $(VENV) .venv-* build dist fusenorm.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

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

SERVING = -m pip install --quiet -c $(CONSTRAINTS)
CONSTRAINTS := constraints-serving.txt

# The tests and tritonclient; the other environments hold one server each.
.venv-client/.done: pyproject.toml constraints-serving.txt
	$(PYTHON) -m venv .venv-client
	.venv-client/bin/python $(SERVING) -e . pytest "tritonclient[grpc,http]"
	touch $@

# What the Python of a Triton server needs.
.venv-triton/.done: constraints-serving.txt
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python $(SERVING) onnxruntime
	touch $@

.venv-mlserver/.done: CONSTRAINTS := constraints-mlserver.txt
.venv-mlserver/.done .venv-kserve/.done: .venv-%/.done: constraints-serving.txt constraints-mlserver.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python $(SERVING) $* onnxruntime
	.venv-$*/bin/python $(SERVING) --no-deps -e .
	touch $@

.venv-ray/.done: CONSTRAINTS := constraints-ray.txt
.venv-ray/.done: pyproject.toml constraints-ray.txt
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python $(SERVING) -e ".[ray]" pytest
	touch $@

# The server out of NVIDIA's wheel, unpacked and not installed, with the stub for this Python; and
# perf_analyzer out of an older client's, with the two libraries it lacks.
build/triton/.done: constraints-serving.txt
	rm -rf build/triton build/wheels
	$(PYTHON) -m pip download --quiet --no-deps --dest build/wheels nvidia-pytriton==0.7.0
	$(PYTHON) -m pip download --quiet --no-deps --dest build/wheels tritonclient==2.49.0
	$(PYTHON) -m zipfile -e build/wheels/nvidia_pytriton-*.whl build/triton
	$(PYTHON) -m zipfile -e build/wheels/tritonclient-*.whl build/triton/perf
	cd build/triton/pytriton/tritonserver && cp python_backend_stubs/3.11/triton_python_backend_stub backends/python/ && chmod +x bin/tritonserver backends/python/triton_python_backend_stub
	cd build/triton/perf/tritonclient-*.data/data/bin && chmod +x perf_analyzer && cp perf_analyzer ../../../
	cd build/triton/perf && cp ../nvidia_pytriton.libs/libb64-*.so.0d libb64.so.0d && cp ../nvidia_pytriton.libs/libcudart-*.so.12* libcudart.so.12
	touch $@
