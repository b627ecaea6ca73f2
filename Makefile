# Two commands do all of the set-up on a fresh machine: `make demo` and `make test`. Both make their own .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test simulate lint types protos protos-check clean

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

$(VENV)/.serve: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing Legato and what it serves with into $(VENV) (a minute or two the first time)"
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[serve]'
	@$(BIN)/python -m kernels.cpu.build || echo "the CPU kernels were not built; PyTorch computes in their place, several times slower"
	@touch $@

$(VENV)/.dev: $(VENV)/.serve
	@echo "installing what tests need into $(VENV)"
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/.serve  ## start a cluster, ask it three questions at once, show where each ran
	@$(BIN)/legato demo

test: $(VENV)/.dev  ## every test
	@$(BIN)/python -m pytest

SEEDS ?= 100000
simulate: $(VENV)/.dev  ## SEEDS simulated clusters under faults, each about 40 ms of a core; 100,000 unless said otherwise
	@$(BIN)/python tests/simulation/run.py --seeds $(SEEDS)

lint: $(VENV)/.dev  ## style
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## types; strict in the pure rooms
	@$(BIN)/mypy spec scheduler kernels kvtransfer engine telemetry service worker router prefill_svc decode_svc legato

# protobuf is generated with an old compiler on purpose: what 1.71 writes runs on protobuf 5, 6 and 7.
PROTOC := .venv-protoc/bin/python
$(PROTOC):
	@$(PYTHON) -m venv .venv-protoc
	@.venv-protoc/bin/pip install --quiet 'grpcio-tools==1.71.2' setuptools

protos: $(PROTOC)  ## generate legato/v1/*_pb2*.py from protos/
	@$(PROTOC) -m grpc_tools.protoc -I protos --python_out=. --pyi_out=. --grpc_python_out=. protos/legato/v1/*.proto

protos-check: protos  ## the generated code is what protos/ says
	@git diff --exit-code -- legato/v1 || (echo "legato/v1 is stale: run 'make protos' and commit"; exit 1)

clean:  ## remove what was made
	rm -rf $(VENV) .venv-protoc .mypy_cache .ruff_cache .pytest_cache results
