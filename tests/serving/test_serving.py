"""Generation in all of transformers' ways: what is decoded equals a decode that computes every step anew, without a cache."""

import oracle
import pytest
import rounding
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM
from written_out import SHAPE, TOKENS, logits_bound, naive_llama, spread_scales

import ssmax

OPTIONS = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return spread_scales(ssmax.convert(LlamaForCausalLM(LlamaConfig(**SHAPE)).eval(), 0.5, bias=True))


def greedy_from_the_oracle(model, prompt, count):
    """Token by token from the float64 model that the tests write out."""
    tokens = prompt
    for _ in range(count):
        best = torch.tensor(naive_llama(model, tokens)[:, -1].argmax(-1))
        tokens = torch.cat([tokens, best[:, None]], 1)
    return tokens


@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy_decoding(model, cache):
    got = model.generate(TOKENS, cache_implementation=cache, **OPTIONS)
    assert torch.equal(got, greedy_from_the_oracle(model, TOKENS, 10))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_beam_search_equals_one_without_a_cache(model, implementation):
    model.set_attn_implementation(implementation)
    batch = TOKENS.clone()
    batch[0, :4] = 0  # left padding
    options = {**OPTIONS, "attention_mask": (batch != 0).long(), "num_beams": 4, "num_return_sequences": 2}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    cached = model.generate(batch, **options)
    anew = model.generate(batch, use_cache=False, **options)
    assert torch.equal(cached.sequences, anew.sequences)
    # A score is a mean of log-probabilities, each off by twice the largest error of a logit; both sides are.
    bound = 4 * logits_bound(model).max()
    rounding.assert_within(cached.sequences_scores, anew.sequences_scores, bound)
    greedy = model.generate(batch, attention_mask=options["attention_mask"], **OPTIONS)
    assert not torch.equal(cached.sequences[::2], greedy), "the beams found nothing but the greedy answer"


@pytest.mark.parametrize("drafted_by", ["a smaller model", "the prompt"])
def test_assisted_decoding_gives_the_greedy_answer(model, drafted_by):
    prompt = TOKENS[:1].repeat(1, 3)
    torch.manual_seed(1)
    small = ssmax.convert(LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": 1})).eval())
    assistant = {"assistant_model": small} if drafted_by == "a smaller model" else {"prompt_lookup_num_tokens": 4}
    got = model.generate(prompt, attention_mask=torch.ones_like(prompt), **assistant, **OPTIONS)
    assert torch.equal(got, greedy_from_the_oracle(model, prompt, 10))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_continuous_batching_gives_each_request_its_own_answer(model, implementation):
    model.set_attn_implementation(implementation)
    prompts = [TOKENS[0, :5].tolist(), TOKENS[1].tolist(), TOKENS[0, 3:11].tolist()]
    options = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=-1)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # its own choice is most of the memory
    results = model.generate_batch(inputs=prompts, generation_config=options, continuous_batching_config=small)
    got = sorted((result.prompt_ids, result.generated_tokens) for result in results.values())
    for prompt, answer in got:
        want = greedy_from_the_oracle(model, torch.tensor([prompt]), 10)[0, len(prompt) :]
        assert list(answer) == want.tolist()
    assert [prompt for prompt, _ in got] == sorted(prompts)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_prefix_that_sees_itself_whole(model, implementation):
    model.set_attn_implementation(implementation)
    seen = oracle.causal(12, 12)
    seen[:5, :5] = True
    mask = torch.tensor(seen).expand(2, 1, 12, 12)
    if implementation == "eager":  # transformers hands a 4-D mask on as it is, and eager adds it
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        got = model(TOKENS, attention_mask=mask).logits
    want = naive_llama(model, TOKENS, seen)
    assert abs(want - naive_llama(model, TOKENS)).max() > 0.1
    rounding.assert_within(got, want, logits_bound(model, attention_mask=mask))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {}),
        ("qwen3_moe", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("mixtral", {"tie_word_embeddings": True}),
    ],
)
def test_sharded_tied_and_mixed_checkpoints_come_back_whole(family, changes, tmp_path):
    model = spread_scales(ssmax.convert(tiny_model(family, **changes), 0.5, bias=True))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == bool(changes)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
        plain = ssmax.revert(loaded)(TOKENS).logits
        assert torch.equal(plain, tiny_model(family, **changes)(TOKENS).logits)
        assert not torch.equal(plain, model(TOKENS).logits)
