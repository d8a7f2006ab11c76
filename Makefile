# Everything runs from one virtual environment with locked dependencies; `make demo` and `make test` are the two
# commands a newcomer needs. PYTHON may name another interpreter (>= 3.11).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test test-slow test-rare test-operators image lint format bench bench-full lock system-packages kube-binaries clean

help:
	@echo "make demo             set up, then show co-location on this machine's own cgroups (about two minutes)"
	@echo "make test             set up, then run the quick tests of every suite whose prerequisites exist"
	@echo "make test-slow        the slow tests: cgroup v2 in a virtual machine, a controller that dies at every write"
	@echo "make test-rare        what nearly says the same again and takes half an hour: kubelet and the manifests on v2, more gangs at every write, all of openb"
	@echo "make test-operators   unmodified operators (MPIJob, RayCluster, PyTorchJob, JobSet, LeaderWorkerSet, Kueue) against the controller; builds them once (Go, minutes each)"
	@echo "make image            the container image, without a registry or a daemon (Debian packages: mmdebstrap)"
	@echo "make lint             ruff, mypy --strict, import-linter"
	@echo "make bench            a subset of the benchmarks (at most 40 minutes); bench-full runs all"
	@echo "make system-packages  the Debian packages of the guest, browser and benchmark suites (root)"
	@echo "make kube-binaries    etcd, Kubernetes and containerd for the cluster suite, demo gang and demo kubernetes (Go >= 1.26; ten minutes, once)"

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "colocate needs Python >= 3.11: $(PYTHON) is older; try make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "python3 -m venv failed: on Debian and Ubuntu install it with: apt-get install python3-venv" >&2; exit 2; }
	@echo "installing locked dependencies into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)
	@$(BIN)/colocate demo

test: $(STAMP)
	@$(BIN)/python -m tests.run

test-slow: $(STAMP)
	@$(BIN)/python -m tests.run --slow

test-rare: $(STAMP)
	@$(BIN)/python -m pytest -q -ra -m rare tests/guest tests/cluster tests/unit

test-operators: $(STAMP)
	@$(BIN)/python -m tools.operators && $(BIN)/python -m pytest -q -ra tests/operators

image: $(STAMP)
	@$(BIN)/python -m tools.image

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP)
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

bench: $(STAMP)
	@$(BIN)/python -m benchmarks

bench-full: $(STAMP)
	@$(BIN)/python -m benchmarks --full

system-packages:
	@sh tools/system-packages.sh

kube-binaries:
	@sh tools/kube-binaries.sh

lock:
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url \
	  --group dev pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build
