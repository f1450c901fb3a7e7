# Two commands do all the set-up: `make demo` and `make test`.
# Tools run as modules: the scripts that pip writes name their interpreter in the first line, where no path may hold a
# blank. All paths are relative for the same reason: make takes blanks for the end of a name.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CORES ?= all
# The tests that read ../shared/data run where that folder is, those of the dense CRF where its package is, those in a
# browser where Chromium is, those of the page for trying where gradio is (make page). Asked when `test` runs, not
# before there is an environment.
BROWSER = $(shell command -v chromium chromium-browser google-chrome)
HAS = $(shell "$(BIN)/python" -c 'from importlib.util import find_spec; print(find_spec("$(1)") or "")')
MARKS = not gpu and not full_size and not weights$(if $(wildcard ../shared/data),, and not shared_data)$(if $(call HAS,pydensecrf),, and not crf)$(if \
	$(BROWSER),, and not browser)$(if $(call HAS,gradio),, and not page)

.PHONY: help demo demo-clip-es demo-contrast page test check audit format clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	"$(BIN)/python" -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/page: $(VENV)/installed requirements-page.txt
	$(BIN)/pip install --quiet --no-deps --requirement requirements-page.txt
	touch $@

page: $(VENV)/page ## what the page to try a student on needs beside the rest (cli.py demo)

$(VENV)-audit/bin/pip-audit:
	-$(PYTHON) -m venv $(VENV)-audit && $(VENV)-audit/bin/pip install --quiet --retries 1 pip-audit

audit: $(VENV)-audit/bin/pip-audit ## known vulnerabilities of the pinned versions, where pip-audit has its data
	@$(PYTHON) .ci/audit.py $(VENV)-audit/bin/pip-audit constraints.txt requirements-page.txt

demo: $(VENV)/installed ## install, then run the whole pipeline on the built-in demo (config/demo.yaml)
	"$(BIN)/python" -m snakemake --cores $(CORES) --quiet rules progress
	"$(BIN)/python" cli.py results runs/demo runs/demo-glm_off-0

demo-clip-es: $(VENV)/installed ## the demo from image-level labels alone (config/demo_clip_es.yaml)
	"$(BIN)/python" -m snakemake --cores $(CORES) --configfile config/demo_clip_es.yaml --quiet rules progress
	"$(BIN)/python" cli.py results runs/demo_clip_es

demo-contrast: $(VENV)/installed ## the demo with GLM, without GLM, and with seen labels only, three seeds each
	"$(BIN)/python" -m snakemake -s evidence/Snakefile contrast --cores $(CORES) --quiet rules progress
	"$(BIN)/python" -m evidence contrast

test: $(VENV)/installed ## the tests that need no GPU, published weights or minutes each
	OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -n 2 --dist loadfile -m '$(MARKS)'

check: $(VENV)/installed audit ## ruff, mypy, snakemake --lint, the floors test, no leftovers of a merge, audit
	@! git grep -nE '^(<<<<<<<|>>>>>>>) '
	"$(BIN)/python" -m ruff format --check .
	"$(BIN)/python" -m ruff check .
	"$(BIN)/python" -m mypy
	"$(BIN)/python" -m snakemake --lint
	"$(BIN)/python" -m snakemake --lint -s evidence/Snakefile
	"$(BIN)/python" -m pytest tests/test_floors.py

format: $(VENV)/installed ## ruff format and fix
	"$(BIN)/python" -m ruff format .
	"$(BIN)/python" -m ruff check --fix .

clean: ## remove runs and the environment
	rm -rf runs $(VENV) $(VENV)-audit .snakemake
