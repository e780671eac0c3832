# make demo    the whole job on a small model: runs/demo/report.html   (DATA=FILE takes your own data: docs/data.md)
# make test    every test;   make lab   JupyterLab on the notebooks;   make book   the series as pages: build/book/index.html
# TORCH=cpu or TORCH=cuda chooses PyTorch's build; without it, an NVIDIA driver decides.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= auto
BIN := $(VENV)/bin
# What builds the book has an environment of its own, so that the main one holds nothing of it.
BOOK_VENV ?= .venv-book
# As they were typed, and handed on in the environment: neither make nor the shell reads anything into a file's name.
override DATA := $(value DATA)
override TORCH := $(value TORCH)
override OUT := $(or $(value OUT),stick)
export DATA TORCH VENV BOOK_VENV OUT
INSTALL = "$(PYTHON)" tools/install.py --venv "$$VENV"
export PYTHONWARNINGS ?= ignore::FutureWarning
# A shared machine is not made slower by threads that spin while they wait for each other.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test quick slow matrix test-demo check lab notebooks book workshop shipped stick install lock clean

demo: $(VENV)/.installed
	$(BIN)/python -m qlora_helpers demo $${DATA:+--data "$$DATA"}

# What a change is tried with first: style, imports, and the unit tests that take no time.
quick: $(VENV)/.installed-dev
	$(BIN)/python tests/run_all.py --quick

test: $(VENV)/.installed-dev
	$(BIN)/python tests/run_all.py

# What `make test` does a few times is done many times here.
slow: $(VENV)/.installed-dev
	$(BIN)/python tests/run_all.py --slow

# Every family of causal language models that transformers has, down the whole path (docs/models.md); a part of `make slow`.
matrix: $(VENV)/.installed-dev
	QLORA_SLOW=1 $(BIN)/python -m pytest tests/matrix

# The notebooks in the profile whose outputs they store: minutes, and a small model really learns.
test-demo: $(VENV)/.installed-dev
	$(BIN)/python tests/run_all.py --only notebooks --profile demo

check: $(VENV)/.installed-dev
	$(BIN)/python tests/run_all.py --only style

# The root is this folder, so that the notebooks' links into docs/ lead somewhere.
lab: $(VENV)/.installed
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/start.ipynb

# Runs all notebooks in the demo profile and stores their outputs.
notebooks: $(VENV)/.installed-dev
	$(BIN)/python tests/store_notebooks.py

# The notebooks with their stored outputs, and the documents, as pages that need no server. Nothing is executed.
book: $(BOOK_VENV)/.installed
	$(BOOK_VENV)/bin/python tools/book.py

# Student and solved notebooks, lessons and the instructor's papers: workshop/build.
workshop: $(VENV)/.installed
	$(BIN)/python tools/workshop.py

# A finished run, and one whose model never stops: trained here, about as long as `make demo` twice, into workshop/shipped.
shipped: $(VENV)/.installed
	$(BIN)/python tools/shipped.py

# A folder from which the workshop is installed without a network: make stick OUT=/media/stick STICK_OPTIONS="--download all"
stick: $(VENV)/.installed
	$(BIN)/python tools/stick.py "$$OUT" $(STICK_OPTIONS)

# Installs again, with another TORCH for example.
install:
	$(INSTALL)
	touch $(VENV)/.installed

# Resolves the requirements anew (needs uv on the PATH).
lock:
	$(PYTHON) tools/lock.py

# tools/install.py refuses machines that can't work; Pythons too old to read it are refused here.
OLD_PYTHON = error: Python 3.11 or newer is needed; name one with PYTHON=python3.12
$(VENV)/.installed: requirements.lock requirements.txt pyproject.toml tools/install.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(OLD_PYTHON)" >&2; exit 2; }
	@$(INSTALL)
	@touch $@

$(VENV)/.installed-dev: requirements-dev.lock requirements.lock requirements.txt pyproject.toml tools/install.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(OLD_PYTHON)" >&2; exit 2; }
	@$(INSTALL) --dev
	@touch $(VENV)/.installed $@

$(BOOK_VENV)/.installed: requirements-book.lock tools/install.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(OLD_PYTHON)" >&2; exit 2; }
	@"$(PYTHON)" tools/install.py --venv "$$BOOK_VENV" --book
	@touch $@

clean:
	rm -rf -- "$$VENV" "$$BOOK_VENV"
