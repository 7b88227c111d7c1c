"""Models of other packages, each against the naive formula in float64: make test-modules installs them."""

import copy
import importlib

import pytest
import torch
from attention_modules import Naive, randomise
from module_checks import OPEN, causal, close, differs

import ssmax

pytestmark = pytest.mark.filterwarnings("ignore")


def converted(plain, example, **options):
    model = ssmax.convert(copy.deepcopy(plain), 0.5, bias=True, example=example, **options)
    return model, randomise(model)


def made(build):
    torch.manual_seed(0)
    model = build().double().eval()
    for parameter in model.parameters():  # some start at zero, and would hide the attention
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def equals_the_formula(model, plain, scales, visible, *inputs, **options):
    got = model(*inputs, **options)
    with Naive(*((s, b, visible) for s, b in scales)):
        want = plain(*inputs, **options)
    got, want = (getattr(x, "sample", x) for x in (got, want))
    close(got, want, 1e-9 * want.abs().max().item())
    plain = plain(*inputs, **options)
    differs(got, getattr(plain, "sample", plain))
    return got


def imported_timm():
    """Import timm also where torchvision, which it imports, was built for another torch than the one installed."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError:  # its operators did not load; no model here calls them
        for operator in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{operator}", "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor"
            )
    return pytest.importorskip("timm")


def test_timm_at_two_resolutions():
    timm = imported_timm()
    build = lambda: timm.create_model(  # noqa: E731
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5, dynamic_img_size=True
    )
    plain = made(build)
    model, scales = converted(plain, (torch.rand(1, 3, 32, 32).double(),))
    assert len(scales) == 2
    for size in (32, 64):
        equals_the_formula(model, plain, scales, OPEN, torch.rand(2, 3, size, size).double())
    for block in plain.blocks:
        block.attn.fused_attn = False
    with pytest.raises(ValueError, match="nothing to convert"):
        ssmax.convert(plain, 0.5, example=(torch.rand(1, 3, 32, 32).double(),))
    model.blocks[1].attn.fused_attn = False
    with pytest.raises(ValueError, match="did not call"):
        model(torch.rand(1, 3, 32, 32).double())


def test_x_transformers_causal_and_encoder():
    package = pytest.importorskip("x_transformers")
    tokens = torch.randint(31, (2, 9))
    for kind, visible in ((package.Decoder, causal(9, 9)), (package.Encoder, OPEN)):
        layers = lambda kind=kind, flash=True: kind(dim=32, depth=2, heads=4, attn_dim_head=8, attn_flash=flash)  # noqa: E731
        build = lambda layers=layers: package.TransformerWrapper(num_tokens=31, max_seq_len=16, attn_layers=layers())  # noqa: E731
        plain = made(build)
        model, scales = converted(plain, (tokens,))
        assert len(scales) == 2
        equals_the_formula(model, plain, scales, visible, tokens)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = False
    got = equals_the_formula(model, plain, scales, mask[:, None, None], tokens, mask=mask)
    close(got[:1, :6], model(tokens[:1, :6]), 1e-9 * got.abs().max().item())
    by_hand = package.TransformerWrapper(num_tokens=31, max_seq_len=16, attn_layers=layers(flash=False))
    with pytest.raises(ValueError, match="nothing to convert"):
        ssmax.convert(by_hand, 0.5, example=(tokens,))


def test_diffusers_self_and_cross():
    package = pytest.importorskip("diffusers")
    build = lambda: package.PixArtTransformer2DModel(  # noqa: E731
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        cross_attention_dim=16, caption_channels=6, patch_size=2,
    )  # fmt: skip
    plain = made(build)
    latents, text, step = torch.randn(1, 4, 8, 8).double(), torch.randn(1, 16, 6).double(), torch.tensor([3])
    inputs = {
        "hidden_states": latents,
        "encoder_hidden_states": text,  # as many as there are patches
        "timestep": step,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    model, scales = converted(plain, inputs, cross=True)
    assert len(scales) == 4
    equals_the_formula(model, plain, scales, OPEN, **inputs)
    model, _ = converted(plain, inputs)
    names = [name for name, module in model.named_modules() if name.endswith("ssmax")]
    assert names == ["transformer_blocks.0.attn1.ssmax", "transformer_blocks.1.attn1.ssmax"]


def test_litgpt_whole_and_cached():
    pytest.importorskip("litgpt")
    from litgpt import GPT, Config

    shape = {"n_layer": 2, "n_head": 4, "n_query_groups": 2, "n_embd": 32, "block_size": 16, "vocab_size": 31}
    plain = made(lambda: GPT(Config.from_name("pythia-14m", padded_vocab_size=32, head_size=8, **shape)))
    tokens = torch.randint(31, (2, 9))
    model, scales = converted(plain, (tokens,))
    assert len(scales) == 2
    want = equals_the_formula(model, plain, scales, causal(9, 9), tokens)
    model.set_kv_cache(batch_size=2, device=torch.device("cpu"), dtype=torch.float64)
    parts = [model(tokens[:, :6], torch.arange(6))]
    parts += [model(tokens[:, i : i + 1], torch.tensor([i])) for i in range(6, 9)]
    close(torch.cat(parts, 1), want, 1e-9 * want.abs().max().item())
