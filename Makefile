# Two commands on a bare machine (Python 3.11+ and a C++ compiler): `make demo` and `make test`.

PYTHON ?= python3
BIN    := .venv/bin
DEMO   := runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: setup demo test lint format clean sanitize sanitize-address sanitize-thread fuzz

setup: .venv/.ready

# Rebuilt when the package's metadata or its native code changes.
.venv/.ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/regrow/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[corpus,plot,cluster,onnx,test,lint]'
	touch $@

# Pre-train a small always-sparse BERT on real text, then ask it for a word.
demo: setup
	$(BIN)/regrow pretrain --preset demo --output $(DEMO)
	$(BIN)/python examples/fill_mask.py $(DEMO)

# Two processes of one thread each are faster than one of two: most tests are small.
test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The native code under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer: those of GCC. Each
# has a build of its own, from which the tests take the kernels (REGROW_NATIVE, tests/conftest.py). Left out are tests
# of nothing but torch's and our Python. A part of it: make sanitize-thread SANITIZED=tests/kernels/test_fuzz.py
sanitize: sanitize-address sanitize-thread
SANITIZED := tests/kernels tests/topology tests/nn/test_loss.py tests/bert/test_inference.py -k "not opcheck and not gradcheck and not uniform"

sanitize-address: build/sanitize-address/.ready
	$(call under,address) $(SANITIZED)

# OpenMP is off in that build; torch's own threads are not what is tested.
sanitize-thread: build/sanitize-thread/.ready
	$(call under,thread) $(SANITIZED)

# Random arguments under AddressSanitizer, for so long. A round names its seed, which repeats it.
MINUTES ?= 60
fuzz: build/sanitize-address/.ready
	end=$$(( $$(date +%s) + 60 * $(MINUTES) )); while seed=$$(date +%s); [ $$seed -lt $$end ]; do \
	  echo "--hypothesis-seed=$$seed"; REGROW_FUZZ_EXAMPLES=300 $(call under,address) --quiet --exitfirst \
	  --hypothesis-seed=$$seed tests/kernels/test_fuzz.py || exit 1; done

# Python is not built with a sanitizer: its library is loaded before everything else, and the C++ library, whose
# exceptions it watches, next. Python frees little when it ends, so leaks are not reported. On some systems addresses are
# too random for ThreadSanitizer unless setarch helps. Reports must not end in pytest's capture.
sanitizer_library = $(shell $(CXX) -print-file-name=$(if $(filter thread,$(1)),libtsan,libasan).so)
under = REGROW_NATIVE=build/sanitize-$(1) \
  LD_PRELOAD="$(call sanitizer_library,$(1)) $(shell $(CXX) -print-file-name=libstdc++.so.6)" \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
  TSAN_OPTIONS=halt_on_error=1:allocator_may_return_null=1:ignore_noninstrumented_modules=1:die_after_fork=0:report_thread_leaks=0 \
  $(if $(filter thread,$(1)),$(shell setarch -R true 2> /dev/null && echo setarch -R)) \
  $(BIN)/python -m pytest --capture=sys

build/sanitize-address/.ready: FLAGS := address,undefined
build/sanitize-thread/.ready: FLAGS := thread
build/sanitize-%/.ready: CMakeLists.txt $(wildcard src/regrow/csrc/*) | setup
	@test -e "$(call sanitizer_library,$*)" || { echo "$(CXX) lacks the sanitizers of GCC. Debian: apt-get install g++;" \
	  "Fedora: dnf install gcc-c++ libasan libubsan libtsan. Where another compiler is the default, add CXX=g++"; exit 1; }
	CXX=$(CXX) $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(@D) --config-settings build-dir=$(@D) \
	  --config-settings cmake.build-type=Debug --config-settings cmake.define.REGROW_SANITIZE=$(FLAGS) .
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
