"""A converted model in everything that trains models: train, save, reload, compare."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

import ssmax
from ssmax.hf import parameter_groups

PROGRAM = Path(__file__).parent.parent / "programs" / "distributed.py"
ROWS = torch.randint(3, 99, (16, 24), generator=torch.Generator().manual_seed(0))
# Other libraries' own deprecation warnings are not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


def converted_model(init=0.3, **options):
    return ssmax.convert(tiny_model("llama"), init, bias=True, **options)


def arguments(folder, **changes):
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        **changes,
    }


def scales(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".ssmax." in name}


def moved(model, start=0.3):
    """s and b of every head have left their start."""
    found = scales(model)
    assert len(found) == 4
    assert all((p != (start if "weight" in name else 0.0)).all() for name, p in found.items())
    return True


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=ROWS[:2]).logits


def assert_reloads(model, folder):
    again = AutoModelForCausalLM.from_pretrained(folder)
    for (name, saved), (_, loaded) in zip(scales(model).items(), scales(again).items(), strict=True):
        assert torch.equal(saved, loaded), name
    assert logits(model).std() > 0.01
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def rows():
    return [{"input_ids": row, "labels": row} for row in ROWS]


def test_trainer_leaves_s_undecayed_and_saves_it(tmp_path):
    model = converted_model()
    trainer = Trainer(model=model, args=TrainingArguments(**arguments(tmp_path)), train_dataset=rows())
    trainer.train()
    decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {decay[id(p)] for name, p in model.named_parameters() if ".ssmax." in name} == {0.0}
    assert decay[id(model.lm_head.weight)] == 0.1
    assert moved(model)
    trainer.save_model(str(tmp_path / "model"))
    assert_reloads(model, tmp_path / "model")


def test_trainer_with_a_learning_rate_for_s_alone(tmp_path):
    model = converted_model()
    before = model.lm_head.weight.detach().clone()
    groups = parameter_groups(model, learning_rate=0.0, weight_decay=0.1, ssmax_learning_rate=1e-2)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    assert [{p.ndim >= 2 for p in group["params"]} for group in groups] == [{True}, {False}, {False}]
    optimizer = torch.optim.AdamW(groups)
    Trainer(
        model=model,
        args=TrainingArguments(**arguments(tmp_path)),
        train_dataset=rows(),
        optimizers=(optimizer, None),
    ).train()
    assert moved(model)
    assert torch.equal(model.lm_head.weight, before)


def test_trainer_resumes_from_its_checkpoint_with_s(tmp_path):
    options = arguments(tmp_path, save_strategy="steps", save_steps=2)
    whole = converted_model()
    Trainer(model=whole, args=TrainingArguments(**options), train_dataset=rows()).train()
    resumed = converted_model()
    trainer = Trainer(model=resumed, args=TrainingArguments(**options), train_dataset=rows())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(logits(resumed), logits(whole), rtol=0, atol=1e-6)


def test_sft(tmp_path):
    from trl import SFTConfig, SFTTrainer

    words = {f"w{i}": i for i in range(99)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", bos_token="w1", eos_token="w2")
    texts = Dataset.from_list([{"text": " ".join(f"w{i}" for i in row.tolist())} for row in ROWS])
    model = converted_model()
    options = arguments(tmp_path, max_length=32, dataset_num_proc=None, bf16=False)
    trainer = SFTTrainer(model=model, args=SFTConfig(**options), train_dataset=texts, processing_class=fast)
    trainer.train()
    assert moved(model)
    trainer.save_model(str(tmp_path / "model"))
    assert_reloads(model, tmp_path / "model")


def test_accelerate(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = converted_model()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, weight_decay=0.1))
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(ROWS, batch_size=4))
    prepared.train()
    for batch in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(input_ids=batch, labels=batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert moved(model)
    accelerator.unwrap_model(prepared).save_pretrained(tmp_path, state_dict=accelerator.get_state_dict(prepared))
    assert_reloads(model, tmp_path)


def gradients(model):
    model.zero_grad()
    model(input_ids=ROWS, labels=ROWS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(got, want):
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing(tmp_path):
    model = converted_model().train()
    plain = gradients(model)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments(tmp_path, gradient_checkpointing=True)),
        train_dataset=rows(),
    )
    trainer.train()
    assert moved(model)
    trainer.save_model(str(tmp_path / "model"))
    assert_reloads(model, tmp_path / "model")
    fresh = converted_model().train()
    for module in fresh.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = torch.utils.checkpoint.checkpoint
    assert_same_gradients(gradients(fresh), plain)


def test_torch_compile(tmp_path):
    model = converted_model().train()
    plain = gradients(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled.zero_grad()
    compiled(input_ids=ROWS, labels=ROWS).loss.backward()
    assert_same_gradients({name: p.grad for name, p in model.named_parameters()}, plain)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, weight_decay=0.1))
    optimizer.step()
    assert moved(model)
    model.save_pretrained(tmp_path)
    assert_reloads(model, tmp_path)


def train_adapter(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for batch in ROWS.split(4):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


def test_lora_with_s_beside_it(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["ssmax"], task_type="CAUSAL_LM")
    model = get_peft_model(converted_model(), config)
    train_adapter(model)
    trained = {name: p for name, p in model.named_parameters() if ".ssmax." in name and p.requires_grad}
    assert len(trained) == 4
    assert all((p != (0.3 if name.endswith("weight") else 0.0)).all() for name, p in trained.items())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(converted_model(), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    assert not torch.allclose(logits(model), logits(converted_model()))
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert_reloads(merged, tmp_path / "merged")
    assert moved(merged)


def test_s_alone_as_an_adapter(tmp_path):
    from peft import LNTuningConfig, PeftModel, get_peft_model

    model = get_peft_model(converted_model(), LNTuningConfig(target_modules=["ssmax"], task_type="CAUSAL_LM"))
    learned = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(learned) == 4
    assert all(".ssmax." in name for name in learned)
    train_adapter(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 1000
    again = PeftModel.from_pretrained(converted_model(), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    assert not torch.allclose(logits(model), logits(converted_model()))


def torchrun(way, ranks, folder):
    folder.mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            PROGRAM,
            way,
            folder,
        ],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "support"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert moved(model)
    return model


def test_ddp_on_two_ranks_ends_where_one_process_ends(tmp_path):
    one, two = (torchrun(f"ddp{ranks}", ranks, tmp_path / str(ranks)) for ranks in (1, 2))
    torch.testing.assert_close(logits(two), logits(one), rtol=0, atol=2e-5)


def test_fsdp2_in_bfloat16_ends_near_float32(tmp_path):
    one, two = (torchrun("fsdp2", ranks, tmp_path / str(ranks)) for ranks in (1, 2))
    assert {p.dtype for p in two.parameters()} == {torch.float32}
    # Both round to bfloat16 on the way, at different places: close, and far nearer to each other than to the start.
    between = (logits(two) - logits(one)).abs().mean()
    assert between < 0.1 * (logits(two) - logits(converted_model())).abs().mean()
