# Two commands do all the set-up on a machine that has only Python and pip: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= safegen-demo
FIGURES ?= safegen-figures
INTEROP ?= safegen-interop
.DEFAULT_GOAL := help
.PHONY: help demo test nightly interop integrations lint docs bench clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[all,test]'
	@touch $@

demo: .venv/installed ## the main job: remove skulls from the bundled miniature model, and report (about 4 minutes)
	$(BIN)/safegen demo --out $(OUT)

test: .venv/installed ## the test suite, in two processes of one thread each; most tests leave a second thread idle
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

nightly: .venv/installed ## the slow proofs too: the shipped model's required figures, the whole demo, other programs
	$(BIN)/python -m pytest
	$(MAKE) interop

interop: .venv/installed ## ComfyUI, stable-diffusion.cpp, InvokeAI and diffusers read our files (4 GB of disk, 7 GB of memory)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[interop]'
	$(BIN)/python -m tools.interop --cache $(INTEROP)

integrations: ## eval-unlearn, inspect_ai, Ray and C2PA as they are, in an environment of their own
	$(PYTHON) -m venv .venv-integrations
	.venv-integrations/bin/pip install --quiet --disable-pip-version-check -e '.[eval-unlearn,inspect,ray,c2pa,test]'
	.venv-integrations/bin/python -m pytest tests/integrations tests/serve/ray tests/evaluation/engines tests/serve/test_provenance.py

docs: .venv/installed ## the documentation site, in site/
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: .venv/installed ## the figures in docs/, made again in a folder of their own (some hours)
	$(BIN)/python benchmarks/required.py --out $(FIGURES)
	$(BIN)/python benchmarks/counts.py $(FIGURES)/skulls
	$(BIN)/python benchmarks/counts.py $(FIGURES)/fire
	$(BIN)/python benchmarks/ablation.py --out $(FIGURES)/ablation.jsonl
	$(BIN)/python benchmarks/ablation.py --table $(FIGURES)/ablation.jsonl
	mkdir -p $(FIGURES)/patches
	$(BIN)/python benchmarks/edits.py --out $(FIGURES)/edits.jsonl --keep $(FIGURES)/patches
	$(BIN)/python benchmarks/shielddiff.py train --out $(FIGURES)/shielddiff
	$(BIN)/python benchmarks/shielddiff.py compare --out $(FIGURES)/shielddiff --patches $(FIGURES)/patches
	$(BIN)/python benchmarks/shielddiff.py grid --out $(FIGURES)/shielddiff --patches $(FIGURES)/patches --image $(FIGURES)/shielddiff-grid.png
	$(BIN)/python benchmarks/attacks.py --patches $(FIGURES)/patches --out $(FIGURES)/attacks
	$(BIN)/python benchmarks/attacks.py --out $(FIGURES)/attacks --table $(FIGURES)/attacks.json --plot $(FIGURES)/attacks.png
	$(BIN)/python benchmarks/ring_a_bell.py --out $(FIGURES)/ring_a_bell_cost.json
	$(BIN)/python benchmarks/guards.py
	$(BIN)/python benchmarks/judges.py
	$(BIN)/python benchmarks/judge_truth.py --out $(FIGURES)/agreement.json
	$(BIN)/python benchmarks/prompt_ladder.py --patches $(FIGURES)/patches --out $(FIGURES)
	$(BIN)/python benchmarks/held_out_judge.py $(FIGURES)/skulls
	$(BIN)/python benchmarks/unlearn_diff.py --folder $(FIGURES)/unlearn-diff --out $(FIGURES)/unlearn_diff_cost.json
	$(BIN)/python benchmarks/carry_over.py --study --out $(FIGURES)/carry-over
	$(BIN)/python benchmarks/carry_over.py --out $(FIGURES)/carry-over --table $(FIGURES)/carry-over.json
	$(BIN)/python benchmarks/shards_killed.py --out $(FIGURES)/shards_killed.json
	$(BIN)/python benchmarks/plan.py --out $(FIGURES)/plan.json
	$(BIN)/python benchmarks/closed_forms.py full --out $(FIGURES)/closed-forms.json
	$(BIN)/python benchmarks/closed_forms.py captions --out $(FIGURES)/closed-forms.json
	$(BIN)/python benchmarks/closed_forms.py mini --out $(FIGURES)/closed-forms.json
	$(BIN)/python benchmarks/training_speed.py --out $(FIGURES)/training_speed.json
	$(BIN)/python benchmarks/big_run.py --out $(FIGURES)/big_runs.json
	$(BIN)/python benchmarks/generation.py --out $(FIGURES)/generation.json
	$(BIN)/python benchmarks/real_size.py --out $(FIGURES)/real_size.json
	$(BIN)/python benchmarks/full_size.py --folder $(FIGURES)/full-size --out $(FIGURES)/full-size.json
	$(BIN)/python benchmarks/gpu.py --tiny --out $(FIGURES)/gpu.json
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	$(BIN)/python benchmarks/evaluate_ray.py --out $(FIGURES)/evaluate_ray.json
	$(BIN)/python benchmarks/serve_ray.py --out $(FIGURES)/serve_ray.json
	$(BIN)/python benchmarks/serve.py --out $(FIGURES)/serve.json
	$(BIN)/python benchmarks/sheet.py --out $(FIGURES)/mini-sheet.png
	$(BIN)/python benchmarks/before_after.py $(FIGURES)/patches/safegen-0.safetensors --out $(FIGURES)/before-after.png

lint: .venv/installed ## ruff, mypy, the import contracts and the vocabulary
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_vocabulary.py

clean: ## remove the environment
	rm -rf .venv .venv-integrations $(INTEROP)
