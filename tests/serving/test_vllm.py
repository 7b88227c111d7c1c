"""What vLLM's attention says of n, by position alone; make test-serving runs vLLM itself."""

import pytest
import torch
from tiny_models import tiny_model

from ssmax.hf.visibility import kernel_visible_keys


def test_n_in_vllm_is_the_position_within_the_window():
    module = tiny_model("llama").model.layers[0].self_attn
    query, key = torch.zeros(1, 4, 6, 8), torch.zeros(1, 2, 6, 8)
    positions = torch.tensor([[7, 8, 0, 1, 2, 300]])  # of three requests in one batch, one of them in mid-prompt
    n, _ = kernel_visible_keys("vllm", module, query, key, None, {"position_ids": positions})
    assert n.tolist() == [[8, 9, 1, 2, 3, 301]]
    n, _ = kernel_visible_keys("vllm", module, query, key, None, {"position_ids": positions, "sliding_window": 4})
    assert n.tolist() == [[4, 4, 1, 2, 3, 4]]
    for bad in ({}, {"position_ids": positions.expand(3, 1, 6)}, {"position_ids": positions, "is_causal": False}):
        with pytest.raises(ValueError, match="plain positions"):
            kernel_visible_keys("vllm", module, query, key, None, bad)
