# Two commands set everything up on a machine that has Python (>= 3.11) and pip: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# The versions that were tested; empty for the newest ones.
CONSTRAINTS ?= --constraint constraints.txt

# One test process a core, each with one thread of its own: the models are too small for more.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(JOBS) --dist loadscope

.PHONY: docs site demo test test-all test-oldest explore-properties coverage lint types chromium clean

.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --editable '.[data,report]'
	touch $@

.venv/dev: .venv/core
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --editable '.[dev]'
	touch $@

demo: .venv/core
	mkdir -p demo
	OMP_NUM_THREADS=1 $(BIN)/python examples/own_network.py --report demo/report.html

# Three quarters of the tests, all of them quick.
test: .venv/dev
	$(PYTEST) -m "not slow"

# What a change has to pass.
test-all: .venv/dev
	$(PYTEST)

# The tests of properties, on examples that are drawn anew each time; `make test-all` draws the same ones.
explore-properties: .venv/dev
	HYPOTHESIS_PROFILE=explore $(PYTEST) -m hypothesis

# Prints the lines and branches that no test runs, and writes the annotated sources to htmlcov/index.html.
coverage: .venv/dev
	$(PYTEST) --cov --cov-report=term --cov-report=html

# Every lower bound of pyproject.toml at once.
.venv-oldest/dev: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt --editable '.[data,report,onnx,gguf,peft,compressed-tensors,ray,mlflow,benchmarks,test]'
	touch $@

# The tests of what meets those packages most closely.
test-oldest: BIN := .venv-oldest/bin
test-oldest: .venv-oldest/dev
	$(PYTEST) tests/io tests/network tests/engine tests/initial tests/lowrank tests/exporting tests/fine_tuning tests/adapters tests/report

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest --noconftest tests/test_rooms.py

# The command line lies beside the package and is installed inside it: checked as it is installed.
types: .venv/dev
	rm -rf build/typed && mkdir -p build/typed/compressor
	ln -s $(CURDIR)/compressor/* build/typed/compressor && ln -s $(CURDIR)/cli build/typed/compressor/cli
	cd build/typed && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

# What is generated: the types of the keyword arguments, the reference page, the picture of the rooms, the figures of results.
docs: .venv/dev
	$(BIN)/python -m compressor.api.reference
	$(BIN)/python -m docs.design.rooms
	$(BIN)/python -m docs.tables
	$(MAKE) site

# The documentation's site, in build/site; a link that leads nowhere is an error.
site: .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The browser that the explorer's tests are run in, as root on Debian; without it they are skipped.
chromium:
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }

clean:
	rm -rf .venv .venv-oldest build htmlcov demo *.egg-info
