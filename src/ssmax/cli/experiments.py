"""ssmax reproduce, train and prepare: the paper's experiments. Every field of a recipe is an option of the command line."""

import contextlib
import dataclasses
import os
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ssmax.cli.options import TEXTS_HELP, UNPREFIXED, Flag, flat, option, option_groups, parse, with_values
from ssmax.errors import UserError
from ssmax.paper.models import FORMS, VARIANTS
from ssmax.paper.recipes import RECIPES, Recipe
from ssmax.runs.failures import AGAIN
from ssmax.runs.folder import RunFolder

RECIPE_HELP = option(
    "tiny: 2 CPU cores, less than 20 minutes. laptop: 2 CPU cores, more models and seeds, about two hours. smoke: a test of "
    "a minute, too small to show an effect. laws: other laws of n, 2 CPU cores, half an hour. small: one GPU, target: "
    "an hour. paper: the paper's size, a cluster.",
    metavar="{" + ",".join(RECIPES) + "}",
)
Corpus: Any = Annotated[
    str | None,
    option(f"{TEXTS_HELP} Or a folder of ssmax prepare.", unset="Python's standard library", metavar="SOURCE"),
]
Shard: Any = Annotated[
    Flag, option("Under torchrun, shard weights and optimizer over the ranks (FSDP2). Otherwise: DDP.")
]
Timeout: Any = Annotated[
    float, option("Under torchrun, minutes that a rank waits for the others; preparing the corpus counts.")
]
DryRun: Any = Annotated[
    Flag, option("Say what the recipe takes on this machine, from a few measured steps, and write nothing.")
]
# Fields of a recipe that ssmax train sets by other options; and the option of a field whose default depends on another field.
REPLACED = ("models", "retrieval", "counting", "seeds")
Saving: Any = Annotated[
    int | None,
    option(
        "Steps between two checkpoints. 0: only when it is stopped.", unset="the recipe's, or steps / 10", metavar="INT"
    ),
]
# Variants that are made from a trained model, or of which only what they learn counts, are not for ssmax train.
TRAINED = {letter: one for letter, one in VARIANTS.items() if one.measured and not one.made_of}
VariantName: Any = Annotated[
    Literal[*TRAINED],  # pyrefly: ignore[invalid-literal]
    option(" ".join(f"{letter}: {one.help}." for letter, one in TRAINED.items())),
]
FormName: Any = Annotated[
    Literal[*FORMS],  # pyrefly: ignore[invalid-literal]
    option(" ".join(f"{name}: {form.title}, {form.family}." for name, form in FORMS.items())),
]
RecipeOptions: Any = option_groups(Recipe)
TrainOptions: Any = option_groups(Recipe, leave_out=REPLACED, checkpoint_steps=Saving)


