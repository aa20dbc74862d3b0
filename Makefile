# Everything works from a clone with Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LITELLM := .venv-litellm
DECIDING := */rl/*,*/protocol/*,*/judging/*,*/evaluation/metrics.py
# More options of pytest.
ARGS ?=
# The package index that torch comes from; empty: pip's own. Where that brings gigabytes of GPU libraries to a machine without
# a GPU, give the address of the CPU index that pytorch.org names: make demo TORCH_INDEX=...
TORCH_INDEX ?=
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test test-quick test-litellm coverage check lint format reference docs bench mutants quality quality-quick clean

help:
	@echo "make demo   moderate text, images and both with the embedded guard"
	@echo "make test   run the tests; make test-quick: without the slow ones, in a minute"
	@echo "make test-litellm  run those that need LiteLLM, in an environment of its own"
	@echo "make coverage  the lines and branches that the tests run"
	@echo "make check  formatting, lint, types, import contract"
	@echo "make reference  write docs/reference from the code"
	@echo "make docs   build the documents as a site"
	@echo "make bench  speed and memory beside plain transformers"
	@echo "make mutants  small faults that no test sees"
	@echo "make quality  a guard's figures beside what is wanted; make quality-quick: a part of it, in seconds"

# torch comes first and alone, so that its index serves no other package.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/core: $(VENV)/torch pyproject.toml
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/dev: $(VENV)/torch pyproject.toml
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/core

demo: $(VENV)/core
	$(BIN)/python examples/demo.py

# Two workers with one thread each: with more threads than cores, small operations wait for each other.
test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

test-quick: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

# Lines and branches: 90% of the package, and all of the rooms that decide.
coverage: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n 2 $(ARGS)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --skip-covered --fail-under=90
	$(BIN)/coverage report --skip-covered --show-missing --fail-under=100 --include='$(DECIDING)'

# LiteLLM cannot live beside the other pins (constraints-litellm.txt). The variable keeps it off the internet.
$(LITELLM)/ready: constraints-litellm.txt
	$(PYTHON) -m venv $(LITELLM)
	$(LITELLM)/bin/pip install -q --no-deps -r constraints-litellm.txt
	touch $@

test-litellm: $(LITELLM)/ready
	LITELLM_LOCAL_MODEL_COST_MAP=true PYTHONPATH=src \
	  $(LITELLM)/bin/python -m pytest --allowed-skips=/dev/null $(ARGS) tests/integrations/test_litellm*.py

lint: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tools/check_names.py

check: lint
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/dev
	$(BIN)/python benchmarks/speed.py

# The pages of docs/reference, from the code; ARGS=--check writes nothing and names the stale ones.
reference: $(VENV)/dev
	$(BIN)/python -m tools.reference $(ARGS)

# Offline; a broken link or a page outside the navigation fails the build, and so does a page that loads anything from elsewhere.
# The site lies in site/.
docs: $(VENV)/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@! grep -rnoE '<(script|link|img|iframe)[^>]* (src|href)="(https?:)?//[^"]*"' site --include='*.html'

# A quarter of an hour on two cores: 40 small faults in each file that decides, each with the nearest tests.
mutants: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.mutants

# Resumable. DATA: the folder of the public sets (docs/evaluation.md); MODEL: a model folder, else the embedded guard.
quality: $(VENV)/dev
	$(BIN)/python -m benchmarks.quality $(if $(DATA),--data $(DATA)) $(if $(MODEL),--model $(MODEL)) $(ARGS)

quality-quick: $(VENV)/dev
	$(BIN)/python -m benchmarks.quality --quick $(ARGS)

clean:
	rm -rf $(VENV) $(LITELLM) mutants site .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.*
