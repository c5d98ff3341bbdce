# make train: set everything up and train the demonstration.   make test: lint and tests; TESTS=EXPRESSION chooses others.
# Nothing but python (>= 3.11), git and make is needed; where python3 is older, uv's is taken if uv is there.

VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test long-test gpu-test install crash-test hostile-test fuzz suites-test browser-test peft-test docs-test
.PHONY: bench bench-real clean

train: $(VENV)/.installed
	$(BIN)/vpd-mlx train quickstart

test: TESTS := not long
test: $(VENV)/.installed-dev
	$(BIN)/python -m compileall -q vpd_mlx  # once, and not in every process that a test starts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --dist worksteal -m "$(TESTS)"

long-test: TESTS := long
long-test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist worksteal -m "$(TESTS)"

# The engine's tests once more, in the ways of a GPU: padded, in its chunks, compiled. Needs g++ for that.
GPU_TESTS := device attention lora rollout updates rlcsd losses architectures temperature recurrence recurrent
gpu-test: $(VENV)/.installed-dev
	VPD_MLX_GPU_PATHS=1 $(BIN)/python -m pytest -n auto $(GPU_TESTS:%=tests/test_%.py)

# What takes minutes, or a browser: not part of `make test`, part of a release.
crash-test: $(VENV)/.installed-dev
	$(BIN)/python tests/crash/kill.py --kills 100

# Every hostile program alone, with all layers of the sandbox and without each. Writes the table in docs/sandbox.md.
hostile-test: $(VENV)/.installed-dev
	PYTHONPATH=tests $(BIN)/python tests/hostile/check.py

# A million frames of the sandbox's result pipe.
fuzz: $(VENV)/.installed-dev
	PYTHONPATH=tests $(BIN)/python tests/fuzz/frames.py
	$(BIN)/python tests/fuzz/verdicts.py

# Every reference of HumanEval, MBPP+, GSM8K and MATH-500 through its verifier; DATA has their files (tests/suites/check.py).
suites-test: $(VENV)/.installed-dev
	$(BIN)/python tests/suites/check.py --data $(DATA)

# docs/architectures.md: a tiny model of every architecture of the installed mlx-lm. To be made again when mlx-lm moves.
.PHONY: architectures
architectures: $(VENV)/.installed-dev
	$(BIN)/python docs/make_architectures.py

browser-test: $(VENV)/.installed-dev
	$(BIN)/python tests/browser/check.py
	$(BIN)/python tests/browser/coach.py --steps 20

# transformers and peft in an environment of their own, build/peft-venv: they must give mlx-lm's answers.
peft-test: $(VENV)/.installed-dev
	$(BIN)/python tests/parity/peft.py

# Planned memory against measured peaks, for published configs scaled down: within a fifth.
.PHONY: plan-test
plan-test: $(VENV)/.installed-dev
	$(BIN)/python tests/parity/memory.py

# Every command that README and docs/ print, as printed.
docs-test: $(VENV)/.installed-dev
	$(BIN)/python tests/docs_commands.py

# Time and memory beside other trainers, which have an environment of their own. Wants an idle machine.
bench: $(VENV)/.installed-dev build/bench-venv/.installed
	$(BIN)/python -m benchmarks.run --peers build/bench-venv/bin/python --out benchmarks/RESULTS.md

# The same with a pretrained model, REAL=FOLDER. A dense one on a CPU wants a fast BLAS in LD_PRELOAD.
bench-real: $(VENV)/.installed-dev build/bench-venv/.installed
	@test -n "$(REAL)" || { echo "say which model: make bench-real REAL=FOLDER" >&2; exit 2; }
	$(BIN)/python -m benchmarks.run --only real --peers build/bench-venv/bin/python --real $(REAL) --out benchmarks/REAL.md

build/bench-venv/.installed:
	python3 -m venv build/bench-venv
	build/bench-venv/bin/pip install --quiet $$($(BIN)/python -m pip freeze | grep -E '^mlx(-lm|-cpu)?==') mlx-lm-lora==5.10.2 mlx-tune==0.6.0
	build/bench-venv/bin/pip install --quiet --no-deps inductive-mlxrl==0.2.4 unsloth-zoo==2026.10.9
	@touch $@

install: $(VENV)/.installed

$(VENV)/bin/python:
	@if python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		python3 -m venv $(VENV); \
	elif command -v uv >/dev/null 2>&1; then \
		uv venv --seed --python 3.12 $(VENV); \
	else \
		echo "python3 is older than 3.11 and uv is not installed. This installs uv:" >&2; \
		echo "    curl -LsSf https://astral.sh/uv/install.sh | sh" >&2; \
		exit 1; \
	fi

# constraints.txt pins a known good set, so that a fresh install next year is the one that was tested.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu]'
	@touch $@

# pip would compile every module on one core, and half of them are tests, or models that no test loads.
NOT_COMPILED := '/(tests|mypy|mypyc|pip|setuptools)/|/transformers/models/(?!auto/)[^/]*/'

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	-$(BIN)/python -m compileall -q -j 0 -x $(NOT_COMPILED) $(VENV)/lib/python3*/site-packages
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
