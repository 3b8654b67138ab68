# Two commands set everything up on a machine that has Python (>= 3.11) and pip: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

# The oldest release of transformers that the tests are run on.
OLDEST := 5.19.0

.PHONY: demo test test-oldest lint types chromium clean

.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[data,report]'
	touch $@

.venv/dev: .venv/core
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/core
	mkdir -p demo
	$(BIN)/compress model_cards/digits-mlp/model.safetensors --output demo/digits-mlp-small.safetensors \
	  --data builtin:digits --model model_cards/digits-mlp/train.py:build_model \
	  --report demo/report.html --overwrite

test: .venv/dev
	$(BIN)/pytest

.venv/transformers-$(OLDEST): .venv/dev
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ transformers==$(OLDEST)

# What meets transformers most closely, with that release before the newer one of the environment.
test-oldest: .venv/transformers-$(OLDEST)
	PYTHONPATH=$(CURDIR)/$< $(BIN)/pytest tests/rewrite

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	$(BIN)/mypy

# The browser that the explorer's tests are run in, as root on Debian; without it they are skipped.
chromium:
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }

clean:
	rm -rf .venv build demo *.egg-info
