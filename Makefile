# Two commands on a fresh machine: `make demo` and `make test`. Both need python3 (with venv) and make only.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready
TORCH  := torch>=2.13,<2.14

.PHONY: demo test test-all check format reference clean

demo: $(READY)
	@rm -rf runs/demo
	$(BIN)/fedveil simulate examples/digits-vae.toml --out runs/demo
	@echo "The picture is runs/demo/samples.png"

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow" $(ARGS)

test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

# mypy refuses a folder whose name is no identifier, so it is shown the root under a link named
# fedveil. `-p fedveil` takes the tests too: they lie below the root.
check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p $(VENV)/mypy && ln -sfn "$(CURDIR)" $(VENV)/mypy/fedveil
	MYPYPATH=$(VENV)/mypy $(BIN)/mypy -p fedveil --exclude /benchmarks/
	MYPYPATH=$(VENV)/mypy:benchmarks $(BIN)/mypy --explicit-package-bases benchmarks

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: $(READY)
	$(BIN)/python -m fedveil.reference README.md

clean:
	rm -rf $(VENV) build runs *.egg-info

# TORCH_INDEX=URL picks the package index that torch comes from (https://download.pytorch.org/whl/cpu, say);
# without it pip takes the CPU build where one is offered.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet --index-url "$(TORCH_INDEX)" "$(TORCH)")
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $(READY)
