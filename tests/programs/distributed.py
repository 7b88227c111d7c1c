"""Run by torchrun: train a tiny converted model under DDP (transformers' Trainer) or FSDP2, and save it.

torchrun --nproc-per-node 2 distributed.py {ddp,fsdp2} FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import tiny_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

import ssmax
from ssmax.hf import parameter_groups

STEPS, GLOBAL_BATCH, LENGTH = 4, 4, 24


def batches():
    tokens = torch.randint(3, 99, (STEPS * GLOBAL_BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


class InOrder(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def with_trainer(model, folder, ranks):
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=GLOBAL_BATCH // ranks,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = InOrder(model=model, args=arguments, train_dataset=batches())
    trainer.train()
    trainer.save_model(str(folder / "model"))


def with_fsdp2(model, folder):
    dist.init_process_group("gloo")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, weight_decay=0.1, ssmax_learning_rate=5e-2))
    share = GLOBAL_BATCH // dist.get_world_size()
    rows = torch.stack([row["input_ids"] for row in batches()])
    model.train()
    for step in range(STEPS):
        first = step * GLOBAL_BATCH + dist.get_rank() * share
        tokens = rows[first : first + share]
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        whole = ssmax.convert(tiny_model("llama"), 0.3, bias=True)
        whole.load_state_dict(state)
        whole.save_pretrained(folder / "model")


def main(way, folder):
    model = ssmax.convert(tiny_model("llama"), 0.3, bias=True)
    if way == "fsdp2":
        with_fsdp2(model, folder)
    else:
        with_trainer(model, folder, ranks=int(way.removeprefix("ddp")))
    if dist.is_initialized():  # a rank that ends while another still talks to it may abort
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
