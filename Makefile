# Every target sets up what it needs: `make demo` and `make test` work on a fresh machine.
#   PYTHON=python3.12    the Python that a new environment is made of
#   VENV=path            the environment; one that make did not create is used as it is, nothing is downloaded for it
#   TORCH=2.13.0         the torch of an environment that make creates
#   FUSEDRNN_CUDA=1      builds the CUDA kernels where there is no GPU too (0: nowhere)
#   ARGS="..."           passed on to the program that the target runs
PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.14.1
ARGS ?=
export MAX_JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
export PATH := $(abspath $(VENV))/bin:$(PATH)

PY := $(VENV)/bin/python
OURS := $(VENV)/.fusedrnn-created
TORCH_STAMP := $(VENV)/.fusedrnn-torch-$(TORCH)
# Python compiles what it imports; of torch that is a part (20 s less).
NO_COMPILE := --no-compile
# Where none of these is, the CUDA kernels are left out of what make installs: tests and demo can do without them.
GPUS := /dev/nvidia[0-9]* /dev/dxg
# An environment holds one checkout at a time (the stamp's name), a checkout the extension of one environment at a time
# (build/environment): whichever is out of date, the target installs again.
INSTALLED := $(VENV)/.fusedrnn-installed-$(subst /,+,$(subst $() ,_,$(CURDIR)))
ENVIRONMENT := $(strip $(abspath $(VENV)) torch=$(TORCH) $(wildcard $(GPUS)) $(foreach v,FUSEDRNN_BUILD FUSEDRNN_CUDA FUSEDRNN_NVRTC TORCH_CUDA_ARCH_LIST,$(if $($v),$v=$($v))))
SOURCES := pyproject.toml setup.py $(shell find csrc -type f 2>/dev/null)
CLANG_FORMATTED = $(shell git ls-files 'csrc/*' 'tests/*' | grep -E '\.(h|cuh|cpp|cu)$$')
SPELLED = README.md CHANGELOG.md CONTRIBUTING.md docs/*.md docs/*.py fusedrnn/*.py fusedrnn/backends fusedrnn/compat benchmarks/*.py kernels examples tests/*.py csrc
# The tests run on every core where pytest-xdist is; ARGS=-n0 runs them in one process.
# Threads of one that wait for a core that another has must not spin: passive takes 0.3 s where spinning takes 2.
WORKERS = $(if $(shell $(PY) -c 'import xdist; print(1)' 2>/dev/null),-n $(MAX_JOBS) --dist worksteal --benchmark-disable)

.PHONY: help install demo test test-all lint cells bench gpu-cost gpu-check docs pictures dist clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      train a character-level language model with torch.nn.LSTM and fusedrnn.LSTM side by side"
	@echo "make test      the tests that take seconds each      make test-all  all tests"
	@echo "make bench     fusedrnn against torch.nn on the CPU  make gpu-cost  what the GPU kernels cost: counts, a model of time"
	@echo "make gpu-check first contact with a GPU: are the kernels right, how long is a step; one file to send back"
	@echo "make lint      ruff, clang-format, spelling, links   make install   set up and build only"
	@echo "make cells     prints the built-in cells from fusedrnn/zoo.py (csrc, kernels and fusedrnn/printed.*)"
	@echo "make docs      the documentation (docs/_build/html)  make dist      an sdist, the wheel for every torch, a pure one (dist/)"
	@echo "make pictures  draws those of the documentation that need no model (docs/images/*.svg)"
	@echo "make clean     remove what was built (not the environment)"
	@echo "Tests run on every core (ARGS=-n0: one process); without a GPU no CUDA kernels are built (FUSEDRNN_CUDA=1: they are)"

demo: $(INSTALLED)
	$(PY) examples/char_lm.py $(ARGS)

test: $(INSTALLED)
	OMP_WAIT_POLICY=passive $(PY) -m pytest -q -rs $(WORKERS) -m "not slow" $(ARGS)

test-all: $(INSTALLED) $(VENV)/.fusedrnn-extra-examples $(VENV)/.fusedrnn-extra-docs $(VENV)/.fusedrnn-extra-tools \
  $(VENV)/.fusedrnn-extra-models
	OMP_WAIT_POLICY=passive $(PY) -m pytest -q -rs $(WORKERS) $(ARGS)

# Check in what it changes: nothing is traced when the package is built.
cells: $(TORCH_STAMP)
	$(PY) -c 'from fusedrnn import printing; printing.write_printed()'

bench: $(INSTALLED)
	$(PY) -m fusedrnn bench --suite deepbench --quick $(ARGS)

gpu-cost: $(INSTALLED)
	$(PY) benchmarks/gpu_cost.py $(ARGS)

# On a machine with a GPU, where it needs no network; one file to send back. Elsewhere as far as the simulator goes.
gpu-check: $(INSTALLED)
	$(if $(wildcard $(GPUS)),,FUSEDRNN_SIMULATE=1) $(PY) -m fusedrnn.benchmarks.gpu_check $(ARGS)

lint: $(VENV)/.fusedrnn-extra-lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m codespell_lib $(SPELLED)
	$(PY) docs/links.py
	$(if $(CLANG_FORMATTED),$(VENV)/bin/clang-format --dry-run -Werror $(CLANG_FORMATTED))

docs: $(INSTALLED) $(VENV)/.fusedrnn-extra-docs
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html $(ARGS)
	@echo docs/_build/html/index.html

pictures: $(INSTALLED)
	$(PY) docs/draw.py

# FUSEDRNN_CUDA=0 and FUSEDRNN_BUILD=0 leave out what they leave out of an installation.
# One wheel for every torch and Python that are supported, with device code for drivers of CUDA 12 and later.
WHEEL_NVRTC = $(if $(filter 0,$(FUSEDRNN_CUDA)),,FUSEDRNN_NVRTC=12)
dist: $(TORCH_STAMP) $(VENV)/.fusedrnn-extra-dist $(if $(filter 0,$(FUSEDRNN_CUDA)),,$(VENV)/.fusedrnn-extra-cuda-wheel)
	$(PY) -m build --no-isolation --sdist $(ARGS)
	FUSEDRNN_BUILD=0 $(PY) -m build --no-isolation --wheel $(ARGS)
	FUSEDRNN_DIRECT=0 $(WHEEL_NVRTC) TORCH_CUDA_ARCH_LIST='$(or $(TORCH_CUDA_ARCH_LIST),8.0+PTX;9.0;10.0;12.0)' \
	  $(PY) -m build --no-isolation --wheel $(ARGS)
	$(PY) -m abi3audit --assume-minimum-abi3 3.10 dist/*-abi3-*.whl

install: $(INSTALLED)

clean:
	rm -rf build dist *.egg-info demo-out bench-out gates-out docs/_build
	rm -rf fusedrnn/*.so fusedrnn/device

# Without isolation: _direct has to fit the environment's torch.
$(INSTALLED): $(TORCH_STAMP) $(SOURCES)
	@rm -f $(VENV)/.fusedrnn-installed-*
	@[ "$$(cat build/environment 2>/dev/null)" = "$(ENVIRONMENT)" ] || rm -rf fusedrnn/*.so fusedrnn/device
	FUSEDRNN_CUDA=$(or $(FUSEDRNN_CUDA),auto) $(PY) -m pip install $(NO_COMPILE) $$([ -e $(OURS) ] || echo --no-deps) --no-build-isolation -e '.[test,demo]'
	@[ ! -e $(OURS) ] || $(PY) -c 'import triton' 2>/dev/null || $(PY) -m pip install $(NO_COMPILE) 'triton>=3.6'
	@$(PY) -c "import fusedrnn; i = fusedrnn.build_info(); \
	  print('fusedrnn: C++ extension:', i['cpu_capability'] or i['extension_why']); print('fusedrnn:', i['cuda_why'])"
	@mkdir -p build && echo '$(ENVIRONMENT)' > build/environment
	@touch $@

ifneq ($(shell cat build/environment 2>/dev/null),$(ENVIRONMENT))
$(INSTALLED): FORCE
endif
FORCE:

$(TORCH_STAMP): | $(PY)
	@rm -f $(VENV)/.fusedrnn-torch-*
	@if [ -e $(OURS) ]; then \
	  $(PY) -m pip install $(NO_COMPILE) 'setuptools>=77' wheel ninja 'torch==$(TORCH)'; \
	else \
	  echo "$(VENV) was not created by make: it is used as it is, with its own torch"; \
	  $(PY) -c "import torch; print('torch', torch.__version__)"; \
	fi
	@touch $@

# The packages of this one are data; what they need would be ten times as much.
$(VENV)/.fusedrnn-extra-examples: PIP_FLAGS := --no-deps
# The tools of an extra, at its versions; an environment that make did not create has to bring them.
$(VENV)/.fusedrnn-extra-%: pyproject.toml | $(PY)
	@[ ! -e $(OURS) ] || sed -n 's/^$* = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ',' | \
	  xargs $(PY) -m pip install $(PIP_FLAGS)
	@touch $@

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit("fusedrnn needs Python 3.10 or later: make PYTHON=..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV) || { rm -f $(PY); exit 1; }
	@touch $(OURS)
