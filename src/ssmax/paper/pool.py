"""Worker processes that run the stages of a recipe's models, one model each at a time."""

import ctypes
import dataclasses
import multiprocessing
import os
import signal
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from ssmax.data import corpus as corpora
from ssmax.errors import RunFailed, Stopped
from ssmax.hf.loading import quiet
from ssmax.paper.models import VARIANTS
from ssmax.paper.recipes import Recipe
from ssmax.paper.stages import STAGES
from ssmax.runs import signals
from ssmax.runs.failures import failures
from ssmax.runs.folder import RunFolder
from ssmax.runs.progress import progress_bar
from ssmax.runs.provenance import Meter, stamped
from ssmax.runs.rows import write_rows

__all__ = ["run_jobs"]

MAX_WORKERS = 8
# Time for a step and a checkpoint. A second Ctrl-C stops at once.
SAVING_SECONDS = 60


def run_jobs(run: RunFolder, recipe: Recipe, tokens: Path, provenance: dict) -> None:
    """Run every stage of every job that has no rows yet, each job in one worker.

    Args:
        run: the folder, opened by this process.
        recipe: what to train and measure.
        tokens: folder of the tokenised corpus.
        provenance: of the rows.

    Raises:
        RunFailed: a stage failed, or a worker was killed; finished stages are kept.
        Stopped: a signal came; trainings have saved a checkpoint.
    """
    units = [[(job, stage) for job in jobs for stage in run.todo(job)] for jobs in _units(recipe.jobs)]
    units = sorted(filter(None, units), key=lambda unit: _tokens(unit, recipe), reverse=True)  # no long one comes last
    if not units:
        return
    on_gpu = torch.cuda.is_available()
    workers = 1 if on_gpu else min(len(units), os.cpu_count() or 1, MAX_WORKERS)
    threads = (os.cpu_count() or 1) // workers
    _keep_freed_memory()
    _give_back_freed_memory()
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    total = sum(_tokens(unit, recipe) for unit in units)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (messages, threads))
    with progress_bar(total, f"{len(recipe.jobs)} models") as bar:
        watcher = threading.Thread(target=_show, args=(messages, bar), daemon=True)
        watcher.start()
        futures = []
        try:
            futures += [pool.submit(_work, unit, recipe, tokens, run, provenance) for unit in units]
            _wait(futures)
            messages.put(None)
            watcher.join()
        except Stopped:
            _let_save(pool, futures)
            raise
        finally:
            # A killed worker may hold the lock of messages for ever, so messages is not used after this.
            _kill(pool)
            pool.shutdown(cancel_futures=True)


def _keep_freed_memory() -> None:
    """Let processes started from here keep freed memory; glibc would return large blocks that each step asks for again."""
    for name, size in (("MALLOC_MMAP_THRESHOLD_", 2**25), ("MALLOC_TRIM_THRESHOLD_", 2**31)):
        os.environ.setdefault(name, str(size))


def _give_back_freed_memory() -> None:
    """Return what the tokenisation freed to the system; glibc would keep it for as long as the workers train."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _tokens(unit, recipe):
    return sum(STAGES[stage].tokens(recipe) for _, stage in unit)


def _units(jobs):
    """Return the work of one worker each: a model, followed by those that are made of it or branch off its training."""
    units = {}
    for job in sorted(jobs, key=lambda job: bool(_before(job))):
        first = dataclasses.replace(job, variant=_before(job) or job.variant)
        units.setdefault(first if first in units else job, []).append(job)
    return list(units.values())


def _before(job):
    return VARIANTS[job.variant].made_of or VARIANTS[job.variant].branch_of


def _wait(futures):
    pending = set(futures)
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            try:
                future.result()
            except BrokenProcessPool:
                raise RunFailed("a worker process was killed (out of memory?); the same command continues") from None


def _kill(pool):
    for process in list((pool._processes or {}).values()):
        process.kill()


def _let_save(pool, futures):
    """Ask the workers to save checkpoints of their trainings, and wait for them."""
    for process in list((pool._processes or {}).values()):
        process.terminate()
    wait([future for future in futures if future.running()], SAVING_SECONDS)


def _show(messages, bar):
    running = {}
    while (message := messages.get()) is not None:
        name, stage, amount = message
        running[name] = stage
        if stage is None:
            running.pop(name, None)
        bar.set_description_str(" · ".join(f"{name} {stage}" for name, stage in sorted(running.items())), refresh=False)
        bar.update(amount)


_messages: Any = None  # a worker's queue to the parent


def _start_worker(messages, threads):
    """Leave Ctrl-C to the parent, and end with it: an orphan would write into the folder of a continued run."""
    global _messages
    _messages = messages
    signals.install(deferred=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    quiet()


def _work(unit, recipe, tokens, run, provenance):
    with failures(""):
        corpus = corpora.load(tokens)
    for job, stage in unit:
        signals.check()
        _messages.put((job.name, stage, 0))
        meter = Meter()

        def progress(done, job=job, stage=stage):
            _messages.put((job.name, stage, done))
            if not STAGES[stage].trains:  # a training checks for signals itself, and saves first
                signals.check()

        with failures(f"{job.name}: "):
            rows = STAGES[stage].run(job, recipe, corpus, run.folder / "models", progress)
            rows = stamped(rows, provenance | meter.read())
            write_rows(run.stage_file(f"{job.name}.{stage}"), rows, checked=True)
        _messages.put((job.name, None, 0))
