"""The demo's measurements: loss by position, needles found, and the attention of each model's best head."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel
from transformers.utils import logging

import ssmax.hf  # noqa: F401 (makes the shipped SSMax models known to transformers)
from ssmax.evaluation import (
    NeedleExample,
    NeedleTask,
    binned,
    loss_by_position,
    retrieve_grid,
    rope_scaling,
    rope_theta,
)
from ssmax.evaluation.attention import attend
from ssmax.evaluation.reading import Reader
from ssmax.hf.loading import load_model

FOLDER = Path(__file__).parent / "models"
MODELS = {"softmax": "Softmax", "ssmax": "SSMax"}
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
THETA_FACTOR = 50  # factor of RoPE's theta for the loss by position, as in the paper


@dataclass(frozen=True)
class Shipped:
    """The models and texts that ship with the package.

    Attributes:
        pretrained: name in MODELS -> the pretrained model.
        retrieval: the same models, fine-tuned to find the needle on contexts up to the training
            length.
        tokenizer: tokenizer of both models.
        texts: (K, L) token ids that neither model was trained on.
        provenance: recipe, corpus, commit, seed and versions of the run that made the models.
    """

    pretrained: dict[str, PreTrainedModel]
    retrieval: dict[str, PreTrainedModel]
    tokenizer: Tokenizer
    texts: np.ndarray
    provenance: dict[str, Any]

    @property
    def train_length(self) -> int:
        """Tokens of a training window."""
        return self.provenance["train_length"]

    @property
    def lengths(self) -> list[int]:
        """Context sizes of the demo: the training length, doubled up to the length of the texts."""
        count = (self.texts.shape[1] // self.train_length).bit_length()
        return [self.train_length * 2**k for k in range(count)]

    @property
    def needle_rope(self) -> dict[str, Any]:
        """RoPE's parameters for needles: those of the run that made the models, by which it judged them."""
        return self.provenance["needle_rope"]

    def encode(self, text: str) -> list[int]:
        """Return ids without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def task(self) -> NeedleTask:
        """Return the needle task in the held-out texts."""
        return NeedleTask(self.encode, self.texts.reshape(-1), self.provenance["needle_digits"])


def load(folder: Path = FOLDER) -> Shipped:
    """Load the models and texts that ship with the package, in float32."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def models(suffix: str) -> dict[str, PreTrainedModel]:
        options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa", "local_files_only": True}
        return {name: load_model(folder / f"{name}{suffix}", **options).eval() for name in MODELS}

    provenance = json.loads((folder / "provenance.json").read_text())
    texts = np.load(folder / "texts.npy").astype(np.int64)
    return Shipped(models(""), models("-retrieval"), tokenizer, texts, provenance)


def losses(shipped: Shipped, progress: Callable[[int], Any]) -> list[dict[str, Any]]:
    """Return the loss of each model in bins of positions: first and last position, and nats per token by model."""
    texts = torch.from_numpy(shipped.texts)
    bins = {}
    for name, model in shipped.pretrained.items():
        with rope_theta(model, THETA_FACTOR):
            bins[name] = binned(loss_by_position(model, texts, progress=lambda n: progress(n * len(texts))))
    pairs = zip(*bins.values(), strict=True)
    return [{"first": a.first, "last": a.last, **dict(zip(bins, (a.mean, b.mean), strict=True))} for a, b in pairs]


def needles(shipped: Shipped, trials: int, progress: Callable[[int], Any]) -> dict[str, dict[int, list]]:
    """Ask each model for needles at every context size and depth; return the results by model and context size."""
    task = shipped.task()
    cells = [(length, depth) for length in shipped.lengths for depth in DEPTHS]
    asked = [task.grid(cells, np.random.default_rng(seed)) for seed in range(trials)]
    found = {}
    for name, model in shipped.retrieval.items():
        with rope_scaling(model, shipped.needle_rope):
            outcomes = retrieve_grid(model, asked, progress=progress)
        found[name] = {n: [trial[n, d] for trial in outcomes for d in DEPTHS] for n in shipped.lengths}
    return found


def best_head(outcomes: dict[int, list]) -> tuple[int, int]:
    """Return layer and head with the highest mean needle score over all trials and context sizes."""
    scores = torch.stack([trial.scores for trials in outcomes.values() for trial in trials]).mean(0)
    return divmod(int(scores.argmax()), scores.shape[1])


@torch.inference_mode()
def look(
    model: PreTrainedModel, example: NeedleExample, head: tuple[int, int], rope: dict[str, Any]
) -> tuple[list[float], list[int]]:
    """Return the weights of a head, (layer, head), from the last token of the prompt, and the answer's token ids."""
    layer, number = head
    prompt = torch.tensor([example.prompt])
    with rope_scaling(model, rope):
        reader = Reader(model, prompt, 1024)
        memory = reader.read(reader.empty(1), prompt[:, :-1])
        _, weights = attend(reader, memory, prompt[:, -1:], prompt.shape[1])
        asked = {"max_new_tokens": len(example.answer), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        generate: Any = model.generate
        spoken = generate(prompt, attention_mask=torch.ones_like(prompt), **asked)
    return weights.layers[layer][0, number].tolist(), spoken[0, prompt.shape[1] :].tolist()
