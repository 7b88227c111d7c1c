# Each target makes .venv when it is missing; nothing else has to be installed by hand.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
COMPRESSOR := .venvs/llm-compressor
# One worker for each core. A worker takes neighbouring tests, so that the fixtures of a file are seldom built twice.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal $(if $(FAULTS),--faults=$(FAULTS))

.PHONY: demo docs reproduce test test-processors test-browser test-faults test-harness test-llama test-mlx test-onnx test-quantized test-serving test-modules test-axolotl test-unsloth fuzz versions lint clean

demo: $(STAMP)
	$(BIN)/ssmax demo

reproduce: $(STAMP)
	$(BIN)/ssmax reproduce

test: $(STAMP) lint
	$(PYTEST)

# The numerical tests again, with the code of torch and of oneDNN for processors that have fewer instructions than this one.
LESSER := import torch; own = torch.backends.cpu.get_cpu_capability().lower(); \
	known = ["default", "avx2", "avx512"]; lesser = known[: known.index(own) if own in known else 0]; \
	print(*(kind + ":" + {"default": "SSE41"}.get(kind, kind.upper()) for kind in lesser))
test-processors: $(STAMP)
	set -e; for kind in $$($(BIN)/python -c '$(LESSER)'); do \
		echo "as on a processor with $${kind%:*} instructions:"; \
		ATEN_CPU_CAPABILITY=$${kind%:*} ONEDNN_MAX_CPU_ISA=$${kind#*:} $(PYTEST) -m 'numerical and not slow'; done

# Kills, full disks, lost ranks, random calls; renews the rows of docs/faults.md with FAULTS=docs/results/faults.jsonl
test-faults: $(STAMP)
	$(PYTEST) -m slow

fuzz: $(STAMP)
	$(BIN)/python tests/support/calls.py 10000 $(or $(SEED),1)

# The oldest and the newest supported torch and transformers, each in a venv of its own: gigabytes, some minutes.
versions:
	$(PYTHON) tests/programs/versions.py

# lm-evaluation-harness is large, and only one test needs it.
test-harness: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt lm_eval==0.4.13 wonderwords==3.0.1 nltk==3.10.4
	$(BIN)/python -m pytest tests/evaluation/test_lm_eval.py

# Converts models of timm, x-transformers, diffusers and litgpt; runs the recipes for litgpt, torchtitan and Lightning.
# timm has a folder of its own: it imports torchvision, whose wheels do not load beside a torch for CPUs alone. Packages that use
# torchvision where it is installed would fail there; timm's test alone helps itself.
test-modules: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt x-transformers diffusers jsonargparse einops
	$(BIN)/python -m pip install --quiet --no-deps litgpt==0.5.13 lightning==2.6.6 lightning-utilities torchmetrics \
		torchtitan==0.3.0 spmd_types==0.2.3 torchdata
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venvs/timm timm==1.0.31 torchvision==0.28.0
	$(BIN)/python -m pytest -rs tests/modules/test_packages.py tests/test_examples.py
	PYTHONPATH=.venvs/timm $(BIN)/python -m pytest tests/modules/test_packages.py -k timm

# The recipe for axolotl in a venv of its own, 3.2 GB: axolotl's pins differ from ours, and it also requires packages for GPUs.
test-axolotl:
	test -x .venvs/axolotl/bin/python || $(PYTHON) -m venv .venvs/axolotl
	.venvs/axolotl/bin/python -m pip install --quiet --editable . -r tests/programs/axolotl.txt
	.venvs/axolotl/bin/python -m pip install --quiet --no-deps axolotl==0.19.0 axolotl-contribs-lgpl==0.0.7 \
		axolotl-contribs-mit==0.0.6 liger-kernel==0.8.1 optimum==1.16.2
	cd .venvs/axolotl && AXOLOTL_DO_NOT_TRACK=1 bin/python -W ignore ../../examples/pretrain_axolotl.py

# The recipe for unsloth in a venv of its own, 2.9 GB: its pins differ from ours, and it also requires packages for GPUs.
test-unsloth:
	test -x .venvs/unsloth/bin/python || $(PYTHON) -m venv .venvs/unsloth
	.venvs/unsloth/bin/python -m pip install --quiet --editable . -r tests/programs/unsloth.txt
	.venvs/unsloth/bin/python -m pip install --quiet --no-deps unsloth==2026.10.9 unsloth_zoo==2026.10.9 \
		cut_cross_entropy==25.1.1
	cd .venvs/unsloth && bin/python -W ignore ../../examples/pretrain_unsloth.py

# The demo's page in a real browser: needs Debian's packages chromium and chromium-driver.
test-browser: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt selenium
	$(BIN)/python -m pytest -rs tests/cli/test_demo_page.py

# The documentation as a site, in site/; a broken link fails.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Builds llama.cpp from source: a C++ compiler and cmake, minutes. Compares exported models with it.
test-llama: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[export]'
	$(BIN)/python tests/programs/llama.py .venvs/llama

# Exported graphs in ONNX Runtime and OpenVINO.
test-onnx: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[export]' onnxruntime openvino
	$(BIN)/python -W ignore tests/programs/onnx_logits.py

# Saved models in mlx-lm; on Linux, in the build of mlx for CPUs.
test-mlx: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'mlx[cpu]' mlx-lm
	$(BIN)/python -W ignore tests/programs/mlx_logits.py

# Converted models whose matrices are quantised.
test-quantized: $(STAMP) $(COMPRESSOR)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torchao bitsandbytes compressed-tensors
	$(BIN)/python -W ignore tests/programs/quantized.py transformers
	$(COMPRESSOR)/bin/python -W ignore tests/programs/quantized.py llm-compressor

# llm-compressor needs an older transformers, in a venv of its own.
$(COMPRESSOR)/.installed:
	test -x $(COMPRESSOR)/bin/python || $(PYTHON) -m venv $(COMPRESSOR)
	$(COMPRESSOR)/bin/python -m pip install --quiet torch==2.13.0 transformers==5.17.0 llmcompressor==0.14.0.1 --editable .
	touch $@

# vLLM on the CPU and transformers serve in a venv of their own, 3.4 GB; real engines, and servers on 127.0.0.1.
test-serving: $(COMPRESSOR)/.installed
	$(PYTHON) tests/programs/vllm_venv.py .venvs/vllm
	.venvs/vllm/bin/python tests/programs/vllm_requests.py
	.venvs/vllm/bin/python tests/programs/transformers_serve.py

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports --no-cache

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf .venv .venvs
