"""SSMax in your own Transformer: scale the query, keep the kernel. Here two documents are packed in one row."""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from ssmax import SSMaxScale, matched_scale, visible_keys


class Attention(nn.Module):
    def __init__(self, size, heads, train_length):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.out = nn.Linear(size, size, bias=False)
        self.ssmax = SSMaxScale(heads, s=matched_scale(train_length))

    def forward(self, x, n, mask):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query = self.ssmax(query, n)  # after RoPE and QK-norm, if the model has them
        return self.out(scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2))


lengths = torch.tensor([5, 11])
n = visible_keys(cu_seqlens=torch.tensor([0, 5, 16]))  # 1 ... 5, 1 ... 11
document = torch.repeat_interleave(torch.arange(2), lengths)
mask = (document[:, None] == document).tril()

layer = Attention(size=32, heads=4, train_length=1024)
output = layer(torch.randn(1, 16, 32), n, mask)
output.square().mean().backward()
print("n:", n.tolist()[0])
print("gradient of s:", layer.ssmax.s.grad.tolist())
