"""Shared prefixes, retrieval tasks, attention of few rows, RoPE scalings: what ssmax evaluate is made of."""

import itertools

import numpy as np
import pytest
import torch
from plain_bytes import SHAPE, encode
from tiny_models import implementations, tiny_model
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import ssmax
from ssmax.evaluation import (
    ABCDigits,
    NeedleTask,
    PromptForm,
    attention_sharpness,
    binned,
    loss_by_position,
    needle_scores,
    retrieve,
    retrieve_grid,
    rope_scaling,
    rope_theta,
)
from ssmax.evaluation.position_loss import log_edges
from ssmax.evaluation.prefix import prefill, prefix_tree, size
from ssmax.evaluation.reading import Reader
from ssmax.evaluation.retrieval import grid_tokens
from ssmax.evaluation.tasks import CITIES

TEXT = np.array(encode("the quick brown fox jumps over a lazy dog and " * 100))
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}


def tokens(count, seed=0, rows=1):
    return torch.randint(3, 99, (rows, count), generator=torch.Generator().manual_seed(seed))


def family(name):
    changes = {"max_position_embeddings": 4096, "n_positions": 4096}
    changes |= SLIDING if name in ("gemma2", "gemma3_text") else {}
    changes |= {"sliding_window": 16} if name == "mistral" else {}
    changes |= {"logit_scale": 0.5} if name == "cohere" else {}
    return tiny_model(name, **{k: v for k, v in changes.items() if k != "n_positions" or name == "gpt2"})


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere", "gpt2", "mixtral", "phi3", "gemma3_text"])
def test_loss_by_position_has_each_familys_own_head(name):
    """Softcaps, scaled logits, learned positions, experts: at 2,000 tokens equal to a plain forward."""
    model, ids = family(name), tokens(2001)
    with torch.no_grad():
        want = cross_entropy(model(ids[:, :-1]).logits.transpose(1, 2), ids[:, 1:], reduction="none")
    got = loss_by_position(model, ids, chunk=700)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert "forward" not in vars(model.base_model)


def test_the_vocabulary_exists_for_few_rows_at_a_time():
    model, rows = family("llama"), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    ids = tokens(1001, rows=2)
    got = loss_by_position(model, ids, chunk=1000)
    assert max(rows) <= 256
    assert 2000 <= sum(rows) <= 2100  # the model is looked at on a few tokens first
    with torch.no_grad():
        want = cross_entropy(model(ids[:, :-1]).logits.transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_code_that_is_not_transformers_passes_whole():
    class Elsewhere(LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            output = super().forward(input_ids=input_ids, **kwargs)
            output.logits = torch.nn.functional.one_hot((input_ids + 1) % 300, 300) * 50.0
            return output

    torch.manual_seed(0)
    losses = loss_by_position(Elsewhere(LlamaConfig(**SHAPE)), torch.arange(900)[None] % 300, chunk=800)
    assert losses.max() < 1e-6


def test_bins_and_bands():
    losses = torch.tensor([[1.0] * 8 + [2.0] * 12, [3.0] * 8 + [2.0] * 12, [5.0] * 8 + [2.0] * 12])
    bins = binned(losses)
    assert [(b.first, b.last) for b in bins] == [(1, 8), (9, 11), (12, 16), (17, 20)]
    assert bins[0].mean == pytest.approx(3)
    # Three documents at 1, 3, 5: deviation 2, so 4.30265 * 2 / sqrt(3).
    assert bins[0].high - 3 == pytest.approx(3 - bins[0].low) == pytest.approx(4.30265 * 2 / 3**0.5)
    assert bins[-1].low == bins[-1].high == 2
    assert binned(losses[:1])[0].low is None
    assert log_edges(20) == [8, 11, 16, 20]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "lfm2"])
def test_a_shared_prefix_leaves_what_a_prompt_of_its_own_leaves(name):
    """Also past a window of 16 keys, and where a convolution keeps a state."""
    model = family(name) if name != "lfm2" else tiny_model("lfm2", layer_types=["conv", "full_attention"])
    base, other = tokens(40, 1, rows=2), tokens(40, 2, rows=2)
    prompts = [
        torch.cat([base[:, :33], other[:, :9]], 1),
        base,
        torch.cat([base[:, :21], other[:, :5]], 1),
        base[:, :21],
        torch.cat([base[:, :33], other[:, 9:13]], 1),
    ]
    tree = prefix_tree(prompts)
    assert size(tree) == 40 + 9 + 5 + 4
    ask, seen = tokens(1, 3, rows=2), []
    for index, cache in prefill(Reader(model, base, 7), prompts, tree):
        with torch.inference_mode():
            got = model(input_ids=ask, past_key_values=cache).logits[:, -1]
            want = model(input_ids=torch.cat([prompts[index], ask], 1)).logits[:, -1]
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
        seen.append(index)
    assert sorted(seen) == [0, 1, 2, 3, 4]