def parse_recipe(command: Any, arguments: list[str], prog: str, recipe: str | None = None) -> Any:
    """Parse the arguments of a command. Options that are not given have the values of the named recipe."""
    foreign = [option for x in arguments if (option := x.partition("=")[0]) in {f"--{name}" for name in REPLACED}]
    if command is Train and foreign:
        raise UserError(
            f"{foreign[0]} is an option of ssmax reproduce; ssmax train takes --form, --variant and --seed of one model"
        )
    name = recipe or next((word for x in arguments if (word := x.rpartition("=")[2]) in RECIPES), "tiny")
    fields = dataclasses.fields(command)
    needed = {f.name: tyro.MISSING for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    options = with_values(TrainOptions() if command is Train else RecipeOptions(), RECIPES[name]())
    parsed = parse(command, arguments, prog, command(recipe=name, options=options, **needed))
    if parsed.recipe == name or parsed.recipe not in RECIPES:
        return parsed
    return parse_recipe(command, arguments, prog, parsed.recipe)  # another argument had a recipe's name


def _recipe(name: str, options: Any, **more: Any) -> Recipe:
    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r}; the recipes are {', '.join(RECIPES)}")
    chosen = {key: value for key, value in flat(options).items() if value is not None}
    return dataclasses.replace(RECIPES[name](), **{**more, **chosen})


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Train the paper's models, measure them far past their training length, and judge each claim of the paper.

    Leaves OUT/rows.jsonl (every number), OUT/figures/ (PNG and SVG) and OUT/report.html. The same
    command continues an interrupted run and repeats nothing that is finished. Defaults below are
    those of the recipe: see ssmax reproduce laptop --help.

    Example: ssmax reproduce tiny --corpus books/ --seeds 0 1 2

    On eight GPUs: torchrun --nproc-per-node 8 -m ssmax reproduce small. The batch size of a step stays the same.
    """

    again = AGAIN

    recipe: Annotated[str, tyro.conf.Positional, RECIPE_HELP] = "tiny"
    corpus: Corpus = None
    out: Annotated[Path | None, option("Folder of the run.", unset="runs/RECIPE", metavar="PATH")] = None
    dry_run: DryRun = False
    shard: Shard = False
    timeout_minutes: Timeout = 120.0
    options: Annotated[RecipeOptions, UNPREFIXED] = dataclasses.field(default_factory=RecipeOptions)

    def chosen(self) -> Recipe:
        """Return the recipe with the options that were given."""
        return _recipe(self.recipe, self.options)

    def run(self) -> None:
        """Run it."""
        recipe = self.chosen()
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
        from ssmax.paper.reproduce import reproduce
        from ssmax.training.loop import Setup
        from ssmax.training.ranks import join

        main = join(self.timeout_minutes)
        with run.opened() if main else contextlib.nullcontext():
            reproduce(run.recipe, self.corpus, run, run.folder.parent / "cache", Setup(shard=self.shard))
            if main:
                _report(run.folder)


@dataclasses.dataclass(frozen=True)
class Train:
    """Pretrain one model on your own text, and save it as a folder that transformers loads.

    Leaves OUT/model, which loads with AutoModelForCausalLM after "import ssmax.hf", and
    OUT/rows.jsonl with the training loss. The same command continues an interrupted run from its
    last checkpoint, on any number of devices.

    Example: ssmax train runs/mine --recipe tiny --variant b --corpus books/

    On eight GPUs: torchrun --nproc-per-node 8 -m ssmax train runs/mine. The batch size of a step stays the same.
    """

    again = AGAIN

    out: Annotated[Path, tyro.conf.Positional, option("Folder of the run.", metavar="OUT")]
    recipe: Annotated[str, RECIPE_HELP] = "tiny"
    variant: VariantName = "b"
    form: FormName = "paper"
    seed: Annotated[int, option("Seed of the initial weights and of the order of the data.")] = 0
    corpus: Corpus = None
    shard: Shard = False
    timeout_minutes: Timeout = 120.0
    report_to: Annotated[str, option("Tracker of transformers' Trainer, such as tensorboard or wandb.")] = "none"
    dry_run: DryRun = False
    options: Annotated[TrainOptions, UNPREFIXED] = dataclasses.field(default_factory=TrainOptions)

    def chosen(self) -> Recipe:
        """Return the recipe with the options that were given."""
        only = {"models": (f"{self.form}:{self.variant}",), "retrieval": (), "counting": (), "seeds": (self.seed,)}
        recipe = _recipe(self.recipe, self.options, **only)
        if flat(self.options)["checkpoint_steps"] is None and not recipe.checkpoint_steps:
            recipe = dataclasses.replace(recipe, checkpoint_steps=max(1, recipe.steps // 10))
        return recipe

    def run(self) -> None:
        """Run it."""
        recipe = self.chosen()
        if self.dry_run:
            return _print_plan(recipe)
        from ssmax.paper.reproduce import train  # loads torch and transformers
        from ssmax.training.loop import Setup
        from ssmax.training.ranks import join

        main = join(self.timeout_minutes)
        run = RunFolder(self.out, recipe, self.corpus)
        with run.opened() if main else contextlib.nullcontext():
            model = train(recipe, self.corpus, run, self.out.parent / "cache", Setup(self.shard, self.report_to))
        if main:
            print(f"Model: {model.resolve()}")
        return None


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Tokenise a corpus ahead of a run, so that no accelerator waits for it.

    Prints a folder; give it to ssmax train or reproduce as --corpus. With --tokenizer the text may
    have any size: it is read as a stream and written in shards, and the same command continues an
    interrupted preparation after its last complete shard. Without --tokenizer the text is held in
    memory.

    Example: ssmax prepare paper --corpus org/web-text --tokenizer gpt2
    """

    again = "the same command continues, complete shards are kept"

    recipe: Annotated[str, tyro.conf.Positional, RECIPE_HELP] = "tiny"
    corpus: Corpus = None
    cache: Annotated[Path, option("Folder that holds all prepared corpora.")] = Path("runs/cache")
    options: Annotated[RecipeOptions, UNPREFIXED] = dataclasses.field(default_factory=RecipeOptions)

    def run(self) -> None:
        """Run it."""
        recipe = _recipe(self.recipe, self.options)
        from ssmax.data.shards import check
        from ssmax.paper.reproduce import tokenise  # loads torch and transformers

        folder, _ = tokenise(recipe, self.corpus, self.cache)
        found = check(folder)
        print(
            f"{found.source}: {found.documents:,} documents, {found.tokens:,} training tokens in {len(found.shards)} shards, "
            f"{found.held_out['texts']} held-out texts of {found.held_out['length']:,} tokens\nCorpus: {folder.resolve()}"
        )


WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun sets it


def _report(folder: Path) -> None:
    from ssmax.paper import report  # loads numpy

    print(report.claims_text(report.build(folder), shutil.get_terminal_size().columns))
    print(f"Report: {(folder / 'report.html').resolve()}")


def _print_plan(recipe: Recipe) -> None:
    from ssmax.paper.plan import plan  # loads torch and transformers

    print("\n".join([*plan(recipe), "dry run: nothing was written"]))
