"""Worker processes that run the stages of a recipe's models, one stage each at a time."""

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

MAX_WORKERS = 8
# Time for a step and a checkpoint. A second Ctrl-C stops at once.
SAVING_SECONDS = 60


def run_jobs(run: RunFolder, recipe: Recipe, tokens: Path, provenance: dict) -> None:
    """Run every stage of every job that has no rows yet.

    Args:
        run: the folder, opened by this process.
        recipe: what to train and measure.
        tokens: folder of the tokenised corpus.
        provenance: of the rows.

    Raises:
        RunFailed: a stage failed, or a worker was killed; finished stages are kept.
        Stopped: a signal came; trainings have saved a checkpoint.
    """
    chains = [[(job, stage) for job in jobs for stage in run.todo(job)] for jobs in _families(recipe.jobs)]
    chains = [chain for chain in chains if chain]
    if not chains:
        return
    on_gpu = torch.cuda.is_available()
    workers = 1 if on_gpu else min(len(chains), os.cpu_count() or 1, MAX_WORKERS)
    threads = (os.cpu_count() or 1) // workers
    # Let the workers keep freed memory; glibc would return large blocks that each step asks for again.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**25))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**31))
    # Return what the tokenisation freed to the system; glibc would keep it for as long as the workers train.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    total = sum(_tokens(chain, recipe) for chain in chains)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (messages, threads))
    with progress_bar(total, f"{len(recipe.jobs)} models") as bar:
        watcher = threading.Thread(target=_show, args=(messages, bar), daemon=True)
        watcher.start()
        running: dict[Any, Any] = {}  # a future, and the stages that follow it
        try:
            while chains or running:
                while chains and len(running) < workers:
                    chain = max(chains, key=lambda chain: _tokens(chain, recipe))  # so that no long one comes last
                    chains.remove(chain)
                    running[pool.submit(_work, *chain[0], recipe, tokens, run, provenance)] = chain[1:]
                chains += filter(None, map(running.pop, _finished(running)))
            messages.put(None)
            watcher.join()
        except BrokenProcessPool:
            raise RunFailed("a worker process was killed (out of memory?); the same command continues") from None
        except Stopped:
            _let_save(pool, running)
            raise
        finally:
            # A killed worker may hold the lock of messages for ever, so messages is not used after this.
            _kill(pool)
            pool.shutdown(cancel_futures=True)


def _tokens(chain, recipe):
    return sum(STAGES[stage].tokens(recipe) for _, stage in chain)


def _families(jobs):
    """Return lists of a job, followed by those that are made of its model or branch off its training."""
    families = {}
    for job in sorted(jobs, key=lambda job: bool(_before(job))):
        first = dataclasses.replace(job, variant=_before(job) or job.variant)
        families.setdefault(first if first in families else job, []).append(job)
    return list(families.values())


def _before(job):
    return VARIANTS[job.variant].made_of or VARIANTS[job.variant].branch_of


def _finished(futures):
    """Wait until some of the futures are done, and return these. Raise what one of them raised."""
    done, _ = wait(futures, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return done


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


def _work(job, stage, recipe, tokens, run, provenance):
    with failures(""):
        corpus = corpora.load(tokens)
    signals.check()
    _messages.put((job.name, stage, 0))
    meter = Meter()

    def progress(done):
        _messages.put((job.name, stage, done))
        if not STAGES[stage].trains:  # a training checks for signals itself, and saves first
            signals.check()

    with failures(f"{job.name}: "):
        rows = STAGES[stage].run(job, recipe, corpus, run.folder / "models", progress)
        rows = stamped(rows, provenance | meter.read())
        write_rows(run.stage_file(f"{job.name}.{stage}"), rows, checked=True)
    _messages.put((job.name, None, 0))
