# `make demo` sets up the runtime alone, `make test` the whole workshop; both start from nothing but Python, git and make.
# 3.11 comes first: pybullet may have no wheel for a newer Python, and pip then compiles it (minutes, and needs g++).
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
# On x86 the default index may hold PyTorch's CUDA build alone (gigabytes); point pip at the CPU builds that pytorch.org
# names: make test PIP_FLAGS="--extra-index-url URL".
PIP_FLAGS ?=
DEMO_PICTURE ?= demo.png
# One compute thread a test process; the processes share the cores.
TEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n logical --dist loadfile

.PHONY: demo test lint types layers tables check clean

demo: .venv-demo/ready
	.venv-demo/bin/python examples/demo.py $(DEMO_PICTURE)

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

# A set-up that was cut off leaves `unfinished` behind and starts over; pip's cache keeps what it had fetched. A finished
# one is brought up to date in place when its requirements change.
define venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test ! -e $(@D)/unfinished || rm -rf $(@D)
	mkdir -p $(@D)
	touch $(@D)/unfinished
	test -x $(@D)/bin/pip || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
endef

.venv-demo/ready: pyproject.toml constraints.txt
	$(venv)
	$(@D)/bin/pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[onnx]'
	mv $(@D)/unfinished $@

.venv/ready: pyproject.toml constraints.txt
	$(venv)
	$(@D)/bin/pip install --quiet $(PIP_FLAGS) --constraint constraints.txt torch
	$(@D)/bin/pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[onnx]' --group dev
	mv $(@D)/unfinished $@
