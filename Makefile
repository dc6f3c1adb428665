# Needs Python >= 3.11 and make; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DEVELOPED := .venv/.developed

.PHONY: install develop demo test test-oldest slow gpu fuzz families options check bench docs clean
.DEFAULT_GOAL := install

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "regraft needs Python 3.11 or newer, and $(PYTHON) is older: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@if command -v uv >/dev/null; then uv=uv; else \
		$(BIN)/python -m pip install --quiet uv; uv=$(BIN)/uv; fi; \
	$$uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[decode]'
	@touch $@
	@echo "installed: $(BIN)/regraft --help"

# What the tests and checks need besides: transformers, Lightning, pytest, ruff, pyright.
develop: $(DEVELOPED)

$(DEVELOPED): $(INSTALLED)
	@if command -v uv >/dev/null; then uv=uv; else uv=$(BIN)/uv; fi; \
	$$uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/regraft demo --out regraft-demo --overwrite

test: develop
	$(BIN)/python -m pytest -m 'not slow and not gpu and not fuzz'

# The same tests with the oldest versions that pyproject.toml allows; test_layering holds the list of them against it.
test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -m 'not slow and not gpu and not fuzz'

.venv-oldest/.installed: $(INSTALLED) constraints-oldest.txt
	@test -x .venv-oldest/bin/python || $(BIN)/python -m venv .venv-oldest
	@if command -v uv >/dev/null; then uv=uv; else uv=$(BIN)/uv; fi; \
	$$uv pip install --quiet --python .venv-oldest/bin/python --constraint constraints-oldest.txt --editable '.[dev]'
	@touch $@

slow: develop
	$(BIN)/python -m pytest -m slow --dist worksteal

# On a machine with a CUDA device; each test is skipped with a reason elsewhere.
gpu: develop
	$(BIN)/python -m pytest -o addopts= -q --strict-markers -rs -m gpu
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
		then cd benchmarks && ../$(BIN)/python gpu.py; else echo "there is no CUDA device here: benchmarks/gpu.py was not run"; fi

fuzz: develop
	@if command -v uv >/dev/null; then uv=uv; else uv=$(BIN)/uv; fi; \
	$$uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev,fuzz]'
	$(BIN)/python -m pytest -m fuzz tests/fuzz

check: develop
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -p no:xdist -o addopts= -q tests/test_layering.py

# The whole of the sweeps, of which `make slow` takes a part.
families: develop
	REGRAFT_WRITE_FAMILIES=1 $(BIN)/python -m pytest -o addopts= -q tests/test_architectures.py tests/training/test_features.py tests/freezing/test_families.py tests/surgery/test_surgery_families.py tests/surgery/test_ends_of_families.py tests/checkpoint/test_round_trip_families.py

options: develop
	REGRAFT_WRITE_OPTIONS=1 $(BIN)/python -m pytest -o addopts= -q tests/cli/test_train_options.py

bench: .venv-bench/.installed
	cd benchmarks && for part in speed live_part memory views compiled page; do ../.venv-bench/bin/python $$part.py || exit 1; done

.venv-bench/.installed: $(INSTALLED)
	@test -x .venv-bench/bin/python || $(BIN)/python -m venv .venv-bench
	@if command -v uv >/dev/null; then uv=uv; else uv=$(BIN)/uv; fi; \
	$$uv pip install --quiet --python .venv-bench/bin/python --constraint constraints.txt --editable '.[bench]'
	@touch $@

docs: develop
	$(BIN)/python -m pytest -o addopts= -q tests/test_docs.py

clean:
	rm -rf .venv .venv-bench .venv-oldest .pytest_cache .ruff_cache regraft-demo
