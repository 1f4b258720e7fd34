# Everything here works on a machine that has Python 3.11 and nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test test-arm lint types bench clean

# About five minutes after the installation. DEMO=--full is the long one, DEMO=--quick only shows that all works.
demo: $(if $(findstring full,$(DEMO)),.venv/installed,.venv/exporting)
	$(BIN)/vitkit demo demo $(DEMO)

# On two cores; a file's tests stay together, since they share what they make. A process that crashes is not replaced:
# pytest-xdist 3.8 then waits for ever instead of saying which test it was.
# Torch's threads of one would otherwise spin on the core of the other.
test: lint types
	GOMP_SPINCOUNT=100 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Every engine on an emulated ARM processor; 2 GB and Debian's apt-get, but no root. ARM_NETWORKS="ps_vit_ti_14_share
# remax_t" takes those of real size instead: an hour.
test-arm: .arm/python
	VITKIT_ARM=.arm VITKIT_ARM_NETWORKS="$(ARM_NETWORKS)" $(BIN)/python -m pytest tests/arm

.arm/python: tests/arm/prepare.sh constraints.txt .venv/installed
	sh tests/arm/prepare.sh .arm $(BIN)/python

# The folders are packages of one import name only once installed, so that is what is checked.
types: .venv/installed
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy -p vitkit
	for example in examples/*.py; do MYPYPATH=build/typed $(BIN)/mypy $$example || exit 1; done

bench: .venv/installed
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/overhead.py

# torch first: timm and torchvision, resolved together with it, may pick a newer one with CUDA packages.
.venv/exporting: pyproject.toml constraints.txt
	@echo "[1/2] an environment in .venv, and torch; about 75 s left of the installation (1.7 GB)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --constraint constraints.txt torch
	@$(BIN)/pip install --quiet --constraint constraints.txt setuptools wheel
	@echo "[2/2] vitkit and the packages that make engines; about 40 s left of the installation"
	@$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[export]"
	@touch .venv/exporting

.venv/installed: .venv/exporting
	@echo "the packages for TFLite engines and for tests: about 45 s, 1.1 GB"
	@$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[export,tflite-export,dev]"
	@touch .venv/installed

clean:
	rm -rf .venv .arm build dist demo *.egg-info
