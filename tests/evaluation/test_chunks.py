"""A chunk behind a cache attends to the same keys with and without its mask."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ssmax.evaluation.chunks import CausalAfterCache

GENERATOR = torch.Generator().manual_seed(0)


def inputs(rows, keys, heads=4, key_heads=4, size=16):
    shapes = ((2, heads, rows, size), (2, key_heads, keys, size), (2, key_heads, keys, size))
    return [torch.randn(shape, generator=GENERATOR, dtype=torch.float64) for shape in shapes]


def causal(rows, keys):
    return torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)[None, None]


@pytest.mark.parametrize(("rows", "keys"), [(128, 129), (200, 1000), (700, 701), (128, 128), (5, 400)])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 2.0])
def test_the_join_is_softmax_over_all_keys(rows, keys, key_heads, scale):
    given = inputs(rows, keys, key_heads=key_heads)
    options = {"attn_mask": causal(rows, keys), "scale": scale, "enable_gqa": key_heads != 4}
    want = scaled_dot_product_attention(*given, **options)
    with CausalAfterCache():
        got = scaled_dot_product_attention(*given, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_logits_far_apart_do_not_overflow():
    query, key, value = inputs(130, 300)
    mask = causal(130, 300)
    for far in (slice(170), slice(170, None)):
        apart = key.clone()
        apart[:, :, far] *= 1e3
        want = scaled_dot_product_attention(query, apart, value, mask)
        with CausalAfterCache():
            got = scaled_dot_product_attention(query, apart, value, mask)
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def other_masks():
    mask = causal(150, 400)
    masks = {"window": mask & ~mask.roll(-100, -1), "per head": mask.repeat(1, 4, 1, 1)}
    masks["per head"][0, 2] = True
    for name, at in (("padding", (0, 3)), ("a hole at the end", (149, 399)), ("a key too early", (0, 300))):
        masks[name] = mask.repeat(2, 1, 1, 1)
        masks[name][1, 0, at[0], at[1]] ^= True
    return masks


@pytest.mark.parametrize("mask", other_masks().values(), ids=other_masks())
def test_any_other_mask_is_left_as_it_is(mask):
    given = inputs(150, 400)
    want = scaled_dot_product_attention(*given, attn_mask=mask)
    with CausalAfterCache():
        got = scaled_dot_product_attention(*given, attn_mask=mask)
    assert torch.equal(got, want)
    assert not torch.allclose(want, scaled_dot_product_attention(*given, attn_mask=causal(150, 400)))
