# Everything runs in a virtual environment inside the checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PACKAGES := neobert neobert_kernels

# Both names: pip before 25.3 applies the first to isolated builds too, later ones want the second.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test bench table gpu budgets lint format clean

help:
	@echo "make setup   virtual environment in .venv, kernels built, package installed (editable)"
	@echo "make demo    a full-size NeoBERT beside plain PyTorch; a small one, trained to search: 5 minutes"
	@echo "make test    all tests"
	@echo "make bench   all benchmarks, into benchmarks/results/"
	@echo "make table   the throughput table alone, in ten minutes, and the README's figures from it"
	@echo "make gpu     on a machine with a CUDA GPU: its tests, then the benchmarks of ops and latency"
	@echo "make budgets refresh the registers and shared memory that each Triton kernel may use"
	@echo "make lint    ruff (check and format) and mypy"

setup: $(READY)

# Without build isolation the kernels are compiled against the very torch that will load them, and
# torch is downloaded once, not twice.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel ninja torch
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[dev]"
	$(BIN)/python -m neobert_kernels
	touch $@

demo: setup
	$(BIN)/python -m neobert.demo $(if $(MODEL),--model $(MODEL))

test: setup
	$(BIN)/python -m pytest tests

bench: setup
	$(BIN)/python -m pytest benchmarks --benchmark-only

table: setup
	$(BIN)/neobert bench --plot
	$(BIN)/python benchmarks/report.py --write

GPU_OPS := rms_norm swiglu rotary pooling cross_entropy attention epilogue
OP_BENCHMARKS := $(patsubst %,benchmarks/bench_%.py,$(GPU_OPS))
gpu: setup
	$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('no CUDA GPU')"
	$(BIN)/python -m neobert_kernels
	$(BIN)/python -m pytest tests/gpu
	$(BIN)/python -m pytest $(OP_BENCHMARKS) --benchmark-only
	$(BIN)/python -m pytest benchmarks/bench_host_cost.py benchmarks/bench_latency.py \
		-k "not test_compiled" --benchmark-only
	$(BIN)/python benchmarks/plot_attention.py
	$(BIN)/python benchmarks/report.py

budgets: setup
	$(BIN)/python tests/budgets.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build *.egg-info neobert_kernels/*.so neobert_kernels/build.json
