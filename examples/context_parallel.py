"""SSMax with a sequence that is split over ranks: ring attention and Ulysses, simulated in one process.

Both give the outputs and gradients of one device if two rules are kept. n is *global*: a rank counts the keys that a query
sees in the whole sequence. The gradient of s is the sum over all ranks. SSMax sends nothing else.
"""

import copy

import torch
from torch import Tensor

from ssmax import SSMaxScale, attention, visible_keys

Ranks = list[Tensor]  # (B, H, N / ranks, D) of each


def ring(queries: Ranks, keys: Ranks, values: Ranks, scales: list[SSMaxScale]) -> tuple[Ranks, int]:
    """Ring attention: queries stay, keys and values go round. Return each rank's output and the bytes that one rank sends."""
    outputs, sent = [], 0
    for rank, (query, scale) in enumerate(zip(queries, scales, strict=True)):
        length = query.shape[2]
        position = torch.arange(rank * length, (rank + 1) * length)  # in the whole sequence
        scaled = scale(query, visible_keys(position_ids=position))
        output, mass = _block(scaled, keys[rank], values[rank], causal=True)
        for step in range(1, len(queries)):
            source = (rank - step) % len(queries)
            sent += (keys[source].nbytes + values[source].nbytes) // len(queries)
            if source < rank:  # a causal query does not see later keys
                theirs, their_mass = _block(scaled, keys[source], values[source], causal=False)
                whole = torch.logaddexp(mass, their_mass)
                output = output * (mass - whole).exp() + theirs * (their_mass - whole).exp()
                mass = whole
        outputs.append(output)
    return outputs, sent


def ulysses(queries: Ranks, keys: Ranks, values: Ranks, scales: list[SSMaxScale]) -> tuple[Ranks, int]:
    """Ulysses: each rank attends with a part of the heads to all tokens, and sends the outputs back. Returns as ring does."""
    ranks, sent = len(queries), 0

    def all_to_all(parts: Ranks, split: int, join: int) -> Ranks:
        nonlocal sent
        sent += parts[0].nbytes * (ranks - 1) // ranks
        pieces = [part.chunk(ranks, split) for part in parts]
        return [torch.cat([piece[rank] for piece in pieces], join) for rank in range(ranks)]

    q, k, v = (all_to_all(parts, 1, 2) for parts in (queries, keys, values))
    s = [scale.s.chunk(ranks)[rank] for rank, scale in enumerate(scales)]  # of this rank's heads
    whole = [attention(*of_rank, is_causal=True) for of_rank in zip(q, k, v, s, strict=True)]  # n is that of all tokens
    return all_to_all(whole, 2, 1), sent


def all_reduce(scales: list[SSMaxScale]) -> Tensor:
    """Return the gradient of s: the sum over the ranks."""
    return torch.stack([torch.zeros_like(scale.s) if scale.s.grad is None else scale.s.grad for scale in scales]).sum(0)


def _block(scaled, key, value, causal):
    """Return attention to one rank's keys, and the log-sum-exp with which it is merged with other blocks."""
    z = scaled @ key.mT * key.shape[-1] ** -0.5
    if causal:
        z = z.masked_fill(torch.ones(z.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return z.softmax(-1) @ value, z.logsumexp(-1, keepdim=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    whole = [torch.randn(1, 8, 64, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    scale = SSMaxScale(8).double()
    want = attention(*whole, scale.s, is_causal=True)
    want.square().sum().backward()
    for name, method in (("ring", ring), ("Ulysses", ulysses)):
        for ranks in (2, 4, 8):
            own = [copy.deepcopy(scale) for _ in range(ranks)]
            for copied in own:
                copied.zero_grad()
            parts = [[x.detach().clone().requires_grad_() for x in tensor.chunk(ranks, 2)] for tensor in whole]
            outputs, sent = method(*parts, own)
            sum(output.square().sum() for output in outputs).backward()
            torch.testing.assert_close(torch.cat(outputs, 2), want)
            torch.testing.assert_close(all_reduce(own), scale.s.grad)
            for mine, one in zip(parts, whole, strict=True):
                torch.testing.assert_close(torch.cat([x.grad for x in mine], 2), one.grad)
            print(f"{name} over {ranks} ranks equals one device; each sends {sent:,} bytes forward, and 64 for s")
