"""The ranks of a distributed run: they join, compare their settings before anything is written, and name a missing rank."""

import os
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from torch import distributed

from ssmax.errors import RunFailed, UserError
from ssmax.hf.loading import quiet
from ssmax.private import default_store
from ssmax.runs import signals

# How long a rank that failed waits for the messages of the others.
LAST_WORDS = timedelta(seconds=5)


def join(timeout_minutes: float) -> bool:
    """Join the other ranks that torchrun started, if any; return whether this process is the main one.

    A rank that waits longer for another one fails, so that one that hangs does not stop all for
    ever.
    """
    if not 0 < timeout_minutes < 1e6:
        raise UserError(f"--timeout-minutes must be positive, and less than a million; got {timeout_minutes}")
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(minutes=timeout_minutes))
    quiet()
    return state.is_main_process


def world_size() -> int:
    """Return the number of ranks that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def gpu_name() -> str | None:
    """Return the name of this process's GPU, or None if it has none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def leave() -> None:
    """Wait for the other ranks and leave the group. The group's threads may abort a process that exits without leaving."""
    state = PartialState()
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()


def agree(facts: Mapping[str, Any]) -> None:
    """Raise UserError on every rank if the ranks do not have the same facts. The message names the rank and the fact."""
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
    """Return whether the flag is set on any rank. All ranks must call this together."""
    state = PartialState()
    if state.num_processes == 1:
        return flag
    shared = torch.tensor(flag, dtype=torch.int32, device=state.device)
    distributed.all_reduce(shared, distributed.ReduceOp.MAX)
    return bool(shared.item())


def explained(error: Exception) -> Exception:
    """Return the error to report: if other ranks failed first or do not answer, an error that names them."""
    state = PartialState()
    if state.num_processes == 1:
        return error
    own = isinstance(error, (UserError, RunFailed, OSError))
    others = [rank for rank in range(state.num_processes) if rank != state.process_index]
    try:
        with signals.deferred():  # torchrun stops all ranks as soon as one of them is gone
            words = _last_words(state.process_index, str(error) if own else "", () if own else others)
    except RuntimeError:  # the machine that held the store is gone
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
    """Leave a message for the other ranks in torchrun's store, and wait a moment for theirs."""
    store = default_store()
    store.set(f"ssmax/{rank}", word)
    words: dict[int, str] = {}
    deadline = time.monotonic() + LAST_WORDS.total_seconds()
    while len(words) < len(others) and time.monotonic() < deadline:
        words |= {other: store.get(key).decode() for other in others if store.check([key := f"ssmax/{other}"])}
        time.sleep(0.05)
    return words