CELLS = list(itertools.product((150, 300, 600), (0.0, 0.5, 1.0)))


@pytest.mark.parametrize("task", ["needle", "several", "distractors", "abc"])
def test_a_grid_says_what_each_cell_says_alone(task):
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"max_position_embeddings": 1024}))
    made = {
        "needle": NeedleTask(encode, TEXT, 2),
        "several": NeedleTask(encode, TEXT, 2, several=True),
        "distractors": NeedleTask(encode, TEXT, 2, distractors=1),
        "abc": ABCDigits(encode, 2),
    }[task]
    cells = CELLS if task in ("needle", "abc") else [cell for cell in CELLS if cell[0] > 150]
    trials = [made.grid(cells, np.random.default_rng(seed)) for seed in range(3)]
    found = retrieve_grid(model, trials, chunk=100)
    for trial, grid in zip(found, trials, strict=True):
        for cell, outcome in trial.items():
            alone = retrieve(model, [grid[cell]])[0]
            assert (outcome.correct, outcome.first_digit) == (alone.correct, alone.first_digit)
            torch.testing.assert_close(outcome.scores, alone.scores, rtol=0, atol=1e-6)
    separately = sum(len(example.prompt) - 1 for grid in trials for example in grid.values())
    assert grid_tokens(trials) < 0.85 * separately


def test_a_single_needle_draws_what_it_always_drew():
    """City, number, place in the text: the rows of ssmax reproduce depend on it."""
    rng, same = np.random.default_rng(3), np.random.default_rng(3)
    example = NeedleTask(encode, TEXT).example(300, 0.5, rng)
    city, number = same.integers(10), same.integers(0, 10, 7)
    fixed = (
        len(example.answer) + example.span[1] - example.span[0] + len(f"\nThe special magic {CITIES[city]} number is:")
    )
    start = same.integers(0, len(TEXT) - (300 - fixed) + 1)
    assert rng.bit_generator.state == same.bit_generator.state
    assert spelled(example.answer) == " " + "".join(map(str, number))
    assert example.prompt[: example.span[0]] == TEXT[start : start + example.span[0]].tolist()


def spelled(ids):
    return "".join(map(chr, ids))


def test_several_needles_share_one_context_and_each_is_asked():
    grid = NeedleTask(encode, TEXT, several=True).grid([(700, d) for d in (0.0, 0.5, 1.0)], np.random.default_rng(0))
    contexts = {spelled(example.prompt).rpartition("\nThe special")[0] for example in grid.values()}
    assert len(contexts) == 1
    assert contexts.pop().count("The special magic") == 3
    cities = set()
    for example in grid.values():
        needle = spelled(example.prompt[slice(*example.span)])
        city = needle.split()[3]
        cities.add(city)
        assert spelled(example.prompt).endswith(f"\nThe special magic {city} number is:")
        assert needle == f"\nThe special magic {city} number is:{spelled(example.answer)}.\n"
    assert len(cities) == 3


def test_distractors_have_the_same_form_and_other_cities():
    grid = NeedleTask(encode, TEXT, distractors=3).grid([(700, 0.0), (700, 1.0)], np.random.default_rng(0))
    for example in grid.values():
        prompt = spelled(example.prompt)
        context = prompt.rpartition("\nThe special")[0]
        cities = [line.split()[3] for line in context.splitlines() if line.startswith("The special magic")]
        assert len(cities) == len(set(cities)) == 4
        assert prompt.split()[-3] in cities
        assert len(example.prompt) + len(example.answer) == 700
    assert grid[700, 0.0].answer == grid[700, 1.0].answer


def test_letters_with_digits():
    grid = ABCDigits(encode).grid([(400, 0.0), (400, 0.5), (400, 1.0)], np.random.default_rng(0))
    for (_, depth), example in grid.items():
        lines = spelled(example.prompt).splitlines()
        asked = lines.pop().rstrip("=")
        where = [i for i, line in enumerate(lines) if line.startswith(asked)]
        assert where == [round(depth * (len(lines) - 1))]
        assert lines[where[0]] == f"{asked}={spelled(example.answer)}"
        assert spelled(example.prompt[slice(*example.span)]) == lines[where[0]] + "\n"
        values = dict(line.split("=") for line in lines)
        assert all(values[line[0]] == line[2:] for line in lines)
        assert len(example.answer) == 6
        assert 400 - 9 < len(example.prompt) + len(example.answer) <= 400


