.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS := cluster/constraints.txt

.PHONY: help
help: ## List the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'

.venv/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[demo,dev,sign,onnx]'
	@touch $@

.PHONY: venv
venv: .venv/installed ## Create .venv and install everything, pinned

.PHONY: demo
demo: venv ## Compress all-MiniLM-L6-v2 into out/demo, on a Ray started on the spot
	@HF_HUB_OFFLINE=1 $(BIN)/python examples/demo.py

PYTEST := $(BIN)/python -m pytest -n $(or $(PROCESSES),2) --dist loadfile --no-loadscope-reorder

.PHONY: test
test: venv ## Run the fast tests, minutes on 2 cores: a real Ray job, an S3 server and a real model among them
	$(PYTEST) -m "not slow"

.PHONY: test-all
test-all: venv ## Run every test, but those that need real S3 servers (PROCESSES=n, 2 by default)
	$(PYTEST)

.PHONY: mutants
mutants: venv ## Break the package in many places, one at a time: a fast test must catch each
	$(BIN)/python -m tests.mutants

.PHONY: test-s3
test-s3: venv ## Run the store's tests against OpenStack Swift and Ceph, started on loopback
	FFSPLIT_TEST_SERVERS=1 $(BIN)/python -m pytest tests/s3

.PHONY: apt
apt: ## Refresh the package lists that `make test-s3` downloads Ceph by (Debian, as root; elsewhere nothing)
	@if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then apt-get update --quiet; \
	else echo "no apt-get, or not root: the package lists stay as they are"; fi

.PHONY: test-faults
test-faults: venv ## Kill workers, nodes and drivers at every stage of real runs, 60 times (KILLS=n, SEED=n)
	FFSPLIT_TEST_KILLS=$(or $(KILLS),60) FFSPLIT_TEST_SEED=$(or $(SEED),0) $(BIN)/python -m pytest -s tests/faults

.PHONY: lint
lint: venv ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: format
format: venv ## Mend what the linter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: docs
docs: venv ## Generate docs/manifest.schema.json and docs/models.md
	$(BIN)/python -m ffsplit.store.manifest > docs/manifest.schema.json
	$(BIN)/python -m ffsplit.models.table > docs/models.md

.PHONY: bench-speed
bench-speed: venv ## Time compressed models beside other tools' into benchmarks/speed_<hardware>.md
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .bench torchao==0.18.0 \
		compressed-tensors==0.19.0 loguru
	PYTHONPATH=.:.bench $(BIN)/python benchmarks/speed.py

.PHONY: bench-scaling
bench-scaling: venv ## How the work spreads over workers, into benchmarks/scaling.md (two idle cores)
	$(BIN)/python -m benchmarks.scaling

.PHONY: bench-quality
bench-quality: venv ## Score every recipe (DATA=folder with stsb/ and others) into benchmarks/quality.md
	$(BIN)/python benchmarks/quality.py $(if $(DATA),--data $(DATA))
