"""Put models of a finished run into the package, for ssmax demo: python docs/demo_models.py RUN [SEED]

RUN is a folder of ssmax reproduce whose recipe trained paper:ab, fine-tuned them for retrieval and has --needle-rope llama3.
Give the seed with the median difference of needles found, among those with which both models learned the task (of two, the
smaller). Weights are kept in float16 (s and b in float32), which moves the losses by less than 0.001 nats.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from ssmax.demo.measure import FOLDER
from ssmax.hf.loading import load_model
from ssmax.paper.measuring import LLAMA3
from ssmax.runs.rows import read_rows

TEXTS = 4
VARIANTS = {"softmax": "a", "ssmax": "b"}
STAGES = {"": "pretrained", "-retrieval": "finetuned"}
NOTICE = """The models that `ssmax demo` reads: `python docs/demo_models.py` wrote them from a run of `ssmax reproduce`.

provenance.json says which run. texts.npy holds token ids of texts that it held out; where its corpus is Python's standard
library, they are excerpts of it, Copyright (c) Python Software Foundation, under the PSF License Version 2.
"""

run, seed = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
recipe = json.loads((run / "recipe.json").read_text())["recipe"]
made = next(row for row in read_rows(run / "rows.jsonl") if row.variant == "b" and row.seed == seed).provenance
cache = run.parent / "cache" / made["corpus"].split()[-1]
shutil.rmtree(FOLDER, ignore_errors=True)
FOLDER.mkdir()
for name, variant in VARIANTS.items():
    for suffix, stage in STAGES.items():
        model = load_model(run / "models" / f"paper-{variant}-{seed}" / stage, dtype=torch.float32)
        model.half().save_pretrained(FOLDER / f"{name}{suffix}")
        for path in (FOLDER / f"{name}{suffix}").iterdir():
            if path.name not in ("config.json", "model.safetensors"):
                path.unlink()
shutil.copy(cache / "tokenizer" / "tokenizer.json", FOLDER)
length = recipe["train_length"] * recipe["length_factor"] + 1
np.save(FOLDER / "texts.npy", np.load(cache / "held-out.npy")[:TEXTS, :length].astype(np.uint16))
shape = {key: recipe[key] for key in ("train_length", "needle_digits")}
factor = float(max(recipe["needle_theta_factors"]))
shape["needle_rope"] = {"rope_type": recipe["needle_rope"], "factor": factor, **LLAMA3}
facts = {"recipe": recipe["name"], "seed": seed, "parameters": sum(p.numel() for p in model.parameters()), **shape}
facts |= {
    key: value for key, value in made.items() if key not in ("recipe", "seconds", "processor_seconds", "peak_mib")
}
(FOLDER / "provenance.json").write_text(json.dumps(facts, indent=1) + "\n")
(FOLDER / "README.md").write_text(NOTICE)
