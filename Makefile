# Run `make` for the list of targets.
# Everything runs in .venv, which the first target that needs it makes with the versions in constraints.txt.

PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
PIP_INSTALL := "$(BIN)/python" -m pip install -q -c constraints.txt
# uv takes half of pip's time, but reads none of pip's settings: where it finds no packages, pip installs them.
# It compiles all modules, on all cores: processes that start at the same time would each compile what they import.
UV_INSTALL := "$(BIN)/python" -m uv pip install -q --compile-bytecode --python "$(BIN)/python" -c constraints.txt
define install
	$(UV_INSTALL) $(1) || { echo "uv cannot install this here: pip tries" >&2; $(PIP_INSTALL) $(1); }
endef
ALL_BUT_INT8 := --no-build-isolation -e '.[data,train,demo,dev]'

.DEFAULT_GOAL := help
.PHONY: help demo evaluate test test-cpu test-census test-times test-lowest test-newest test-upstream test-evaluate test-gpu check-beside check-wheel check-dist check-docker lint docs notebooks space test-space benchmark clean

help: ## list the targets
	@echo 'Usage: make TARGET [PYTHON=python3.11]    (Python >= 3.11; the first run installs into .venv)'
	@echo
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

demo: .venv/.installed ## embed real cells and draw them; MODEL=<id or folder> and SIZE=<size> are optional
	"$(BIN)/python" examples/demo.py $(if $(MODEL),--model "$(MODEL)") $(if $(SIZE),--size "$(SIZE)")

# Tests and checks run without downloads and with one thread each (OMP_NUM_THREADS=2 for two). Waiting threads sleep, so
# that they do not take a core from other processes.
CHECKS := test test-cpu test-census check-wheel check-dist check-docker docs notebooks space test-space test-times test-lowest test-newest test-upstream test-evaluate
$(CHECKS): export HF_HUB_OFFLINE = 1
$(CHECKS): export OMP_NUM_THREADS ?= 1
$(CHECKS): export OMP_WAIT_POLICY = PASSIVE
# Many processes import the same modules: one compiles them for all, also where the user's processes write no bytecode.
$(CHECKS): export PYTHONDONTWRITEBYTECODE =
# tiledbsoma's reader crashed twice, only in processes that had loaded torchao's libraries and had run other tests. So
# its tests run by themselves, and torchao, of which we use only the Python part, does not load its libraries. It crashed
# once more in a process of its own (a thread of TileDB's, signal 11; not seen again in 44 runs under load): where a
# signal, not a test, ends the run, it is repeated once.
$(CHECKS): export TORCHAO_FORCE_SKIP_LOADING_SO_FILES = 1
CENSUS_TESTS = tests/data/sources/test_census.py
PYTEST_OPTIONS = -m "not gpu" -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
  $(CENSUS_TESTS:%=--ignore=%)
PYTEST_CPU = "$(BIN)/python" -m pytest $(PYTEST_OPTIONS)

# Two jobs run side by side: the tests, and all other checks one after another. The checks give way to the tests: they
# take the time in which tests wait.
test: .venv/.int8 ## all that a change must pass on a CPU: lint, the tests that need no GPU, the wheel
	+$(MAKE) --no-print-directory -k -j2 test-cpu check-beside

check-beside:
	@failed=; for each in lint test-census check-wheel; do \
	  nice -n 7 $(MAKE) --no-print-directory $$each || failed="$$failed $$each"; done; \
	  if test -n "$$failed"; then echo "failed:$$failed" >&2; exit 1; fi

test-cpu: .venv/.int8
	$(PYTEST_CPU)

test-census: .venv/.int8
	"$(BIN)/python" -m pytest -q $(CENSUS_TESTS) || { code=$$?; test $$code -ge 128 && \
	  echo "a signal ended the run (exit status $$code): once more" >&2 && \
	  "$(BIN)/python" -m pytest -q $(CENSUS_TESTS); }

check-wheel: .venv/.installed
	"$(BIN)/python" tests/check_wheel.py

test-times: .venv/.int8 ## the tests that need no GPU, and a list of those that take most CPU seconds
	$(PYTEST_CPU) --cpu-times 60

# uv makes separate environments with versions that setup.cfg allows, not those of constraints.txt. The census is left
# out, since its readers need older anndata and pandas. uv does not read pip's settings, so a folder with wheels is
# handed on.
NEWEST_PYTHON ?= python3.12
UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export UV_FIND_LINKS
define test_in_environment
	"$(BIN)/python" -m uv venv -q --clear --python "$(2)" .venv-$(1)
	"$(BIN)/python" -m uv pip install -q --python .venv-$(1)/bin/python --resolution $(3) -e '.[test]'
	"$(BIN)/python" -m uv pip list -q --python .venv-$(1)/bin/python
	.venv-$(1)/bin/python -m pytest $(PYTEST_OPTIONS) $(TESTS)
