# make demo   the whole job on a small model: runs/demo/report.html   (DATA=file.jsonl takes your own dialogues)
# make test   every test;   make lab   JupyterLab on the notebooks
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PYTHONWARNINGS ?= ignore::FutureWarning
# A shared machine is not made slower by threads that spin while they wait for each other.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-demo check lab notebooks clean

demo: $(VENV)/.installed
	$(BIN)/python -m qlora_helpers demo $(if $(DATA),--data "$(DATA)")

test: $(VENV)/.installed-dev
	$(BIN)/python tests/run_all.py

# The notebooks in the profile whose outputs they store: minutes, and a small model really learns.
test-demo: $(VENV)/.installed-dev
	$(BIN)/python tests/run_all.py --only notebooks --profile demo

check: $(VENV)/.installed-dev
	$(BIN)/python tests/run_all.py --only style

lab: $(VENV)/.installed
	$(BIN)/jupyter lab notebooks

# Runs all notebooks in the demo profile and stores their outputs.
notebooks: $(VENV)/.installed-dev
	$(BIN)/python tests/store_notebooks.py

$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; name one with PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV)
