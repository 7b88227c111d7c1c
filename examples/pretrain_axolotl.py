"""axolotl loads the model itself: convert a folder first, and name this file's plugin in the settings."""

import json
from pathlib import Path

import yaml
from axolotl.integrations.base import BasePlugin
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer

import ssmax
import ssmax.hf  # registers saved models, and excludes s and b from Trainer's weight decay


class Plugin(BasePlugin):
    """In the settings: plugins: [pretrain_axolotl.Plugin]. It does its work by the import of ssmax.hf."""


SETTINGS = {
    "base_model": "converted",
    "plugins": ["pretrain_axolotl.Plugin"],
    "datasets": [{"path": "texts.jsonl", "ds_type": "json", "type": "completion"}],
    "output_dir": "trained",
    "attn_implementation": "sdpa",
    "sequence_len": 32,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 4,
    "learning_rate": 0.01,
    "lr_scheduler": "constant",
    "optimizer": "adamw_torch",
    "weight_decay": 0.1,
    "bf16": False,
    "tf32": False,
}


def save_converted_model() -> None:
    """Save a small converted model with its tokenizer, as ssmax convert does with a model of yours."""
    words = __doc__.split()
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *dict.fromkeys(words)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    ssmax.convert(LlamaForCausalLM(config), train_length=32).save_pretrained("converted")
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained("converted")
    Path("texts.jsonl").write_text(json.dumps({"text": __doc__}) + "\n")


def train() -> Trainer:
    """Train as `axolotl train settings.yml` does, and return the trainer that it made."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import setup_model_and_trainer

    settings = load_cfg("settings.yml")
    trainer = setup_model_and_trainer(settings, load_datasets(cfg=settings))[0]
    trainer.train()
    trainer.save_model("trained")
    return trainer


if __name__ == "__main__":
    save_converted_model()
    Path("settings.yml").write_text(yaml.safe_dump(SETTINGS))
    trainer = train()
    decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    attention = trainer.model.model.layers[0].self_attn
    s = attention.ssmax.s
    print("weight decay of s:", decay[id(s)], "- of q_proj:", decay[id(attention.q_proj.weight)])
    assert decay[id(s)] == 0
    assert s.ne(ssmax.matched_scale(32)).all()  # it learned
    assert AutoModelForCausalLM.from_pretrained("trained").model.layers[0].self_attn.ssmax.s.equal(s)
