PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# threads that spin while they wait halve the speed of a busy machine
export OMP_WAIT_POLICY ?= PASSIVE
# sums over threads round otherwise: figures repeat to the last digit only with as many threads
ONE := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

.PHONY: setup demo test test-gpu check bench regress rebase report clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	for model in mamba mamba2; do for method in magnitude wanda; do \
	  $(BIN)/ssmcompress prune ref:$$model --method $$method --sparsity 0.5 --out out/$$model-$$method --overwrite || exit; \
	done; done
	$(BIN)/python evals/quality.py --demo out

test: $(READY)
	$(ONE) $(BIN)/pytest -n 2

test-gpu: $(READY)
	$(BIN)/python -c "from ssmcompress.kernels import cuda; usable, why = cuda.available(); raise SystemExit(None if usable else why)"
	$(ONE) $(BIN)/pytest -m gpu tests/gpu

check: $(READY)
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python evals/bench/cpu.py
	$(BIN)/python evals/bench/cuts.py

regress: $(READY)
	$(ONE) $(BIN)/python -m evals.regress

rebase: $(READY)
	$(ONE) $(BIN)/python -m evals.regress --rebase

report: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m evals.report --limit 20 --out out/report

clean:
	rm -rf out build dist .pytest_cache .ruff_cache .mypy_cache
	find ssmcompress tests evals -name __pycache__ -exec rm -rf {} +
