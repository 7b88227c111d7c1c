"""ssmax reproduce, train and prepare: the paper's experiments, every field of a recipe an option."""

import contextlib
import dataclasses
import os
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ssmax.cli.texts import TEXTS_HELP
from ssmax.errors import UserError
from ssmax.paper import report
from ssmax.paper.recipes import RECIPES, Recipe
from ssmax.runs.folder import RunFolder

__all__ = ["Prepare", "Reproduce", "Train"]


def _options() -> type:
    """Every field of a recipe as an option; what is not given is the recipe's own."""
    fields = [field for field in dataclasses.fields(Recipe) if field.name != "name"]
    made = [
        (field.name, Annotated[field.type | None, tyro.conf.arg(help=field.metadata["help"])], None)  # pyrefly: ignore
        for field in fields
    ]
    return dataclasses.make_dataclass("Options", made, frozen=True)


Options: Any = _options()


def _recipe(name: str, options: Any, **more: Any) -> Recipe:
    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r}; recipes are {', '.join(RECIPES)}")
    chosen = {key: value for key, value in vars(options).items() if value is not None}
    return dataclasses.replace(RECIPES[name](), **{**more, **chosen})


RECIPE_HELP = (
    "tiny: 2 CPU cores, a quarter of an hour. laptop: the same cores, more models and seeds, target: two hours. smoke: a "
    "minute, shows nothing. small: one GPU, target: about an hour. paper: the paper's own size, a cluster."
)
CORPUS_HELP = f"{TEXTS_HELP} Or the folder that ssmax prepare left."
SHARD_HELP = "Under torchrun, shard weights and optimizer over the ranks (FSDP2). Default: each rank holds all (DDP)."

