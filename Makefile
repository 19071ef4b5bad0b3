# make run    set up, then train the demo (or CONFIG=my.yaml) with snakemake
# make test   set up, then run every test
# make fuzz   set up, then feed every parser with FUZZ_CASES (5000) damaged files each (an hour)
# make faults set up, then play FAULTS (108) faults in real workflows (12 minutes)
# make bench  set up, then measure the cache (about 50 minutes); BENCH="--only vae" for a part
# make lockfile   set up, then write requirements-lock.txt anew from the package index
# make lint   formatting and lint of Python and Snakemake files

PYTHON ?= python3
CORES ?= all
VENV := .venv
BIN := $(VENV)/bin
SNAKEMAKE := $(BIN)/snakemake --cores $(CORES) $(if $(CONFIG),--configfile "$(CONFIG)")

.PHONY: run test fuzz faults bench lint lockfile setup clean

run: setup
	$(SNAKEMAKE)

test: setup
	$(BIN)/python -m pytest --numprocesses auto --dist loadgroup

fuzz: setup
	FUZZ_CASES=$(or $(FUZZ_CASES),5000) $(BIN)/python -m pytest --numprocesses auto --dist worksteal tests/attacks/test_fuzz.py

faults: setup
	PYTHONPATH="$(CURDIR)/tests:$(CURDIR)/scripts" $(BIN)/python tests/faults/make_table.py --points $(or $(FAULTS),108)

bench: setup
	$(BIN)/python benchmarks/run.py $(BENCH)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint

# the comment at its head stays
lockfile: setup
	$(BIN)/python -m pip install --quiet uv==0.13.9
	grep '^#' requirements-lock.txt > requirements-lock.new
	$(BIN)/uv pip compile requirements.txt --generate-hashes --universal --python-version 3.11 \
		--no-annotate --no-header --no-config >> requirements-lock.new
	mv requirements-lock.new requirements-lock.txt

setup: $(VENV)/installed

$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

clean:
	rm -rf $(VENV)
