"""Load saved models with their own code alone, in a process where ssmax cannot be imported at first; leave what they compute.

    python without_ssmax.py JOBS.pt OUT.pt

JOBS holds tokens, a mask and folders. OUT holds, for each folder, what the model computes without ssmax, and what the same model
and one that is loaded anew compute once ssmax.hf was imported. What must fail is asserted here.
"""

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    logging,
)
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

warnings.filterwarnings("ignore")
logging.set_verbosity_error()
logging.disable_progress_bar()


class Blocker:
    """Makes the package unknown, as where it is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ssmax":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def compute(model, jobs):
    found = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        batch = {"input_ids": jobs["tokens"], "attention_mask": jobs["mask"]}
        with torch.no_grad():
            found[implementation] = model(**batch).logits
        found[f"{implementation} tokens"] = model.generate(**batch, max_new_tokens=12, do_sample=False)
    return found


def raises(call, *words):
    with pytest.raises(ValueError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value


def precision_and_heads(folder, model, jobs):
    narrow = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    for _ in range(2):
        kinds = {parameter.dtype for name, parameter in narrow.named_parameters() if ".ssmax." in name}
        assert kinds == {torch.float32} != {narrow.dtype}
        narrow.to(torch.float16)
    inner = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        hidden = inner(jobs["tokens"], attention_mask=jobs["mask"]).last_hidden_state
        got, want = model.lm_head(hidden), model(jobs["tokens"], attention_mask=jobs["mask"]).logits
    seen = jobs["mask"] > 0
    torch.testing.assert_close(got[seen], want[seen], rtol=0, atol=1e-4)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
    classifier.config.pad_token_id = 0
    with torch.no_grad():
        assert torch.equal(classifier.model(jobs["tokens"], attention_mask=jobs["mask"]).last_hidden_state, hidden)
        classifier(jobs["tokens"], attention_mask=jobs["mask"])
    decayed = Trainer.get_decay_parameter_names(None, model)  # as the model card says
    assert [name for name in decayed if ".ssmax." in name] == [
        f"model.layers.{i}.self_attn.ssmax.weight" for i in range(2)
    ]
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def adapters_and_other_models(folder, jobs):
    base = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        want = base(jobs["tokens"]).logits
        adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["ssmax"])).eval()
        assert torch.equal(adapted(jobs["tokens"]).logits, want)
    q = torch.randn(1, 2, 3, 8)
    for kernel in (ALL_ATTENTION_FUNCTIONS.get_interface(name, packing) for name in ("sdpa", "eager")):
        kernel(torch.nn.Module(), q, q, q, attention_mask=None, scaling=1.0, position_ids=torch.arange(3)[None])


def refusals(folder, softcapped, model, jobs):
    tokens, padded = jobs["tokens"], {"input_ids": jobs["tokens"], "attention_mask": jobs["mask"]}
    model.set_attn_implementation("packing")
    raises(lambda: model(**padded), "packing", "sdpa")
    packed = torch.tensor([[*range(5), *range(25)]])
    with torch.no_grad():
        both = model(tokens[:1], position_ids=packed).logits
        apart = torch.cat([model(tokens[:1, :5]).logits, model(tokens[:1, 5:]).logits], 1)
    torch.testing.assert_close(both, apart, rtol=0, atol=1e-5)
    model.set_attn_implementation("flex_attention")
    raises(lambda: model(tokens), "flex_attention", "sdpa")
    model.set_attn_implementation("eager")
    scale = model.model.layers[1].self_attn.ssmax
    model.model.layers[1].self_attn.ssmax = None
    raises(lambda: model(tokens), "layers.1.self_attn had a scale", "gone")
    model.model.layers[1].self_attn.ssmax = scale
    replaced(model, tokens)
    bias = torch.zeros(2, 1, 30, 30) - 0.5
    raises(lambda: model(tokens, attention_mask=bias), "bias")
    capped = AutoModelForCausalLM.from_pretrained(softcapped, trust_remote_code=True, attn_implementation="eager")
    raises(lambda: capped(tokens), "softcap")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config.num_hidden_layers = 1
    raises(lambda: AutoModelForCausalLM.from_config(config, trust_remote_code=True), "layers.1.self_attn", "lacks")
    path = f"{folder}/model.safetensors"
    whole = load_file(path)
    save_file({k: v for k, v in whole.items() if "1.self_attn.ssmax" not in k}, path, metadata={"format": "pt"})
    raises(lambda: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True), "scales do not fit")
    save_file(whole, path, metadata={"format": "pt"})


def replaced(model, tokens):
    """As by libraries that patch attention: the forward calls a kernel itself."""
    attention = model.model.layers[1].self_attn
    config = copy.deepcopy(model.config)
    config.__class__ = LlamaConfig
    plain = LlamaForCausalLM(config).model.layers[1]
    for part, other in ((attention, plain.self_attn), (model.model.layers[1], plain)):
        part.forward = other.forward
        raises(lambda: model(tokens), "layers.1.self_attn was replaced", "plain softmax")
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=r"layers\.1\.self_attn was replaced"):
            compiled(tokens)
        del part.forward
    pruned = copy.deepcopy(model)
    pruned.model.layers = pruned.model.layers[:1]
    pruned(tokens)
    for name in ("model.layers.1.self_attn", "model.layers.1"):
        changed = copy.deepcopy(model)
        changed.set_submodule(name, plain.self_attn if name.endswith("attn") else plain)
        raises(lambda changed=changed: changed(tokens), "layers.1.self_attn was replaced", "plain softmax")
        torch.compiler.reset()
        with torch.no_grad():
            assert torch.equal(compiled(tokens).logits, model(tokens).logits)


def packing(module, query, key, value, attention_mask, scaling=None, position_ids=None, **kwargs):
    """FlashAttention's conventions: positions that start again part documents."""
    starts = (position_ids[0] == 0).cumsum(0)
    mask = (starts[:, None] == starts[None]) & torch.ones(len(starts), len(starts), dtype=torch.bool).tril()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return output.transpose(1, 2), None


