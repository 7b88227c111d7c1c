import numpy as np
import pytest
import rounding
import torch
from plain_bytes import SHAPE, encode
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import ssmax
from ssmax.evaluation import NeedleTask, loss_by_position, needle_scores, retrieve, rope_theta


@pytest.fixture(params=["llama", "llama-ssmax", "qwen3-ssmax"])
def model(request):
    torch.manual_seed(0)
    family, _, converted = request.param.partition("-")
    types = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    config_type, model_type = types[family]
    model = model_type(config_type(**SHAPE))
    return ssmax.convert(model, 0.4) if converted else model


@pytest.mark.parametrize("chunk", [37, 256, 5000])
def test_loss_by_position_equals_a_plain_forward(model, chunk):
    """In float64, where sums of thousands of terms are off by less than 1e-10, until logits become losses in float32.

    There each logit is rounded (twice in a difference), 300 exponentials are added, and the loss is rounded.
    """
    model.double()
    tokens = torch.randint(0, 300, (1, 2001), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
        want = cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    got = loss_by_position(model, tokens, chunk=chunk)
    assert got.shape == (1, 2000)
    assert got.dtype == torch.float32
    assert want.std() > 0.1
    unit = rounding.unit(torch.float32)
    bound = unit * (4 * logits.abs().amax(-1) + want) + rounding.gamma(logits.shape[-1], unit) + 1e-10
    assert ((got - want).abs() <= bound).all()
    assert model.training


def test_needle_scores_equal_eager_attention(model):
    tokens = torch.randint(0, 300, (50,), generator=torch.Generator().manual_seed(1))
    got = needle_scores(model, tokens, (10, 17))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(tokens[None], output_attentions=True).attentions
    want = torch.stack([a[0, :, -1, 10:17].sum(-1) for a in attentions])
    assert got.shape == (2, 4)
    assert want.max() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_needle_scores_leave_the_implementation_alone(model):
    needle_scores(model, torch.arange(9), (0, 9))
    assert model.config._attn_implementation == "sdpa"


def test_rope_theta_is_another_model_for_a_while(model):
    tokens = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    model.eval()
    with torch.no_grad():
        before = model(tokens).logits
        with rope_theta(model, 50):
            raised = model(tokens).logits
            base = model.config.rope_parameters["rope_theta"] * 50
            want = base ** -(torch.arange(0, 8, 2) / 8)
            torch.testing.assert_close(model.model.rotary_emb.inv_freq, want)
        assert torch.equal(model(tokens).logits, before)
    assert (raised - before).abs().max() > 0.01


def task(digits=7):
    return NeedleTask(encode, np.array(encode("the quick brown fox ") * 50, dtype=np.int32), digits)


@pytest.mark.parametrize(("length", "depth"), [(150, 0.0), (150, 1.0), (400, 0.5), (400, 0.25)])
def test_needle_examples(length, depth):
    example = task().example(length, depth, np.random.default_rng(3))
    prompt, answer = ("".join(map(chr, part)) for part in (example.prompt, example.answer))
    assert len(example.prompt) + len(example.answer) == length
    needle = prompt[slice(*example.span)]
    city, number = needle.split()[3], needle.split()[-1].rstrip(".")
    assert needle == f"\nThe special magic {city} number is: {number}.\n"
    assert len(number) == 7
    assert prompt.endswith(f"\nThe special magic {city} number is:")
    assert answer == f" {number}"
    room = length - len(needle) - len(f"\nThe special magic {city} number is:") - len(answer)
    assert example.span[0] == round(depth * room)
    assert prompt.count("magic") == 2


def test_a_needle_without_room_says_what_it_needs():
    with pytest.raises(ValueError, match=r"needs .* tokens"):
        task().example(60, 0.5, np.random.default_rng(0))


class Copier(LlamaForCausalLM):
    """Always answers with what followed the last occurrence of the latest three tokens."""

    def forward(self, input_ids, past_key_values=None, **kwargs):
        self.seen = torch.cat([self.seen, input_ids], 1) if past_key_values.get_seq_length() else input_ids
        output = super().forward(input_ids, past_key_values=past_key_values, **kwargs)
        total = self.seen.shape[1]
        for row in range(len(input_ids)):
            for back in range(output.logits.shape[1]):
                at = total - output.logits.shape[1] + back
                tail = self.seen[row, at - 2 : at + 1]
                matches = [i for i in range(2, at) if torch.equal(self.seen[row, i - 2 : i + 1], tail)]
                if matches:
                    output.logits[row, back, self.seen[row, matches[-1] + 1]] = 1e4
        return output


def test_retrieval_is_perfect_for_a_copier_and_hopeless_for_a_random_model():
    examples = [task(1).example(120, 0.5, np.random.default_rng(i)) for i in range(60)]
    torch.manual_seed(0)
    copier = retrieve(Copier(LlamaConfig(**SHAPE)), examples)
    assert all(trial.correct for trial in copier)
    random = retrieve(LlamaForCausalLM(LlamaConfig(**SHAPE)), examples)
    assert sum(trial.correct for trial in random) < 6


def test_retrieval_is_what_greedy_generation_says(model):
    examples = [task(3).example(150, 0.3, np.random.default_rng(i)) for i in range(4)]
    model.eval()
    trials = retrieve(model, examples)
    for example, trial in zip(examples, trials, strict=True):
        prompt = torch.tensor([example.prompt])
        answer = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
        assert trial.correct == (answer[0, prompt.shape[1] :].tolist() == example.answer)
        torch.testing.assert_close(trial.scores, needle_scores(model, prompt, example.span), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: loss_by_position(m, torch.ones(2, 1).long()), "T >= 2"),
        (lambda m: loss_by_position(m, torch.ones(2, 4)), "integers"),
        (lambda m: loss_by_position(m, torch.ones(2, 4).long(), chunk=0), "chunk"),
        (lambda m: needle_scores(m, torch.ones(2, 4).long(), (0, 1)), "one sequence"),
        (lambda m: needle_scores(m, torch.ones(4).long(), (2, 5)), "span"),
        (lambda m: retrieve(m, []), "at least one"),
        (lambda m: rope_theta(m, -1).__enter__(), "positive"),
        (lambda m: rope_theta(torch.nn.Linear(1, 1), 2).__enter__(), "no RoPE"),
    ],
)
def test_bad_calls(call, words):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=words):
        call(LlamaForCausalLM(LlamaConfig(**SHAPE)))
