"""AttentionCall: one call of attention as an object. Each backend says why it cannot compute it (why_not), or computes it."""

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ssmax.visible import document_bounds

if TYPE_CHECKING:
    from ssmax.sharp.keys import ScreenedKeys


class AttentionCall(NamedTuple):
    """Attention as softmax(m softcap(scale q k) + mask) v. Rows that see no key give zeros.

    Attributes:
        query: (B, H, N, D); rows that see no key hold zeros.
        key: (B, H or a divisor of H, S, D).
        value: (B, heads as key, S, V).
        multiplier: m, (B or 1, H or 1, N or 1), float32 or float64. None if the query is multiplied
            already; only sdpa and sharp take that.
        scale: factor of q k.
        mask: bool (True = visible) or a bias, (B or 1, H or 1, N or 1, S or 1); or a BlockMask.
        cu_seqlens: offsets of packed documents; a query sees only its own document.
        is_causal: a query sees no later key; the queries are the last N of S positions.
        window: largest number of keys that a query sees, its own included.
        softcap: c, for c tanh(z / c).
        dropout_p: probability of dropping a weight.
        tolerance: weight that a kernel may leave out of a row, if it leaves out any.
        screen: the screen of key, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    multiplier: Any
    scale: float
    mask: Any = None
    cu_seqlens: Tensor | None = None
    is_causal: bool = False
    window: int | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    tolerance: float = 1e-3
    screen: "ScreenedKeys | None" = None

    def wants_gradient(self) -> bool:
        """Return whether a backward may follow."""
        inputs = (self.query, self.key, self.value, self.multiplier)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)

    def why_not_mask(self, rounds: bool = True) -> str | None:
        """Return why a kernel cannot take the mask, if it takes only tensors and (if rounds) adds them in the query's dtype."""
        if self.mask is None:
            return None
        if not isinstance(self.mask, Tensor):
            return "does not take a BlockMask; use impl='flex' or 'auto'"
        if rounds and self.mask.is_floating_point() and self.mask.dtype != self.query.dtype:
            return (
                f"would round the bias from {self.mask.dtype} to {self.query.dtype}; cast it, or use impl='reference'"
            )
        return None

    def documents(self) -> tuple[Tensor, ...]:
        """Return all positions of packed documents, and the start and end of each one's document, (T,) each."""
        assert self.cu_seqlens is not None
        position_T = torch.arange(self.key.shape[2], device=self.query.device)
        return position_T, *document_bounds(self.cu_seqlens.to(self.query.device), position_T)

    def in_one_document(self) -> Tensor:
        """Return which pairs of positions are in one document, (T, T), bool."""
        position_T, start_T, end_T = self.documents()
        return (position_T >= start_T[:, None]) & (position_T < end_T[:, None])


class Backend(Protocol):
    """A module that computes attention."""

    def why_not(self, call: AttentionCall) -> str | None:
        """Return why the backend cannot compute the call exactly, as words that follow its name; None if it can."""

    def forward(self, call: AttentionCall) -> Tensor:
        """Return (B, H, N, V)."""
