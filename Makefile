# `make help` lists the targets. All of them set themselves up in .venv; nothing else is touched.
PYTHON ?= python3
PORT ?= 30000
MODEL ?=
KERNELS ?= ours
SUITE ?= tiny
ARGS ?=

RUN := .venv/bin/python
PYTEST := $(RUN) -m pytest
# One thread a process: the interpreter computes small blocks, and the processes share the cores.
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) --numprocesses auto --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup setup-eval setup-test demo serve status doctor eval test lint test-cpu \
	test-sglang test-e2e test-evals test-gpu docs clean

help:  ## show this
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:
	@$(PYTHON) scripts/setup_env.py run

setup-eval:
	@$(PYTHON) scripts/setup_env.py eval

setup-test:
	@$(PYTHON) scripts/setup_env.py test

demo: setup  ## start the real SGLang on the tiny model, ask it, show what our kernels did, stop
	@$(RUN) -m sglang_trinv.serve.demo

serve: setup  ## serve until Ctrl-C: MODEL=folder PORT=30000 KERNELS=ours|stock ARGS="SGLang flags"
	@$(RUN) -m sglang_trinv serve $(if $(MODEL),--model $(MODEL)) --kernels $(KERNELS) \
		--port $(PORT) $(if $(ARGS),-- $(ARGS))

status: setup  ## what the processes of the newest server report
	@$(RUN) -m sglang_trinv status

doctor: setup  ## check this installation
	@$(RUN) -m sglang_trinv doctor

eval: setup-eval  ## accuracy, ours against stock: SUITE=tiny|quick|real MODEL=folder ARGS="options"
	@$(RUN) -m sglang_trinv eval --suite $(SUITE) $(if $(MODEL),--model $(MODEL)) $(ARGS)

test: setup-test  ## everything: lint, then the cpu, sglang, e2e and evals tests
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory test-cpu
	@$(MAKE) --no-print-directory test-sglang
	@$(MAKE) --no-print-directory test-e2e
	@$(MAKE) --no-print-directory test-evals

lint: setup-test  ## ruff
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

test-cpu: setup-test  ## references, ops in Triton's interpreter, command line
	$(PARALLEL) tests/cpu

test-sglang: setup-test  ## against the sources of SGLang's releases
	$(PARALLEL) tests/sglang

test-e2e: setup-test  ## the real server
	$(PYTEST) tests/e2e

test-evals: setup-test  ## tasks, statistics, gate; then the quick suite on real servers
	$(PYTEST) tests/evals

test-gpu: setup-test  ## the same ops compiled, on a machine with a GPU
	$(PYTEST) tests/gpu --gpu-report benchmarks/results/gpu-tests.json

docs:  ## the documentation as a site, in build/site
	@$(PYTHON) scripts/setup_env.py docs
	$(RUN) -m mkdocs build --quiet

clean:  ## remove .venv and what builds and tests left
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis *.egg-info \
		serve/cpu_platform/build serve/cpu_platform/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
