"""nn.MultiheadAttention and torch's Transformers, converted without an example: every mask, layout and way through."""

import copy
import pickle
import warnings

import pytest
import torch
from attention_modules import Naive, randomise
from module_checks import OPEN, causal, close, converted, differs, inputs, made, trains_alike
from torch import nn

import ssmax

WIDTH, HEADS, BATCH, ROWS, KEYS = 16, 4, 3, 5, 7


def padding(keys, batch=BATCH):
    """True = hidden: each row's last keys, none of the first row's."""
    return torch.arange(keys) >= keys - torch.arange(batch)[:, None]


def hiding(*shape):
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(4)) > 0.6
    mask[..., 0] = False
    return mask


def additive(mask):
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -torch.inf)


MASKS = {
    "none": ({}, OPEN),
    "padding": ({"key_padding_mask": padding(KEYS)}, ~padding(KEYS)[:, None, None]),
    "2-D": ({"attn_mask": hiding(ROWS, KEYS)}, ~hiding(ROWS, KEYS)),
    "3-D": (
        {"attn_mask": hiding(BATCH * HEADS, ROWS, KEYS)},
        ~hiding(BATCH * HEADS, ROWS, KEYS).view(BATCH, HEADS, ROWS, KEYS),
    ),
    "both": (
        {"attn_mask": hiding(ROWS, KEYS), "key_padding_mask": padding(KEYS)},
        ~(hiding(ROWS, KEYS) | padding(KEYS)[:, None, None]),
    ),
    "causal": ({"attn_mask": ~causal(ROWS, KEYS), "is_causal": True}, causal(ROWS, KEYS)),
    "causal and padding": (
        {"attn_mask": ~causal(ROWS, KEYS), "is_causal": True, "key_padding_mask": padding(KEYS)},
        causal(ROWS, KEYS) & ~padding(KEYS)[:, None, None],
    ),
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 10}, {"bias": False}])
def test_every_mask_equals_the_formula(masks, options):
    plain = made(lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options))
    model = ssmax.convert(copy.deepcopy(plain), 0.5, bias=True, cross=True)
    ((s, b),) = randomise(model)
    given, visible = MASKS[masks]
    q, k, v = (
        inputs(BATCH, ROWS, WIDTH),
        inputs(BATCH, KEYS, plain.kdim, seed=2),
        inputs(BATCH, KEYS, plain.vdim, seed=3),
    )
    for needed in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        for floating in (False, True):
            masked = {name: additive(x) if floating and torch.is_tensor(x) else x for name, x in given.items()}
            with Naive((s, b, visible)):
                want, shown = plain(q, k, v, **masked, **needed)
            got, weights = model(q, k, v, **masked, **needed)
            close(got, want)
            differs(got, plain(q, k, v, **masked)[0])
            assert (weights is None) == (shown is None)
            if weights is not None:
                close(weights, shown)
    trains_alike(model, got, plain, want)


@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_in_every_layout(batch_first):
    plain = made(lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first))
    model = ssmax.convert(copy.deepcopy(plain), 0.5, bias=True)
    ((s, b),) = randomise(model)
    for x, masks, visible in (
        (inputs(BATCH, ROWS, WIDTH), {"key_padding_mask": padding(ROWS)}, ~padding(ROWS)[:, None, None]),
        (inputs(ROWS, WIDTH), {"key_padding_mask": padding(ROWS)[1]}, ~padding(ROWS)[1]),
        (inputs(ROWS, WIDTH), {"attn_mask": hiding(HEADS, ROWS, ROWS)}, ~hiding(HEADS, ROWS, ROWS)[None]),
    ):
        x = x.transpose(0, 1) if x.ndim == 3 and not batch_first else x
        with Naive((s, b, visible)):
            want = plain(x, x, x, **masks)
        for mine, truth in zip(model(x, x, x, **masks), want, strict=True):
            close(mine, truth)
        with torch.no_grad():  # where torch's own kernel would read the weights and never call forward
            close(model(x, x, x, **masks)[0], want[0])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference_mode"])
