"""Any causal model is read exactly: in pieces where it goes on from a cache, whole where it does not, or refused."""

import warnings

import pytest
import torch
from tiny_models import tiny_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSeq2SeqLM, LlavaConfig, LlavaForConditionalGeneration, T5Config

import ssmax
from ssmax.evaluation import attention_sharpness, loss_by_position, needle_scores, retrieve_grid
from ssmax.evaluation.prefix import prefill, prefix_tree
from ssmax.evaluation.reading import PIECES, Reader
from ssmax.evaluation.tasks import NeedleExample

DECODER = {
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 40,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
}
MAMBA2 = {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8, "chunk_size": 8}
JAMBA = {"num_hidden_layers": 2, "attn_layer_offset": 1, "attn_layer_period": 2}
# Family, what its config needs, and whether a text may come in pieces.
FAMILIES = {
    "bart": (DECODER, True),
    "bert": ({"is_decoder": True}, True),
    "bigbird_pegasus": (DECODER, True),
    "bloom": ({}, True),
    "codegen": ({"rotary_dim": 8}, True),
    "cohere": ({"logit_scale": 0.5}, True),
    "ctrl": ({}, True),
    "falcon": ({}, True),
    "falcon_mamba": ({}, False),
    "gemma2": ({}, True),
    "gpt2": ({}, True),
    "jamba": (JAMBA, False),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, True),
    "mamba": ({}, False),
    "mamba2": (MAMBA2, True),
    "marian": (DECODER, True),
    "openai-gpt": ({}, False),
    "opt": ({"word_embed_proj_dim": 16}, True),
    "pegasus": (DECODER, True),
    "rwkv": ({}, False),
    "trocr": (DECODER, True),
    "xglm": ({"attention_heads": 4}, True),
}


def tokens(count, seed=0, rows=1):
    return torch.randint(3, 90, (rows, count), generator=torch.Generator().manual_seed(seed))


