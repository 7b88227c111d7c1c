"""Runs all stages of all models of a recipe, one worker process for each core; a stopped run continues."""

import ctypes
import dataclasses
import functools
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from ssmax.data import corpus as corpora
from ssmax.data.shards import check, verify
from ssmax.errors import RunFailed, Stopped
from ssmax.evaluation.tasks import NEEDLE_WORDS
from ssmax.hf.loading import quiet
from ssmax.paper.formula import formula_rows
from ssmax.paper.models import VARIANTS
from ssmax.paper.recipes import Recipe
from ssmax.paper.stages import STAGES
from ssmax.paper.training import check_fit
from ssmax.runs import signals
from ssmax.runs.failures import failures as failures_alone
from ssmax.runs.files import check_folder, written_whole
from ssmax.runs.folder import RunFolder, versions
from ssmax.runs.progress import progress_bar
from ssmax.runs.provenance import Meter, provenance_of, stamped
from ssmax.runs.rows import read_rows, write_rows
from ssmax.training.loop import Setup
from ssmax.training.ranks import agree, explained, gpu_name, join, leave, world_size

__all__ = ["prepared", "reproduce", "start_ranks", "train"]

# An error on one rank may be caused by another rank.
failures = functools.partial(failures_alone, explained=explained)
# Worker processes of the whole run at most.
MAX_WORKERS = 8


def reproduce(recipe: Recipe, source: str | None, run: RunFolder, cache: Path, setup: Setup = Setup()) -> None:  # noqa: B008
    """Run a recipe in its folder, or continue it, and write all rows to run.rows_file.

    Under torchrun all ranks call this and train each model together. Otherwise each model is
    trained by one worker.

    Args:
        recipe: what to train and measure.
        source: the corpus, see ssmax.data.corpus.prepare.
        run: the folder, opened by this process (by the main one of several).
        cache: folder of tokenised corpora.
        setup: how trainings run.

    Raises:
        UserError: a bad corpus, or a folder that belongs to another configuration.
        RunFailed: a stage failed; finished stages are kept.
    """
    tokens, provenance = prepare(recipe, source, run, cache)
    with failures(""):
        if PartialState().is_main_process and not run.stage_file("formula").exists():
            write_rows(run.stage_file("formula"), stamped(formula_rows(), provenance), checked=True)
    if world_size() > 1:
        _run_together(run, recipe, tokens, provenance, setup)
    else:
        _run_jobs(run, recipe, tokens, provenance)
    if PartialState().is_main_process:
        with failures(""):
            rows = [row for name in run.stages for row in read_rows(run.stage_file(name))]
            write_rows(run.rows_file, rows, checked=True)
    with failures(""):
        leave()


def train(recipe: Recipe, source: str | None, run: RunFolder, cache: Path, setup: Setup) -> Path:
    """Pretrain the only model of a recipe in its folder, on all ranks together, and return the saved model's folder.

    Arguments and errors as in reproduce. An interrupted training continues from its last
    checkpoint.
    """
    tokens, provenance = prepare(recipe, source, run, cache)
    with failures(""):
        corpus, state, job = corpora.load(tokens), PartialState(), recipe.jobs[0]
        rows, model = run.stage_file(f"{job.name}.pretrain"), run.folder / "model"
        done = rows.exists()
        state.wait_for_everyone()
        if not done:
            total = STAGES["pretrain"].tokens(recipe)
            with progress_bar(total, job.name, state.is_main_process) as bar:
                found = STAGES["pretrain"].run(job, recipe, corpus, run.folder / "models", bar.update, setup)
            if state.is_main_process:
                write_rows(rows, stamped(found, provenance), checked=True)
        if state.is_main_process:
            if not model.exists():
                _publish(run.folder / "models" / job.name / "pretrained", tokens / "tokenizer", model)
            write_rows(run.rows_file, read_rows(rows), checked=True)
        leave()
    return model


def _publish(source, tokenizer, target):
    """Copy the trained model and its tokenizer into a folder that transformers loads."""
    check_folder(source)
    with written_whole(target, owner="model") as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
        shutil.copytree(tokenizer, temporary, dirs_exist_ok=True)


def prepare(recipe: Recipe, source: str | None, run: RunFolder, cache: Path) -> tuple[Path, dict]:
    """Tokenise the corpus, claim the run's folder, and return the corpus's folder and the rows' provenance, on all ranks."""

    def once():
        tokens, description = prepared(recipe, source, cache)
        check_fit(recipe, corpora.load(tokens))
        if not run.claimed:
            verify(tokens)
        return tokens, description

    with failures(""):
        tokens, description = _from_main(once)
        fingerprint = check(tokens).fingerprint
        facts = {"version": versions(), "recipe": dataclasses.asdict(recipe), "corpus": source, "tokens": fingerprint}
        agree(facts)
        if PartialState().is_main_process:
            run.claim(fingerprint)
    return tokens, provenance_of(recipe, f"{description} {fingerprint}", gpu_name())


def prepared(recipe: Recipe, source: str | None, cache: Path) -> tuple[Path, str]:
    """Tokenise the corpus with the recipe's settings; return the folder and the corpus's name."""
    return corpora.prepare(
        source,
        limit_bytes=recipe.corpus_bytes,
        vocab_size=recipe.vocab_size,
        held_out=(recipe.loss_texts, recipe.length_factor * recipe.train_length + 1),
        cache=cache,
        tokenizer=recipe.tokenizer,
        tokens=recipe.prepared_tokens,
        words=NEEDLE_WORDS,
    )


def _from_main(make: Callable[[], Any]) -> Any:
    """Return on all ranks what make returns on the main one. It may take days."""
    if world_size() == 1:
        return make()
    # A group with its own time-out: a preparation may take days, and the other time-out is for ranks that hang.
    patient: Any = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    found = [make() if PartialState().is_main_process else None]
    dist.broadcast_object_list(found, src=0, group=patient)
    return found[0]


def start_ranks(timeout_minutes: float) -> bool:
    """Join the other ranks that torchrun started, if any; return whether this process is the main one.

    Args:
        timeout_minutes: how long a rank waits for the others. A rank that hangs must not stop them
            for ever.
    """
    state = join(timedelta(minutes=timeout_minutes))
    quiet()
    return state.is_main_process


def _run_together(run, recipe, tokens, provenance, setup):
    """Train each model on all ranks together; then each rank measures its share of the models."""
    corpus, state = corpora.load(tokens), PartialState()
    todo = [(job, stage) for job in recipe.jobs for stage in run.todo(job)]
    state.wait_for_everyone()  # all ranks must have made this list before one of them writes rows
    together = [stage.name for stage in STAGES.values() if stage.trains]
    training = [(job, stage) for stage in together for job, wanted in todo if wanted == stage]
    measuring = [(job, stage) for job, stage in todo if stage not in together]
    mine = measuring[state.process_index :: state.num_processes]
    total = sum(STAGES[stage].tokens(recipe) for _, stage in training + mine)
    with progress_bar(total, f"{len(recipe.jobs)} models, {state.num_processes} ranks", state.is_main_process) as bar:
        for job, stage in training + mine:
            bar.set_description_str(f"{job.name} {stage}")
            with failures(f"{job.name}: "):
                place = run.folder / "models"
                more = (setup,) if stage in together else ()
                rows = STAGES[stage].run(job, recipe, corpus, place, bar.update, *more)
                if stage not in together or state.is_main_process:
                    write_rows(run.stage_file(f"{job.name}.{stage}"), stamped(rows, provenance), checked=True)
        with failures(""):
            state.wait_for_everyone()


def keep_freed_memory() -> None:
    """Let processes started from here keep freed memory; glibc would return large blocks that each step asks for again."""
    for name, size in (("MALLOC_MMAP_THRESHOLD_", 2**25), ("MALLOC_TRIM_THRESHOLD_", 2**31)):
        os.environ.setdefault(name, str(size))


def give_back_freed_memory() -> None:
    """Return what the tokenisation freed to the system; glibc would keep it for as long as the workers train."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _run_jobs(run, recipe, tokens, provenance):
    units = [[(job, stage) for job in jobs for stage in run.todo(job)] for jobs in _units(recipe.jobs)]
    units = sorted(filter(None, units), key=lambda unit: _tokens(unit, recipe), reverse=True)  # no long one comes last
    if not units:
        return
    on_gpu = torch.cuda.is_available()
    workers = 1 if on_gpu else min(len(units), os.cpu_count() or 1, MAX_WORKERS)
    threads = (os.cpu_count() or 1) // workers
    keep_freed_memory()
    give_back_freed_memory()
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


# Time for a step and a checkpoint. A second Ctrl-C stops at once.
SAVING_SECONDS = 60


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
