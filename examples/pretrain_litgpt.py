"""litgpt: a subclass of its attention that scales the query, with n counted from the mask that it receives.

Import this file before litgpt builds a model. Then run litgpt.pretrain.setup with optimizer=OPTIMIZER.
"""

import litgpt.model
import torch
from litgpt import GPT, Config
from litgpt.utils import instantiate_torch_optimizer

from ssmax import SSMaxScale, matched_scale, visible_keys


class SSMaxAttention(litgpt.model.CausalSelfAttention):
    def __init__(self, config, block_idx):
        super().__init__(config, block_idx)
        if config.attention_logit_softcapping is not None:
            raise ValueError("litgpt would apply the softcap to scaled logits, which is not SSMax")
        self.ssmax = SSMaxScale(config.n_head, matched_scale(config.block_size))

    def scaled_dot_product_attention(self, q, k, v, mask=None):
        if mask is None:
            n = torch.arange(1, q.shape[2] + 1, device=q.device)[None]
        else:
            n = visible_keys(mask=mask.expand(-1, -1, q.shape[2], k.shape[2]))
        return super().scaled_dot_product_attention(self.ssmax(q, n), k, v, mask)


class AdamW(torch.optim.AdamW):
    """AdamW that decays matrices and not vectors. litgpt gives parameters without names; s and b are vectors."""

    def __init__(self, params, weight_decay=0.1, **options):
        params = list(params)
        groups = [
            {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        ]
        super().__init__(groups, **options)


OPTIMIZER = {"class_path": f"{__name__}.AdamW", "init_args": {"lr": 3e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}}
litgpt.model.CausalSelfAttention = SSMaxAttention  # litgpt's Block takes the class by this name when it is built

if __name__ == "__main__":
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 32, "padded_vocab_size": 256}
    model = GPT(Config.from_name("pythia-14m", **shape))
    s = model.transformer.h[0].attn.ssmax.s
    start = s.detach().clone()
    optimizer = instantiate_torch_optimizer(OPTIMIZER, model.parameters())
    tokens = torch.tensor(list(__doc__.encode()))[:128].view(4, 32)
    losses = []
    for _ in range(30):
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}; weight decay of s: {decay[id(s)]}; s: {s.tolist()}")
    assert losses[-1] < losses[0] / 2
    assert decay[id(s)] == 0
    assert s.ne(start).all()
