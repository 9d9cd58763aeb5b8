PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint format clean conformance

demo: $(INSTALLED)  ## train, compress, heal and compare a small GPT-2 on text that every Python carries
	$(BIN)/factorized-gpt2-demo --output_dir demo_output

test: lint  ## lint, format check and every test, offline
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline $(BIN)/pytest -n 2

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): setup.cfg constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo_output build *.egg-info

conformance: $(INSTALLED)  ## transformers' own common model tests, from its source archive: needs network
	$(BIN)/pip install --quiet --disable-pip-version-check parameterized
	$(BIN)/python tests/conformance/run.py