endef

test-lowest: .venv/.installed ## the tests with the lowest versions that setup.cfg allows; TESTS="..." for some of them
	$(call test_in_environment,lowest,$(PYTHON),lowest-direct)

test-newest: .venv/.installed ## the tests with the newest versions, on NEWEST_PYTHON (anndata 0.13 needs 3.12)
	$(call test_in_environment,newest,$(NEWEST_PYTHON),highest)

# transformers' and PEFT's common tests come with their source distributions alone. Their environment shares the packages
# of .venv, and adds what only these tests need; tests of ours that need bitsandbytes run in it too. The table is written
# whether or not all tests pass.
UPSTREAM := $(CURDIR)/build/upstream
UPSTREAM_PYTHON := $(CURDIR)/.venv-upstream/bin/python
test-upstream: export TAHOEX1_UPSTREAM_SOURCES = $(UPSTREAM)
test-upstream: export TAHOEX1_UPSTREAM_RESULTS = $(UPSTREAM)/results.json
test-upstream: export RUN_SLOW = yes
test-upstream: .venv-upstream/.installed build/upstream/.unpacked ## transformers' and PEFT's own tests on our classes; writes docs/upstream-tests.md
	"$(UPSTREAM_PYTHON)" -m pytest -q -p no:cacheprovider tests/test_modeling_tahoe_x1.py -k bitsandbytes
	"$(UPSTREAM_PYTHON)" -m pytest -q -c tests/upstream/pytest.ini tests/upstream $(TESTS); \
	  code=$$?; "$(UPSTREAM_PYTHON)" tests/upstream/table.py "$(UPSTREAM)/results.json"; exit $$code

.venv-upstream/.installed: .venv/.int8
	"$(BIN)/python" -m uv venv -q --clear --python "$(BIN)/python" .venv-upstream
	"$(BIN)/python" -c 'import site; print(site.getsitepackages()[0])' > \
	  "$$("$(UPSTREAM_PYTHON)" -c 'import site; print(site.getsitepackages()[0])')/shared.pth"
	"$(BIN)/python" -m pip --python .venv-upstream install -q -c constraints.txt --no-deps parameterized bitsandbytes
	@touch $@

build/upstream/.unpacked: .venv/.installed
	rm -rf build/upstream
	"$(BIN)/python" -m pip download -q -c constraints.txt --no-binary :all: --no-deps --no-build-isolation \
	  -d build/upstream transformers peft
	cd build/upstream && for each in *.tar.gz; do tar -xzf "$$each" || exit 1; done
	@touch $@

# STATE draws in Lightning, Hydra and wandb, which nothing else here needs, so it gets an environment of its own.
evaluate: .venv-evaluate/.installed ## an environment with Arc's STATE, for `tahoex1 evaluate state`
	@echo "--state-python $(CURDIR)/.venv-evaluate/bin/python"

.venv-evaluate/.installed: .venv/.installed
	"$(BIN)/python" -m uv venv -q --clear --python "$(BIN)/python" .venv-evaluate
	"$(BIN)/python" -m uv pip install -q --python .venv-evaluate/bin/python arc-state==0.11.1 cell-eval==0.8.2 torch==2.13.0
	@touch $@

# Tools for pages and packages share the packages of .venv, too.
TOOLS_PYTHON := $(CURDIR)/.venv-tools/bin/python
.venv-tools/.installed: .venv/.installed
	"$(BIN)/python" -m uv venv -q --clear --python "$(BIN)/python" .venv-tools
	"$(BIN)/python" -c 'import site; print(site.getsitepackages()[0])' > \
	  "$$("$(TOOLS_PYTHON)" -c 'import site; print(site.getsitepackages()[0])')/shared.pth"
	"$(BIN)/python" -m pip --python .venv-tools install -q -c constraints.txt --no-build-isolation -e '.[docs,dist]'
	@touch $@

docs: export NO_MKDOCS_2_WARNING = 1
docs: .venv-tools/.installed ## the documentation as a site, in build/site; fails at a warning or a broken link
	"$(TOOLS_PYTHON)" -m mkdocs build --strict --quiet --site-dir build/site

notebooks: .venv/.int8 ## run the notebooks of examples/notebooks, and store their outputs
	TAHOEX1_STORE_NOTEBOOKS=1 "$(BIN)/python" -m pytest -q tests/examples/test_notebooks.py