class Copier(LlamaForCausalLM):
    """Always copies: answers with what followed the earliest occurrence of the latest tokens, the longest run first."""

    def forward(self, input_ids, past_key_values=None, **kwargs):
        before = getattr(past_key_values, "seen", input_ids[:, :0])
        seen = torch.cat([before, input_ids], 1)
        output = super().forward(input_ids, past_key_values=past_key_values, **kwargs)
        past_key_values.seen = seen
        kept = output.logits.shape[1]
        for row, back in itertools.product(range(len(seen)), range(kept)):
            text = seen[row, : seen.shape[1] - kept + back + 1].tolist()
            for length in range(40, 0, -1):
                at = [i for i in range(len(text) - length) if text[i : i + length] == text[-length:]]
                if at:
                    output.logits[row, back, text[at[0] + length]] = 1e4
                    break
        return output


@pytest.mark.parametrize("task", [NeedleTask(encode, TEXT, 3, distractors=1), ABCDigits(encode, 3)])
def test_a_model_that_copies_finds_everything_and_a_random_one_nothing(task):
    trials = [task.grid([(260, 0.0), (260, 1.0)], np.random.default_rng(seed)) for seed in range(2)]
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE | {"num_hidden_layers": 1})
    copied = retrieve_grid(Copier(config), trials)
    assert all(outcome.correct and outcome.first_digit for trial in copied for outcome in trial.values())
    guessed = retrieve_grid(LlamaForCausalLM(config), trials)
    assert not any(outcome.correct for trial in guessed for outcome in trial.values())


def test_the_first_digit_counts_alone():
    class FirstOnly(LlamaForCausalLM):
        """Right about the space and the first digit of " 777", then wrong."""

        def forward(self, input_ids, **kwargs):
            output = super().forward(input_ids, **kwargs)
            output.logits[:] = 0
            for back in range(output.logits.shape[1]):
                token = {ord(":"): " ", ord(" "): "7"}.get(int(input_ids[0, back - output.logits.shape[1]]), "x")
                output.logits[:, back, ord(token)] = 1
            return output

    example = NeedleTask(encode, TEXT, 3).example(200, 0.5, np.random.default_rng(0))
    assert example.first == 2
    trial = retrieve(FirstOnly(LlamaConfig(**SHAPE)), [type(example)(example.prompt, encode(" 777"), example.span, 2)])[
        0
    ]
    assert (trial.correct, trial.first_digit) == (False, True)


class Words:
    """A tokenizer of characters with a chat template and a first token."""

    chat_template = "<{message}>assistant:"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + encode(text)}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return self.chat_template.format(message=messages[0]["content"])


def test_prompts_for_base_and_chat_models():
    base, chat = (NeedleTask(encode, TEXT, form=PromptForm.of(Words(), style)) for style in ("base", "chat"))
    example = base.example(300, 0.5, np.random.default_rng(0))
    assert example.prompt[0] == 1
    assert len(example.prompt) + len(example.answer) == 300
    example = chat.example(300, 0.5, np.random.default_rng(0))
    prompt = spelled(example.prompt)
    city = prompt.split()[-3]
    assert prompt.startswith("<")
    assert prompt.endswith(
        f"\n\nWhat is the special magic {city} number?>assistant:The special magic {city} number is:"
    )
    assert len(example.prompt) + len(example.answer) == 300
    bare = Words()
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        PromptForm.of(bare, "chat")


