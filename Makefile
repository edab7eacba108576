# make demo: set up, run the main job on the shipped models, print the table. make test: set up, run all tests.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/installed
# suture and nothing for developers
DEMO = $(VENV)-demo

.PHONY: demo test lint slow docs catalogue package clean

demo: $(DEMO)/installed
	$(DEMO)/bin/suture demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

package:
	$(PYTHON) -m venv $(VENV)-package
	$(VENV)-package/bin/python -m pip install --quiet build twine
	$(VENV)-package/bin/python -m build --outdir dist . > /dev/null
	$(VENV)-package/bin/python -m build --outdir dist packages/suture-zoo > /dev/null
	$(VENV)-package/bin/python -m twine check --strict dist/*

catalogue: $(INSTALLED)
	$(BIN)/python -m suture.cli.catalogue

$(DEMO)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(DEMO)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[run]" --editable packages/suture-zoo
	touch $(DEMO)/installed

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]" --editable packages/suture-zoo
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt --no-deps --target $(VENV)/vision \
		torchvision open_clip_torch timm ftfy wcwidth
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) $(DEMO) $(VENV)-package outputs build dist
