# Every target sets up what it needs. "make" alone lists them.
PYTHON ?= python3
CONFIG ?= embedded
RUN := .venv/bin/python
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup pipeline chat serve test test-arm64 test-arm64-kernels test-resilience loadtest count-arm64 lint format bench bench-quality bench-cache bench-server bench-8b bench-torchchat test-8b bench-tasks test-tasks lock clean

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: ## install everything into .venv (a few minutes, once)
	@$(PYTHON) -m pipeline.install

pipeline: setup ## build model, cache and report; CONFIG=llama31-8b for the large model, ARGS="--set …"
	@$(RUN) -m pipeline run --config $(CONFIG) $(ARGS)

chat: setup ## talk to the storyteller in the terminal
	@EMERALD_BUILD=$${EMERALD_BUILD:-build/$(CONFIG)} $(RUN) -m serving chat $(ARGS)

serve: setup ## serve the OpenAI-compatible HTTP interface on HOST and PORT
	@EMERALD_BUILD=$${EMERALD_BUILD:-build/$(CONFIG)} $(RUN) -m serving serve

test: setup ## run the tests (about a quarter of an hour on 2 cores)
	@$(RUN) -m pytest tests --ignore=tests/resilience --ignore=tests/tasks $(ARGS)

ARM_KERNEL_TESTS := tests/model/test_int4_linear.py tests/model/test_cpu.py
ARM_TESTS ?= $(ARM_KERNEL_TESTS) tests/model/test_kernels.py tests/arm64
test-arm64: setup ## kernels, packing, export and engine on emulated Arm, with i8mm and bf16 and without (needs root)
	@for cpu in max neoverse-n1; do tests/arm64/run.sh $$cpu python3 -m pytest $(ARM_TESTS) $(ARGS) || exit; done

test-arm64-kernels: ## the quick part of test-arm64: KleidiAI's packing and products
	@$(MAKE) --no-print-directory test-arm64 ARM_TESTS="$(ARM_KERNEL_TESTS)"

loadtest: setup ## 64 clients for ten minutes, a fifth hanging up, then random arrivals; ARGS="--clients 16 --seconds 60"
	@$(RUN) -m pipeline run export certify_cache --config $(CONFIG)
	@$(RUN) -m pipeline.loadtest --build build/$(CONFIG) $(ARGS)

test-resilience: setup ## kill the whole pipeline at ten random moments and compare what it builds
	@$(RUN) -m pytest tests/resilience $(ARGS)

lint: setup ## check style and types
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

format: setup ## rewrite the code in the house style
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

bench: setup ## both schemes beside llama.cpp, torch and the machine's limits (first run builds llama.cpp)
	@$(RUN) -m pipeline run export --config $(CONFIG) $(ARGS)
	@$(RUN) -m pipeline run export --config $(CONFIG) --build build/$(CONFIG)-channel --set quantize.scheme=int4-channel
	@$(RUN) -m pipeline.bench --config $(CONFIG) --build build/$(CONFIG) build/$(CONFIG)-channel

count-arm64: setup ## instructions per decoded token on emulated Arm, with KleidiAI and without (needs root)
	@tests/arm64/count.sh

bench-quality: setup ## our recipes beside torchao's and llama.cpp's int4, on the embedded model
	@$(RUN) -m pipeline run fetch --config $(CONFIG)
	@$(RUN) -m pipeline.bench_quality --config $(CONFIG)

bench-cache: setup ## the cache's decision beside its peers', and what a lookup costs
	@$(RUN) -m pipeline run certify_cache --config $(CONFIG) $(ARGS)
	@$(RUN) -m pipeline.bench_cache --build build/$(CONFIG)

bench-server: setup ## the server beside llama.cpp's and its own engine, ready answers, restart (first run builds llama.cpp)
	@$(RUN) -m pipeline run export certify_cache --config $(CONFIG)
	@$(RUN) -m pipeline.bench_server --config $(CONFIG) --build build/$(CONFIG) $(ARGS)

bench-8b: setup ## quantize, export and serve at Llama 3.1 8B's size, with synthetic weights (40 GB of disk, half an hour)
	@$(RUN) -m pipeline run fetch
	@$(RUN) -m pipeline.bench_8b $(ARGS)

LM_EVAL := $(RUN) -m pip install --quiet --requirement requirements/tasks.txt \
	--constraint requirements/linux-$(shell uname -m).txt
TASKS ?= arc_easy,hellaswag
bench-tasks: setup ## int4 beside the reference, question by question; TASKS=arc_easy,hellaswag ARGS="--limit 200"
	@$(LM_EVAL)
	@$(RUN) -m pipeline run quantize --config $(CONFIG)
	@$(RUN) -m pipeline.bench_tasks --config $(CONFIG) --tasks $(TASKS) $(ARGS)

test-tasks: setup ## the comparison through lm-evaluation-harness, on a task of our own
	@$(LM_EVAL)
	@$(RUN) -m pipeline run quantize
	@$(RUN) -m pytest tests/tasks $(ARGS)

bench-torchchat: setup ## the real torchchat beside us; TORCHCHAT_DIR=path of a checkout
	@$(RUN) -m pipeline run export --config $(CONFIG)
	@$(RUN) -m pipeline.torchchat --build build/$(CONFIG) $(ARGS)

test-8b: setup ## the configuration llama31-8b, whole, in 16 GB of memory and 14 GB of disk (needs root)
	@$(RUN) -m pipeline run fetch
	@tests/eight_billion/run.sh $(ARGS)

lock: ## pin the newest versions that pyproject.toml allows (needs uv)
	@sh requirements/lock.sh

clean: ## remove what was built, and the environment
	rm -rf build .venv .pytest_cache .mypy_cache .ruff_cache
