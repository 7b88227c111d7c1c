"""Switch a trained model to SSMax, save it, load it, and take SSMax out again."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ssmax
import ssmax.hf  # registers saved SSMax models with the Auto classes

model = LlamaForCausalLM(
    LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
)
tokens = torch.randint(0, 100, (1, 32))
before = model(tokens).logits

ssmax.convert(model, "identity")  # s = 0, b = 1: the same model, and s and b can learn
assert torch.allclose(model(tokens).logits, before, atol=1e-5)

optimizer = torch.optim.AdamW(
    [p for name, p in model.named_parameters() if ".ssmax." in name], lr=1e-2, weight_decay=0.0
)
for _ in range(5):
    optimizer.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
print("s of the first layer:", model.model.layers[0].self_attn.ssmax.s.tolist())

model.save_pretrained("ssmax-model")
loaded = AutoModelForCausalLM.from_pretrained("ssmax-model")
assert torch.equal(loaded(tokens).logits, model(tokens).logits)

ssmax.revert(model)
assert torch.allclose(model(tokens).logits, before, atol=1e-5)
