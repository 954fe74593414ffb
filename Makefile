# Every target makes .venv when it is missing and installs the exact versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

RESULTS := benchmarks/results

.PHONY: lock demo test test-examples test-matrix lint check format fuzz reliability tables bench bench-gpu

# make demo QUICK=1: one epoch on a part of the data
demo: $(INSTALLED)
	$(BIN)/loretta demo $(if $(QUICK),--quick)

# Half the time of one process; `.venv/bin/python -m pytest PATH` for a part
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The scripts of examples/ and what launchers start, each in a process of its own
test-examples: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m examples

# As other machines would: instruction sets, threads, random numbers. The numeric part, or all tests with FULL=1, in
# every cell, or in one: make test-matrix CELL=avx2-2
test-matrix: $(INSTALLED)
	$(BIN)/python tests/run_matrix.py $(if $(FULL),--full) $(if $(CELL),--cell $(CELL))

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

# Damaged and hostile files for everything that reads files of others: eleven minutes; make fuzz INPUTS=10000 for one
INPUTS ?= 100000
fuzz: $(INSTALLED)
	$(BIN)/python benchmarks/fuzz.py --inputs $(INPUTS) --out $(RESULTS)/fuzz.json

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The versions of constraints.txt with the hashes of their files, for `pip install --require-hashes`. Needs uv.
lock:
	{ sed -n 1,2p requirements.lock; uv pip compile --quiet --generate-hashes --no-strip-extras --no-header --no-annotate \
		--python-version 3.11 --constraint constraints.txt --extra dev --extra demo --extra examples pyproject.toml; } \
		> requirements.lock.new
	mv requirements.lock.new requirements.lock

# Fill the tables of README and docs from benchmarks/results/, and docs/cli.md from --help (cp runs/demo/demo.json there after a demo)
tables: $(INSTALLED)
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/front.py
	$(BIN)/python benchmarks/evidence.py
	$(BIN)/python benchmarks/counts.py
	$(BIN)/python benchmarks/performance.py
	$(BIN)/python benchmarks/reliability.py
	$(BIN)/python benchmarks/page.py
	$(BIN)/python docs/cli.py
	$(BIN)/python docs/quickstart.py
	$(BIN)/python benchmarks/prose.py --write

# What a CPU can measure, in about a quarter of an hour; `make tables` puts it into the docs. Leave the machine alone.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/wrapping.py --out $(RESULTS)/wrapping.json
	$(BIN)/python benchmarks/cpu.py --out $(RESULTS)/cpu.json
	$(if $(DATA),$(BIN)/python benchmarks/population.py --device cpu --llama none --tasks rte --methods rep \
		--sizes 1 4 8 --limit 200 --epochs 1 --model $(or $(MODEL),sentence-transformers/all-MiniLM-L6-v2) \
		--data-dir $(DATA) --out $(RESULTS)/population_cpu.json)

# Kill 50 runs at random moments and go on with them, watch memory, feed 12,000 hostile files: about half an hour
reliability: $(INSTALLED)
	$(BIN)/python benchmarks/reliability.py --out $(RESULTS)/reliability.json

# What needs a GPU. DATA=folder of sst2/ and MODEL=folder of all-MiniLM-L6-v2 add training end to end
bench-gpu: $(INSTALLED)
	$(BIN)/python benchmarks/speed.py --shape llama-7b --modes graph --out $(RESULTS)/speed_llama-7b_graph.json
	$(BIN)/python benchmarks/speed.py --shape llama-7b --modes eager \
		--out $(RESULTS)/speed_llama-7b_eager.json
	$(BIN)/python benchmarks/speed.py --shape llama-7b --modes compile --layers 8 --sizes 1x256,8x512 --steps 40 \
		--methods "lora q+v,rep q+v,adp" --out $(RESULTS)/speed_llama-7b_compile.json
	$(BIN)/python benchmarks/speed.py --shape llama-1b --out $(RESULTS)/speed_llama-1b.json
	$(BIN)/python benchmarks/speed.py --shape roberta-base --out $(RESULTS)/speed_roberta-base.json
	$(BIN)/python benchmarks/growth.py --out $(RESULTS)/growth.json
	$(BIN)/python benchmarks/inference.py --out $(RESULTS)/inference.json
	$(BIN)/python benchmarks/fused.py --out $(RESULTS)/fused.json
	$(if $(DATA),$(BIN)/python benchmarks/graph_training.py $(if $(MODEL),--model $(MODEL)) --data-dir $(DATA) \
		--out $(RESULTS)/graph_training.json)
	$(if $(DATA),$(BIN)/python benchmarks/population.py --model $(or $(MODEL),sentence-transformers/all-MiniLM-L6-v2) \
		--data-dir $(DATA) --out $(RESULTS)/population.json)
	$(if $(DATA),$(BIN)/python benchmarks/population_step.py --data-dir $(DATA) --out $(RESULTS)/population_step.json \
		--model $(or $(MODEL),sentence-transformers/all-MiniLM-L6-v2))

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,demo,examples]'
	touch $(INSTALLED)
