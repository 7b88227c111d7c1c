"""torchtitan: a subclass of its attention that scales the query, with the n of the mask that its inner attention applies.

Use convert_config(model_config, train_length) and OPTIMIZER in the config of a run.
"""

import re
from dataclasses import dataclass, fields

import torch
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.models.common.attention import FlexAttention, GQAttention, ScaledDotProductAttention
from torchtitan.protocols.module import Module

from ssmax import SSMaxScale, matched_scale


class Scale(SSMaxScale, Module):
    """SSMaxScale as a torchtitan Module: torchtitan builds models on the meta device and initialises only its own Modules."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        n_heads: int
        s: float

    def __init__(self, config):
        SSMaxScale.__init__(self, config.n_heads, config.s)

    def _init_self_parameters(self):
        self.reset_parameters()


class SSMaxGQAttention(GQAttention):
    @dataclass(kw_only=True, slots=True)
    class Config(GQAttention.Config):
        s: float

    def __init__(self, config):
        super().__init__(config)
        if not isinstance(self.inner_attention, (ScaledDotProductAttention, FlexAttention)):
            raise ValueError(f"n is not known for {type(self.inner_attention).__name__}; use sdpa or flex")
        self.ssmax = Scale.Config(n_heads=config.n_heads, s=config.s).build()

    def forward(self, x, attention_masks, positions=None):
        q, k, v = self.qkv_linear(x)  # (B, N, H, D)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rope(q, k, positions)
        if isinstance(self.inner_attention, FlexAttention) and positions is not None:
            n = positions + 1  # a document's first token has position 0
        else:  # torchtitan's sdpa is causal over the whole row, across documents
            n = torch.arange(1, q.shape[1] + 1, device=q.device)[None]
        q = self.ssmax(q.transpose(1, 2), n).transpose(1, 2)
        y = self.inner_attention(
            q, k, v, attention_masks=attention_masks, scale=self.scaling, enable_gqa=self.enable_gqa
        )
        return self.wo(y.contiguous().flatten(2))


def convert_config(model_config, train_length):
    """Replace every GQAttention in a model's config by an SSMaxGQAttention."""
    for layer in model_config.layers:
        old = layer.attention
        values = {field.name: getattr(old, field.name) for field in fields(old)}
        layer.attention = SSMaxGQAttention.Config(**values, s=matched_scale(train_length))
    return model_config


OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8}
OPTIMIZER = OptimizersContainer.Config(
    param_groups=[
        ParamGroupConfig(
            pattern=r"\.ssmax\.", optimizer_name="AdamW", optimizer_kwargs=OPTIONS | {"weight_decay": 0.0}
        ),
        ParamGroupConfig(pattern=r".*", optimizer_name="AdamW", optimizer_kwargs=OPTIONS | {"weight_decay": 0.1}),
    ]
)

if __name__ == "__main__":
    from torchtitan.models.llama3 import llama3_configs

    torch.manual_seed(0)
    config = convert_config(llama3_configs["debugmodel"](attn_backend="flex"), train_length=32)
    for layer in config.layers:  # torch's FlexAttention has no backward on the CPU
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    with torch.device("meta"):
        model = config.build()
    model.to_empty(device="cpu")
    model.init_states()
    s = model.layers["0"].attention.ssmax.s
    start = s.detach().clone()
    assert start.eq(matched_scale(32)).all()  # initialised, not left-over memory

    optimizer = OPTIMIZER.build(model_parts=[model])
    tokens = torch.tensor(list(__doc__.encode()))[:128].view(4, 32)
    losses = []
    for _ in range(20):
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    decay = {id(p): group["weight_decay"] for one in optimizer for group in one.param_groups for p in group["params"]}
    names = [name for name, p in model.named_parameters() if decay[id(p)] == 0]
    print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}; not decayed: {names[:2]} ...; s: {s.tolist()[:4]} ...")
    assert losses[-1] < losses[0] / 2
    assert names
    assert all(re.search(r"\.ssmax\.", name) for name in names)
    assert s.ne(start).all()
