# Two commands do everything, from a fresh clone:
#   make study   sets up .venv, runs studies/quickstart.toml, ends by printing the path of one HTML report
#   make test    sets up .venv, runs lint, types and all tests
PYTHON ?= python3
BIN := .venv/bin

.PHONY: study test lint types tests kernels bench clean

study: .venv/ready
	$(BIN)/dspace study run studies/quickstart.toml --jobs 2
	$(BIN)/dspace study report quickstart

test: lint types tests

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

tests: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

kernels: .venv/ready
	$(BIN)/dspace generate --all

bench: .venv/ready
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/compile_time.py

# A PyTorch with CUDA that is already installed is used as it is; otherwise constraints.txt pins what is installed.
.venv/ready: pyproject.toml constraints.txt
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.version.cuda)' 2>/dev/null; then \
		echo "using the PyTorch with CUDA of $$(command -v $(PYTHON))"; \
		$(PYTHON) -m venv --system-site-packages .venv && grep -vE '^(torch|triton|numpy)==' constraints.txt > .venv/constraints.txt; \
	else \
		$(PYTHON) -m venv .venv && cp constraints.txt .venv/constraints.txt; \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .venv/constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv
