"""Run all stages of all models of a recipe, one worker process a core, and continue where an earlier run stopped."""

import dataclasses
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import ssmax
from ssmax.errors import RunFailed, UserError
from ssmax.lab import corpus as corpora
from ssmax.lab.experiments import check_fit, formula_rows, run_stage, stage_tokens
from ssmax.lab.folder import RunFolder
from ssmax.lab.recipes import STAGES, Recipe
from ssmax.results import read_rows, write_rows

__all__ = ["reproduce"]

# Of the whole run; a model that cannot get so much of a core per worker is slower on two.
MAX_WORKERS = 8


def reproduce(recipe: Recipe, source: str | None, run: RunFolder, cache: Path) -> None:
    """Run or continue a recipe in its folder, to the end: run.rows_file holds every row.

    Args:
        recipe: what to train and measure.
        source: the corpus, see ssmax.lab.corpus.documents.
        run: the folder, opened by this process.
        cache: for tokenised corpora.

    Raises:
        UserError: a bad corpus, or a folder that belongs to another configuration.
        RunFailed: a stage failed; all finished ones are kept.
    """
    tokens, description = corpora.prepare(
        source,
        limit_bytes=recipe.corpus_bytes,
        vocab_size=recipe.vocab_size,
        held_out=(recipe.loss_texts, recipe.length_factor * recipe.train_length + 1),
        cache=cache,
    )
    check_fit(recipe, corpora.load(tokens))
    run.claim(tokens.name)
    provenance = _provenance(recipe, f"{description} {tokens.name}")
    if not run.stage_file("formula").exists():
        write_rows(run.stage_file("formula"), _stamped(formula_rows(), provenance))
    _run_jobs(run, recipe, tokens, provenance)
    write_rows(run.rows_file, [row for name in run.stages for row in read_rows(run.stage_file(name))])


def _run_jobs(run, recipe, tokens, provenance):
    todo = {
        job: [stage for stage in STAGES if not run.stage_file(f"{job.name}.{stage}").exists()] for job in recipe.jobs
    }
    todo = {job: stages for job, stages in todo.items() if stages}
    if not todo:
        return
    on_gpu = torch.cuda.is_available()
    workers = 1 if on_gpu else min(len(todo), os.cpu_count() or 1, MAX_WORKERS)
    threads = (os.cpu_count() or 1) // workers
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    total = sum(stage_tokens(stage, recipe) for stages in todo.values() for stage in stages)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (messages, threads))
    bar_format = "{desc} {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left"
    every = 0.5 if sys.stderr.isatty() else 30.0  # seconds; a log file needs few lines
    with tqdm(
        total=total,
        desc=f"{len(todo)} models",
        bar_format=bar_format,
        smoothing=0.02,
        mininterval=every,
        dynamic_ncols=True,
    ) as bar:
        watcher = threading.Thread(target=_show, args=(messages, bar), daemon=True)
        watcher.start()
        try:
            futures = {
                pool.submit(_work, job, stages, recipe, tokens, run, provenance): job for job, stages in todo.items()
            }
            _wait(futures)
            messages.put(None)
            watcher.join()
        except BaseException:
            # A killed worker may hold the lock of messages for ever: nothing is put there or awaited any more.
            _kill(pool)
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _wait(futures):
    pending = set(futures)
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            job = futures[future]
            try:
                future.result()
            except (UserError, RunFailed) as error:
                raise type(error)(f"{job.name}: {error}") from None
            except BrokenProcessPool:
                raise RunFailed("a worker process was killed (out of memory?); the same command continues") from None


def _kill(pool):
    for process in list((pool._processes or {}).values()):
        process.kill()


def _show(messages, bar):
    running = {}
    while (message := messages.get()) is not None:
        name, stage, amount = message
        running[name] = stage
        if stage is None:
            running.pop(name)
        bar.set_description_str(" · ".join(f"{name} {stage}" for name, stage in sorted(running.items())), refresh=False)
        bar.update(amount)


_messages: Any = None  # a worker's queue to the parent


def _start_worker(messages, threads):
    """Leave Ctrl-C to the parent, and never outlive it: an orphan would write beside the run that continues."""
    global _messages
    _messages = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate")


def _work(job, stages, recipe, tokens, run, provenance):
    corpus = corpora.load(tokens)
    for stage in stages:
        _messages.put((job.name, stage, 0))
        try:
            rows = run_stage(
                stage,
                job,
                recipe,
                corpus,
                run.folder / "models" / job.name,
                lambda n, s=stage: _messages.put((job.name, s, n)),
            )
            write_rows(run.stage_file(f"{job.name}.{stage}"), _stamped(rows, provenance))
        except (UserError, RunFailed):
            raise
        except Exception as error:  # a worker's traceback helps nobody; what is finished is kept
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise RunFailed(f"{stage}: {reason}; finished stages are kept, the same command continues") from error
    _messages.put((job.name, None, 0))


def _stamped(rows, provenance):
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return [dataclasses.replace(row, provenance=provenance | {"time": now}) for row in rows]


def _provenance(recipe, corpus):
    return {
        "recipe": recipe.name,
        "corpus": corpus,
        "commit": _commit(),
        "ssmax": ssmax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}",
    }


def _commit():
    """Return the commit of the checkout that this package lies in, with + where it was changed; None outside one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "src"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed.strip() else "")
