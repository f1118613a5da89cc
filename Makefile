# PYTHON makes the virtual environment; given to `make gpu`, it is the Python that runs there.
PYTHON ?= python3
OUT ?= gpu-results
COMMIT ?=

BIN := .venv/bin
STAMP := .venv/stamp
PYTHON_GIVEN := $(filter-out file,$(origin PYTHON))

.DEFAULT_GOAL := help
.PHONY: help demo test test-all compat sanitize integration lint format bench report docs gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## train a small OCR network on a photo, with and without the kernels, and draw what it sees
	$(BIN)/ocr-kernels demo

WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --timeout 900

test: $(STAMP) ## the tests that this machine can run; WORKERS=2
	$(PYTEST) -m "not wide"

test-all: $(STAMP) ## the same over the whole grid of dtypes, layouts and sizes
	$(PYTEST)

# The Triton that belongs to a PyTorch: builds for GPUs ask for it themselves, builds for CPUs do not.
TRITON ?= $(patsubst $(basename $(TORCH)):%,%,$(filter $(basename $(TORCH)):%,2.11:3.6.0 2.13:3.7.1 2.14:3.8.0))
COMPAT = build/compat-$(or $(TORCH),newest)

compat: ## every test but the slow ones on another PyTorch, in an environment of its own; TORCH=2.11.0, else the newest
	$(PYTHON) -m venv $(COMPAT)
	grep -vE '^(numpy|setuptools|torch|triton)==' constraints.txt > $(COMPAT)/constraints.txt
	echo 'numpy<2.4' >> $(COMPAT)/constraints.txt # for the interpreter of Triton 3.6
	$(COMPAT)/bin/pip install 'setuptools>=77' torch$(TORCH:%===%) 'triton$(TRITON:%===%); platform_system == "Linux"'
	OCR_KERNELS_BUILD=none $(COMPAT)/bin/pip install --no-build-isolation -c $(COMPAT)/constraints.txt -e '.[test]'
	OCR_KERNELS_BUILD=cpu $(COMPAT)/bin/python setup.py -q build_ext --build-lib $(COMPAT) --build-temp $(COMPAT)/objects
	$(COMPAT)/bin/pip list | grep -E '^(numpy|onnx|onnxscript|torch|triton) '
	OCR_KERNELS_LIBRARY="$(CURDIR)/$(COMPAT)/ocr_kernels/libocr_kernels_cpu.so" \
		$(COMPAT)/bin/python -m pytest -q -rfE --numprocesses $(WORKERS) --dist loadgroup -m "not slow and not wide and not integration"

SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
CXX ?= c++

# Python itself is not built with AddressSanitizer, so its library comes first by force, and libstdc++ with it, whose
# exceptions it watches. Python and PyTorch leave memory to the end of the process, which is not what is looked for.
sanitize: $(STAMP) ## the compiled library's tests under AddressSanitizer and UBSan
	CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" OCR_KERNELS_BUILD=cpu $(BIN)/python setup.py -q build_ext --debug \
		--build-lib build/sanitize --build-temp build/sanitize-objects
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		OCR_KERNELS_LIBRARY="$(CURDIR)/build/sanitize/ocr_kernels/libocr_kernels_cpu.so" \
		$(BIN)/python -m pytest tests/test_fuzz.py tests/test_native.py tests/test_parity.py tests/test_passes.py tests/test_values.py \
		-k "native or compiled or private or passes" --hypothesis-profile=thorough

integration: $(STAMP) ## tests with mmsegmentation and Lightning, which it installs
	$(BIN)/pip install -r tests/integration/requirements.txt
	$(BIN)/pip install --no-deps -r tests/integration/openmmlab.txt
	$(BIN)/python -m pytest -m integration

CPP := $(shell find csrc examples tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

lint: $(STAMP) ## ruff, clang-format and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: $(STAMP) ## rewrite the code as `make lint` wants it
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

bench: $(STAMP) ## times beside eager PyTorch, a few on a CPU; on a GPU all, beside torch.compile too
	$(BIN)/ocr-kernels bench

report: $(STAMP) ## RESULTS.md, the README's table and the pictures, from benchmarks/results
	$(BIN)/python -m benchmarks.pages

docs: $(STAMP) ## the site, into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

gpu: $(if $(PYTHON_GIVEN),,$(STAMP)) ## tests and benchmarks on a GPU; PYTHON=python3 OUT=dir COMMIT=hash
	@PYTHONPATH="$(CURDIR)" $(if $(PYTHON_GIVEN),$(PYTHON),$(BIN)/python) -m benchmarks.gpu --out "$(OUT)" --commit "$(COMMIT)"

clean: ## remove everything that these commands made
	rm -rf .venv build dist *.egg-info demo-output gpu-results .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find benchmarks ocr_kernels tests -name __pycache__ -prune -exec rm -rf {} +

# PyTorch first and by its exact version, so that an index's CPU build of it is taken and then kept.
$(STAMP): constraints.txt pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $$(grep -E '^(setuptools|torch)==' constraints.txt)
	$(BIN)/pip install --no-build-isolation -c constraints.txt -e '.[dev]'
	touch $@