# What a Hugging Face Space holds; docs/how-to/space.md says how to publish it. gradio and its tests share the packages of
# .venv, but gradio needs an older pillow, so they get an environment of their own. The tests drive Debian's chromium.
space: .venv/.installed ## the folder of a Hugging Face Space, in build/space
	rm -rf build/space && mkdir -p build && cp -r examples/space build/space
	"$(BIN)/python" examples/space_cells.py build/space

SPACE_PYTHON := $(CURDIR)/.venv-space/bin/python
test-space: .venv-space/.installed ## the Space's page in a headless Chromium (apt-get install chromium)
	"$(SPACE_PYTHON)" -m pytest -q tests/examples/test_space.py tests/examples/test_space_page.py

.venv-space/.installed: .venv/.installed examples/space/requirements.txt
	"$(BIN)/python" -m uv venv -q --clear --python "$(BIN)/python" .venv-space
	"$(BIN)/python" -c 'import site; print(site.getsitepackages()[0])' > \
	  "$$("$(SPACE_PYTHON)" -c 'import site; print(site.getsitepackages()[0])')/shared.pth"
	mkdir -p build && grep -v '^pillow==' constraints.txt > build/constraints-space.txt
	"$(BIN)/python" -m pip --python .venv-space install -q -c build/constraints-space.txt \
	  $$(grep -E '^(gradio|pillow)==' examples/space/requirements.txt) playwright axe-playwright-python
	@touch $@

check-dist: .venv-tools/.installed ## build wheel and source distribution into dist/, and check what would go to PyPI
	"$(TOOLS_PYTHON)" tests/check_dist.py

check-docker: .venv/.installed ## the steps of the Dockerfile in an environment of its own, without Docker (downloads)
	"$(BIN)/python" tests/check_docker.py

# cz-benchmarks asks for an older numcodecs than ours: its environment leaves that pin out, and zarr's, which needs it.
test-evaluate: .venv-cz/.installed ## the tests that need scib-metrics or cz-benchmarks
	.venv-cz/bin/python -m pytest -q tests/benchmarking/test_cz_benchmarks.py tests/benchmarking/test_integration.py

.venv-cz/.installed: .venv/.installed
	"$(BIN)/python" -m uv venv -q --clear --python "$(BIN)/python" .venv-cz
	mkdir -p build && grep -v -E '^(numcodecs|zarr)==' constraints.txt > build/constraints-cz.txt
	"$(BIN)/python" -m uv pip install -q --python .venv-cz/bin/python -c build/constraints-cz.txt \
	  -e '.[data,evaluate,train]' pytest cz-benchmarks==0.15.1
	@touch $@

test-gpu: export HF_HUB_OFFLINE = 1
test-gpu: .venv/.installed .venv/.int8 ## the tests that need a CUDA device
	"$(BIN)/python" -m pytest -m gpu

lint: .venv/.installed ## ruff (rules and format) and mypy
	"$(BIN)/python" -m ruff check .
	"$(BIN)/python" -m ruff format --check .
	"$(BIN)/python" -m mypy tahoex1_hf benchmarks

benchmark: .venv/.installed .venv/.int8 .venv/.loaders ## measure speed and memory (on Python 3.12 also beside annbatch)
	"$(BIN)/python" -m benchmarks

clean: ## remove .venv, caches and build output
	rm -rf .venv .venv-cz .venv-evaluate .venv-lowest .venv-newest .venv-space .venv-upstream .venv-tools build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last. An install that was cut short leaves .incomplete, and the next one starts afresh.
# torch goes in first, by itself, so that the pin and the pip configuration alone decide which build it is.
.venv/.installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'tahoex1_hf needs Python >= 3.11, and "$(PYTHON)" is not that. Name one: make PYTHON=python3.11' >&2; exit 1; }
	@rm -f $@
	fresh=; if test -e .venv/.incomplete; then fresh=--clear; fi; \
	  mkdir -p .venv && touch .venv/.incomplete && $(PYTHON) -m venv $$fresh .venv && touch .venv/.incomplete
	$(PIP_INSTALL) setuptools torch uv
	$(call install,$(ALL_BUT_INT8))
	@rm .venv/.incomplete && touch $@

# Installed separately: transformers imports torchao where it is installed, and torchao then warns about its CUDA parts,
# in the demo too.
.venv/.int8: .venv/.installed
	$(call install,--no-build-isolation -e '.[int8]')
	@touch $@

.venv/.loaders: .venv/.installed
	$(call install,--no-build-isolation -e '.[loaders]')
	@touch $@
