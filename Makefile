# Make only bootstraps .venv with pinned versions, every file checked against its hash (locks/write.py), and calls
# the program. The stamps are written last, so an interrupted installation is repeated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOCKED := $(PIP) install --quiet --require-hashes --no-deps --no-build-isolation
HERE := PYTHONWARNINGS=ignore $(PIP) install --quiet --no-deps --no-build-isolation -e .
PINS := pyproject.toml $(wildcard locks/*.txt)

.PHONY: figures test slow soak lab lint docs bench reproduce gallery clean

figures: $(VENV)/.base
	$(BIN)/loopmdm figures

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

# What takes many seconds and rarely fails, and every notebook, of few sequences.
slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "slow and not soak"

# What is too slow for every run: twenty kills at random moments, with one process and with two, and 5,000 bad inputs
# of the command line, of files and of the Python API; prints what was counted.
soak: $(VENV)/.dev
	$(BIN)/python -m pytest -m soak -s

lab: $(VENV)/.dev
	$(BIN)/python notebooks/sync.py
	$(BIN)/jupyter lab notebooks

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python notebooks/sync.py --check

# The site, docs/_build/html: chapters are run and kept with their outputs, warnings are errors.
docs: $(VENV)/.docs
	$(BIN)/python docs/build.py

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
	$(LOCKED) -r locks/build.txt  # before what comes as source only, which pip builds with it
	$(LOCKED) -r locks/torch-cpu.txt 2>/dev/null || $(LOCKED) -r locks/torch.txt  # the CPU build where pip finds it
	$(LOCKED) -r locks/base.txt
	$(HERE)
	touch $@

$(VENV)/.pipeline: $(VENV)/.base
	rm -f $@
	$(LOCKED) -r locks/pipeline.txt
	touch $@

$(VENV)/.dev: $(VENV)/.base
	rm -f $@
	$(LOCKED) -r locks/dev.txt
	touch $@

$(VENV)/.docs: $(VENV)/.dev
	rm -f $@
	$(LOCKED) -r locks/docs.txt
	touch $@

# The committed PNGs and the generated pages and blocks, from the committed tables.
gallery: $(VENV)/.base
	$(BIN)/loopmdm gallery

clean:
	rm -rf $(VENV) figures/out
