# `make demo` and `make test` do everything on a machine that has only Python 3.10 or newer with venv and pip.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
OLDEST ?= .venv-oldest
BREADTH ?= .venv-breadth
INSTALLED ?= .venv-package
BIN := $(VENV)/bin
OUT ?= out/demo
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PACKAGING := setup.py pyproject.toml constraints.txt

.PHONY: help demo test slow test-oldest test-breadth test-real backbones notebooks docs lint package checkpoint clean

help:
	@echo "make demo        environment, then photographs and scenes with reasoning, heatmaps and masks in $(OUT)"
	@echo "make test        environment, then every test that is not marked slow"
	@echo "make slow        the slow tests"
	@echo "make test-oldest the core tests on the oldest versions that setup.py admits, in $(OLDEST)"
	@echo "make test-breadth every VLM family against docs/reference/backbones.md, with torchvision and timm, in $(BREADTH)"
	@echo "make backbones   the same, and renew docs/reference/backbones.md"
	@echo "make notebooks   run examples/notebooks and renew their outputs"
	@echo "make test-real   tests on real pretrained weights out of package registries"
	@echo "make docs        the documentation site, in out/docs; fails on a broken link"
	@echo "make lint        ruff, and mypy on the public API"
	@echo "make package     sdist and wheel in dist, checked; the wheel used from an empty folder, in $(INSTALLED)"
	@echo "make checkpoint  train scenes-tiny from scratch into runs/scenes-tiny (hours on two CPU cores)"

# The environment is renewed only when the packaging files change: one stamp for what the demo needs, one for all.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-stamp: $(PACKAGING) | $(BIN)/python
	$(PIP_INSTALL) -e ".[demo,data]"
	@touch $@

$(VENV)/.dev-stamp: $(PACKAGING) | $(BIN)/python
	$(PIP_INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/.demo-stamp

demo: $(VENV)/.demo-stamp
	$(BIN)/segcompass demo --output $(OUT)

# The tests' models are tiny: more threads only wait for each other.
test slow: export OMP_NUM_THREADS ?= 1

test: $(VENV)/.dev-stamp
	$(BIN)/python -m pytest -m "not slow and not real" -n 2 --dist loadfile

slow: $(VENV)/.dev-stamp
	$(BIN)/python -m pytest -m "slow and not real" || [ $$? -eq 5 ]  # 5: no test is marked slow

$(OLDEST)/.stamp: setup.py pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e ".[data]" \
		torchvision pytest hypothesis
	@touch $@

test-oldest: export OMP_NUM_THREADS ?= 1

test-oldest: $(OLDEST)/.stamp
	$(OLDEST)/bin/python -m pytest -m "not slow" tests/test_*.py tests/metrics tests/data

# Some families' image processors need torchvision, for which there is no build beside our torch.
$(BREADTH)/.stamp: setup.py pyproject.toml constraints-breadth.txt
	$(PYTHON) -m venv $(BREADTH)
	$(BREADTH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-breadth.txt \
		-e ".[train,data]" torchvision timm num2words pytest pytest-xdist
	@touch $@

test-breadth backbones: export OMP_NUM_THREADS ?= 1

test-breadth: $(BREADTH)/.stamp
	$(BREADTH)/bin/python -m pytest -n 2 tests/breadth

backbones: $(BREADTH)/.stamp
	$(BREADTH)/bin/python tests/breadth/report.py

# onnx and gguf read the files that the packages hold; without them, or without the packages, tests are skipped and say
# so. The weights stay in ~/.cache/segcompass_hf/real_parts, or what SEGCOMPASS_REAL_PARTS names.
test-real: export OMP_NUM_THREADS ?= 1

test-real: $(VENV)/.dev-stamp
	$(PIP_INSTALL) onnx gguf || echo "test-real: onnx and gguf could not be installed"
	$(BIN)/python -m pytest -m real tests/real

notebooks: export OMP_NUM_THREADS ?= 1

notebooks: $(VENV)/.dev-stamp
	$(BIN)/python tests/support/notebooks.py

# Where the packages of the extra cannot be installed nothing is built, and it says so.
docs: export NO_MKDOCS_2_WARNING = 1

docs: $(VENV)/.dev-stamp
	$(PIP_INSTALL) -e ".[docs]" || echo "docs: the extra docs could not be installed"
	if $(BIN)/python -c "import material, mkdocstrings_handlers.python"; then $(BIN)/mkdocs build; \
		else echo "docs: skipped, there is no mkdocs"; fi

lint: $(VENV)/.dev-stamp
	$(BIN)/ruff check .
	$(BIN)/mypy

# What an index would take, installed with its dependencies where nothing else of this clone is.
package: $(VENV)/.dev-stamp
	rm -rf dist $(INSTALLED)
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv $(INSTALLED)
	$(INSTALLED)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		"$$(ls dist/*.whl)[demo,data,explain]"
	SEGCOMPASS_WHEEL_PYTHON=$(INSTALLED)/bin/python $(BIN)/python -m pytest -m slow tests/packaging

checkpoint: $(VENV)/.dev-stamp
	$(BIN)/python examples/scenes_tiny/pretrain.py --output runs/scenes-tiny
	$(BIN)/segcompass train examples/scenes_tiny/recipe.yaml

clean:
	rm -rf out build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