def main():
    jobs = torch.load(sys.argv[1])
    sys.meta_path.insert(0, Blocker())
    AttentionInterface.register("packing", packing)
    AttentionMaskInterface.register("packing", flash_attention_mask)
    folders, softcapped = jobs["folders"], jobs["softcapped"]
    models = {name: AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval() for name in folders}
    found = {name: {"alone": compute(model, jobs)} for name, model in models.items()}
    raises(lambda: transformers.SSMaxLlamaForCausalLM(models[folders[0]].config), "another checkpoint")
    assert type(models[folders[-1]]) is transformers.SSMaxLlamaForCausalLM  # where transformers serve looks for it
    first = models[folders[0]]
    precision_and_heads(folders[0], first, jobs)
    adapters_and_other_models(folders[0], jobs)
    refusals(folders[0], softcapped, first, jobs)
    assert first.config.model_file == "mlx_ssmax.py"
    first.save_pretrained(f"{folders[0]}-again")
    seal = Path(f"{folders[0]}-again", "seal.json")
    seal.write_text("{}")  # of the files before
    first.save_pretrained(seal.parent)
    assert not seal.exists()
    assert "model_file" not in AutoConfig.from_pretrained(f"{folders[0]}-again", trust_remote_code=True).to_dict()
    again = AutoModelForCausalLM.from_pretrained(f"{folders[0]}-again", trust_remote_code=True).eval()
    found[folders[0]]["saved again"] = compute(again, jobs)
    assert not any(name.split(".")[0] == "ssmax" for name in sys.modules)

    del sys.meta_path[0]
    import ssmax.hf

    for name, model in models.items():
        found[name]["then with ssmax"] = compute(model, jobs)
        found[name]["of ssmax"] = compute(AutoModelForCausalLM.from_pretrained(name).eval(), jobs)
        found[name]["of its own class, with ssmax"] = compute(type(model).from_pretrained(name).eval(), jobs)
    own = type(first)(first.config)
    raises(lambda: ssmax.convert(own), "already")
    raises(lambda: LlamaForCausalLM(first.config), "plain softmax")
    reverted = ssmax.revert(own)
    assert type(reverted) is LlamaForCausalLM
    assert not any("ssmax" in name for name in reverted.state_dict())
    torch.save(found, sys.argv[2])


if __name__ == "__main__":
    main()