def family(name):
    return tiny_model(name, **FAMILIES[name][0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_losses_are_those_of_a_plain_forward(name, record):
    model, ids = family(name), tokens(60, rows=2)
    with torch.no_grad():
        want = cross_entropy(model(input_ids=ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    assert want.std() > 0.1
    for chunk in (1024, 16, 1):
        torch.testing.assert_close(loss_by_position(model, ids, chunk=chunk), want, rtol=0, atol=2e-5)
    assert Reader(model, ids, 16).pieces == FAMILIES[name][1]
    record("a family read in pieces, against a plain forward", 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_of_a_plain_forward(name):
    """Right where the model's own next choices, in one forward of prompt and answer, are the answer."""
    model, contexts = family(name), tokens(40, 1, rows=3)
    grid, wanted = {}, {}
    for cell, at in enumerate((10, 20, 39)):
        prompt = torch.cat([contexts[0, :at], contexts[1, at:]])
        with torch.no_grad():
            said = prompt.tolist()
            for _ in range(3):
                said.append(model(input_ids=torch.tensor([said])).logits[0, -1].argmax().item())
        answer = said[40:] if cell != 1 else [*said[40:42], (said[42] + 1) % 90]
        grid[cell], wanted[cell] = NeedleExample(prompt.tolist(), answer, (5, 9)), cell != 1
    found = retrieve_grid(model, [grid], chunk=16)[0]
    assert {cell: trial.correct for cell, trial in found.items()} == wanted
    assert all(trial.first_digit for trial in found.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("rwkv", "mamba", "mamba2", "falcon_mamba")])
def test_every_layer_with_attention_has_its_scores(name):
    model, ids = family(name), tokens(50)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = needle_scores(model, ids, (10, 17), chunk=16)
        sharp = attention_sharpness(model, ids, [20, 50], chunk=16)
    model.config._attn_implementation = "eager"
    eager = type(model)(model.config).eval()  # some families choose when they are built
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        attentions = eager(input_ids=ids, output_attentions=True).attentions
    want = torch.stack([layer[0, :, -1] for layer in attentions])
    torch.testing.assert_close(got, want[:, :, 10:17].sum(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(sharp[1].largest, want.amax(-1), rtol=0, atol=1e-5)
    missing = [str(x.message) for x in said if "no attention weights" in str(x.message)]
    if name in ("jamba", "lfm2"):
        assert all("attention is that of layers 1; layers 0 have no attention weights" in words for words in missing)
        assert len(missing) == 2
    else:
        assert not missing
        assert len(got) == 2


@pytest.mark.filterwarnings("ignore")
def test_rows_carry_the_index_of_their_layer():
    model, ids = family("jamba"), tokens(30)
    trial = retrieve_grid(model, [{0: NeedleExample(ids[0].tolist(), [5, 6], (3, 9))}])[0][0]
    assert list(trial.by_layer) == [1]


@pytest.mark.filterwarnings("ignore")
def test_heads_that_differ_by_layer_are_refused_with_their_numbers_and_kept_apart_in_rows():
    model, ids = tiny_model("laguna", num_attention_heads_per_layer=[4, 2]), tokens(40)
    for call in (lambda: needle_scores(model, ids, (3, 9)), lambda: attention_sharpness(model, ids, [9, 40])):
        with pytest.raises(ValueError, match=r"heads differ by layer.*layer 0: 4, layer 1: 2"):
            call()
    trial = retrieve_grid(model, [{0: NeedleExample(ids[0].tolist(), [5, 6], (3, 9))}])[0][0]
    assert {layer: len(scores) for layer, scores in trial.by_layer.items()} == {0: 4, 1: 2}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("bert", {}, "not causal.*is_decoder"),
        ("xlnet", {}, "not causal"),
        ("rwkv", {}, "no attention weights"),
        ("mamba", {}, "no attention weights"),
        ("diffllama", {}, "attention cannot be measured"),
    ],
)
def test_what_cannot_be_measured_is_refused(name, changes, words):
    model, ids = tiny_model(name, **changes), tokens(40)
    with pytest.raises(ValueError, match=words):
        needle_scores(model, ids, (3, 9))
    if "causal" in words:
        with pytest.raises(ValueError, match=words):
            loss_by_position(model, ids)


def test_an_encoder_decoder_is_refused():
    config = T5Config(vocab_size=99, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder"):
        loss_by_position(AutoModelForSeq2SeqLM.from_config(config), tokens(20))


@pytest.mark.filterwarnings("ignore")
def test_a_cache_that_is_swallowed_is_noticed_whatever_its_name(record):
    """Transformers' own forward, around a backbone that takes a cache and drops it."""
    model, ids = tiny_model("llama"), tokens(60)
    backbone = model.model.forward

    def forward(input_ids=None, past_key_values=None, **kwargs):
        return backbone(input_ids=input_ids, **{**kwargs, "use_cache": False})

    model.model.forward = forward
    with torch.no_grad():
        want = cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    assert not Reader(model.eval(), ids, 16).pieces
    torch.testing.assert_close(loss_by_position(model, ids, chunk=16), want, rtol=0, atol=1e-5)
    assert model.model.forward is forward
    record("a cache that a model swallows", 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "lfm2", "mamba"])
def test_rounding_in_half_precision_is_no_lost_memory(name):
    changes = {"layer_types": ["conv", "full_attention"]} if name == "lfm2" else {}
    reader = Reader(tiny_model(name, num_hidden_layers=2, **changes).bfloat16(), tokens(60), 64)
    assert reader.pieces == (name != "mamba")
    assert reader.backbone is not None


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_shares_nothing_yields_its_prompts():
    model, base = family("mamba"), tokens(30)
    prompts = [base, torch.cat([base[:, :20], tokens(5, 2)], 1)]
    held = dict(prefill(Reader(model, prompts[0], 8), prompts, prefix_tree(prompts)))
    assert all(torch.equal(held[i], prompts[i]) for i in range(2))


@pytest.mark.filterwarnings("ignore")
def test_a_multimodal_wrapper_is_read_by_its_language_model():
    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "vocab_size": 99, "initializer_range": 0.2}
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_id=98)).eval()
    ids = tokens(60)
    with torch.no_grad():
        want = cross_entropy(model(input_ids=ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(loss_by_position(model, ids, chunk=16), want, rtol=0, atol=1e-5)
    assert Reader(model, ids, 16).pieces
    assert needle_scores(model, ids, (3, 9)).shape == (2, 4)


def test_answers_of_a_model_of_nan_are_no_zero_percent():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    example = NeedleExample(tokens(30)[0].tolist(), [5, 6], (3, 9))
    with pytest.raises(FloatingPointError, match="not numbers"):
        retrieve_grid(model, [{0: example}])
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[:] = float("nan")
    with pytest.raises(FloatingPointError, match="layer 1"):
        needle_scores(model, tokens(30), (3, 9))


@pytest.mark.filterwarnings("ignore")
def test_opt_is_calibrated():
    model, texts = family("opt"), tokens(32, rows=4)
    found = ssmax.calibrate(model, texts, length=32, steps=1, inits=("identity",))
    assert found.pieces == 1


def test_a_sample_holds_pieces_of_every_kind():
    assert {1, 2} < set(PIECES)
    assert max(PIECES) > 4
