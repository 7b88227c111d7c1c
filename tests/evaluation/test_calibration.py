import copy
import functools

import pytest
import torch
from tiny_models import tiny_model
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import ssmax
from ssmax.evaluation import loss_by_position
from ssmax.nn import SSMaxScale

LENGTH = 96
GENERATOR = torch.Generator().manual_seed(0)


def copies(count):
    """Texts that repeat a random half: a model that attends sharply to the token behind the last copy does well."""
    half = torch.randint(3, 99, (count, LENGTH // 2), generator=GENERATOR)
    return torch.cat([half, half], 1)


@pytest.fixture(scope="module")
def trained():
    """A tiny model whose attention was learned and then blunted to a sixth: calibration has something to mend."""
    torch.manual_seed(0)
    model = tiny_model("llama", hidden_size=64, initializer_range=0.05, max_position_embeddings=LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        tokens = copies(16)
        optimizer.zero_grad()
        cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight /= 6
    return model


@pytest.fixture
def model(trained):
    return copy.deepcopy(trained)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".ssmax." not in name}


def test_it_fits_s_and_b_alone_and_reports_what_it_did(model):
    before, texts, held = weights(model), copies(24), copies(4)
    plain = loss_by_position(model, held)
    found = ssmax.calibrate(model, texts, held_out=held, steps=30, learning_rate=0.05, inits=("identity",))
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())
    after = loss_by_position(model, held)
    assert found.chosen is not None
    assert found.mean_before == pytest.approx(plain.mean().item(), abs=1e-5)
    assert found.mean_after == pytest.approx(after.mean().item(), abs=1e-5)
    assert after.mean() < plain.mean() - 0.2
    assert found.positions == [63, LENGTH - 2]
    assert found.before == pytest.approx([plain[:, :64].mean().item(), plain[:, 64:].mean().item()], abs=1e-5)
    # The blunted heads want a multiplier above 1 again.
    scales = [m for m in model.modules() if isinstance(m, SSMaxScale)]
    at_end = torch.cat([m.s * torch.tensor(float(LENGTH)).log() + m.b for m in scales])
    assert at_end.mean() > 1.02
    assert "kept: init identity" in str(found)
    assert f"{LENGTH}" in str(found)


def test_the_best_of_several_starts_and_layer_sets_is_kept(model):
    found = ssmax.calibrate(
        model, copies(12), held_out=copies(4), steps=6, inits=("matched", "identity"), layer_sets=(None, [1])
    )
    assert len(found.trials) == 4
    assert found.chosen is not None
    assert found.chosen.loss == min(trial.loss for trial in found.trials)
    assert model.config.ssmax["layers"] == found.chosen.layers
    assert model.config.ssmax["init"] == found.chosen.init


def test_a_model_that_cannot_be_bettered_stays_as_it_was(model):
    classes, before = type(model), weights(model)
    # Fitted on noise, in wide steps, it unlearns to copy.
    noise = torch.randint(3, 99, (8, LENGTH), generator=GENERATOR)
    found = ssmax.calibrate(model, noise, held_out=copies(4), steps=3, learning_rate=0.5, inits=("identity",))
    assert found.chosen is None
    assert found.before == found.after
    assert "nothing has changed" in str(found)
    assert type(model) is classes
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_converted_model_goes_on_from_its_own_scales(model):
    ssmax.convert(model, 0.3, bias=True, layers=[0])
    found = ssmax.calibrate(model, copies(8), held_out=copies(2), steps=4)
    assert [trial.layers for trial in found.trials] == [[0]]
    assert model.config.ssmax["init"] == 0.3


def test_modes_and_frozen_weights_come_back(model):
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    ssmax.calibrate(model, copies(8), steps=2, inits=("identity",))
    assert model.training
    assert not model.model.layers[0].mlp.training
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "lm_head.weight" not in learned
    assert "model.norm.weight" in learned
    assert all(p.grad is None for p in model.parameters())


def test_checkpointing_changes_nothing_but_memory(model):
    other = copy.deepcopy(model)
    for module in other.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    texts, held = copies(8), copies(2)
    results = [
        ssmax.calibrate(m, texts, held_out=held, steps=3, inits=("identity",)).mean_after for m in (model, other)
    ]
    assert results[0] == pytest.approx(results[1], abs=1e-6)


def test_a_single_long_text_is_cut_and_its_last_quarter_held_out(model):
    found = ssmax.calibrate(model, copies(8).flatten(), length=LENGTH, steps=1, inits=("identity",))
    assert found.pieces == 2


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"texts": ["a string"]}, TypeError, "tokenizer"),
        ({"texts": [torch.arange(50)]}, ValueError, "at least two pieces of 96 tokens"),
        ({"length": 3}, ValueError, "at least 16"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"held_out": [torch.arange(50)]}, ValueError, "held_out has no document of 96 tokens"),
        ({"inits": ("paper",)}, ValueError, "init must be"),
        ({"layer_sets": ([9],)}, ValueError, "layers must be some of"),
        ({"texts": [torch.randn(500)]}, ValueError, "1-D integers"),
    ],
)
def test_bad_arguments_are_refused_and_leave_the_model_alone(model, options, kind, words):
    classes = type(model)
    with pytest.raises(kind, match=words):
        ssmax.calibrate(model, **{"texts": copies(4), "steps": 1, **options})
    assert type(model) is classes
    assert all(p.requires_grad for p in model.parameters())


def test_a_loss_that_is_not_finite_is_an_error_and_the_model_is_as_it_was(model):
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    classes = type(model)
    with pytest.raises(FloatingPointError, match="not finite"):
        ssmax.calibrate(model, copies(4), steps=1)
    assert type(model) is classes
