"""Two ranks (torchrun, gloo): converted models under FSDP2, FSDP1 and tensor parallelism against one process."""

import functools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import ssmax.hf

IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))


def tiny(dtype=torch.bfloat16):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return ssmax.convert(LlamaForCausalLM(config), 0.5, bias=True).to(dtype).train()


def train(model, ids):
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def scales(state):
    return torch.cat([state[name].float() for name in sorted(state) if ".ssmax." in name])


def fsdp2(model, mesh, **options):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fsdp1(model, mesh, **options):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), device_mesh=mesh, **options)


def sharded():
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    wrap = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    mixed = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ways = {
        "FSDP2": (torch.bfloat16, fsdp2, {}),
        "FSDP2 mixed": (torch.bfloat16, fsdp2, {"mp_policy": policy}),
        "FSDP2 float32 mixed": (torch.float32, fsdp2, {"mp_policy": policy}),
        "FSDP2 float32": (torch.float32, fsdp2, {}),
        "FSDP1 original": (torch.bfloat16, fsdp1, {"use_orig_params": True}),
        "FSDP1 flat": (torch.bfloat16, fsdp1, {}),
        "FSDP1 layers": (torch.bfloat16, fsdp1, {"auto_wrap_policy": wrap, "use_orig_params": True}),
        "FSDP1 float32 mixed": (torch.float32, fsdp1, {"mixed_precision": mixed, "use_orig_params": True}),
    }
    for name, (dtype, shard, options) in ways.items():
        one = tiny(dtype)
        want = train(one, IDS)
        model = shard(tiny(dtype), mesh, **options)
        mine = torch.tensor(train(model, IDS[rank : rank + 1]))
        dist.all_reduce(mine)
        # Losses are taken in bfloat16 matmuls; the update of s is compared, which would be half without the other rank.
        assert torch.allclose(mine / 2, torch.tensor(want), rtol=0.02), (name, mine / 2, want)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if rank == 0:
            assert all(state[key].dtype == torch.float32 for key in state if ".ssmax." in key), name
            start, end, got = (scales(state) for state in (tiny(dtype).state_dict(), one.state_dict(), state))
            moved, error = (end - start).norm(), (got - end).norm()
            print(f"{name}: {float(error / moved):.3f}", flush=True)


def tensor_parallel(folder):
    one, model = (AutoModelForCausalLM.from_pretrained(folder, **o) for o in ({}, {"tp_plan": "auto"}))
    torch.testing.assert_close(model(IDS).logits, one(IDS).logits, rtol=0, atol=1e-5)
    losses = [[] for _ in range(2)]
    for losses_of, each in zip(losses, (one, model), strict=True):
        for _ in range(3):
            loss = each(input_ids=IDS, labels=IDS).loss
            loss.backward()
            losses_of.append(float(loss.detach()))
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter -= 0.05 * parameter.grad
                    parameter.grad = None
    assert torch.allclose(*(torch.tensor(of) for of in losses), atol=1e-5), losses
    model.save_pretrained(Path(folder, "again"))
    dist.barrier()
    if dist.get_rank() == 0:
        saved = AutoModelForCausalLM.from_pretrained(Path(folder, "again"))
        torch.testing.assert_close(scales(saved.state_dict()), scales(one.state_dict()), rtol=0, atol=1e-5)
        print("tensor parallel: 0.000", flush=True)


if sys.argv[1] == "save":
    tiny(torch.float32).save_pretrained(sys.argv[2])
else:
    dist.init_process_group("gloo")
    sharded() if sys.argv[1] == "sharded" else tensor_parallel(sys.argv[2])
    dist.barrier()
    dist.destroy_process_group()
