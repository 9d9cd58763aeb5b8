PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TOOLS := $(VENV)/.installed-tools
OLDEST := .venv-oldest/bin
PIP := pip install --quiet --disable-pip-version-check
OFFLINE := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline
# What needs neither launched processes nor tools outside this package.
FAST := arguments blockwise_loss calibration classification code_products coded_command coded_head coded_vocabulary compress_command compression \
	configuration conversion data decoder_refinement distillation evaluation experiments factorization factorized_causal_lm forward generation \
	modeling peft progress refinement reporting results fingerprints finished_model run_folder token_file training vocabulary_refinement

.PHONY: demo gpu-bundle test test-slow test-oldest soak lint format clean conformance

demo: $(INSTALLED)  ## train, compress, heal and compare a small GPT-2 on text that every Python carries; threads that wait give way
	OMP_WAIT_POLICY=PASSIVE $(BIN)/factorized-gpt2-demo --output_dir demo_output

gpu-bundle: $(INSTALLED)  ## what the tests and the benchmark need on a machine with a GPU and no network
	$(BIN)/python benchmarks/gpu_bundle.py

test: lint  ## lint, types, format check and tests, offline
	$(OFFLINE) $(BIN)/pytest -n 2 --dist worksteal --ignore tests/slow

test-slow: $(TOOLS)  ## what is slow by nature: launched processes, benchmarks in small, harnesses, ONNX, the walk-through
	$(OFFLINE) $(BIN)/pytest -n 2 --dist worksteal tests/slow

test-oldest: .venv-oldest/.installed  ## the fast tests with the oldest libraries that setup.cfg allows
	$(OFFLINE) $(OLDEST)/pytest -n 2 $(FAST:%=tests/*/test_%.py)

soak: $(TOOLS)  ## kills, a full disk, bad inputs and load, at full length: half an hour
	$(OFFLINE) $(BIN)/python soak/kills.py --kills 20
	$(OFFLINE) $(BIN)/python soak/launched.py
	$(OFFLINE) $(BIN)/python soak/bad_inputs.py --cases 2000
	$(OFFLINE) $(BIN)/python soak/load.py
	$(OFFLINE) $(BIN)/python soak/disk.py  # which needs the right to mount

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy factorized_gpt2

format: $(TOOLS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): setup.cfg constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) --constraint constraints.txt --editable '.[all]'
	touch $@

$(TOOLS): $(INSTALLED)
	$(BIN)/$(PIP) --constraint constraints.txt --editable '.[dev,ecosystem]'
	touch $@

.venv-oldest/.installed: setup.cfg constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/$(PIP) --constraint constraints-oldest.txt --editable '.[all]' hypothesis pytest pytest-xdist
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest demo_output build *.egg-info

conformance: $(TOOLS)  ## transformers' own common model tests, from its source archive: needs network
	$(BIN)/$(PIP) parameterized
	$(BIN)/python tests/conformance/run.py