TIMEOUT_HELP = (
    "Under torchrun, how long one rank waits for another before the run ends; longer than the tokenising of the corpus and "
    "the measurements of one model."
)


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Train the paper's models side by side, measure them far past their training length, and report.

    Leaves runs/NAME/ with rows.jsonl (every number), figures/ (PNG and SVG) and report.html. The same command
    continues an interrupted run and repeats nothing that is finished. On more devices: torchrun --nproc-per-node 8
    -m ssmax reproduce ...; the batch of a step stays the same.
    """

    recipe: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="{tiny,laptop,smoke,small,paper}", help=RECIPE_HELP)
    ] = "tiny"
    corpus: Annotated[str | None, tyro.conf.arg(help=CORPUS_HELP)] = None
    out: Annotated[Path | None, tyro.conf.arg(help="Folder of the run. Default: runs/RECIPE.")] = None
    dry_run: Annotated[bool, tyro.conf.arg(help="Say what it takes, from one measured step; write nothing.")] = False
    shard: Annotated[bool, tyro.conf.arg(help=SHARD_HELP)] = False
    timeout_minutes: Annotated[float, tyro.conf.arg(help=TIMEOUT_HELP)] = 120.0
    of_the_recipe: Annotated[Options, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=Options)

    def run(self) -> None:
        """Run it."""
        recipe = _recipe(self.recipe, self.of_the_recipe)
        if self.dry_run:
            return _print_plan(recipe)
        folder = self.out or Path("runs") / recipe.name
        run = RunFolder(folder, recipe, self.corpus)
        if WORLD_SIZE > 1:
            return self._together(run)
        with run.opened():
            if not run.finished:
                from ssmax.paper.reproduce import reproduce  # loads torch and transformers

                reproduce(recipe, self.corpus, run, cache=folder.parent / "cache")
            _report(folder)
        return None

    def _together(self, run: RunFolder) -> None:
        from ssmax.paper.reproduce import reproduce, start_ranks
        from ssmax.training.loop import Setup

        main = start_ranks(self.timeout_minutes)
        with run.opened() if main else contextlib.nullcontext():
            reproduce(run.recipe, self.corpus, run, run.folder.parent / "cache", Setup(shard=self.shard))
            if main:
                _report(run.folder)


@dataclasses.dataclass(frozen=True)
class Train:
    """Pretrain one model of a recipe on your own text, and save it as a folder that transformers loads.

    OUT/model loads with AutoModelForCausalLM after "import ssmax.hf"; OUT/rows.jsonl holds the training loss. The same
    command continues an interrupted run from its last checkpoint. On more devices: torchrun --nproc-per-node 8 -m
    ssmax train ...; the batch of a step stays the same, and a run may continue on another number of devices.
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help="Folder of the run.")]
    recipe: Annotated[str, tyro.conf.arg(metavar="{tiny,laptop,smoke,small,paper}", help=RECIPE_HELP)] = "tiny"
    variant: Annotated[
        Literal["a", "b", "c", "d", "f"],
        tyro.conf.arg(
            help="a: Softmax. b: SSMax. c: SSMax without s. d: SSMax with bias. f: Softmax that switches to SSMax for the last "
            "eighth. (e is ssmax convert.)"
        ),
    ] = "b"
    form: Annotated[
        Literal["paper", "qk-norm", "partial-rope"],
        tyro.conf.arg(
            help="paper: Llama's shape. qk-norm: queries and keys normalised. partial-rope: RoPE on half of a head."
        ),
    ] = "paper"
    seed: Annotated[int, tyro.conf.arg(help="Of initial weights and data order.")] = 0
    corpus: Annotated[str | None, tyro.conf.arg(help=CORPUS_HELP)] = None
    shard: Annotated[bool, tyro.conf.arg(help=SHARD_HELP)] = False
    timeout_minutes: Annotated[float, tyro.conf.arg(help=TIMEOUT_HELP)] = 120.0
    report_to: Annotated[
        str, tyro.conf.arg(help="A tracker of transformers' Trainer, such as tensorboard or wandb. Default: none.")
    ] = "none"
    dry_run: Annotated[bool, tyro.conf.arg(help="Say what it takes, from one measured step; write nothing.")] = False
    of_the_recipe: Annotated[Options, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=Options)

    def run(self) -> None:
        """Run it."""
        for name in ("models", "retrieval", "counting", "seeds"):
            if getattr(self.of_the_recipe, name) is not None:
                raise UserError(
                    f"--{name} is of ssmax reproduce; train takes --form, --variant and --seed of one model"
                )
        only = {"models": (f"{self.form}:{self.variant}",), "retrieval": (), "counting": (), "seeds": (self.seed,)}
        recipe = _recipe(self.recipe, self.of_the_recipe, **only)
        if self.of_the_recipe.checkpoint_steps is None and not recipe.checkpoint_steps:
            recipe = dataclasses.replace(recipe, checkpoint_steps=max(1, recipe.steps // 10))
        if self.dry_run:
            return _print_plan(recipe)
        from ssmax.paper.reproduce import start_ranks, train  # loads torch and transformers
        from ssmax.training.loop import Setup

        main = start_ranks(self.timeout_minutes)
        run = RunFolder(self.out, recipe, self.corpus)
        with run.opened() if main else contextlib.nullcontext():
            model = train(recipe, self.corpus, run, self.out.parent / "cache", Setup(self.shard, self.report_to))
        if main:
            print(f"Model: {model.resolve()}")
        return None


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Tokenise a corpus ahead, so that no accelerator waits for it; give the folder to train or reproduce as --corpus.

    With --tokenizer the text passes as a stream of any size, into shards on disk; the same command continues an
    interrupted preparation behind its last whole shard. Without it the text is held in memory.
    """

    recipe: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="{tiny,laptop,smoke,small,paper}", help=RECIPE_HELP)
    ] = "tiny"
    corpus: Annotated[str | None, tyro.conf.arg(help=CORPUS_HELP)] = None
    cache: Annotated[Path, tyro.conf.arg(help="Folder of all prepared corpora.")] = Path("runs/cache")
    of_the_recipe: Annotated[Options, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=Options)

    def run(self) -> None:
        """Run it."""
        recipe = _recipe(self.recipe, self.of_the_recipe)
        from ssmax.data.shards import check
        from ssmax.paper.reproduce import prepared  # loads torch and transformers

        folder, _ = prepared(recipe, self.corpus, self.cache)
        found = check(folder)
        print(
            f"{found.source}: {found.documents:,} documents, {found.tokens:,} training tokens in {len(found.shards)} shards, "
            f"{found.held_out['texts']} held-out texts of {found.held_out['length']:,} tokens\nCorpus: {folder.resolve()}"
        )


WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun sets it


def _report(folder: Path) -> None:
    print(report.claims_text(report.build(folder), shutil.get_terminal_size().columns))
    print(f"Report: {(folder / 'report.html').resolve()}")


def _print_plan(recipe: Recipe) -> None:
    from ssmax.paper.plan import plan  # loads torch and transformers

    print("\n".join([*plan(recipe), "dry run: nothing was written"]))
