"""Runs the stages of ssmax evaluate, model by model. A stopped run continues with its first missing stage."""

import dataclasses
import hashlib
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ssmax.compare.checks import check_fit, check_model, check_rope, naming_nonfinite
from ssmax.compare.settings import Contender, Settings
from ssmax.compare.stages import Material, Needs, finetune, finetune_recipe, run_stage, stage_needs
from ssmax.data.sources import documents
from ssmax.errors import RunFailed, UserError
from ssmax.evaluation import rope_scaling, rope_theta
from ssmax.hf.loading import check_causal, check_weights, load_config, load_model, load_tokenizer, quiet
from ssmax.paper.training import check_stage
from ssmax.runs.failures import failures, out_of_memory, user_errors
from ssmax.runs.folder import RunFolder
from ssmax.runs.progress import progress_bar
from ssmax.runs.provenance import provenance_of, stamped
from ssmax.runs.rows import read_rows, write_rows
from ssmax.training.ranks import gpu_name

TEXT_LIMIT = 64 * 2**20  # bytes of text that are read
TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "spiece*", "*.model", "*.tiktoken")
SIZES = 5  # number of context sizes, in equal steps, if the user names none


@dataclasses.dataclass(frozen=True)
class Machine:
    """How an evaluation runs. This does not change what it measures.

    Attributes:
        device: "cpu", "cuda", "mps", or "auto" for the best that is available.
        chunk: positions in each forward pass.
    """

    device: str = "auto"
    chunk: int = 1024

    def __post_init__(self):
        if self.chunk < 1:
            raise UserError(f"--chunk must be positive, got {self.chunk}")

    @property
    def torch_device(self) -> torch.device:
        """The device.

        Raises:
            UserError: torch does not have it.
        """
        there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = next(x for x in ("cuda", "mps", "cpu") if there[x]) if self.device == "auto" else self.device
        if not there.get(name.partition(":")[0], False):
            raise UserError(
                f"--device {name} is not available here; available: {', '.join(x for x in there if there[x])}"
            )
        return torch.device(name)


