"""Runs all stages of all models of a recipe, in workers or on all ranks of torchrun; a stopped run continues."""

import dataclasses
import functools
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import PartialState

from ssmax.data import corpus as corpora
from ssmax.data.shards import check, verify
from ssmax.evaluation.tasks import NEEDLE_WORDS
from ssmax.paper.formula import formula_rows
from ssmax.paper.pool import run_jobs
from ssmax.paper.recipes import Recipe
from ssmax.paper.stages import STAGES
from ssmax.paper.training import check_fit
from ssmax.runs.failures import failures as failures_alone
from ssmax.runs.files import check_destination, check_folder, written_whole
from ssmax.runs.folder import RunFolder, versions
from ssmax.runs.progress import progress_bar
from ssmax.runs.provenance import provenance_of, stamped
from ssmax.runs.rows import read_rows, write_rows
from ssmax.training.loop import Setup
from ssmax.training.ranks import agree, explained, gpu_name, leave, world_size

# An error on one rank may be caused by another rank.
failures = functools.partial(failures_alone, explained=explained)


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
    tokens, provenance = _claim(recipe, source, run, cache)
    with failures(""):
        if PartialState().is_main_process and not run.stage_file("formula").exists():
            write_rows(run.stage_file("formula"), stamped(formula_rows(), provenance), checked=True)
    if world_size() > 1:
        _run_together(run, recipe, tokens, provenance, setup)
    else:
        run_jobs(run, recipe, tokens, provenance)
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
    if not run.claimed:
        check_destination(run.folder / "model", new=True)
    tokens, provenance = _claim(recipe, source, run, cache)
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


def _claim(recipe: Recipe, source: str | None, run: RunFolder, cache: Path) -> tuple[Path, dict]:
    """Tokenise the corpus, claim the run's folder, and return the corpus's folder and the rows' provenance, on all ranks."""

    def once():
        tokens, description = tokenise(recipe, source, cache)
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


def tokenise(recipe: Recipe, source: str | None, cache: Path) -> tuple[Path, str]:
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
