"""How far rounding alone may lead a result astray, on any processor and in any order of summation.

The computation is repeated in float64 with an error drawn for each of its roundings, as large as a rounding can be: u times
what is rounded, and sqrt(k) u times the sum of the absolute values for a sum of k products (Higham and Mary, A New Approach to
Probabilistic Rounding Error Analysis, 2019). A result may be wrong by MARGIN standard deviations of DRAWS such draws. Nothing is
taken from what a kernel happened to err by on some machine.
"""

import math

import torch

DRAWS, MARGIN = 32, 10.0
EXP = 4.0  # roundings in an exponential: MARGIN times it is 20 ulp, what torch's fastest vectorised one is allowed
NAMES = ("output", "dq", "dk", "dv", "ds", "db")


def unit(dtype):
    """The largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def assert_within(got, want, bound, what=""):
    """Each entry of got (a tensor or array) is within its own bound of want; the bound is far below what is compared."""
    got, want, bound = (torch.as_tensor(x).detach().double() for x in (got, want, bound))
    assert got.shape == want.shape
    wrong = ~((got == want) | ((got - want).abs() <= bound))  # NaN is wrong
    worst = ((got - want).abs() / bound)[wrong]
    assert not wrong.any(), (
        f"{what}: {len(worst)} of {wrong.numel()} entries are wrong, one by {worst.max():.3g} bounds"
    )


class Noise:
    """Errors of one dtype."""

    def __init__(self, dtype, generator):
        self.unit, self.generator = unit(dtype), generator
        # float32's subnormal numbers may be flushed to zero; narrow ones are rounded to their spacing.
        self.tiny = torch.finfo(dtype).smallest_normal * (self.unit if dtype.itemsize == 2 else 1.0)

    def draw(self, x):
        return torch.randn(x.shape, dtype=torch.float64, generator=self.generator)

    def round(self, x, times=1.0):
        """Return x, rounded a number of times."""
        return x + times * (self.unit * x.abs() + self.tiny) * self.draw(x)

    def exp(self, logits, subtracted, visible, times=1.0):
        p = self.round((logits - subtracted).masked_fill(~visible, 0.0), 2).exp().masked_fill(~visible, 0.0)
        return self.round(p, EXP * math.sqrt(times))

    def product(self, a, b):
        """A @ b, each product and each sum rounded."""
        return a @ b + math.sqrt(a.shape[-1] + 2) * self.unit * (a.abs() @ b.abs()) * self.draw(a @ b)

    def sum(self, x, dim=-1):
        total = x.sum(dim, keepdim=True)
        count = x.numel() / max(1, total.numel())
        return total + math.sqrt(count) * self.unit * x.abs().sum(dim, keepdim=True) * self.draw(total)


def spread(compute):
    """Return the bounds of the results of compute(generator), which draws its errors from the generator."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.stack(x) for x in zip(*(compute(generator) for _ in range(DRAWS)), strict=True)]
    return [MARGIN * x.std(0) for x in draws]


def softmax(z, s, b, visible, dtype):
    """Bounds of scalable_softmax over the last dimension, computed in float32 or wider and rounded to dtype."""
    z, visible = (torch.as_tensor(x) for x in (z, visible))
    z, n = z.double().masked_fill(~visible, 0.0), visible.sum(-1, keepdim=True).clamp(min=1).double()

    def compute(generator):
        wide, last = (Noise(x, generator) for x in (torch.float64 if dtype == torch.float64 else torch.float32, dtype))
        m = wide.round(wide.round(s * n.log(), 4) + b)
        return [last.round(_weights(wide.round(m * z, 2), visible, wide)[0])]

    return spread(compute)[0]


def _weights(logits, visible, noise):
    """Return P and the log-sum-exp of an online softmax: a row's maximum may change with each tile of keys."""
    logits = logits.masked_fill(~visible, -math.inf)
    alive = visible.any(-1, keepdim=True)
    top = logits.amax(-1, keepdim=True).masked_fill(~alive, 0.0)
    p = noise.exp(logits, top, visible, 1 + logits.shape[-1] / 16)  # of the smallest kernel
    mass = noise.sum(p).masked_fill(~alive, 1.0)
    return noise.round(p / mass), noise.round(top + mass.log(), 2)


def attention(
    q, k, v, s, b, visible, upstream=None, *, n=None, scale=None, softcap=None, bias=0.0, dtype=torch.float32,
    stored=None, folded=False, centred=False,
):  # fmt: skip
    """Return the bounds of the output; with upstream, those of the output, dq, dk, dv, ds and db by name.

    Args:
        q, k, v, s, b, n, scale, softcap, bias: as for oracle.attention, tensors or arrays.
        visible: bool, broadcast to (B, H, N, S).
        upstream: the gradient of the output.
        dtype: in which it is computed.
        stored: to which P, dS and the results are rounded.
        folded: the query times the multiplier is rounded to stored, and so is its gradient.
        centred: the gradient of the multiplier is taken from z - zbar, which the error of <dO, O> does not reach.
    """
    q, k, v, s, b = (torch.as_tensor(x).detach().double() for x in (q, k, v, s, b))
    groups = q.shape[1] // k.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (k, v))
    visible = torch.as_tensor(visible).expand(*q.shape[:3], k.shape[2])
    n = visible.sum(-1) if n is None else torch.as_tensor(n)
    n = (n[:, None] if n.ndim == 2 else n).expand(q.shape[:3])[..., None]
    visible, log_n = visible & (n > 0), n.clamp(min=1).double().log()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias = torch.as_tensor(bias).double().clamp(min=-1e9)

    def compute(generator):
        noise, last = (Noise(x, generator) for x in (dtype, stored or dtype))
        m = noise.round(noise.round(s[:, None, None] * log_n, 4) + noise.round(b[:, None, None]), 3)
        of_q, of_k, of_v = noise.round(q), noise.round(key), noise.round(value)
        of_scaled = last.round(m * scale * of_q) if folded else m * scale * of_q

        def logits():
            if softcap is None:
                x = noise.product(of_scaled, of_k.mT)
            else:
                x = m * noise.round(
                    softcap * torch.tanh(noise.round(noise.product(scale * of_q, of_k.mT) / softcap)), 3
                )
            return noise.round(x, 2) + bias

        p, logsumexp = _weights(logits(), visible, noise)
        output = last.round(noise.product(last.round(p), of_v))
        if upstream is None:
            return [output]
        g, z = torch.as_tensor(upstream).double(), noise.product(scale * of_q, of_k.mT)
        p = noise.exp(logits(), logsumexp, visible)  # computed again, as flash kernels do
        mean = noise.sum(noise.round(p * z)) if centred else 0.0
        ds = noise.round(p * (noise.product(g, of_v.mT) - noise.sum(g * output)), 2)
        dm = noise.sum(ds * (z - mean))
        ds = last.round(ds)
        dq = last.round(noise.product(ds, of_k)) if folded else noise.product(ds, of_k)
        dk = noise.product(ds.mT, of_scaled) if folded else noise.product((m * scale * ds).mT, of_q)
        dv = noise.product(last.round(p).mT, g)
        dk, dv = (last.round(noise.sum(x.unflatten(1, (k.shape[1], groups)), 2).squeeze(2)) for x in (dk, dv))
        d_s, d_b = (noise.sum(x.transpose(0, 1).flatten(1)).squeeze(1) for x in (log_n * dm, dm))
        return output, last.round(noise.round(m * scale, 2) * dq), dk, dv, d_s, d_b

    bounds = spread(compute)
    return bounds[0] if upstream is None else dict(zip(NAMES, bounds, strict=True))
