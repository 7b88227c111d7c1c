"""Rows of Figures 1 and 3, computed from the formula without a model."""

import numpy as np
import torch

from ssmax.runs.rows import Row
from ssmax.scaling import scalable_softmax


def formula_rows() -> list[Row]:
    """Return the weight of the largest logit by the number of keys and by its lead, under Softmax and SSMax."""
    rows = []
    for n in (2**k for k in range(1, 18)):
        z = torch.full((n,), -2.0, dtype=torch.float64)
        z[-1] = 3.0
        for variant, weights, s in (("a", z.softmax(0), None), ("b", scalable_softmax(z, 0.43), 0.43)):
            rows.append(Row("max_weight", variant, None, {"n": n, "s": s}, weights[-1].item(), 1))
    for n in (100, 1_000, 10_000, 100_000):
        z = torch.linspace(0, 1, n, dtype=torch.float64)
        for z_max in np.linspace(0, 14, 113):
            z[-1] = float(z_max)
            for variant, s in (("a", None), ("b", 0.43), ("b", 1.0)):
                weights = z.softmax(0) if s is None else scalable_softmax(z, s)
                at = {"n": n, "z_max": round(float(z_max), 3), "s": s}
                rows.append(Row("focus_weight", variant, None, at, weights[-1].item(), 1))
    return rows
