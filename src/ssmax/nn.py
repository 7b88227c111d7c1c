"""SSMaxScale: the learned s and b of one attention layer, applied to its query."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ssmax.arguments import whole_number
from ssmax.query_scale import QueryScale, own_part
from ssmax.scaling import log_visible, matched_scale
from ssmax.visible import rows_of


def starting_values(init: str | float, bias: bool | None, train_length: int | None) -> dict[str, Any]:
    """Return s, b and bias of an SSMaxScale as ssmax.convert's init names them.

    Args:
        init: "matched" (s = matched_scale(train_length), b = 0), "identity" (s = 0, b = 1), or a
            number for s.
        bias: learn b as well. Default: only with "identity".
        train_length: training length for "matched", in tokens.

    Raises:
        ValueError: another init, bias=False with "identity", or "matched" without a training
            length.
    """
    learned = init == "identity" if bias is None else bias
    if init == "identity":
        if not learned:
            raise ValueError("init='identity' is s = 0 and b = 1; bias=False contradicts it")
        return {"s": 0.0, "b": 1.0, "bias": True}
    if init == "matched":
        if train_length is None:
            raise ValueError("init='matched' needs train_length, the context length of the training, such as 1024")
        return {"s": matched_scale(whole_number(train_length, "train_length", 1)), "b": 0.0, "bias": learned}
    if isinstance(init, bool) or not isinstance(init, (int, float)) or not math.isfinite(init):
        raise ValueError(f"init must be 'matched', 'identity' or a finite number for s, got {init!r}")
    return {"s": float(init), "b": 0.0, "bias": learned}


class SSMaxScale(QueryScale):
    """Multiply each query by s log n + b, with s and b learned for each head (Eq. 2 of arXiv 2501.19399).

    s and b are float32 parameters of shape (H,). They stay float32 through .to(bfloat16), .half()
    and autocast, since in bfloat16 small steps of s would be lost and products would be inexact.
    Only .double() widens them.

    Args:
        num_heads: number of query heads, H.
        s: starting value of s. Default: ssmax.matched_scale(1024).
        bias: learn b as well.
        b: starting value of b.
        shared: use one s and b for all heads of the layer. To share them between layers, give the
            layers the same module.

    Attributes:
        weight: s, (H,), or (1,) if shared; also called s. Exclude it from weight decay: the paper
            decays matrices only.
        bias: b, of the same shape, or None; also called b.

    Raises:
        ValueError: num_heads is not a positive integer, or b is given without bias.

    Example:
        >>> scale = ssmax.SSMaxScale(num_heads=8, s=ssmax.matched_scale(1024))
        >>> query = scale(query, n=ssmax.visible_keys(num_keys=1024))  # (B, 8, 1024, D)

        A fixed s, as in the paper's model (c): SSMaxScale(heads, s=1.0).requires_grad_(False).
    """

    law = "ssmax"

    def __init__(
        self, num_heads: int, s: float = matched_scale(1024), bias: bool = False, b: float = 0.0, shared: bool = False
    ):
        super().__init__()
        if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
            raise ValueError(f"num_heads must be a positive integer, got {num_heads!r}")
        if b != 0 and not bias:
            raise ValueError(f"b = {b} needs bias=True; without it b is not used")
        self.num_heads = num_heads
        self.init_s, self.init_b = float(s), float(b)
        size = 1 if shared else num_heads
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(size, dtype=torch.float32)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set s and b to their starting values."""
        nn.init.constant_(self.weight, self.init_s)
        if self.bias is not None:
            nn.init.constant_(self.bias, self.init_b)

    @property
    def s(self) -> nn.Parameter:
        """The scale, (H,): the parameter named weight."""
        return self.weight

    @property
    def b(self) -> nn.Parameter | None:
        """The bias, (H,): the parameter named bias, or None."""
        return self.bias

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """s, and b where it is learned."""
        return {"s": self.weight} | ({} if self.bias is None else {"b": self.bias})

    def forward(self, query: Tensor, n: Tensor | int, log_n: Tensor | None = None) -> Tensor:
        """Return the query times s log n + b, in the query's dtype, rounded once.

        Args:
            query: (B, H, N, D), after position encoding and QK-norm.
            n: number of visible keys: a number, (N,), (B, N) or (B, H, N); see ssmax.visible_keys.
                n = 0 counts as 1.
            log_n: ssmax.scaling.log_visible of n, to share it between layers.

        Raises:
            ValueError: the query has another number of heads, or n does not fit it.
        """
        weight, bias = own_part(self.weight), own_part(self.bias)
        self.check_query(query, self.num_heads if self.weight.shape[0] == 1 else weight.shape[0])
        # A decode step feels each small operation: view, not indexing, and no conversion that changes nothing.
        m_BHN1 = weight.view(-1, 1, 1) * (log_visible(rows_of(n, query), query) if log_n is None else log_n)
        scaled = query * (m_BHN1 if bias is None else m_BHN1 + bias.view(-1, 1, 1))
        return scaled if scaled.dtype == query.dtype else scaled.to(query.dtype)

    def extra_repr(self) -> str:
        """Describe the module in one line."""
        return f"num_heads={self.num_heads}, bias={self.bias is not None}"


def parameter_groups(
    module: nn.Module, lr: float, weight_decay: float, ssmax_lr: float | None = None
) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimizer: matrices, vectors, and the scales s and b.

    Only matrices (rank >= 2) are decayed, as in the paper (Table 2 of arXiv 2501.19399). Frozen
    parameters are left out.

    Args:
        module: any module, also one that DDP, FSDP2 or PEFT wraps.
        lr: learning rate.
        weight_decay: weight decay of the matrices.
        ssmax_lr: learning rate of s and b. Default: lr.

    Returns:
        Up to three groups, as dicts with params, lr and weight_decay. Empty groups are left out.

    Example:
        >>> optimizer = torch.optim.AdamW(ssmax.parameter_groups(model, lr=1e-3, weight_decay=0.1))
    """
    scales = {id(p) for m in module.modules() if isinstance(m, QueryScale) for p in m.parameters()}
    learned = [p for p in module.parameters() if p.requires_grad]
    others = [p for p in learned if id(p) not in scales]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in others if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
        {
            "params": [p for p in learned if id(p) in scales],
            "lr": lr if ssmax_lr is None else ssmax_lr,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]
