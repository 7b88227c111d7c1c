"""The ranks of a distributed run: how they join, agree before anything is written, and say which of them is missing."""

import os
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from torch import distributed

from ssmax.errors import RunFailed, UserError
from ssmax.runs import signals

__all__ = ["agree", "any_of", "explained", "gpu_name", "join", "leave", "world_size"]

# How long a rank that failed waits for the word of the others.
LAST_WORDS = timedelta(seconds=5)


def join(timeout: timedelta) -> PartialState:
    """Join the other ranks that torchrun started. A rank that waits longer than timeout for another one fails."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timeout)


def world_size() -> int:
    """Return the number of ranks that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def gpu_name() -> str | None:
    """Return the name of this process's GPU, None without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def leave() -> None:
    """Wait for the other ranks and part from them: who exits inside of a group may be aborted by the group's own threads."""
    state = PartialState()
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()


def agree(facts: Mapping[str, Any]) -> None:
    """Raise UserError on every rank, naming the ranks, where they do not have the same facts."""
    state = PartialState()
    if state.num_processes == 1:
        return
    everybodys: list[Any] = [None] * state.num_processes
    distributed.all_gather_object(everybodys, dict(facts))
    for name, expected in everybodys[0].items():
        for rank, others in enumerate(everybodys):
            if others[name] != expected:
                raise UserError(
                    f"rank {rank} has another {name} than rank 0: {others[name]!r}, not {expected!r}; nothing was written"
                )


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any rank; all ranks must ask together."""
    state = PartialState()
    if state.num_processes == 1:
        return flag
    shared = torch.tensor(flag, dtype=torch.int32, device=state.device)
    distributed.all_reduce(shared, distributed.ReduceOp.MAX)
    return bool(shared.item())


def explained(error: Exception) -> Exception:
    """Return what to tell of an error: where other ranks gave no sign of life or failed first, that it is because of them."""
    state = PartialState()
    if state.num_processes == 1:
        return error
    own = isinstance(error, (UserError, RunFailed, OSError))
    others = [rank for rank in range(state.num_processes) if rank != state.process_index]
    try:
        with signals.deferred():  # torchrun asks the ranks to end as soon as one of them is gone
            words = _last_words(state.process_index, str(error) if own else "", () if own else others)
    except RuntimeError:  # the store was on a machine that is gone
        return error
    if own:
        return error
    failed = [f"rank {rank} failed: {word}" for rank, word in sorted(words.items()) if word]
    if failed:
        return RunFailed("; ".join(failed))
    missing = [str(rank) for rank in others if rank not in words]
    if missing:
        return RunFailed(
            f"rank {', '.join(missing)} does not answer: it hangs or was killed; the same command continues"
        )
    return error


def _last_words(rank, word, others):
    """Leave a word for the other ranks, and wait a moment for theirs."""
    store = distributed.distributed_c10d._get_default_store()
    store.set(f"ssmax/{rank}", word)
    words: dict[int, str] = {}
    deadline = time.monotonic() + LAST_WORDS.total_seconds()
    while len(words) < len(others) and time.monotonic() < deadline:
        words |= {other: store.get(key).decode() for other in others if store.check([key := f"ssmax/{other}"])}
        time.sleep(0.05)
    return words
