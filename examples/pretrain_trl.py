"""TRL's SFTTrainer, a subclass of transformers' Trainer: convert the model and pass it on; s and b are not decayed."""

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import ssmax
import ssmax.hf  # registers saved models, and excludes s and b from Trainer's weight decay

words = __doc__.split()
vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *dict.fromkeys(words)])}
tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")

config = LlamaConfig(
    vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
model = ssmax.convert(LlamaForCausalLM(config), train_length=32)
options = SFTConfig(
    "sft", max_length=32, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, weight_decay=0.1,
    save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, dataset_num_proc=None,
)  # fmt: skip
trainer = SFTTrainer(
    model, options, train_dataset=Dataset.from_dict({"text": [__doc__] * 8}), processing_class=tokenizer
)
trainer.train()

decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
s = model.model.layers[0].self_attn.ssmax.s
print("weight decay of s:", decay[id(s)], "- of q_proj:", decay[id(model.model.layers[0].self_attn.q_proj.weight)])
assert decay[id(s)] == 0
assert s.ne(ssmax.matched_scale(32)).all()  # it learned
trainer.save_model("sft")
assert AutoModelForCausalLM.from_pretrained("sft").model.layers[0].self_attn.ssmax.s.equal(s)
