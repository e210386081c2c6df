# make demo   train the tiny ACE++ on real photos and let it edit them (STEPS=, SEED= change the run)
# make test   lint and the tests in small counts, without those of many devices or processes and kills (.ci/run has them)
# make aot    .venv-aot, with libtpu: `acejax plan --topology=v6e-8 --compile` and `acejax bench tpu` compile for TPUs
#             that are not here (AOT_PYTHON= names a Python of 3.12 or newer)
# make soak   three demos, the stages, a LoRA, rounding, plans, the 12B programs for TPUs, and all tests in full counts
# Each makes .venv and installs what it needs; the install is skipped while pyproject.toml is unchanged.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
QUICK := --quiet --no-compile

DEMO_DIR ?= runs/demo
DEMO_FLAGS = --workdir=$(DEMO_DIR) $(if $(STEPS),--config.steps=$(STEPS)) $(if $(SEED),--config.seed=$(SEED))
AOT := .venv-aot
AOT_PYTHON ?=
AOT_PYTHONS := $(or $(AOT_PYTHON),python3.13 python3.12 python3 $(wildcard $(HOME)/.pyenv/versions/3.1[23].*/bin/python3))
RIGHT := import sys; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))
COUNTS ?= small
LONG := $(if $(filter full,$(COUNTS)),,-m "not long and not soak")
JAX ?=
PYTEST_FLAGS ?=

# The outside judges of parity. The version has a local part (+cpu), so that no GPU build can take its place.
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
TRY := $(PIP) install $(QUICK) --retries 1 --timeout 10

# A stamp file holds the seconds that its installation took; the demo reports their sum.
START := start=$$(date +%s);
SECONDS_SINCE := $$(($$(date +%s) - start))

.PHONY: demo test aot soak lint clean

demo: $(VENV)/.python $(VENV)/.demo
	$(BIN)/acejax demo $(DEMO_FLAGS) --setup_seconds=$$(awk '{ sum += $$1 } END { print sum }' $^)

test: lint
	ACEJAX_TEST_COUNTS=$(COUNTS) $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder $(LONG) $(PYTEST_FLAGS)

aot: $(AOT)/.aot

soak:
	benchmarks/soak.sh

lint: $(VENV)/.test
	$(BIN)/ruff check .

clean:
	rm -rf .venv* .cache .pytest_cache .ruff_cache build dist runs
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v[:2] < (3, 14))' || \
	  { echo "acejax needs Python 3.11, 3.12 or 3.13; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12"; exit 1; }
	@$(START) $(PYTHON) -m venv $(VENV) && echo $(SECONDS_SINCE) > $@

$(VENV)/.demo: pyproject.toml $(VENV)/.python
	@$(START) set -x; $(PIP) install $(QUICK) --editable '.[demo]' && echo $(SECONDS_SINCE) > $@

$(VENV)/.test: pyproject.toml $(VENV)/.python
	@$(START) if $(TRY) $(TORCH) 2>/dev/null || $(TRY) --extra-index-url $(TORCH_INDEX) $(TORCH) 2>/dev/null; \
	then install="$(TORCH) --editable .[test,judges] $(JAX)"; \
	else install="--editable .[test] $(JAX)"; \
	  echo "No CPU build of PyTorch found: parity is held against the recorded goldens."; fi; \
	set -x; $(PIP) install $(QUICK) $$install && echo $(SECONDS_SINCE) | tee $@ > $(VENV)/.demo

# A version manager may have a name without its version: what does not start is passed over.
$(AOT)/.python:
	@for python in $(AOT_PYTHONS); do \
	  if $$python -c '$(RIGHT)' 2>/dev/null; then $$python -m venv $(AOT) && touch $@; exit; fi; \
	done; \
	echo "make aot needs Python 3.12 or 3.13, as older ones have no current libtpu; none of these is one: $(AOT_PYTHONS). Try: make aot AOT_PYTHON=/path/to/python3.12"; exit 1

$(AOT)/.aot: pyproject.toml $(AOT)/.python
	@set -x; $(AOT)/bin/python -m pip --disable-pip-version-check install $(QUICK) --upgrade-strategy eager --editable '.[aot,train]' pytest
	@touch $@
