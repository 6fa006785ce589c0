# One target per stage. `make help` lists them; every target first makes the environment in .venv.
PYTHON ?= python3
VENV ?= .venv
EXPERIMENT ?= pipeline/experiments/demo.toml
WORK ?= runs/results
STUDY ?= pipeline/experiments/dinov2-imagenet.toml
STUDIES ?= runs/study
MAP ?= runs/map
ARGS ?=
BIN := $(VENV)/bin
# faiss-gpu and faiss-cpu exclude each other: take the GPU build only where a GPU answers.
FAISS ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
READY := $(VENV)/.installed-$(FAISS)
PIP := PIP_CONSTRAINT= $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input
PINNED := --constraint .ci/constraints.txt
# Stages of a study: a module each, and a line in the list, which says what it does.
STAGES := $(filter-out __init__,$(basename $(notdir $(wildcard pipeline/stages_of_study/*.py))))
VERBS := run plan predict export serve verify info

.DEFAULT_GOAL := help
.PHONY: help setup demo results map study pseudo-ood $(STAGES) $(VERBS) test lint fmt stress bench bench-extract bench-decode \
	bench-cache bench-store bench-train bench-finetune bench-knn bench-score bench-fits bench-heads bench-watch bench-serve \
	bench-plan bench-company bench-scale bench-cluster check-gpu clean

help: ## List the targets
	@{ grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'; \
		sed -nE 's/^    Listed\("([a-z]+)", "([^"]+)".*/\1\t\2/p' pipeline/stages_of_study/__init__.py; } | expand -t 16

setup: $(READY) ## Create .venv with every pinned dependency (nothing outside it but caches)

$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(PINNED) uv
	@# The two FAISS builds exclude each other: take the other one away first.
	@$(PIP) uninstall --yes faiss-cpu faiss-gpu 2>/dev/null || true
	@# pip takes two minutes longer; but it reads pip.conf, where a company names its own index.
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(PINNED) --editable '.[$(FAISS),test]' \
		|| { echo 'make setup: goes on with pip' >&2; $(PIP) install --no-compile $(PINNED) --editable '.[$(FAISS),test]'; }
	@# An image may say that nothing compiled is kept: every command would compile all that it imports. What tests and
	@# tools alone import is not compiled here. Files that are templates cannot be.
	@$(BIN)/python -m compileall -qq -j 0 -x '/(tests|transformers|moto|mypy|pip|setuptools)/' $(VENV)/lib || true
	@rm -f $(VENV)/.installed-*
	@touch $@

demo: $(READY) ## All three stages on real images and weights from the package registry; prints the table
	$(BIN)/python -m pipeline run pipeline/experiments/demo.toml --set work=runs/demo $(ARGS)

results: $(READY) ## Results on real images: DATA=folder (WORK=runs/results, ARGS="--page FILE"); pipeline/benchmark/README.md
	@$(if $(DATA),,$(error DATA is missing: make results DATA=folder, see pipeline/benchmark/README.md))
	$(BIN)/python -m pipeline results '$(DATA)' --work '$(WORK)' $(ARGS)

map: $(READY) ## Where mixtures gain, by classes, images and experts: DATA=folder (MAP=runs/map); pipeline/benchmark/README.md
	@$(if $(DATA),,$(error DATA is missing: make map DATA=folder, see pipeline/benchmark/README.md))
	$(BIN)/python -m pipeline map '$(DATA)' --work '$(MAP)' $(ARGS)

study: $(READY) ## Several backbones against published numbers: STUDY=file.toml DATA=folder (STUDIES=runs/study); pipeline/reproduction/README.md
	@$(if $(DATA),,$(error DATA is missing: make study DATA=folder, see pipeline/reproduction/README.md))
	$(BIN)/python -m pipeline study '$(STUDY)' '$(DATA)' --work '$(STUDIES)' $(ARGS)

pseudo-ood: $(READY) ## Compare settings of stage two on ID images alone: DATA=folder, as for results
	@$(if $(DATA),,$(error DATA is missing: make pseudo-ood DATA=folder, see pipeline/benchmark/README.md))
	$(BIN)/python -m tests.bench.pseudo_ood '$(DATA)' --work '$(WORK)/pseudo-ood' $(ARGS)

run: $(READY) ## Every stage that is not fresh (EXPERIMENT=file.toml ARGS="--set …", as for each of them)
plan: $(READY) ## What it would cost, before anything runs: images, bytes, hours, memory
predict: $(READY) ## Score new images: ARGS="image.jpg …"
export: $(READY) ## The detector as one file: ARGS="-o pets.ood"
serve: $(READY) ## An exported detector over HTTP: EXPERIMENT=pets.ood ARGS="--port 8000"
verify: $(READY) ## Check every byte of the caches
info: $(READY) ## Show caches and models at a glance
$(STAGES): $(READY)
$(STAGES) $(VERBS):
	$(BIN)/python -m pipeline $@ '$(EXPERIMENT)' $(ARGS)

test: $(READY) ## Set up and run the tests, a file on each core
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY) ## Check style and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@# What Linux alone has must not be called unguarded.
	$(BIN)/mypy --config-file .ci/darwin.toml

bench: bench-extract bench-decode bench-cache bench-store bench-train bench-finetune bench-knn bench-score bench-fits bench-heads bench-watch bench-serve bench-cluster ## Measure every stage against its limit (some minutes; not a test)
bench-extract: $(READY) ## Stage one against the bare forward pass
bench-decode: $(READY) ## The decoder alone, by threads and processes (ARGS=--ways, ARGS="--difference SOURCE")
bench-cache: $(READY) ## The cache against the disk, memory and the bare hash
bench-store: $(READY) ## A cache in an object store against bare ranges of bytes (loopback only)
bench-train: $(READY) ## Stage two against the bare training of one expert
bench-finetune: $(READY) ## The end-to-end fine-tune against bare steps; memory with gradient checkpointing
bench-score: $(READY) ## All scores and metrics of 100,000 rows
bench-fits: $(READY) ## Fits on a million rows: time and memory
bench-heads: $(READY) ## Linear heads of nine strengths beside scikit-learn's
bench-knn: $(READY) ## kNN against a bare FAISS search
bench-watch: $(READY) ## How often a stream of ID images is called drifting, and how soon one with OOD
bench-serve: $(READY) ## A served detector against one in process; good and bad requests; memory (loopback only)
bench-plan: $(READY) ## What plan says against what a run takes: the demo, or ARGS="EXPERIMENT.toml"
bench-company: $(READY) ## Two trainings side by side against one alone
bench-cluster: $(READY) ## One and two workers: extraction, kNN, an empty item; the scheduler's memory
bench-scale: $(READY) ## Each step after extraction at 10,000, 100,000, … rows: time, memory, slopes (ARGS="--rows 1000000 --only grouping")
bench-extract bench-decode bench-cache bench-store bench-train bench-finetune bench-knn bench-score bench-fits bench-heads bench-watch \
	bench-serve bench-plan bench-company bench-scale bench-cluster:
	$(BIN)/python -m tests.bench.$(subst -,_,$@) $(ARGS)

check-gpu: $(READY) ## All that a GPU is for, checked and measured in 8 minutes; exits 3 where none answers
	$(BIN)/python -m tests.bench.check_gpu $(ARGS)

stress: $(READY) ## The tests of kills and damage, many times over; a thousand shards by two workers
	$(BIN)/python -m pytest tests/test_cache tests/test_stages/test_extract_kills.py tests/test_stages/test_inputs/test_images_corpus.py \
		tests/test_pipeline/test_study_bytes.py tests/test_parity/test_engines.py --kills 200 --mutants 3000 --shards 1000 $(ARGS)

fmt: $(READY) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and tool caches; feature caches and runs stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
