# Two commands matter: `make report` and `make test`. Both make .venv first if it is not there.
PYTHON ?= python3.11
VENV := .venv
export HF_HUB_OFFLINE ?= 1
# One thread: the tiny model is too small to gain from more, loses much when another program wants
# the cores, and gives the same bytes on machines with different numbers of them.
export OMP_NUM_THREADS ?= 1

.PHONY: help report replicate test lab bench

help:
	@echo "make report     install, run the tiny study, write outputs/tiny/index.html"
	@echo "make replicate  install, run the tiny study for five seeds, write outputs/tiny/replication.html"
	@echo "make test       install, run all tests that a CPU can (make test ARGS='-m \"not slow\"' for the quick ones)"
	@echo "make lab        install, open the notebooks in JupyterLab"
	@echo "make bench      install, measure the speed ratios of the README's table"

$(VENV)/.report: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.test: $(VENV)/.report
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

report: $(VENV)/.report
	$(VENV)/bin/python -m bpo run tiny

replicate: $(VENV)/.report
	$(VENV)/bin/python -m bpo replicate tiny --seeds 5

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

lab: $(VENV)/.report
	$(VENV)/bin/python -m jupyterlab --notebook-dir=notebooks

bench: $(VENV)/.report
	$(VENV)/bin/python tests/bench.py
