# The newcomer's path: `make demo` and `make test`. Needs Python >= 3.10, git and make; never root.
#
#   PYTHON       the interpreter that .venv is made with           (default python3)
#   TORCH_INDEX  an extra package index to choose torch's build by  (default: whatever pip is configured with)
#                  CPU:   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                  CUDA:  make demo TORCH_INDEX=https://download.pytorch.org/whl/cu130
#   DATA         a folder in MVTec layout for `make demo`           (default: the embedded example)
#   OUT          where `make demo` writes                           (default demo-out)
#   PROCESSES    that tests run in; 0 for one, to debug             (default 2)

PYTHON ?= python3
TORCH_INDEX ?=
DATA ?=
OUT ?= demo-out
PROCESSES ?= 2

VENV := .venv
FLOWER := .venv-flower
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# Neighbours stay in one process, which makes what they share once. A thread each: more would wait for one another.
TESTS := -m "not slow" -n $(PROCESSES) --dist worksteal
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
# Debian puts mosquitto where only root's path looks.
export PATH := $(PATH):/usr/sbin:/usr/local/sbin

.PHONY: help install demo test test-offline lint format docs bench clean flower-env flower-test

help:
	@echo "make demo [DATA=DIR]  train, pack, run a box, replay a line with defects, show the alerts"
	@echo "make test             run every test"
	@echo "make test-offline     the same without any network but loopback (Linux)"
	@echo "make install | lint | format | docs | bench | clean"
	@echo "make flower-env | flower-test    the scale-out engine, in $(FLOWER) (Python >= 3.11)"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python 3.10 or newer is needed; name one with PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "$(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3-venv"; exit 1; }

# A stamp per extra: pip runs again only when pyproject.toml has changed.
$(VENV)/.installed-demo: $(VENV)/bin/python pyproject.toml
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed-demo

install: $(VENV)/.installed-dev

demo: $(VENV)/.installed-demo
	$(BIN)/lineward demo --out $(OUT) $(if $(DATA),--data $(DATA))

test: $(VENV)/.installed-dev
	$(ONE_THREAD) $(BIN)/python -m pytest $(TESTS)

# Nothing of ours needs a network: the suite in a namespace that has loopback only.
test-offline: $(VENV)/.installed-dev
	$(ONE_THREAD) $(BIN)/python tests/offline.py $(TESTS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev
	$(BIN)/python -m deploy.reference > docs/settings.md

bench: $(VENV)/.installed-dev
	@for name in throughput box resolution; do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done
	@echo "accuracy needs images: $(BIN)/python benchmarks/accuracy.py --data FOLDER [FOLDER ...]"

# Flower's pins do not fit beside the other extras, so it has an environment of its own.
$(FLOWER)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Flower needs Python 3.11 or newer; name one with PYTHON=..."; exit 1; }
	@test -x $(FLOWER)/bin/python || $(PYTHON) -m venv $(FLOWER)
	$(FLOWER)/bin/python -m pip --disable-pip-version-check install -e '.[flower]' 'pytest>=8' 'pytest-timeout>=2.3'
	@touch $@

flower-env: $(FLOWER)/.installed

# The apps on messages inside one process, then a SuperLink and its nodes as processes.
flower-test: $(FLOWER)/.installed $(VENV)/.installed-dev
	$(FLOWER)/bin/python -m pytest --noconftest tests/deploy/test_flower_app.py
	$(BIN)/python -m pytest tests/deploy/test_flower_fleet.py

clean:
	rm -rf $(VENV) $(FLOWER) demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
