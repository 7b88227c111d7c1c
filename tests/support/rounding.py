"""How far rounding alone may lead a result astray, on any processor and in any order of summation.

The computation is repeated in float64 with an error drawn for each of its roundings, as large as a rounding can be: u times
what is rounded, and sqrt(k) u times the sum of the absolute values for a sum of k products (Higham and Mary, A New Approach to
Probabilistic Rounding Error Analysis, 2019). A result may be wrong by MARGIN standard deviations of DRAWS such draws. Nothing is
taken from what a kernel happened to err by on some machine.
"""

import math

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DRAWS, MARGIN = 32, 10.0
EXP = 4.0  # roundings in an exponential: MARGIN times it is 20 ulp, what torch's fastest vectorised one is allowed
WHOLE_MARGIN = 6.0  # of a sum of thousands of errors, which is normal: it passes this once in a thousand million times
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


def gamma(terms, unit):
    """The relative error of a sum of so many products: terms u at most, sqrt(terms) u where roundings do not conspire."""
    return min(terms, MARGIN * math.sqrt(terms)) * unit


def closed_form(q, k, v, m, visible, scale, stored, wide=torch.float32):
    """A bound of attention's output that costs one product more than the output, and draws nothing.

    Rounding moves the logit of key j by at most d_j: its two factors are rounded to stored, the sum of its D products to
    wide, and the exponential is as good as a logit that is off by some roundings more. So P_j becomes
    P_j e^x_j / sum_i P_i e^x_i with |x_j| <= d_j, which moves the output by no more than
    sum_j P_j (e^d_j - 1) |v_j - o| / sum_j P_j e^-d_j. The sum over the values and the rounding of P come on top.

    Args:
        q, k, v: (B, H, N, D), (B, K, S, D), (B, K, S, V).
        m: multipliers, broadcast to (B, H, N).
        visible: bool, broadcast to (B, H, N, S), or True.
        scale: of the scores.
        stored: the dtype of q, k, v and the output.
        wide: in which sums are kept.
    """
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.double() for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
    factor, one, u = scale * torch.as_tensor(m).double().expand(q.shape[:3])[..., None], unit(stored), unit(wide)
    visible = torch.as_tensor(visible)
    logits = (factor * (q @ k.mT)).masked_fill(~visible, -math.inf)
    p = logits.softmax(-1).nan_to_num(0.0)
    off = factor.abs() * (q.abs() @ k.mT.abs())
    narrow = one if stored != wide else 0.0
    # Log, s, b, scale and the product are rounded; the maximum that is subtracted is rounded with its own logit.
    off = off * (narrow + gamma(q.shape[-1], u) + 6 * u)
    off = off + 3 * u * (logits - logits.amax(-1, keepdim=True)).abs() + MARGIN * EXP * u
    off = off.masked_fill(~visible, 0.0).clamp(max=300.0)  # beyond, the bound is no bound, and still a number
    output = p @ v
    distance = (v[:, :, None] - output[..., None, :]).abs()
    moved = ((p * off.expm1())[..., None] * distance).sum(-2) / (p * (-off).exp()).sum(-1, keepdim=True).clamp(
        min=1e-300
    )
    summed = (2 * gamma(k.shape[2], u) + narrow) * (p @ v.abs())
    return moved + summed + 2 * one * output.abs() + torch.finfo(stored).smallest_normal


# What these return was an argument's already, or is not rounded.
EXACT = [
    "arange",
    "clone",
    "cat",
    "stack",
    "index",
    "index_select",
    "gather",
    "embedding",
    "where",
    "masked_fill",
    "copy",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "zeros",
    "zeros_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "scalar_tensor",
    "neg",
    "abs",
    "repeat",
    "constant_pad_nd",
    "max",
    "min",
    "amax",
    "amin",
    "maximum",
    "minimum",
    "clamp",
    "topk",
    "sort",
    "relu",
    "triu",
    "tril",
    "roll",
    "histc",
    "slice_backward",
    "select_backward",
    "slice_scatter",
    "index_put",
    "scatter",
    "empty",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "empty_strided",
    "lift_fresh",
    "floor",
    "ceil",
    "round",
    "sign",
    "argmax",
    "repeat_interleave",
    "index_copy",
    "where",
    "detach",
    "flip",
]
SUMS = [
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "mv",
    "dot",
    "convolution",
    "_grouped_mm",
    "sum",
    "mean",
    "cumsum",
    "index_add",
    "scatter_add",
    "scatter_reduce",
]

BASIC = [
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "sqrt",
    "reciprocal",
    "_to_copy",
]  # rounded correctly; others as an exponential


class Rounded(TorchDispatchMode):
    """Every operation of torch returns its result with an error as large as a rounding can be, drawn anew."""

    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        result = func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        if not given or name in EXACT or any(x.alias_info is not None for x in func._schema.returns):
            return result
        if name == "_to_copy" and result.dtype.itemsize >= given[0].dtype.itemsize:
            return result
        sizes, terms = result, 1 if name in BASIC else EXP**2
        if name in SUMS:
            sizes = func(*tree_map(_magnitude, args), **tree_map(_magnitude, kwargs))
            terms = max(x.shape[-1] if x.ndim else 1 for x in given) + 2
            if len(given) == 1:
                terms = given[0].numel() / max(1, result.numel()) + 2
        return tree_map(lambda x, size: self.moved(x, size, terms), result, sizes)

    def moved(self, x, size, terms):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        # A rounding is off by anything up to the unit, evenly. The finite minus infinity of masks and the infinite ones stay.
        deviation = math.sqrt(terms / 3) * unit(x.dtype) * size.abs().double()
        noise = torch.randn(x.shape, dtype=torch.float64, generator=self.generator).mul_(deviation)
        return torch.where(x.abs() < 1e30, noise.add_(x).to(x.dtype), x)


def _magnitude(x):
    return x.abs() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def of(run, draws=DRAWS):
    """The bound of each number that run() returns, for whatever it computes: a model's logits, a loss, gradients.

    It runs draws times, and each of its operations is off by an error of its own, as large as rounding can make it; attention
    is written out. All numbers of a row (the last dimension) have the same bound. Where both sides of a comparison were
    rounded, each has one.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    with sdpa_kernel(SDPBackend.MATH), torch.random.fork_rng(devices=[]):
        for _ in range(draws):
            with Rounded(generator):
                found.append(torch.as_tensor(run()).detach().double())
    variance = torch.stack(found).var(0)
    return WHOLE_MARGIN * (variance.mean(-1, keepdim=True) if variance.ndim else variance).sqrt()