def test_an_encoder_in_every_mode(norm_first, mode):
    build = lambda: nn.TransformerEncoder(  # noqa: E731
        nn.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=0.0, batch_first=True, norm_first=norm_first), 2
    )
    plain, x = made(build), inputs(BATCH, ROWS, WIDTH)
    model = ssmax.convert(copy.deepcopy(plain), 0.5, bias=True)
    scales = randomise(model)
    hidden = padding(ROWS)
    plain.train()
    model.train(mode == "train")
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)
    square = ~causal(ROWS, ROWS)
    for masks, visible in (
        ({}, OPEN),
        ({"src_key_padding_mask": hidden}, ~hidden[:, None, None]),
        ({"mask": square}, causal(ROWS, ROWS)),
        ({"mask": square, "is_causal": True}, causal(ROWS, ROWS)),
        ({"mask": square, "src_key_padding_mask": hidden}, causal(ROWS, ROWS) & ~hidden[:, None, None]),
    ):
        with Naive(*((s, b, visible) for s, b in scales)):
            want = plain(x, **masks)
        with context():
            got = model(x, **masks)
        close(got, want)
        differs(got, plain(x, **masks))
    if mode == "eval":
        alone = model(x[2:, :-2])
        close(model(x, src_key_padding_mask=hidden)[2:, :-2], alone)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
@pytest.mark.parametrize("cross", [False, True])
def test_a_transformer_with_cross_attention(cross):
    plain = made(lambda: nn.Transformer(WIDTH, HEADS, 1, 2, 24, dropout=0.0, batch_first=True))
    model = ssmax.convert(copy.deepcopy(plain), 0.5, bias=True, cross=cross)
    scales, rest = randomise(model), iter(randomise(model))
    source, target, hidden = inputs(BATCH, KEYS, WIDTH), inputs(BATCH, ROWS, WIDTH, seed=2), padding(KEYS)
    memory = ~hidden[:, None, None]
    layers = [(*next(rest), memory)]
    for _ in range(2):
        layers += [(*next(rest), causal(ROWS, ROWS)), (*next(rest), memory) if cross else None]
    masks = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(ROWS, dtype=torch.float64),
        "src_key_padding_mask": hidden,
        "memory_key_padding_mask": hidden,
    }
    plain.train()
    with Naive(*layers), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = plain(source, target, **masks)
    with torch.no_grad():
        got = model(source, target, **masks)
    close(got, want)
    assert len(scales) == (5 if cross else 3)


def test_dropout_stays_in_training():
    model = ssmax.convert(nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5).double(), 0.5)
    x = inputs(ROWS, BATCH, WIDTH)
    for needed in (True, False):
        torch.manual_seed(0)
        first, _ = model.train()(x, x, x, need_weights=needed)
        second, _ = model(x, x, x, need_weights=needed)
        differs(first, second)
        close(model.eval()(x, x, x, need_weights=needed)[0], model(x, x, x)[0])


class Renamed(nn.MultiheadAttention):
    pass


class Widened(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class ByHand(nn.MultiheadAttention):
    def forward(self, x):
        q, k, v = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        return (q @ k.mT).softmax(-1) @ v


def test_subclasses():
    x = inputs(BATCH, ROWS, WIDTH)
    plain = made(lambda: Renamed(WIDTH, HEADS, batch_first=True))
    model = ssmax.convert(copy.deepcopy(plain), 0.5)
    assert isinstance(model, Renamed)
    differs(model(x, x, x)[0], plain(x, x, x)[0])
    for kind in (Widened, ByHand):
        with pytest.raises(ValueError, match=r"own forward.*pass example"):
            ssmax.convert(kind(WIDTH, HEADS), 0.5)
    with pytest.raises(ValueError, match="nothing to convert"):
        ssmax.convert(ByHand(WIDTH, HEADS).double(), 0.5, example=(x,))
    plain = made(lambda: Widened(WIDTH, HEADS, batch_first=True))
    model, ((s, b),) = converted(plain, (x,))
    with Naive((s, b, OPEN)):
        want = plain(x)
    close(model(x), want)
    with torch.no_grad():
        close(model(x), want)
    assert torch.equal(ssmax.revert(pickle.loads(pickle.dumps(model)))(x), plain(x))


class Reader(nn.Module):
    """Reads the weights of a module that it never calls."""

    def __init__(self):
        super().__init__()
        self.attn, self.other = nn.MultiheadAttention(WIDTH, HEADS), nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, x):
        return self.other(x, x, x)[0] @ self.attn.in_proj_weight[:WIDTH].T


class Direct(nn.Module):
    """Calls torch's function itself."""

    def __init__(self):
        super().__init__()
        self.proj, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        weights = (self.proj.weight, self.proj.bias, None, None, False, 0.0, self.out.weight, self.out.bias)
        return nn.functional.multi_head_attention_forward(x, x, x, WIDTH, HEADS, *weights)[0]


