# make quickstart     set up .venv and run the demo: DPO under ZeRO-3 on two ranks, from nothing to a trained model
# make check          what to run after each change: ruff, mypy and every test without ranks, other programs or
#                     ../shared, in about a minute
# make test           every test; make test TESTS="tests/data -m real" runs a part (markers: pytest --markers)
#                     files of tests run two at a time; WORKERS=0 runs one after the other, as a debugger needs it
# make test-ranks     only the tests that start ranks
# make test-nightly   what make test leaves out, as it seldom says something new: benchmarks as whole programs and more
# make test-cluster   tests on simulated hosts and a real Slurm: root, and Debian packages that it names if they are
#                     not there; it installs nothing
# make lint           ruff and mypy
# make format         let ruff put right what it can
# make check-lowest   make check and a run, on the oldest versions that pyproject.toml claims
# make check-newest   the same on the newest versions there are
# make gpu            what a GPU computes otherwise than a CPU, with a report to send in; one GPU is enough, without
#                     one it runs what it can (takes .venv if there is one, else $(PYTHON); installs nothing)
# make docs           the documentation as a site, in runs/site; a broken link is an error
# make bench          every benchmark in a short form; results go to runs/bench (see benchmarks/README.md)
# make clean          remove .venv, caches and runs

PYTHON ?= python3
VENV := .venv
# DeepSpeed's compiled operators: a cache of the project's own, so that no other project's killed build blocks it.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions
PIP_QUIET := --quiet --disable-pip-version-check
WORKERS ?= 2
SIDE_BY_SIDE := -n $(WORKERS) --dist loadfile
QUICK := not ranks and not process and not real
# One run through the whole program, with ranks, an evaluation, a checkpoint and an export.
WHOLE_RUN := tests/commands/test_train.py tests/training/test_export.py tests/reference/test_adapter.py

.PHONY: docs help quickstart check test test-ranks test-nightly test-cluster lint format check-lowest check-newest gpu bench clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

quickstart: $(VENV)/installed
	$(VENV)/bin/dsdpo demo

check: lint
	$(VENV)/bin/python -m pytest -q $(SIDE_BY_SIDE) -m "$(QUICK)" $(TESTS)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest $(SIDE_BY_SIDE) $(TESTS)

test-ranks: $(VENV)/installed
	$(VENV)/bin/python -m pytest $(SIDE_BY_SIDE) -m ranks $(TESTS)

test-nightly: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m nightly $(TESTS)

test-cluster: $(VENV)/installed
	DSDPO_TEST_CLUSTER=1 $(VENV)/bin/python -m pytest tests/cluster

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# An environment of its own for each end, kept in .cache. torch stays at the tested version: another one is another
# download of gigabytes, and DeepSpeed's operators have to be compiled again for it.
check-lowest: .cache/venv-lowest/installed
	.cache/venv-lowest/bin/python -m pytest -q -m "$(QUICK)" $(TESTS)
	.cache/venv-lowest/bin/python -m pytest -q $(WHOLE_RUN)

check-newest:
	$(PYTHON) -m venv .cache/venv-newest
	.cache/venv-newest/bin/pip install $(PIP_QUIET) "$$(grep '^torch==' constraints.txt)"
	.cache/venv-newest/bin/pip install $(PIP_QUIET) --upgrade --upgrade-strategy eager \
		"$$(grep '^torch==' constraints.txt)" --editable '.[dev]'
	.cache/venv-newest/bin/python -m pytest -q -m "$(QUICK)" $(TESTS)
	.cache/venv-newest/bin/python -m pytest -q $(WHOLE_RUN)

.cache/venv-lowest/installed: pyproject.toml constraints.txt constraints-lowest.txt
	$(PYTHON) -m venv .cache/venv-lowest
	.cache/venv-lowest/bin/pip install $(PIP_QUIET) --constraint constraints-lowest.txt --editable '.[dev]'
	touch $@

GPU_PYTHON := $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,$(PYTHON))
gpu:
	DS_ACCELERATOR=$$($(GPU_PYTHON) -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')") \
	DSDPO_GPU_REPORT=runs/gpu/report.json \
	$(GPU_PYTHON) -m pytest -q tests/gpu tests/objective/test_attention.py tests/objective/test_fused_head.py \
	tests/objective/test_eight_bits.py tests/engine/test_compiled_layers.py tests/engine/test_kernels.py \
	tests/test_accelerator.py

# In an environment of its own: nothing of it is needed to run or test dsdpo.
docs: .cache/venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .cache/venv-docs/bin/mkdocs build --strict --quiet

.cache/venv-docs/installed: pyproject.toml
	$(PYTHON) -m venv .cache/venv-docs
	.cache/venv-docs/bin/pip install $(PIP_QUIET) "mkdocs-material>=9.5"
	touch $@

SHORT := --rounds 2 --steps 2
TINY := $(SHORT) --tiny --quick-memory --pairs-per-step 8
bench: $(VENV)/installed
	$(VENV)/bin/pip install $(PIP_QUIET) --constraint constraints.txt --editable '.[bench]'
	$(VENV)/bin/python -m benchmarks.packing $(SHORT) --out runs/bench/packing.json
	$(VENV)/bin/python -m benchmarks.launches --rounds 1 --steps 10 --out runs/bench/launches.json
	$(VENV)/bin/python -m benchmarks.precompute $(SHORT) --tiny --pairs 256 --out runs/bench/precompute.json
	$(VENV)/bin/python -m benchmarks.overhead $(SHORT) --tiny --pairs-per-step 8 --out runs/bench/overhead.json
	$(VENV)/bin/python -m benchmarks.step_split --rounds 1 --tiny --pairs-per-step 8 --out runs/bench/step_split.json
	$(VENV)/bin/python -m benchmarks.saves $(SHORT) --tiny --out runs/bench/saves.json
	$(VENV)/bin/python -m benchmarks.window $(SHORT) --tiny --quick-memory --out runs/bench/window.json
	$(VENV)/bin/python -m benchmarks.strategies $(TINY) --out runs/bench/strategies.json
	$(VENV)/bin/python -m benchmarks.objectives $(SHORT) --tiny --out runs/bench/objectives.json
	$(VENV)/bin/python -m benchmarks.zero_configs $(TINY) --out runs/bench/zero_configs.json
	$(VENV)/bin/python -m benchmarks.scaling $(SHORT) --rows 1000 10000 --out runs/bench/scaling.json
	$(VENV)/bin/python -m benchmarks.vs_trl $(SHORT) --shapes 768+128 --strategies separate --pairs-per-step 8 \
		--starts 1 --quick-memory --out runs/bench/vs_trl.json

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "installing PyTorch, DeepSpeed and what else constraints.txt names into $(VENV): some minutes"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install $(PIP_QUIET) wheel
	$(VENV)/bin/pip install $(PIP_QUIET) --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .cache runs
