"""Run all stages of all models of a recipe, one worker process a core, and continue where an earlier run stopped."""

import dataclasses
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate import PartialState

import ssmax
from ssmax.errors import RunFailed, UserError
from ssmax.lab import corpus as corpora
from ssmax.lab.experiments import check_fit, formula_rows, run_stage, stage_tokens
from ssmax.lab.folder import RunFolder
from ssmax.lab.progress import progress_bar
from ssmax.lab.recipes import TOGETHER, Recipe
from ssmax.lab.shards import check, verify
from ssmax.lab.training import Setup, world_size
from ssmax.results import read_rows, write_rows

__all__ = ["prepared", "reproduce", "start_ranks", "train"]

# Of the whole run; a model that cannot get so much of a core per worker is slower on two.
MAX_WORKERS = 8


def reproduce(recipe: Recipe, source: str | None, run: RunFolder, cache: Path, setup: Setup = Setup()) -> None:  # noqa: B008
    """Run or continue a recipe in its folder, to the end: run.rows_file holds every row.

    Under torchrun all ranks call this, and train each model together; otherwise each model is one worker's.

    Args:
        recipe: what to train and measure.
        source: the corpus, see ssmax.lab.corpus.prepare.
        run: the folder, opened by this process (the main one of several).
        cache: for tokenised corpora.
        setup: how trainings run.

    Raises:
        UserError: a bad corpus, or a folder that belongs to another configuration.
        RunFailed: a stage failed; all finished ones are kept.
    """
    tokens, provenance = prepare(recipe, source, run, cache)
    if PartialState().is_main_process and not run.stage_file("formula").exists():
        write_rows(run.stage_file("formula"), _stamped(formula_rows(), provenance))
    if world_size() > 1:
        _run_together(run, recipe, tokens, provenance, setup)
    else:
        _run_jobs(run, recipe, tokens, provenance)
    if PartialState().is_main_process:
        write_rows(run.rows_file, [row for name in run.stages for row in read_rows(run.stage_file(name))])


def train(recipe: Recipe, source: str | None, run: RunFolder, cache: Path, setup: Setup) -> Path:
    """Pretrain the only model of a recipe in its folder, on all ranks together, and return the saved model's folder.

    Arguments and errors as reproduce; an interrupted training continues from its last checkpoint.
    """
    tokens, provenance = prepare(recipe, source, run, cache)
    corpus, state, job = corpora.load(tokens), PartialState(), recipe.jobs[0]
    rows, model = run.stage_file(f"{job.name}.pretrain"), run.folder / "model"
    done = rows.exists()
    state.wait_for_everyone()
    if not done:
        total = stage_tokens("pretrain", recipe)
        with failures(""), progress_bar(total, job.name, state.is_main_process) as bar:
            found = run_stage("pretrain", job, recipe, corpus, run.folder / "models", bar.update, setup)
        if state.is_main_process:
            write_rows(rows, _stamped(found, provenance))
    if state.is_main_process and not model.exists():
        _publish(run.folder / "models" / job.name / "pretrained", tokens / "tokenizer", model)
        write_rows(run.rows_file, read_rows(rows))
    return model


def _publish(source, tokenizer, target):
    """The trained model with its tokenizer, as a folder that transformers loads."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.copytree(source, temporary)
    shutil.copytree(tokenizer, temporary, dirs_exist_ok=True)
    temporary.rename(target)


def prepare(recipe: Recipe, source: str | None, run: RunFolder, cache: Path) -> tuple[Path, dict]:
    """Tokenise the corpus, claim the folder, and return the corpus's folder and the provenance of rows; on all ranks."""

    def once():
        tokens, description = prepared(recipe, source, cache)
        check_fit(recipe, corpora.load(tokens))
        if not run.claimed:
            verify(tokens)
        fingerprint = check(tokens).fingerprint
        run.claim(fingerprint)
        return tokens, f"{description} {fingerprint}"

    tokens, description = _from_main(once)
    return tokens, _provenance(recipe, description)


def prepared(recipe: Recipe, source: str | None, cache: Path) -> tuple[Path, str]:
    """Tokenise the corpus as the recipe asks; return folder and description."""
    return corpora.prepare(
        source,
        limit_bytes=recipe.corpus_bytes,
        vocab_size=recipe.vocab_size,
        held_out=(recipe.loss_texts, recipe.length_factor * recipe.train_length + 1),
        cache=cache,
        tokenizer=recipe.tokenizer,
        tokens=recipe.prepared_tokens,
    )