def test_weights_that_other_code_reads():
    x = inputs(ROWS, BATCH, WIDTH)
    model = made(Reader)
    with pytest.raises(ValueError, match=r"attn \(MultiheadAttention\) did not run in the example"):
        ssmax.convert(model, 0.5, example=(x,))
    assert type(model.other) is nn.MultiheadAttention
    assert ssmax.convert(model, 0.5, example=(x,), layers=["other"]).other.ssmax
    plain = made(Direct)
    model, ((s, b),) = converted(plain, (x,))
    with Naive((s, b, OPEN)):
        want = plain(x)
    close(model(x), want)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True), "add_bias_kv=True adds a key"),
        (lambda: nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True), "add_zero_attn=True adds a key"),
        (lambda: nn.MultiheadAttention(WIDTH, HEADS, kdim=3), "is cross attention"),
    ],
)
def test_what_is_refused_at_convert(build, words):
    model = build()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=words):
        ssmax.convert(model, 0.5)
    assert type(model) is nn.MultiheadAttention
    assert list(model.state_dict()) == names


def test_what_is_refused_in_a_forward():
    model, x = ssmax.convert(nn.MultiheadAttention(WIDTH, HEADS).double(), 0.5), inputs(ROWS, BATCH, WIDTH)
    for masks, words in (
        ({"attn_mask": inputs(ROWS, ROWS)}, "an additive mask holds 0"),
        ({"key_padding_mask": inputs(BATCH, ROWS)}, "an additive mask holds 0"),
        ({"attn_mask": hiding(1, ROWS)}, "attn_mask must have the shape"),
        ({"key_padding_mask": hiding(1, ROWS)}, "key_padding_mask must have the shape"),
        ({"is_causal": True}, "pass attn_mask as well"),
    ):
        with pytest.raises(ValueError, match=words):
            model(x, x, x, **masks)


@pytest.mark.filterwarnings("ignore")
def test_nested_tensors_are_refused_not_softmax():
    layer = ssmax.convert(nn.TransformerEncoderLayer(WIDTH, HEADS, batch_first=True).eval(), 0.5)
    nested = torch.nested.nested_tensor([torch.randn(3, WIDTH), torch.randn(5, WIDTH)])
    with torch.no_grad(), pytest.raises(ValueError, match="nor nested tensors"):
        layer(nested)


def encoder():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def test_revert_is_bit_for_bit_and_identity_exact():
    plain, x, hidden = made(encoder), inputs(BATCH, ROWS, WIDTH), padding(ROWS)
    attributes = {name: dict(vars(m)) for name, m in plain.named_modules()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested tensors
        want = plain(x, src_key_padding_mask=hidden)
        with ssmax.converted(plain, "identity"):
            got = plain(x, src_key_padding_mask=hidden)
        real = ~hidden
        close(got[real], want[real])
        assert torch.equal(plain(x, src_key_padding_mask=hidden), want)
    assert {name: dict(vars(m)) for name, m in plain.named_modules()} == attributes
    assert plain.use_nested_tensor
    assert [type(m) for m in plain.modules()] == [type(m) for m in encoder().modules()]


def test_copies_pickles_and_stacks_of_converted_layers():
    plain, x = made(encoder), inputs(BATCH, ROWS, WIDTH)
    model = ssmax.convert(copy.deepcopy(plain), 0.5)
    randomise(model)
    want = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), want)
        with torch.no_grad():
            close(other(x), want)
        assert torch.equal(ssmax.revert(other)(x), plain(x))
    with pytest.warns(UserWarning, match="enable_nested_tensor"):
        stack = nn.TransformerEncoder(ssmax.convert(made(encoder).layers[0], 0.5), 2)
    with torch.no_grad():
        assert stack.eval()(x, src_key_padding_mask=padding(ROWS)).isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("grad", [True, False])
def test_an_encoder_compiles_whole_and_exports(grad):
    model = ssmax.convert(made(encoder), 0.5)
    randomise(model)
    x, hidden = inputs(BATCH, ROWS, WIDTH), padding(ROWS)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(grad):
        want = model(x, src_key_padding_mask=hidden)
        close(compiled(x, src_key_padding_mask=hidden), want)
        program = torch.export.export(model, (x,), {"src_key_padding_mask": hidden}, strict=grad)
        close(program.module()(x, src_key_padding_mask=hidden), want)


def test_ddp_trains_s_and_b(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = ssmax.convert(made(encoder), "identity")
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(inputs(BATCH, ROWS, WIDTH)).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        assert torch.equal(wrapped(inputs(BATCH, ROWS, WIDTH)), model(inputs(BATCH, ROWS, WIDTH)))
    finally:
        torch.distributed.destroy_process_group()