def filled_in(settings: Settings) -> Settings:
    """Return the settings with length and sizes from the models' configs, if the user gave none.

    Raises:
        UserError: a model cannot be loaded, or no config holds a context length.
    """
    quiet()
    length = settings.length
    if not length:
        configs = (load_config(contender.source).get_text_config() for contender in settings.jobs)
        known = [getattr(config, "max_position_embeddings", None) for config in configs]
        length = min((n for n in known if n), default=0)
        if not length:
            raise UserError("no model's config holds a context length; give --length")
    steps = tuple(length * k // SIZES for k in range(1, SIZES + 1))
    return dataclasses.replace(settings, length=length, sizes=settings.sizes or steps)


def plan(settings: Settings, source: str | None) -> list[str]:
    """Return lines that say what would be done, from texts, tokenizers and configs, without loading a model."""
    quiet()
    texts, description = _texts(source, settings)
    lines = [f"text: {description}, {len(texts):,} documents"]
    for contender in settings.jobs:
        _, needs = _prepared(contender, settings.stages(contender), settings, texts, Machine())
        lines += [f"{contender.name}: " + ", ".join(f"{stage} {need.tokens:,} tokens" for stage, need in needs.items())]
        if "retrieval" in settings.measures:
            plain = settings.trials * sum(settings.sizes) * len(settings.depths) * len(settings.tasks)
            lines.append(f"  (retrieval without shared prefixes: {plain:,} tokens)")
    return [*lines, "dry run: nothing was written"]


def evaluate(settings: Settings, source: str | None, run: RunFolder, machine: Machine) -> None:
    """Measure every model, and write all rows to run.rows_file.

    Args:
        settings: what to measure, as filled_in returns it.
        source: the texts, see ssmax.data.sources.documents.
        run: the folder, opened by this process.
        machine: how it runs.

    Raises:
        UserError: a bad model or text, a model that cannot be measured, or a folder that belongs to
            another configuration.
        RunFailed: a stage failed, or memory ran out; finished stages are kept.
    """
    quiet()
    texts, description = _texts(source, settings)
    provenance = provenance_of(settings, description, gpu_name()) | {"device": str(machine.torch_device)}
    # Everything that can be checked without weights is checked for all models before the first is loaded.
    jobs = [(contender, todo) for contender in settings.jobs if (todo := run.todo(contender))]
    prepared = [_prepared(contender, todo, settings, texts, machine) for contender, todo in jobs]
    run.claim(_fingerprint(texts, settings))
    for (contender, _), (material, needs) in zip(jobs, prepared, strict=True):
        _measure(contender, material, needs, run, machine, provenance)
    write_rows(run.rows_file, [row for name in run.stages for row in read_rows(run.stage_file(name))], checked=True)


def _prepared(
    contender: Contender, stages: list[str], settings: Settings, texts: list[str], machine: Machine
) -> tuple[Material, dict[str, Needs]]:
    """Return the model's tokens and the needs of each stage, checked against the model's config."""
    with failures(f"{contender.name}: "), _user_errors(machine):
        config = load_config(contender.source)
        check_causal(contender.source, config)
        check_weights(Path(contender.source))
        material = Material(settings, texts, _tokenizer(contender.source))
        needs = {stage: stage_needs(stage, material) for stage in stages}
        check_fit(config, material.tokenizer, needs)
        check_rope(config, settings.theta_factor, settings.rope_parameters)
    return material, needs


def _measure(contender, material, needs, run, machine, provenance):
    settings = material.settings
    tuned = run.folder / "models" / contender.name / "finetuned"
    loaded: dict[str, PreTrainedModel] = {}

    def model(source: str) -> PreTrainedModel:
        if source not in loaded:
            loaded.clear()
            loaded[source] = _load(source, settings, machine)
            check_model(loaded[source], material, "attention" in needs, machine.chunk)
        return loaded[source]

    with progress_bar(sum(need.tokens for need in needs.values()), contender.name) as bar:
        for stage in needs:
            bar.set_description_str(f"{contender.name} {stage}")
            with failures(f"{contender.name} {stage}: "), _user_errors(machine), ExitStack() as rope:
                if stage == "finetune":
                    rows = finetune(contender.name, model(contender.source), material, tuned, bar.update)
                    loaded.clear()
                else:
                    asks = stage in settings.tasks and settings.finetune_steps
                    if asks:
                        check_stage(tuned, finetune_recipe(settings), "finetune.*")
                    chosen = model(str(tuned) if asks else contender.source)
                    rope.enter_context(rope_scaling(chosen, settings.rope_parameters))
                    rope.enter_context(rope_theta(chosen, settings.theta_factor))
                    with naming_nonfinite(chosen):
                        rows = run_stage(stage, contender.name, chosen, material, machine.chunk, bar.update)
            write_rows(run.stage_file(f"{contender.name}.{stage}"), stamped(rows, provenance), checked=True)


@contextmanager
def _user_errors(machine: Machine) -> Iterator[None]:
    """Turn ValueError into UserError; if memory ran out, raise RunFailed with advice."""
    try:
        with user_errors():
            yield
    except (UserError, RunFailed, OSError):
        raise
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise RunFailed(
            f"memory ran out; give a smaller --chunk (now {machine.chunk}), a shorter --length or smaller --sizes; finished "
            "stages are kept, and a run with another --chunk continues after them"
        ) from error


def _load(source: str, settings: Settings, machine: Machine) -> PreTrainedModel:
    model: Any = load_model(source, dtype=settings.dtype)
    return model.to(machine.torch_device).eval()


def _tokenizer(source: str) -> Any:
    folder = Path(source)
    if folder.is_dir() and not any(path for kind in TOKENIZER_FILES for path in folder.glob(kind)):
        raise UserError(f"{source} has no tokenizer; save the model's own into that folder")
    return load_tokenizer(source)


def _texts(source: str | None, settings: Settings) -> tuple[list[str], str]:
    found, description = documents(source, TEXT_LIMIT)
    random.Random(settings.seed).shuffle(found)
    return found, description


def _fingerprint(texts: list[str], settings: Settings) -> str:
    """Return a hash of the texts, and of the sizes and times of each model's files, so that models of one name never mix."""
    digest = hashlib.sha256("\0".join(texts).encode())
    for contender in settings.jobs:
        for path in sorted(Path(contender.source).glob("*")):
            state = path.stat()
            digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
