"""The class of a converted model in vLLM; only vLLM imports this file."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.utils import set_weight_attrs

from ssmax.query_scale import QueryAwareScale, QueryScale


class SSMaxForCausalLM(TransformersForCausalLM):
    """A converted decoder. Under tensor parallelism, s and b are split like the heads."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        # The config may come pickled from another process; this look-up registers it with the Auto classes.
        CONFIG_MAPPING[vllm_config.model_config.hf_config.model_type]
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        parts = vllm_config.parallel_config.tensor_parallel_size
        for module in self.model.modules() if parts > 1 else ():
            if isinstance(module, QueryAwareScale):
                raise ValueError("the networks of law 'query-aware' are shared by heads; set tensor_parallel_size=1")
            if isinstance(module, QueryScale):
                _split(module, parts)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load as vLLM does. Raise ValueError if a scale is missing, which vLLM does not notice in quantised checkpoints."""
        loaded = super().load_weights(weights)
        lost = sorted(name for name, _ in self.named_parameters() if ".ssmax." in name and name not in loaded)
        if lost:
            raise ValueError(f"the checkpoint lacks SSMax scales: {', '.join(lost[:4])}")
        return loaded


def _split(scale, parts):
    for name, whole in list(scale.named_parameters()):
        scale.num_heads = len(whole) // parts
        part = nn.Parameter(torch.empty(scale.num_heads, dtype=torch.float32, device=whole.device), requires_grad=False)
        set_weight_attrs(part, {"weight_loader": sharded_weight_loader(0)})
        setattr(scale, name, part)
