# Make only bootstraps .venv with pinned versions and calls the program. The stamps are written last,
# so an interrupted installation is repeated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINS := pyproject.toml constraints.txt

.PHONY: figures test soak lab lint bench reproduce gallery clean

figures: $(VENV)/.base
	$(BIN)/loopmdm figures

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

# What is too slow for every run: twenty kills at random moments, with one process and with two.
soak: $(VENV)/.dev
	$(BIN)/python -m pytest -m soak

lab: $(VENV)/.dev
	$(BIN)/python notebooks/sync.py
	$(BIN)/jupyter lab notebooks

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python notebooks/sync.py --check

bench: $(VENV)/.dev
	$(BIN)/loopmdm bench

# Train every model of the roster again (many hours), ship, measure and draw everything; figures/PIPELINE.md. What an
# interrupted run of it has done stays done. PROFILE=slurm does the same on a cluster.
PROFILE ?= local
reproduce: $(VENV)/.pipeline
	$(BIN)/snakemake --profile figures/profiles/$(PROFILE) --config from=scratch

$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(VENV)/.base: $(PINS) | $(VENV)/.made
	rm -f $@
	$(PIP) install --quiet -c constraints.txt torch==2.13.0
	$(PIP) install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.pipeline: $(VENV)/.base
	rm -f $@
	$(PIP) install --quiet -c constraints.txt -e '.[pipeline]'
	touch $@

$(VENV)/.dev: $(VENV)/.base
	rm -f $@
	$(PIP) install --quiet -c constraints.txt -e '.[notebooks,dev]'
	touch $@

# The committed PNGs, figures/README.md and the README's generated blocks, from the committed tables.
gallery: $(VENV)/.base
	$(BIN)/loopmdm gallery

clean:
	rm -rf $(VENV) figures/out