def _from_main(make: Callable[[], Any]) -> Any:
    """Return on all ranks what make returns on the main one, however long that takes."""
    if world_size() == 1:
        return make()
    # A group of its own: a preparation may take days, and the time-out of the others is for ranks that hang.
    patient: Any = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    found = [make() if PartialState().is_main_process else None]
    dist.broadcast_object_list(found, src=0, group=patient)
    return found[0]


def start_ranks() -> bool:
    """Join the other ranks where torchrun started some; return whether this process is the main one."""
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)
    _quiet()
    return state.is_main_process


# A rank that hangs must not hold the others for ever; the longest wait is for the measurements of one model.
TIMEOUT = timedelta(hours=2)


def _run_together(run, recipe, tokens, provenance, setup):
    """All ranks train each model together; then each measures its share of the models."""
    corpus, state = corpora.load(tokens), PartialState()
    todo = [(job, stage) for job in recipe.jobs for stage in run.todo(job)]
    state.wait_for_everyone()  # before anybody writes what another one still looks for
    training = [(job, stage) for stage in TOGETHER for job, wanted in todo if wanted == stage]
    measuring = [(job, stage) for job, stage in todo if stage not in TOGETHER]
    mine = measuring[state.process_index :: state.num_processes]
    total = sum(stage_tokens(stage, recipe) for _, stage in training + mine)
    with progress_bar(total, f"{len(recipe.jobs)} models, {state.num_processes} ranks", state.is_main_process) as bar:
        for job, stage in training + mine:
            bar.set_description_str(f"{job.name} {stage}")
            with failures(f"{job.name}: "):
                rows = run_stage(stage, job, recipe, corpus, run.folder / "models", bar.update, setup)
            if stage not in TOGETHER or state.is_main_process:
                write_rows(run.stage_file(f"{job.name}.{stage}"), _stamped(rows, provenance))
    state.wait_for_everyone()


def _run_jobs(run, recipe, tokens, provenance):
    units = [[(job, stage) for job in jobs for stage in run.todo(job)] for jobs in _units(recipe.jobs)]
    units = [unit for unit in units if unit]
    if not units:
        return
    on_gpu = torch.cuda.is_available()
    workers = 1 if on_gpu else min(len(units), os.cpu_count() or 1, MAX_WORKERS)
    threads = (os.cpu_count() or 1) // workers
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    total = sum(stage_tokens(stage, recipe) for unit in units for _, stage in unit)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (messages, threads))
    with progress_bar(total, f"{len(recipe.jobs)} models") as bar:
        watcher = threading.Thread(target=_show, args=(messages, bar), daemon=True)
        watcher.start()
        try:
            _wait([pool.submit(_work, unit, recipe, tokens, run, provenance) for unit in units])
            messages.put(None)
            watcher.join()
        except BaseException:
            # A killed worker may hold the lock of messages for ever: nothing is put there or awaited any more.
            _kill(pool)
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _units(jobs):
    """One worker's work: a model, and (e) behind the (a) that it is made of."""
    units = {job: [job] for job in jobs if job.variant != "e"}
    for job in jobs:
        if job.variant == "e":
            units[dataclasses.replace(job, variant="a")].append(job)
    return list(units.values())


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
    """Leave Ctrl-C to the parent, and never outlive it: an orphan would write beside the run that continues."""
    global _messages
    _messages = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    _quiet()


def _quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate")


def _work(unit, recipe, tokens, run, provenance):
    corpus = corpora.load(tokens)
    for job, stage in unit:
        _messages.put((job.name, stage, 0))
        with failures(f"{job.name}: "):
            rows = run_stage(
                stage,
                job,
                recipe,
                corpus,
                run.folder / "models",
                lambda n, j=job, s=stage: _messages.put((j.name, s, n)),
            )
            write_rows(run.stage_file(f"{job.name}.{stage}"), _stamped(rows, provenance))
        _messages.put((job.name, None, 0))


@contextmanager
def failures(where: str) -> Iterator[None]:
    """Turn whatever goes wrong in a stage into one line for people: UserError or RunFailed."""
    try:
        yield
    except (UserError, RunFailed) as error:
        raise type(error)(f"{where}{error}") from None
    except Exception as error:  # a worker's traceback helps nobody; what is finished is kept
        reason = getattr(error, "strerror", None) or textwrap.shorten(f"{type(error).__name__}: {error}", 400)
        raise RunFailed(f"{where}{reason}; finished stages are kept, the same command continues") from error


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
            [*git, "status", "--porcelain", "--", ":/src"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed.strip() else "")
