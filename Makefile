# `make demo` and `make test` work from a fresh clone with Python 3.11+, make and git. A second run skips what is done.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
OTEL_CLIENT := .venvs/otel-openai-v2
BIN := $(VENV)/bin
# The torch build. The default takes what pip finds; on Linux with no GPU choose the CPU index (see README):
#   make demo TORCH_ARGS="--index-url <the CPU index>"
TORCH := torch==2.13.0
TORCH_ARGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: install check format test otel-clients chdb test-clickhouse bench-clickhouse test-phoenix test-clients test-model faults bench-apo bench-apo-real bench-gateway bench-store bench-scale-out bench-rl study-capital gpu-check demo serve image-steps clean lock

# A stamp per lock: made anew when the lock or the project's metadata changes.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Ratchet needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: $(VENV)/bin/python
	@echo "Installing $(TORCH) (once) ..."
	$(PIP) $(TORCH_ARGS) $(TORCH)
	@touch $@

$(VENV)/.demo: locks/demo.txt pyproject.toml $(VENV)/.torch
	@echo "Installing the demo's packages (once) ..."
	$(PIP) --no-deps --require-hashes -r locks/demo.txt
	$(PIP) --no-deps --editable .
	@touch $@

$(VENV)/.dev: locks/dev.txt pyproject.toml $(VENV)/.torch
	@echo "Installing everything a developer needs (once) ..."
	$(PIP) --no-deps --require-hashes -r locks/dev.txt
	$(PIP) --no-deps --editable .
	@touch $@ $(VENV)/.demo

# The JavaScript client of the contract tests; absent Node is said by the tests that need it.
tests/clients/js/node_modules: tests/clients/js/package-lock.json
	@if command -v npm >/dev/null; then cd tests/clients/js && npm ci --silent --no-audit --no-fund; fi
	@if [ -d $@ ]; then touch $@; fi

install: $(VENV)/.dev tests/clients/js/node_modules

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python scripts/limits.py

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: install otel-clients
	RATCHET_REPEAT=1 $(BIN)/python -m pytest

# The drills of `make test` at full size: 200 kills, all the clock's jumps, 1000 swaps ...; figures in bench/results/faults.json.
faults: install
	RATCHET_FAULTS_RESULT=1 RATCHET_DRILLS=200 RATCHET_BACKLOG=3600 RATCHET_JUMPS=7 RATCHET_SWAPS=1000 RATCHET_STREAMS=50 \
	  RATCHET_CANARIES=1000 $(BIN)/python -m pytest tests/faults -s

# OpenTelemetry's own instrumentor of openai needs other versions of its libraries than the rest: for tests/contract.
otel-clients: $(OTEL_CLIENT)/.done
$(OTEL_CLIENT)/.done:
	$(PYTHON) -m venv $(OTEL_CLIENT)
	$(OTEL_CLIENT)/bin/python -m pip --disable-pip-version-check install --quiet "openai>=2,<3" "wrapt<2" \
	  "opentelemetry-instrumentation-openai-v2==2.3b0" "opentelemetry-exporter-otlp-proto-http>=1.36,<2"
	@touch $@

# The classic script learns with the real local model: a better prompt, proven on held-out tasks; some minutes.
test-model: install
	RATCHET_CLASSIC=1 $(BIN)/python -m pytest tests/e2e/test_classic_model.py -s

# ClickHouse's own engine as a library, 0.9 GB: the SQL of `store.url` is tested and measured in it.
.venvs/chdb/.done:
	$(PYTHON) -m venv .venvs/chdb
	.venvs/chdb/bin/python -m pip --disable-pip-version-check install --quiet "chdb>=4,<5"
	@touch $@

chdb: .venvs/chdb/.done

test-clickhouse: install chdb
	$(BIN)/python -m pytest tests/clickhouse

# The same spans in DuckDB and in ClickHouse's engine: ingest, pages, aggregates; under 5 minutes.
bench-clickhouse: install chdb
	$(BIN)/python -m bench.clickhouse

# Real clients and frameworks, unmodified, each in an environment of its own under .venvs (made once; some GB).
test-clients: install
	$(BIN)/python -m tests.clients.matrix

# What a recorded call costs beside a bare relay and other gateways, which it installs itself; about 13 minutes.
bench-gateway: install
	$(BIN)/python -m bench.gateway

# The store beside the engines used plainly, and beside Arize Phoenix where `make test-phoenix` has installed it.
bench-store: install
	$(BIN)/python -m bench.store

# Hosts that feed one collector: what an outage leaves behind is sent, and when a span is found; about 5 minutes.
bench-scale-out: install
	$(BIN)/python -m bench.scale_out

# The search beside gepa and Agent Lightning's APO on simulated worlds; SEEDS=40 for the full table.
.venvs/bench-agentlightning/.done:
	$(PYTHON) -m venv .venvs/bench-agentlightning
	.venvs/bench-agentlightning/bin/pip install --quiet "agentlightning==0.3.0" poml numpy scipy && touch $@

bench-apo: install
	-$(MAKE) .venvs/bench-agentlightning/.done
	$(BIN)/python -m bench.apo

# The search beside gepa and the beam on the real local model, one fixed bank of parts for all; answers are kept in data.
bench-apo-real: install
	OMP_WAIT_POLICY=PASSIVE ONEDNN_PRIMITIVE_CACHE_CAPACITY=32 $(BIN)/python -m bench.apo_real

# Credit where the truth is known, and what training costs; about 10 minutes.
bench-rl: install
	$(BIN)/python -m bench.rl

# The capital city agent trained on the local model: three seeds of prompt, SFT, RFT and GRPO; about half an hour.
study-capital: install
	$(BIN)/python -m bench.capital

# Step time, tokens a second, memory and bfloat16's error on a GPU; says so where there is none.
gpu-check: install
	$(BIN)/python -m bench.gpu

# A real Arize Phoenix on loopback: what is exported arrives, by its own API; and ingest beside it.
test-phoenix: install
	$(BIN)/python scripts/phoenix.py

# What the Dockerfile does, without Docker.
image-steps:
	PYTHON=$(PYTHON) bash scripts/image_steps.sh

demo: $(VENV)/.demo
	$(BIN)/ratchet demo

serve: $(VENV)/.demo
	$(BIN)/ratchet serve

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis tests/clients/js/node_modules

# Needs `uv`, used for locking only.
lock:
	$(PYTHON) scripts/lock.py
