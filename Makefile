# Two commands from a clone: `make demo` and `make test`. Each sets up .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.agentsdpo-setup
VLLM_STAMP := .venv-vllm/.agentsdpo-setup

.PHONY: help setup demo test vllm test-vllm bench docs notebooks clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv and install the project with the pinned versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "agentsdpo needs Python 3.11 or newer; try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "making .venv"; $(PYTHON) -m venv --clear .venv; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: setup  ## train the shipped model on the built-in world into runs/demo, minutes on a laptop
	$(BIN)/agentsdpo demo

test: setup  ## lint, types, tests, doctests and the wheel; with .venv-vllm also against a real server
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n 2 -m 'not vllm'
	$(BIN)/python -m pytest -q -m vllm -rs tests/serving

vllm: $(VLLM_STAMP)  ## make .venv-vllm: vLLM for CPUs, an environment of its own (minutes, 3.4 GB)

# No resolver: the file names everything, and what it leaves out on purpose would be pulled in again.
$(VLLM_STAMP): constraints-vllm.txt
	@.venv-vllm/bin/python -m pip --version >/dev/null 2>&1 \
	  || { echo "making .venv-vllm"; $(PYTHON) -m venv --clear .venv-vllm; }
	.venv-vllm/bin/python -m pip install --quiet --no-deps --requirement constraints-vllm.txt
	touch $@

test-vllm: setup vllm  ## the tests that need a real vLLM server, one after the other
	$(BIN)/python -m pytest -m vllm tests/serving

bench: setup  ## install the peers, measure store, start-up and learner, write docs/results/perf-*.json
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,bench]'
	$(BIN)/python -m agentsdpo.benchmarks.perf.replay --out docs/results/perf-replay.json
	$(BIN)/python -m agentsdpo.benchmarks.perf.learner --out docs/results/perf-learner.json
	$(BIN)/python -m agentsdpo.benchmarks.perf.viewer --out docs/results/perf-viewer.json

docs: setup  ## write the reference pages from the code
	$(BIN)/python docs/reference.py

notebooks: setup  ## execute the notebooks and keep their outputs
	$(BIN)/python notebooks/execute.py

clean:  ## remove what builds and tests leave behind; .venv and runs/ stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
