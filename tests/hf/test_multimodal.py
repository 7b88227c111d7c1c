"""Models that see pictures: their language model is converted, vision and cross attention stay as they are."""

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText
from written_out import spread_scales

import ssmax

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
SMALL_TEXT = {name: TEXT[name] for name in TEXT if name not in ("head_dim", "num_hidden_layers")}
TOKENS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(3))

# Class, what its config needs, and the layers that attend in full.
MODELS = {
    "Llava": (
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
            "vision_feature_select_strategy": "full",
        },
        [0, 1],
    ),
    "Gemma3": (
        {
            "text_config": TEXT | {"num_hidden_layers": 6},
            "vision_config": {"model_type": "siglip_vision_model", **VISION},
            "mm_tokens_per_image": 1,
        },
        [5],
    ),
    "Qwen2VL": (
        {
            "text_config": TEXT
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
            "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8},
        },
        [0, 1],
    ),
    "Mllama": (
        {
            "text_config": SMALL_TEXT | {"num_hidden_layers": 4, "cross_attention_layers": [1]},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 40,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 4,
                "image_size": 16,
                "patch_size": 8,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [0],
            },
        },
        [0, 2, 3],
    ),
    "PaliGemma": (
        {
            "text_config": {"model_type": "gemma", **TEXT},
            "vision_config": {"model_type": "siglip_vision_model", **VISION},
            "projection_dim": 32,
        },
        [0, 1],
    ),
    "Idefics3": (
        {"text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION, "scale_factor": 2},
        [0, 1],
    ),
}


def build(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name][0], image_token_id=98)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_the_language_model_alone_is_converted_and_comes_back(name, tmp_path):
    with torch.no_grad():
        softmax = build(name)(input_ids=TOKENS).logits
        model = ssmax.convert(build(name), "identity")
        assert torch.equal(model(input_ids=TOKENS).logits, softmax)
        spread_scales(model)
        want = model(input_ids=TOKENS).logits
        assert (want - softmax).abs().max() > 1e-3
        homes = {path.removesuffix(".ssmax") for path, _ in model.named_modules() if path.endswith(".ssmax")}
        assert len(homes) == len(MODELS[name][1])
        assert model.config.ssmax["layers"] == MODELS[name][1]
        assert not [home for home in homes if "vision" in home or "cross" in home]
        model.save_pretrained(tmp_path)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(input_ids=TOKENS).logits, want)
        assert torch.equal(ssmax.revert(loaded)(input_ids=TOKENS).logits, softmax)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_prompt_that_sees_itself_whole_counts_all_of_it(implementation):
    model = ssmax.convert(build("PaliGemma"))
    model.set_attn_implementation(implementation)
    seen = []
    layer = next(module for name, module in model.named_modules() if name.endswith(".ssmax"))
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    kinds = torch.tensor([[0] * 5 + [1] * 7]).expand(2, -1)  # a prefix of five, then causal
    with torch.no_grad():
        model.train()  # in training token types tell the prefix from the answer
        model(input_ids=TOKENS, token_type_ids=kinds, attention_mask=torch.ones_like(TOKENS), labels=TOKENS)
    assert seen[0].expand(2, 12).tolist() == [[5] * 5 + [*range(6, 13)]] * 2


@pytest.mark.filterwarnings("ignore")
def test_a_vision_tower_is_watched_when_it_sees_a_picture():
    plain = build("Llava")
    towers = [f"vision_tower.encoder.layers.{i}.self_attn" for i in range(2)]
    model = ssmax.convert(build("Llava"), 0.5, layers=[*towers, "language_model.layers.1.self_attn"])
    shown = {"input_ids": TOKENS.clone(), "pixel_values": torch.randn(2, 3, 16, 16)}
    shown["input_ids"][:, 2:7] = 98
    want = model(**shown).logits
    for name in (towers[0], "vision_tower.encoder.layers.1", "language_model.layers.1"):
        part = model.model.get_submodule(name)
        part.forward = plain.model.get_submodule(name).forward
        with pytest.raises(ValueError, match="did not use its scale"):
            model(**shown)
        if "vision" in name:
            assert model(input_ids=TOKENS).logits.isfinite().all()  # no picture: the tower does not run
        del part.forward
    assert torch.equal(model(**shown).logits, want)
