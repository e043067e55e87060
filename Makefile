# Every target works in a fresh clone with nothing but Python: the first one makes .venv and installs into it, later ones find it there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Modules are compiled when they are first imported: all 18,000 of them would take a minute more.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile --constraint constraints.txt
METADATA := settings.ini setup.py pyproject.toml constraints.txt
TUTORIALS := nbs/tutorials
FIRST := $(TUTORIALS)/01_first_adapter.ipynb
ROOT_USER := $(if $(filter 0,$(shell id -u)),--allow-root)

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-full bench lab docs notebooks export tiny-model wheel release clean
# Compiled modules are kept: without them every run starts seconds later.
unexport PYTHONDONTWRITEBYTECODE
# A third of the time a test waits for a child process, so there is one worker more than cores.
WORKERS ?= $(shell expr $$(nproc 2> /dev/null || echo 2) + 1)
# Threads that wait for each other sleep: on two busy cores spinning makes small models up to eight times slower.
export OMP_WAIT_POLICY ?= PASSIVE

help: ## say what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

demo: $(VENV)/.runtime ## train the embedded model on the packaged example, compare, merge, ask
	@echo "== demo: sage-finetune demo"
	@$(BIN)/sage-finetune demo

test: $(VENV)/.dev ## run every notebook and every test (those in a browser need Chromium; its pictures are in _screens/)
	@echo "== test: pytest (notebooks, guards, end to end, the package in an empty environment)"
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-fast: $(VENV)/.dev ## the same without the slow tests (the package in an empty environment, the Hub, several processes, the browser, and what took five seconds)
	@echo "== test-fast: pytest -m 'not slow and not full'"
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not full"

test-full: $(VENV)/.dev ## what takes long: the oldest versions that settings.ini allows, Colab's versions, LLaMA-Factory, Notebook 7 and Voila in a browser, the benchmark's real runs, the rest of the kills and of the packaged examples, a release
	@echo "== test-full: pytest -m full"
	@$(BIN)/python -m pytest -m full tests/test_lowest.py tests/test_colab.py tests/test_browser.py tests/test_benchmarks.py tests/test_benchmark_gpu.py \
		tests/test_release.py tests/test_safety.py tests/test_tiny.py tests/test_llamafactory_engine.py

bench: $(VENV)/.dev ## measure speed and memory against peers on this machine in under ten minutes (LONG=1: at full length)
ifdef LONG
	@echo "== bench: benchmarks/train.py, its --tune and --scaling, benchmarks/prepare.py, benchmarks/panels.py"
	@$(BIN)/python benchmarks/train.py
	@$(BIN)/python benchmarks/train.py --tune
	@$(BIN)/python benchmarks/train.py --scaling
	@$(BIN)/python benchmarks/prepare.py
	@$(BIN)/python benchmarks/panels.py
else
	@echo "== bench: benchmarks/train.py --short, benchmarks/prepare.py"
	@$(BIN)/python benchmarks/train.py --short
	@$(BIN)/python benchmarks/prepare.py --rows 10000 --runs 1
endif

lab: $(VENV)/.dev ## open JupyterLab on the first tutorial
	@echo "== lab: JupyterLab on $(FIRST)"
	@$(BIN)/jupyter lab $(ROOT_USER) $(FIRST)

docs: $(VENV)/.dev ## README.md from nbs/index.ipynb, and the site in _docs/
	@echo "== docs: README.md and _docs/index.html"
	@$(BIN)/python .ci/docs.py

notebooks: $(VENV)/.dev ## run all pages and the tutorials again, keep their outputs, clean them
	@echo "== notebooks: run nbs/**/*.ipynb, then nbdev-clean and README.md"
	@$(BIN)/python .ci/notebooks.py
	@$(BIN)/nbdev-clean
	@$(BIN)/python .ci/docs.py --readme

export: $(VENV)/.dev ## after editing notebooks: modules from notebooks, imports in order, clean notebooks, README.md
	@echo "== export: nbdev-export, imports in order, nbdev-clean, README.md"
	@$(BIN)/nbdev-export
	@$(BIN)/python .ci/imports.py
	@$(BIN)/nbdev-clean
	@$(BIN)/python .ci/docs.py --readme

tiny-model: $(VENV)/.dev ## pre-train the embedded model again (up to an hour on two cores; goes on where it stopped)
	@echo "== tiny-model: python -m sage_finetune.tiny.pretrain"
	@$(BIN)/python -m sage_finetune.tiny.pretrain

wheel: $(VENV)/.dev ## build the sdist and the wheel into dist/
	@echo "== wheel: python -m build"
	@$(BIN)/python -m build

release: $(VENV)/.dev ## version (PART=0 major, 1 minor, 2 patch), changelog, build, check: a release in dist/, neither uploaded nor tagged
	@echo "== release: .ci/release.py"
	@$(BIN)/python .ci/release.py $(if $(PART),--part $(PART))

clean: ## remove what was built (the environment stays)
	@echo "== clean: build dist _docs _proc _screens and caches"
	@rm -rf build dist _docs _proc _screens .venv-lowest *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	@find sage_finetune tests nbs .ci -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@echo "== $(VENV): a new environment from $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(METADATA) | $(BIN)/python
	@echo "== $(VENV): torch at the tested version, then sage_finetune and what it needs (once; minutes)"
	@$(PIP) torch
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(METADATA) $(VENV)/.runtime
	@echo "== $(VENV): what tests, notebooks and docs need (once)"
	@$(PIP) --editable '.[dev]'
	@$(BIN)/python .ci/hooks.py
	@touch $@
