# make quickstart   set up .venv and run the demo: DPO under ZeRO-3 on two ranks, from nothing to a trained model
# make test         set up .venv if it is not there and run every test
# make lint         ruff and mypy

PYTHON ?= python3
VENV := .venv
# DeepSpeed's compiled operators: a cache of the project's own, so that no other project's killed build blocks it.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions

.PHONY: quickstart test lint clean

quickstart: $(VENV)/installed
	$(VENV)/bin/dsdpo demo

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest $(TESTS)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .cache runs
