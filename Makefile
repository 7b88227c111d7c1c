# Each target makes .venv when it is missing; nothing else has to be installed by hand.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: reproduce test test-harness lint clean

reproduce: $(STAMP)
	$(BIN)/ssmax reproduce

test: $(STAMP) lint
	$(BIN)/python -m pytest

# lm-evaluation-harness is large and needed by one test alone.
test-harness: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt lm_eval==0.4.13 wonderwords==3.0.1 nltk==3.10.4
	$(BIN)/python -m pytest tests/test_lm_eval.py

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports --no-cache

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf .venv
