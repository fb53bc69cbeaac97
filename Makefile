# One word for each habit; `make help` lists them. Settings go on the command line: make train NPROC=4
VENV   ?= .venv
PYTHON ?= python3
SCRIPT ?= ddp/train.py
NPROC  ?=
ARGS   ?=
M      ?= ddp
NODES  ?= 2
GPUS   ?= 2
# Tests at a time: one for each core. Ranks wait a lot, and three or four of them share a core well.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n > 8 ? 8 : n)))

BIN := $(VENV)/bin
PIP := "$(BIN)/python" -m pip --disable-pip-version-check install
# One worker runs all tests of a folder (tests/conftest.py); the folders are dealt out among the workers.
PYTEST := "$(BIN)/python" -m pytest $(if $(ARGS),,-n $(WORKERS) --dist loadscope --no-loadscope-reorder)
# An environment remembers what was installed into it: the lists of packages, and the checkout that it points to.
LESSON  := $(shell cat requirements-lesson.txt | cksum)
CORE    := $(shell cat requirements-lesson.txt requirements.txt | cksum)
PROJECT := $(shell { pwd; cat pyproject.toml; } | cksum)

.PHONY: help venv venv-lesson train test test-all test-slurm-all mutants lint docs exercise grade scaling doctor gpu-check cluster-up cluster-down clean

help: ## this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile
	@echo '  Settings: VENV=.venv PYTHON=python3 SCRIPT=ddp/train.py NPROC= (default: all GPUs, else 2) ARGS= M=ddp NODES=2 GPUS=2 WORKERS= (tests at a time; default: the cores)'

venv: ## create .venv with the whole core environment, or bring it up to date
	@$(create_venv)
	@[ "$$(cat "$(VENV)/.core" 2>/dev/null)" = "$(CORE)" ] || \
	  { $(PIP) -r requirements.txt && echo "$(CORE)" >"$(VENV)/.core" && echo "$(PROJECT)" >"$(VENV)/.project"; }
	@$(install_project)

venv-lesson:
	@$(create_venv)
	@[ "$$(cat "$(VENV)/.core" 2>/dev/null)" = "$(CORE)" ] || [ "$$(cat "$(VENV)/.lesson" 2>/dev/null)" = "$(LESSON)" ] || \
	  { $(PIP) -r requirements-lesson.txt && echo "$(LESSON)" >"$(VENV)/.lesson"; }
	@$(install_project)

train: venv-lesson ## train SCRIPT on all GPUs, else with 2 processes on the CPU: make train NPROC=4 ARGS="--train.steps 50"
	@[ -f "$(SCRIPT)" ] || { echo "make: there is no script $(SCRIPT); name one: make train SCRIPT=ddp/train.py" >&2; exit 2; }
	@nproc="$(NPROC)"; gpus=$$("$(BIN)/python" -c 'import torch; print(torch.cuda.device_count())') || exit; \
	  [ -n "$$nproc" ] || { [ "$$gpus" -gt 0 ] && nproc=$$gpus || nproc=2; }; \
	  case $$nproc in 0*|*[!0-9]*) echo "make: NPROC=$$nproc; expected how many processes to start, 1 or more" >&2; exit 2; esac; \
	  if [ -z "$$OMP_NUM_THREADS" ]; then \
	    OMP_NUM_THREADS=$$("$(BIN)/python" -c "import os; print(max(1, (os.cpu_count() or 1) // $$nproc))"); fi; \
	  export OMP_NUM_THREADS; \
	  set -- --standalone --nproc-per-node=$$nproc "$(SCRIPT)" $(ARGS); \
	  echo "OMP_NUM_THREADS=$$OMP_NUM_THREADS torchrun $$*"; \
	  trap 'stopped=1' INT; "$(BIN)/torchrun" "$$@"; code=$$?; \
	  [ -z "$$stopped" ] || echo "make: stopped by Ctrl-C, all ranks have ended; torchrun reports it as the traceback above" >&2; \
	  [ $$code -ne 0 ] || echo "make: to run the commands of the READMEs in this shell: source $(VENV)/bin/activate"; \
	  exit $$code

test: venv ## prove every lesson in minutes; a part: make test ARGS="tests/common -k loss"
	@OMP_NUM_THREADS=1 $(PYTEST) -m "not slow" $(ARGS)

