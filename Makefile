# `make demo` runs the example, `make check` the fast checks, `make test` all of them. PYTHON= and TORCH= choose others.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# the lower bounds of pyproject.toml; torch 2.4 has no build for Python 3.13
OLDEST_PYTHON ?= python3.10
OLDEST := torch==2.4.1 numpy==1.26.4 huggingface-hub==0.26.0 safetensors==0.4.3
OLDEST_TORCHVISION := torchvision==0.19.1
# Python compiles on import: a minute or two less than compiling everything that is installed
export PYTHONDONTWRITEBYTECODE :=
PIP := .venv/bin/python -m pip install --quiet --no-compile
OLDEST_PIP := .venv-oldest/bin/python -m pip install --quiet --no-compile
# third-party networks and attacks of the tests, without their dependencies, which could pull another torch
NETWORKS := timm==1.0.31 torchattacks==3.5.1
# libraries of docs/recipes.md, likewise
RECIPES := foolbox==3.3.4 eagerpy==0.30.0 GitPython==3.2.1 gitdb==4.0.12 smmap==5.0.3 \
	lightning==2.6.6 lightning-utilities==0.15.3 torchmetrics==1.9.0
# the newest for Python 3.10 that fit each other; Ruff formats the signatures
SITE := mkdocs-material==9.7.7 mkdocstrings==1.0.6 mkdocstrings-python==2.0.9 pymdown-extensions==12.1 ruff
# or mkdocs-material advertises its successor
export NO_MKDOCS_2_WARNING := 1
# quick: under a minute of CPU time
FAST := tests/package/test_package.py tests/package/test_surgery.py tests/package/test_surgery_refusals.py

.PHONY: demo check test oldest benchmarks zoo docs clean

demo: .venv/examples
	.venv/bin/python examples/quickstart.py

check: .venv/test
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses 2 -m "not slow" $(FAST)

test: .venv/test
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/mkdocs build --strict --quiet
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses 3 --dist worksteal  # of which some wait

# the package's tests on the oldest versions
oldest: .venv-oldest/test
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest --numprocesses 2 --dist worksteal tests/package

# the tables of docs/speed.md, with the libraries they compare with
benchmarks: .venv/benchmarks
	OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.network
	OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.sites
	OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.identities
	OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.editing
	OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m examples.paper.benchmarks.attack --threads 2
	OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m examples.paper.benchmarks.errors --threads 2
	OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m examples.paper.benchmarks.training --threads 2

# the table of docs/zoo.md: the surgery on the networks of public libraries
zoo: .venv/zoo
	OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.zoo

# the site, in site/
docs: .venv/docs
	.venv/bin/mkdocs build --strict

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

# torch first and pinned, so that nothing after it pulls another build
.venv/torch: .venv/bin/python
	@echo "Installing $(TORCH) and the rest into .venv; the first time takes a few minutes."
	$(PIP) "$(TORCH)"
	@touch $@

.venv/examples: .venv/torch pyproject.toml
	$(PIP) --editable ".[examples]"
	@touch $@

.venv/test: .venv/torch pyproject.toml
	$(PIP) --editable ".[test]" $(SITE)
	$(PIP) --no-deps torchvision==0.28.0 $(NETWORKS) $(RECIPES)
	@touch $@

.venv-oldest/test: pyproject.toml
	$(OLDEST_PYTHON) -m venv .venv-oldest
	$(OLDEST_PIP) $(OLDEST) --editable ".[test]"
	$(OLDEST_PIP) --no-deps $(OLDEST_TORCHVISION) $(NETWORKS)
	@touch $@

.venv/benchmarks: .venv/test
	$(PIP) scikit-learn six
	$(PIP) --no-deps adversarial-robustness-toolbox==1.20.1
	@touch $@

.venv/zoo: .venv/test
	$(PIP) transformers==5.24.0
	$(PIP) --no-deps monai==1.6.1 segmentation-models-pytorch==0.6.0
	@touch $@

.venv/docs: .venv/bin/python
	$(PIP) $(SITE)
	@touch $@

clean:
	rm -rf .venv .venv-oldest
