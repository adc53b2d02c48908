# Make only bootstraps .venv with pinned versions and calls the program. The stamps are written last,
# so an interrupted installation is repeated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINS := pyproject.toml constraints.txt

.PHONY: figures test lab lint bench reproduce gallery clean

figures: $(VENV)/.base
	$(BIN)/loopmdm figures

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

lab: $(VENV)/.dev
	$(BIN)/python notebooks/sync.py
	$(BIN)/jupyter lab notebooks

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python notebooks/sync.py --check

bench: $(VENV)/.base
	$(BIN)/loopmdm bench

# Train every shipped model again (hours), then measure and draw everything.
reproduce: $(VENV)/.base
	$(BIN)/loopmdm data fetch sotu
	for spec in sudoku-base sudoku-loop sotu-base sotu-loop; do \
	  $(BIN)/loopmdm train figures/specs/$$spec.toml --resume && \
	  $(BIN)/python -m loopmdm_model.training.ship runs/$$spec || exit; done
	$(BIN)/loopmdm figures --from checkpoints

$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(VENV)/.base: $(PINS) | $(VENV)/.made
	rm -f $@
	$(PIP) install --quiet -c constraints.txt torch==2.13.0
	$(PIP) install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	rm -f $@
	$(PIP) install --quiet -c constraints.txt -e '.[notebooks,dev]'
	touch $@

# The committed PNGs of the README, drawn from the committed tables.
gallery: figures
	cp figures/out/*.png figures/gallery/

clean:
	rm -rf $(VENV) figures/out