test-all: venv ## the same with longer runs, all combinations, all README commands, faults on the cluster
	@TESTS=all OMP_NUM_THREADS=1 $(PYTEST) $(ARGS)

mutants: venv ## plant bugs, and see the tests catch them; one lesson: make mutants M=ddp; the list: make mutants ARGS=--list
	@"$(BIN)/python" tools/mutants.py $(if $(filter command environment,$(origin M)),"$(M)") $(ARGS)

test-slurm-all: venv ## really run every job file of the repository on a Slurm cluster on this machine
	@TESTS=all OMP_NUM_THREADS=1 REQUIRE_SLURM=1 "$(BIN)/python" -m pytest tests/slurm/test_every_job_file.py $(ARGS)

lint: venv ## check style, format, types, shell scripts and job files
	@failed=; PATH="$(BIN):$$PATH"; \
	  ruff check . || failed=1; \
	  ruff format --check . || failed=1; \
	  mypy || failed=1; \
	  find . \( -name .git -o -name '.venv*' -o -name runs \) -prune -o \
	    -type f \( -name '*.sh' -o -name '*.sbatch' -o -path ./.ci/run \) -exec shellcheck -x {} + || failed=1; \
	  python tools/sbatch_lint.py || failed=1; \
	  [ -z "$$failed" ]

docs: venv ## rewrite the generated parts of all READMEs
	@"$(BIN)/python" tools/docs.py refresh

# What a lesson's exercises import: transformers, DeepSpeed and Lightning are not in the small environment.
exercise grade: $(if $(filter deepspeed fsdp lightning,$(M)),venv,venv-lesson)

exercise: ## write the tasks of a lesson for you to solve: make exercise M=ddp
	@"$(BIN)/python" tools/exercises.py write "$(M)" $(ARGS)

grade: ## grade your solutions on the CPU: make grade M=ddp
	@OMP_NUM_THREADS=1 "$(BIN)/python" tools/exercises.py grade "$(M)" $(ARGS)

scaling: venv-lesson ## measure how SCRIPT scales, as a table and a plot
	@"$(BIN)/python" benchmarks/scaling.py "$(SCRIPT)" $(ARGS)

doctor: ## check this machine: packages, GPUs, network, disks, Slurm; and what to do about each problem
	@python="$(BIN)/python"; [ -x "$$python" ] || python="$(PYTHON)"; "$$python" prerequisites/doctor.py $(ARGS)

gpu-check: venv ## run every GPU path on a machine with NVIDIA GPUs, in about six minutes, and print a verdict
	@"$(BIN)/python" tools/gpu_check.py $(ARGS)

cluster-up: ## start a Slurm cluster on this machine: make cluster-up NODES=2 GPUS=2
	@"$(PYTHON)" slurm/cluster.py up --nodes "$(NODES)" --gpus-per-node "$(GPUS)"

cluster-down: ## end it; nothing stays behind
	@"$(PYTHON)" slurm/cluster.py down

clean: ## remove caches and build leftovers; environments and runs/ stay
	@find . \( -name .git -o -name '.venv*' -o -name runs \) -prune -o -type d \
	  \( -name __pycache__ -o -name .pytest_cache -o -name .mypy_cache -o -name .ruff_cache -o -name '*.egg-info' \) \
	  -prune -exec rm -rf {} +
	@rm -rf build

define create_venv
"$(BIN)/python" -c '' 2>/dev/null || { \
  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
    echo "make: $(PYTHON) is $$("$(PYTHON)" -V 2>/dev/null || echo missing); Python 3.11 or newer is needed: make PYTHON=python3.12 …" >&2; exit 2; }; \
  "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
    echo "make: $(PYTHON) cannot create environments; install venv (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 2; }; \
  rm -f "$(VENV)/.core" "$(VENV)/.lesson" "$(VENV)/.project"; \
  "$(PYTHON)" -m venv "$(VENV)"; }
endef

define install_project
[ "$$(cat "$(VENV)/.project" 2>/dev/null)" = "$(PROJECT)" ] || \
  { $(PIP) --quiet --no-deps --no-build-isolation -e . && echo "$(PROJECT)" >"$(VENV)/.project"; }
endef
