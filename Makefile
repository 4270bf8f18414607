# Two commands do everything: `make demo` and `make test`. PYTHON= and TORCH= choose others than these.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# what is imported is compiled then, and kept: a minute or two less than to compile all
export PYTHONDONTWRITEBYTECODE :=
PIP := .venv/bin/python -m pip install --quiet --no-compile

.PHONY: demo test benchmarks zoo clean

demo: .venv/examples
	.venv/bin/python examples/quickstart.py

test: .venv/test
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses 2 --dist worksteal

# the tables of docs/speed.md, with the libraries they compare with
benchmarks: .venv/benchmarks
	OMP_NUM_THREADS=1 .venv/bin/python benchmarks/network.py
	OMP_NUM_THREADS=1 .venv/bin/python benchmarks/sites.py
	OMP_NUM_THREADS=1 .venv/bin/python benchmarks/identities.py
	OMP_NUM_THREADS=1 .venv/bin/python benchmarks/editing.py
	OMP_WAIT_POLICY=PASSIVE .venv/bin/python benchmarks/attack.py --threads 2
	OMP_WAIT_POLICY=PASSIVE .venv/bin/python benchmarks/errors.py --threads 2
	OMP_WAIT_POLICY=PASSIVE .venv/bin/python benchmarks/training.py --threads 2

# the table of docs/zoo.md: the surgery on the networks of public libraries
zoo: .venv/zoo
	OMP_NUM_THREADS=1 .venv/bin/python benchmarks/zoo.py

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

# networks and attacks of other people to test against; without their dependencies, for the same reason
.venv/test: .venv/torch pyproject.toml
	$(PIP) --editable ".[test]"
	$(PIP) --no-deps torchvision==0.28.0 timm==1.0.31 torchattacks==3.5.1
	@touch $@

.venv/benchmarks: .venv/test
	$(PIP) scikit-learn six
	$(PIP) --no-deps adversarial-robustness-toolbox==1.20.1
	@touch $@

.venv/zoo: .venv/test
	$(PIP) transformers==5.24.0
	$(PIP) --no-deps monai==1.6.1 segmentation-models-pytorch==0.6.0
	@touch $@

clean:
	rm -rf .venv
