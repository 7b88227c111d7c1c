"""Run all stages of all models of a recipe, one worker process a core, and continue where an earlier run stopped."""

import dataclasses
import fcntl
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import ssmax
from ssmax.lab import corpus as corpora
from ssmax.lab.errors import RunFailed, UserError
from ssmax.lab.experiments import STAGES, Job, formula_rows, run_stage, stage_tokens
from ssmax.lab.recipes import Recipe
from ssmax.results import Row, read_rows, write_atomically, write_rows

__all__ = ["ROWS", "reproduce"]

ROWS = "rows.jsonl"
SETTINGS = "recipe.json"
# Of the whole run; a model that cannot get so much of a core per worker is slower on two.
MAX_WORKERS = 8


def reproduce(recipe: Recipe, source: str | None, folder: Path, cache: Path) -> list[Row]:
    """Run or continue a recipe in folder, and return its rows, which also stand in folder/rows.jsonl.

    Args:
        recipe: what to train and measure.
        source: the corpus, see ssmax.lab.corpus.documents.
        folder: of this run; holds its settings, models, rows.
        cache: for tokenised corpora.

    Raises:
        UserError: bad corpus, or a folder that belongs to another configuration or another running process.
        RunFailed: a stage failed; all finished ones are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if _unchanged(folder, recipe, source) and _finished(folder, recipe):
            return read_rows(folder / ROWS)
        corpus_options = _corpus_options(recipe, source, cache)
        corpus = corpora.prepare(**corpus_options)
        settings = _settings(recipe, source) | {"corpus_fingerprint": corpus.fingerprint}
        _check_settings(folder, settings)
        provenance = _provenance(recipe, corpus)
        if not _stage_file(folder, "formula").exists():
            write_rows(_stage_file(folder, "formula"), _stamped(formula_rows(), provenance))
        _run_jobs(folder, recipe, corpus_options, provenance)
        rows = [row for name in _stage_names(recipe) for row in read_rows(_stage_file(folder, name))]
        write_rows(folder / ROWS, rows)
    return rows


def jobs_of(recipe: Recipe) -> list[Job]:
    """Return the recipe's models, the variants of a seed side by side."""
    return [Job(form, variant, seed) for seed in recipe.seeds for form in recipe.forms for variant in recipe.variants]


def _run_jobs(folder, recipe, corpus_options, provenance):
    todo = {
        job: [stage for stage in STAGES if not _stage_file(folder, f"{job.name}.{stage}").exists()]
        for job in jobs_of(recipe)
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
    with tqdm(
        total=total, desc=f"{len(todo)} models", bar_format=bar_format, smoothing=0.02, dynamic_ncols=True
    ) as bar:
        watcher = threading.Thread(target=_show, args=(messages, bar), daemon=True)
        watcher.start()
        try:
            futures = {
                pool.submit(_work, job, stages, recipe, corpus_options, folder, provenance): job
                for job, stages in todo.items()
            }
            _wait(futures)
        except BaseException:
            _kill(pool)
            raise
        finally:
            messages.put(None)
            watcher.join()
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


_messages: Any = None


def _start_worker(messages, threads):
    """Leave Ctrl-C to the parent, and never outlive it: an orphan would write beside the run that continues."""
    global _messages
    _messages = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate")


def _work(job, stages, recipe, corpus_options, folder, provenance):
    corpus = corpora.prepare(**corpus_options)
    for stage in stages:
        _messages.put((job.name, stage, 0))
        try:
            rows = run_stage(
                stage,
                job,
                recipe,
                corpus,
                folder / "models" / job.name,
                lambda n, s=stage: _messages.put((job.name, s, n)),
            )
            write_rows(_stage_file(folder, f"{job.name}.{stage}"), _stamped(rows, provenance))
        except OSError as error:
            raise RunFailed(
                f"{stage}: {error.strerror or error}; finished stages are kept, the same command continues"
            ) from None
        except ValueError as error:
            raise RunFailed(f"{stage}: {error}") from None
    _messages.put((job.name, None, 0))


def _stage_file(folder, name):
    return folder / "stages" / f"{name}.jsonl"


def _stage_names(recipe):
    return ["formula", *(f"{job.name}.{stage}" for job in jobs_of(recipe) for stage in STAGES)]


def _finished(folder, recipe):
    return (folder / ROWS).exists() and all(_stage_file(folder, name).exists() for name in _stage_names(recipe))


def _corpus_options(recipe, source, cache):
    return {
        "source": source,
        "limit_bytes": recipe.corpus_bytes,
        "vocab_size": recipe.vocab_size,
        "held_out": (recipe.loss_texts, recipe.length_factor * recipe.train_length + 1),
        "cache": cache,
    }


def _settings(recipe, source):
    return {"recipe": json.loads(json.dumps(dataclasses.asdict(recipe))), "corpus": source}


def _unchanged(folder, recipe, source):
    """Whether folder holds a run of these settings; another configuration is refused before the corpus is read."""
    path = folder / SETTINGS
    if not path.exists():
        return False
    settings = _settings(recipe, source)
    kept = _read_settings(path)
    _check_settings(folder, settings | {"corpus_fingerprint": kept.get("corpus_fingerprint")})
    return True


def _check_settings(folder, settings):
    path = folder / SETTINGS
    if not path.exists():
        write_atomically(path, json.dumps(settings, indent=1) + "\n")
        return
    kept = _read_settings(path)
    flat = [
        {**s.get("recipe", {}), "corpus": s.get("corpus"), "corpus text": s.get("corpus_fingerprint")}
        for s in (kept, settings)
    ]
    changed = [name for name in flat[1] if flat[0].get(name) != flat[1][name]]
    if changed:
        what = ", ".join(f"{name} was {flat[0].get(name)!r}, is {flat[1][name]!r}" for name in changed[:3])
        raise UserError(
            f"{folder} holds a run of another configuration ({what}); give another --out, or delete that folder"
        )


def _read_settings(path):
    try:
        kept = json.loads(path.read_text())
        assert isinstance(kept, dict)
    except (json.JSONDecodeError, AssertionError):
        raise UserError(f"{path} is damaged; give another --out, or delete that folder") from None
    return kept


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system releases however this process ends."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process runs in {folder}; wait for it, or give another --out") from None
        yield


def _stamped(rows, provenance):
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return [dataclasses.replace(row, provenance=provenance | {"time": now}) for row in rows]


def _provenance(recipe, corpus):
    return {
        "recipe": recipe.name,
        "corpus": f"{corpus.source} {corpus.fingerprint}",
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
