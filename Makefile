# Two commands for everybody: `make demo` shows what simtrain does, `make test` checks all of it. Both set themselves up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint types layers unit benchmark validate validate-gpu notebook clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

demo: $(READY)
	mkdir -p out
	$(BIN)/simtrain plan gpt2-small --cluster "4x rtx-3090" --global-batch 256 --timeline out/timeline.png --memory-plot out/memory.png --trace out/step.json
	$(BIN)/simtrain validate torch --quick

test: lint types layers unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

layers: $(READY)
	$(BIN)/lint-imports

unit: $(READY)
	$(BIN)/pytest -n 2 --dist loadgroup

benchmark: $(READY)
	$(BIN)/pytest -p benchmark benchmarks --override-ini addopts=-q

validate: $(READY)
	$(BIN)/simtrain validate published
	$(BIN)/simtrain validate torch --save validation/measured

# One GPU machine, in one call; its own Python with PyTorch, no network: `make validate-gpu PYTHON=python3 DEVICE=cuda`.
validate-gpu:
	PYTHON=$(PYTHON) validation/gpu_session.sh

notebook: $(READY)
	$(BIN)/python notebooks/execute.py

clean:
	rm -rf $(VENV) out dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
