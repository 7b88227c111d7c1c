"""unsloth loads the model itself: convert a folder first, import ssmax.hf, and add s and b to the adapter."""

import unsloth  # isort: skip  # before transformers, which it changes

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import ssmax
import ssmax.hf  # registers saved models, and excludes s and b from Trainer's weight decay


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


def train(full: bool) -> None:
    """Train all weights, or a LoRA together with s and b; check s before and after saving."""
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        "converted", max_seq_length=32, load_in_4bit=False, full_finetuning=full
    )
    if not full:
        model = unsloth.FastLanguageModel.get_peft_model(model, r=4, modules_to_save=["ssmax"])
    options = SFTConfig(
        "trained", max_length=32, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, weight_decay=0.1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, dataset_num_proc=None,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=options, train_dataset=Dataset.from_dict({"text": [__doc__] * 8}), processing_class=tokenizer
    )
    trainer.train()

    decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    learned = {name: p for name, p in model.named_parameters() if ".ssmax." in name and p.requires_grad}
    first = next(iter(learned.values()))
    print(f"all weights: {full}; weight decay of s:", {decay[id(s)] for s in learned.values()})
    assert {decay[id(s)] for s in learned.values()} == {0}
    assert len(learned) == 2
    assert first.ne(ssmax.matched_scale(32)).all()  # it learned
    if full:
        trainer.save_model("trained")
    else:
        model.save_pretrained_merged("trained", tokenizer)
    assert AutoModelForCausalLM.from_pretrained("trained").model.layers[0].self_attn.ssmax.s.equal(first)


if __name__ == "__main__":
    save_converted_model()
    train(full=False)
    train(full=True)
