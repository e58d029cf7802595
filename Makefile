# `make demo` sets up the runtime alone, `make test` the whole workshop; both start from nothing but Python, git and make.
# 3.11 comes first: pybullet may have no wheel for a newer Python, and pip then compiles it (minutes, and needs g++).
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
# On x86 the default index may hold PyTorch's CUDA build alone (gigabytes); point pip at the CPU builds that pytorch.org
# names: make test PIP_FLAGS="--extra-index-url URL".
PIP_FLAGS ?=
DEMO_PICTURE ?= demo.png
# The oldest Python that the runtime is for, where there is one; PyEnv's are not on the path.
OLDEST ?= $(shell for python in python3.10 $(wildcard $(HOME)/.pyenv/versions/3.10*/bin/python) $(PYTHON); do \
	$$python -c '' 2>/dev/null && echo $$python && break; done)
# Tests that need nothing of the workshop.
RUNTIME_TESTS = $(addprefix tests/test_,answer.py boxes.py decoding.py draw.py picture_files.py stopping.py)
# One compute thread a test process; the processes share the cores. Files with slow tests come first (tests/conftest.py),
# or the slowest would be left for one process alone. Large pages, where Linux has them: weights of gigabytes, zeroed
# in small ones, take a quarter longer.
TEST = OMP_NUM_THREADS=1 THP_MEM_ALLOC_ENABLE=1 .venv/bin/python -m pytest -n logical --dist loadfile --no-loadscope-reorder

NATIVE = gemvg_edge/engines/native

.PHONY: demo workshop native test lint types layers tables docs lowest check clean

demo: .venv-demo/ready
	.venv-demo/bin/python examples/demo.py $(DEMO_PICTURE)

# What `make test` sets up, without its tests: training, quantising, exporting, benchmarks, and `gemvg` as a door to them.
workshop: .venv/ready $(NATIVE)/.built
	@echo 'ready: .venv/bin/gemvg --help'

test: .venv/ready $(NATIVE)/.built
	$(TEST) $(ARGS)

# Our own engine on the CPU. Without a compiler everything runs on ONNX Runtime, and its tests skip.
native: .venv/ready $(NATIVE)/.built

$(NATIVE)/.built: $(wildcard $(NATIVE)/src/*) $(NATIVE)/compiling.py | .venv/ready
	if command -v $(CXX) > /dev/null; then .venv/bin/python -m gemvg_edge.engines.native.build --compiler $(CXX); \
		else echo 'no $(CXX) here (apt-get install g++): ONNX Runtime alone'; fi
	touch $@

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/ready
	.venv/bin/mypy

layers: .venv/ready
	.venv/bin/lint-imports

tables: .venv/ready
	.venv/bin/python -m bench.readme --check

# The site, in ./site; --strict takes a warning or a broken link for an error.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
	@echo 'site/index.html; with search: python3 -m http.server -d site'

# The runtime alone, with the least versions that pyproject.toml names, on the oldest Python.
lowest: .venv-lowest/ready
	.venv-lowest/bin/python -VV
	.venv-lowest/bin/python -m compileall -q gemvg_edge
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -q -n logical --dist loadfile $(RUNTIME_TESTS)
	.venv-lowest/bin/gemvg inspect
	.venv-lowest/bin/python examples/demo.py .venv-lowest/demo.png

check: lint types layers tables lowest test

clean:
	rm -rf $(NATIVE)/*.so $(NATIVE)/.built .venv .venv-demo .venv-lowest site demo.png .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# A set-up that was cut off leaves `unfinished` behind and starts over; pip's cache keeps what it had fetched. A finished
# one is brought up to date in place when its requirements change.
define venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < ($(LEAST)) and "Python $(LEAST) or newer is needed: make PYTHON=...")'
	test ! -e $(@D)/unfinished || rm -rf $(@D)
	mkdir -p $(@D)
	touch $(@D)/unfinished
	test -x $(@D)/bin/pip || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
endef

LEAST = 3, 11
.venv-demo/ready .venv-lowest/ready: LEAST = 3, 10
.venv-lowest/ready: PYTHON := $(OLDEST)

.venv-demo/ready: pyproject.toml constraints.txt
	$(venv)
	$(@D)/bin/pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[onnx]'
	mv $(@D)/unfinished $@

.venv-lowest/ready: pyproject.toml constraints-lowest.txt
	$(venv)
	$(@D)/bin/pip install --quiet $(PIP_FLAGS) --constraint constraints-lowest.txt --editable '.[onnx]' pytest pytest-xdist hypothesis
	mv $(@D)/unfinished $@

.venv/ready: pyproject.toml constraints.txt
	$(venv)
	$(@D)/bin/pip install --quiet $(PIP_FLAGS) --constraint constraints.txt torch
	$(@D)/bin/pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[onnx,serve,cpp]' --group dev
	mv $(@D)/unfinished $@
