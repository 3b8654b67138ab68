# Two commands set everything up on a machine that has Python (>= 3.11) and pip: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types chromium clean

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
