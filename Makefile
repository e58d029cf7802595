# `make demo` needs the runtime alone; `make test` sets up the whole workshop. Both start from nothing but Python and git.
# 3.11 is preferred: pybullet has no wheels for newer Pythons, so pip compiles it there (minutes, and needs g++).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# A machine that would get PyTorch's CUDA build (5 GB) can be pointed at the CPU one:
#   make test PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=
# One compute thread a test process; the processes share the cores.
TEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --dist loadfile

.PHONY: demo test lint types layers tables check clean

demo: .venv-demo/ready
	.venv-demo/bin/python examples/demo.py demo.png

test: .venv/ready
	$(TEST) $(ARGS)

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/ready
	.venv/bin/mypy

layers: .venv/ready
	.venv/bin/lint-imports

tables: .venv/ready
	.venv/bin/python -m bench.readme --check

check: lint types layers tables test

clean:
	rm -rf .venv .venv-demo demo.png .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# The file `ready` is written last, so a set-up that was interrupted is done again.
.venv-demo/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv --clear .venv-demo
	.venv-demo/bin/pip install --quiet --upgrade pip
	.venv-demo/bin/pip install --quiet $(PIP_FLAGS) --editable '.[onnx]'
	touch $@

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv --clear .venv
	.venv/bin/pip install --quiet --upgrade pip
	.venv/bin/pip install --quiet $(PIP_FLAGS) --constraint constraints.txt torch
	.venv/bin/pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --group dev --editable '.[onnx]'
	touch $@
