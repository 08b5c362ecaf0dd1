# make quickstart   set up .venv and run the demo: DPO under ZeRO-3 on two ranks, from nothing to a trained model
# make test         set up .venv if it is not there and run every test
# make lint         ruff and mypy
# make bench        every benchmark in a short form; results go to runs/bench (see benchmarks/README.md)

PYTHON ?= python3
VENV := .venv
# DeepSpeed's compiled operators: a cache of the project's own, so that no other project's killed build blocks it.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions

.PHONY: quickstart test lint bench clean

quickstart: $(VENV)/installed
	$(VENV)/bin/dsdpo demo

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest $(TESTS)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

SHORT := --rounds 2 --steps 2
TINY := $(SHORT) --tiny --quick-memory --pairs-per-step 8
bench: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(VENV)/bin/python -m benchmarks.packing $(SHORT) --out runs/bench/packing.json
	$(VENV)/bin/python -m benchmarks.precompute $(SHORT) --tiny --pairs 256 --out runs/bench/precompute.json
	$(VENV)/bin/python -m benchmarks.overhead $(SHORT) --tiny --pairs-per-step 8 --out runs/bench/overhead.json
	$(VENV)/bin/python -m benchmarks.window $(SHORT) --tiny --quick-memory --out runs/bench/window.json
	$(VENV)/bin/python -m benchmarks.strategies $(TINY) --out runs/bench/strategies.json
	$(VENV)/bin/python -m benchmarks.zero_configs $(TINY) --out runs/bench/zero_configs.json
	$(VENV)/bin/python -m benchmarks.scaling $(SHORT) --rows 1000 10000 --out runs/bench/scaling.json
	$(VENV)/bin/python -m benchmarks.vs_trl $(SHORT) --shapes 768+128 --strategies separate --pairs-per-step 8 \
		--starts 1 --quick-memory --out runs/bench/vs_trl.json

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .cache runs
