# nanoMiMo: every target sets itself up on a machine that has python3 and make.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test lint bench figures clean

demo: .venv/run                  # the whole recipe on the CPU, about a quarter of an hour on two idle cores
	$(PY) demo.py

test: .venv/dev                  # every test that needs no GPU
	$(PY) -m pytest

lint: .venv/dev
	$(PY) -m ruff check .

figures: .venv/run               # the report's tables and figures, remade from the runs under out/
	$(PY) paper/figures.py

bench: .venv/bench               # speed and memory as ratios against named alternatives; hours; each script says what to expect
	for f in bench/generate.py bench/judge.py bench/extract.py; do if [ -f $$f ]; then $(PY) $$f || exit 1; fi; done

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.venv/bench: requirements-bench.txt .venv/dev
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	@touch $@

clean:
	rm -rf out .pytest_cache .ruff_cache
