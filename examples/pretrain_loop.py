"""A training script like nanoGPT's or nanochat's: convert the model, and give the optimizer the parameter groups of ssmax."""

import torch
from torch import nn
from torch.nn import functional as F

import ssmax


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (y.view(*y.shape[:2], self.heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class GPT(nn.Module):
    def __init__(self, vocabulary=256, width=32, heads=4, layers=2, length=64):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.attention = nn.ModuleList(Attention(width, heads) for _ in range(layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            x = x + attention(F.layer_norm(x, x.shape[-1:]))
            x = x + mlp(F.layer_norm(x, x.shape[-1:]))
        return self.head(self.norm(x))


torch.manual_seed(0)
text = torch.tensor(list(__doc__.encode() * 20))
length = 64
model = GPT(length=length)

ssmax.convert(model, train_length=length, example=(text[None, :length],))  # before torch.compile, DDP and the optimizer
optimizer = torch.optim.AdamW(ssmax.parameter_groups(model, lr=3e-3, weight_decay=0.1))
scales = {name: p for name, p in model.named_parameters() if ".ssmax." in name}
print("weight decay of s:", {g["weight_decay"] for g in optimizer.param_groups for p in g["params"] if any(p is s for s in scales.values())})  # fmt: skip

losses = []
for _ in range(60):
    starts = torch.randint(len(text) - length - 1, (8,)).tolist()
    rows = torch.stack([text[i : i + length + 1] for i in starts])
    loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}; s of the first layer {model.attention[0].ssmax.s.tolist()}")
assert losses[-1] < losses[0] / 2

torch.save(model.state_dict(), "gpt.pt")
again = ssmax.convert(GPT(length=length), train_length=length, example=(text[None, :length],))
again.load_state_dict(torch.load("gpt.pt"))  # a GPT that is not converted would refuse these keys
assert torch.equal(again(rows[:, :-1]), model(rows[:, :-1]))
