PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv/.peers

.PHONY: demo test bench bench-loss bench-views lint
demo: $(READY)
	$(BIN)/simclr-kernels demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: bench-loss bench-views

bench-loss: $(PEERS)
	mkdir -p .benchmarks
	$(BIN)/python -m pytest benchmarks/bench_ntxent.py --benchmark-only --benchmark-json .benchmarks/ntxent.json
	$(BIN)/python -m benchmarks.plot_ntxent .benchmarks/ntxent.json --out .benchmarks/ntxent.png

bench-views: $(PEERS)
	mkdir -p .benchmarks
	$(BIN)/python -m pytest benchmarks/bench_augment.py benchmarks/bench_pipelines.py \
	    --benchmark-only --benchmark-json .benchmarks/views.json
	$(BIN)/python -m benchmarks.plot_views .benchmarks/views.json --out .benchmarks/views.png

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(READY): setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev,hf,dali,kornia]'
	touch $@

$(PEERS): $(READY)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[bench]'
	touch $@