def test_a_real_tokenizers_chat_template():
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.add_tokens(pre_tokenizers.ByteLevel.alphabet())
    raw.add_special_tokens(["<|user|>", "<|assistant|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    form = PromptForm.of(tokenizer, "chat")
    assert (tokenizer.decode(list(form.head)), form.opening, form.tail) == ("<|user|>", "<|user|>", "<|assistant|>")
    assert PromptForm.of(tokenizer, "base") == PromptForm()


def eager_rows(model, ids):
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    model.set_attn_implementation(before)
    return torch.stack(weights)[:, 0]  # (layers, heads, N, N)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_attention_of_few_rows_equals_eager_attention_on_every_implementation(name):
    model, ids = family(name), tokens(70)
    ssmax.convert(model, 0.4)
    rows = eager_rows(model, ids)
    for implementation in [*implementations(model), "flex_attention"]:
        model.set_attn_implementation(implementation)
        with torch.compiler.set_stance("force_eager"):  # FlexAttention takes a minute to compile on a CPU
            scores = needle_scores(model, ids, (50, 60))
            found = attention_sharpness(model, ids, [10, 33, 70], chunk=9)
        assert model.config._attn_implementation == implementation
        torch.testing.assert_close(scores, rows[:, :, -1, 50:60].sum(-1), rtol=0, atol=1e-5)
        for sharpness, layer in itertools.product(found, range(2)):
            windowed = name == "gemma3_text" and layer == 0 and sharpness.n > 16
            keys = 16 if windowed else sharpness.n
            p = rows[layer, :, sharpness.n - 1, sharpness.n - keys : sharpness.n].double()
            want = -(p * p.clamp(min=1e-300).log()).sum(-1) / np.log(keys)
            torch.testing.assert_close(sharpness.entropy[layer].double(), want, rtol=0, atol=1e-5)
            torch.testing.assert_close(sharpness.largest[layer].double(), p.amax(-1), rtol=0, atol=1e-5)
            q = p if windowed else p[:, 1:] / p[:, 1:].sum(-1, keepdim=True)
            torch.testing.assert_close(sharpness.largest_without_sink[layer].double(), q.amax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0], "factor": 4.0},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_rope_scalings_are_those_of_a_model_made_with_them(parameters):
    """On 200 tokens of a model whose context is 128."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    rope = {"rope_theta": 10_000.0, **parameters}
    if parameters["rope_type"] in ("yarn", "longrope", "llama3"):
        rope["original_max_position_embeddings"] = 128
    made = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=rope)).eval()
    made.load_state_dict(model.state_dict())
    ids = tokens(200)
    with torch.no_grad():
        plain = model(ids).logits
        with rope_scaling(model, parameters):
            scaled = model(ids).logits
        torch.testing.assert_close(scaled, made(ids).logits)
        assert torch.equal(model(ids).logits, plain)
    assert (scaled - plain).abs().max() > 1e-3


def test_rope_of_layers_with_a_window_stays():
    model = family("gemma3_text")
    before = model.model.rotary_emb
    with rope_theta(model, 10):
        after = model.model.rotary_emb
        assert torch.equal(after.sliding_attention_inv_freq, before.sliding_attention_inv_freq)
        torch.testing.assert_close(after.full_attention_inv_freq[1], before.full_attention_inv_freq[1] * 10 ** -(2 / 8))
    assert model.model.rotary_emb is before


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: rope_scaling(m, {"rope_type": "alibi"}).__enter__(), "dynamic, linear, llama3"),
        (lambda m: rope_scaling(m, {"rope_type": "linear"}).__enter__(), "factor"),
        (lambda m: rope_scaling(tiny_model("gpt2"), {"rope_type": "yarn", "factor": 2}).__enter__(), "no RoPE"),
        (lambda m: rope_theta(tiny_model("gpt2"), 2).__enter__(), "no RoPE"),
        (lambda m: attention_sharpness(m, torch.ones(9).long(), [9, 4]), "ascend"),
        (lambda m: attention_sharpness(m, torch.ones(9).long(), [4, 10]), "at most 9"),
        (lambda m: ABCDigits(encode).grid([(12, 0.5)], np.random.default_rng(0)), "needs"),
        (lambda m: NeedleTask(encode, TEXT, distractors=10).grid([(9, 0)], np.random.default_rng(0)), "at most 10"),
    ],
)
def test_bad_calls(call, words):
    with pytest.raises(ValueError, match=words):
        call(tiny_model("llama"))


def test_caches_are_released(monkeypatch):
    """Walking a grid holds two branches at a time, not one for each cell."""
    model, alive = tiny_model("llama", max_position_embeddings=4096), []
    base = tokens(400)
    prompts = [torch.cat([base[:, :at], tokens(30, at)], 1) for at in range(40, 400, 40)]
    for _ in prefill(Reader(model, prompts[-1], 100), prompts, prefix_tree(prompts)):
        import gc

        storages = {
            layer.keys.data_ptr()
            for cache in gc.get_objects()
            if type(cache) is DynamicCache
            for layer in cache.layers
            if layer.keys is not None and layer.keys.numel()
        }
        alive.append(len(storages) / 2)  # layers
    assert max(alive) <= 3
