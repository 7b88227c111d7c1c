"""Encoders, encoder-decoders and plain modules convert; what reads texts takes none of them, and says so in one line."""

import pytest
import torch
from attention_modules import GPT
from tiny_models import tiny_config
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPTNeoXConfig,
    LlamaModel,
)

import ssmax
from ssmax.errors import Damaged
from ssmax.evaluation import attention_sharpness, loss_by_position, needle_scores
from ssmax.hf.loading import check_causal

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.randint(3, 30, (2, 64), generator=torch.Generator().manual_seed(0))
SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
ONLY = "; only causal language models of transformers can be measured and calibrated"
MODELS = {
    "BertForMaskedLM": (lambda: BertForMaskedLM(BertConfig(vocab_size=99, **SHAPE)), "is not causal"),
    "BertForSequenceClassification": (
        lambda: BertForSequenceClassification(BertConfig(vocab_size=99, **SHAPE)),
        f"does not return logits for each token{ONLY}",
    ),
    "LlamaModel": (lambda: LlamaModel(tiny_config("llama")), f"does not return logits for each token{ONLY}"),
    "BartModel": (
        lambda: AutoModel.from_config(AutoConfig.for_model("bart", vocab_size=99, **BART)),
        f"is an encoder-decoder model{ONLY}",
    ),
    "ViTModel": (
        lambda: AutoModel.from_config(AutoConfig.for_model("vit", image_size=16, patch_size=8, **SHAPE)),
        f"reads pixel_values, not tokens{ONLY}",
    ),
    "GPT": (GPT, f"is not a model of transformers{ONLY}"),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(32, 4), f"is not a model of transformers{ONLY}"),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_no_causal_language_model_is_refused_in_one_line(name):
    build, words = MODELS[name]
    model = ssmax.convert(build(), 0.5, **({"example": (TOKENS,)} if name == "GPT" else {}))
    scales = {key: value.clone() for key, value in model.state_dict().items()}
    for measure in (
        lambda: ssmax.calibrate(model, TOKENS, held_out=TOKENS, length=32, steps=1),
        lambda: loss_by_position(model, TOKENS),
        lambda: needle_scores(model, TOKENS[0], (3, 5)),
        lambda: attention_sharpness(model, TOKENS[0], [32]),
    ):
        with pytest.raises(ValueError, match=words) as said:
            measure()
        assert "\n" not in str(said.value)
    if name != "LlamaModel":
        with pytest.raises(ValueError, match=r"outside of a decoder-only|not a converted model of transformers"):
            ssmax.fold(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in scales.items())


def test_the_command_line_takes_no_encoder():
    with pytest.raises(Damaged, match="of model type 'bert', an encoder; this takes causal language models alone"):
        check_causal("folder", BertConfig(architectures=["BertForMaskedLM"]))
    check_causal("folder", BertConfig(architectures=["BertLMHeadModel"]))
    check_causal("folder", GPTNeoXConfig())  # is_decoder is False there too
