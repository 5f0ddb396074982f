# Needs Python >= 3.10 and make (any, also macOS's 3.81); every target makes .venv when it is missing.
# Another interpreter: make PYTHON=python3.12 test
ENV = @PYTHON="$(PYTHON)" sh tools/env.sh
BIN = .venv/bin

.DEFAULT_GOAL := help
.PHONY: help env demo test export readme docs docs-check dist clean

help:         ## this list
	@echo "make TARGET    (the first one makes .venv, which takes minutes; later ones start at once)"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

env:          ## make or update .venv, and nothing else
	$(ENV)

demo:         ## train DPI on real digits, sample, score, write demo/report.html; options in ARGS="--seed 1"
	$(ENV)
	@$(BIN)/dpi_demo $(ARGS)

test:         ## everything: notebooks and package in sync, all notebooks run, tests/
	$(ENV)
	@$(BIN)/python tools/run_tests.py

export:       ## write dpi_nbdev/*.py from the notebooks and clean these
	$(ENV)
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean

readme:       ## write README.md from nbs/index.ipynb
	$(ENV)
	@$(BIN)/python tools/readme.py

docs:         ## build the site into _docs/ (needs Quarto)
	@command -v quarto >/dev/null || { echo "make docs needs Quarto: install it from https://quarto.org/docs/get-started/ and run again." >&2; exit 1; }
	$(ENV)
	@$(BIN)/python tools/readme.py   # first: nbdev_docs renders a README older than index.ipynb its own way
	@PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_docs

docs-check:   ## process all notebooks as the site would, without Quarto
	$(ENV)
	@$(BIN)/python tools/docs_check.py

dist:         ## build the wheel and the source distribution into dist/
	$(ENV)
	@$(BIN)/python -m build

clean:        ## remove what was built (keeps .venv and demo/)
	rm -rf _proc _docs _site build dist *.egg-info .pytest_cache nbs/.ipynb_checkpoints
	find dpi_nbdev nbs tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
