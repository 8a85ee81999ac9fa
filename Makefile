# Each target sets up what it needs. `make demo` and `make test` are all a fresh machine wants.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test slow check format bench docs clean

demo: $(VENV)/ready
	$(BIN)/stepmask demo --out demo-out

test: $(VENV)/ready
	$(BIN)/python -m pytest -n auto --dist worksteal

slow: $(VENV)/ready
	$(BIN)/python -m pytest tests/test_fuzz.py tests/test_law.py tests/test_coverage.py --hypothesis-profile=slow -n auto --dist worksteal

check: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check --output-format concise .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/full_size.py
	$(BIN)/python benchmarks/learning_memory.py
	$(BIN)/python benchmarks/per_timestep.py
	$(BIN)/python benchmarks/regular_tables.py
	$(BIN)/python benchmarks/calibration.py
	$(BIN)/python benchmarks/prediction.py
	$(BIN)/python benchmarks/frontier.py
	$(BIN)/python benchmarks/learned_speed.py
	for pipeline in dit ldm ddpm pixart; do for steps in 20 50; do \
		$(BIN)/python benchmarks/against_peers.py --pipeline zoo:$$pipeline-emoji --steps $$steps || exit 1; \
		$(BIN)/python benchmarks/quality.py --pipeline zoo:$$pipeline-emoji --steps $$steps || exit 1; done; done
	$(BIN)/python benchmarks/unets.py
	$(BIN)/python benchmarks/few_steps.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/transfer.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/half.py
	$(BIN)/python benchmarks/sweep_memory.py

docs: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky --fresh-env docs docs/_build

clean:
	rm -rf $(VENV) demo-out runs build dist docs/_build

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
