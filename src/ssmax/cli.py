"""The command line: ssmax reproduce, train, prepare, evaluate, convert, calibrate, inspect."""

import contextlib
import dataclasses
import errno
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ssmax import report
from ssmax.errors import RunFailed, UserError
from ssmax.lab.folder import RunFolder
from ssmax.lab.recipes import RECIPES, Recipe
from ssmax.report import longcontext
from ssmax.suite.settings import Settings

__all__ = ["main"]

EXTRAS = "pip install 'ssmax[lab]'"


def _options() -> type:
    """Every field of a recipe as an option; what is not given is the recipe's own."""
    fields = [field for field in dataclasses.fields(Recipe) if field.name != "name"]
    made = [
        (field.name, Annotated[field.type | None, tyro.conf.arg(help=field.metadata["help"])], None)  # pyrefly: ignore
        for field in fields
    ]
    return dataclasses.make_dataclass("Options", made, frozen=True)


Options: Any = _options()
EvaluateOptions: Any = dataclasses.make_dataclass(
    "EvaluateOptions",
    [
        (f.name, Annotated[f.type, tyro.conf.arg(help=f.metadata["help"])], f.default)  # pyrefly: ignore
        for f in dataclasses.fields(Settings)
        if "help" in f.metadata
    ],
    frozen=True,
)


def _recipe(name: str, options: Any, **more: Any) -> Recipe:
    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r}; recipes are {', '.join(RECIPES)}")
    chosen = {key: value for key, value in vars(options).items() if value is not None}
    return dataclasses.replace(RECIPES[name](), **{**more, **chosen})


RECIPE_HELP = (
    "tiny: 2 CPU cores, a quarter of an hour. smoke: a minute, shows nothing. small: one GPU, about an hour. paper: the "
    "paper's own size, a cluster."
)
TEXTS_HELP = (
    "A text file, a folder of text files, .parquet, .jsonl or .csv files, a data set saved on disk, or one on a hub as "
    "NAME:SUBSET#COLUMN (each but the name may be left out); several with their shares as A=0.7,B=0.3. "
    "Default: Python's own standard library."
)
CORPUS_HELP = f"{TEXTS_HELP} Or the folder that ssmax prepare left."
SHARD_HELP = "Under torchrun, shard weights and optimizer over the ranks (FSDP2). Default: each rank holds all (DDP)."


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Train the paper's models side by side, measure them far past their training length, and report.

    Leaves runs/NAME/ with rows.jsonl (every number), figures/ (PNG and SVG) and report.html. The same command
    continues an interrupted run and repeats nothing that is finished. On more devices: torchrun --nproc-per-node 8
    -m ssmax reproduce ...; the batch of a step stays the same.
    """

    recipe: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="{tiny,smoke,small,paper}", help=RECIPE_HELP)
    ] = "tiny"
    corpus: Annotated[str | None, tyro.conf.arg(help=CORPUS_HELP)] = None
    out: Annotated[Path | None, tyro.conf.arg(help="Folder of the run. Default: runs/RECIPE.")] = None
    dry_run: Annotated[bool, tyro.conf.arg(help="Say what it takes, from one measured step; write nothing.")] = False
    shard: Annotated[bool, tyro.conf.arg(help=SHARD_HELP)] = False
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
                from ssmax.lab.reproduce import reproduce  # loads torch and transformers

                reproduce(recipe, self.corpus, run, cache=folder.parent / "cache")
            _report(folder)
        return None

    def _together(self, run: RunFolder) -> None:
        from ssmax.lab.reproduce import reproduce, start_ranks
        from ssmax.lab.training import Setup

        main = start_ranks()
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
    recipe: Annotated[str, tyro.conf.arg(metavar="{tiny,smoke,small,paper}", help=RECIPE_HELP)] = "tiny"
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
        from ssmax.lab.reproduce import start_ranks, train  # loads torch and transformers
        from ssmax.lab.training import Setup

        main = start_ranks()
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
        str, tyro.conf.Positional, tyro.conf.arg(metavar="{tiny,smoke,small,paper}", help=RECIPE_HELP)
    ] = "tiny"
    corpus: Annotated[str | None, tyro.conf.arg(help=CORPUS_HELP)] = None
    cache: Annotated[Path, tyro.conf.arg(help="Folder of all prepared corpora.")] = Path("runs/cache")
    of_the_recipe: Annotated[Options, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=Options)

    def run(self) -> None:
        """Run it."""
        recipe = _recipe(self.recipe, self.of_the_recipe)
        from ssmax.lab.reproduce import prepared  # loads torch and transformers
        from ssmax.lab.shards import check

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
    from ssmax.lab.plan import plan  # loads torch and transformers

    print("\n".join([*plan(recipe), "dry run: nothing was written"]))


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Measure how models hold at long context, side by side: loss by position, retrieval, sharpness of attention.

    Any causal model of transformers, converted or not. Leaves OUT/rows.jsonl (every number), figures/ (PNG and SVG) and
    report.html, and prints tables. The same command continues an interrupted run and repeats nothing that is finished.
    """

    models: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            help="Folders of transformers models with their tokenizers, or names on a hub.", metavar="MODEL ..."
        ),
    ]
    texts: Annotated[str | None, tyro.conf.arg(help=CORPUS_HELP)] = None
    out: Annotated[Path, tyro.conf.arg(help="Folder of the run.")] = Path("runs/evaluate")
    device: Annotated[str, tyro.conf.arg(help="cpu, cuda, cuda:1, mps; auto takes the best that is there.")] = "auto"
    chunk: Annotated[
        int,
        tyro.conf.arg(help="Tokens that pass at once: smaller needs less memory. It may change when a run continues."),
    ] = 1024
    json: Annotated[bool, tyro.conf.arg(help="Print the tables as JSON.")] = False
    dry_run: Annotated[bool, tyro.conf.arg(help="Read texts and tokenizers, say what it takes, write nothing.")] = False
    of_the_evaluation: Annotated[EvaluateOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=EvaluateOptions
    )

    def run(self) -> None:
        """Run it."""
        settings = Settings("evaluate", self.models, **vars(self.of_the_evaluation))
        from ssmax.suite.run import Machine, evaluate, filled_in, plan  # loads torch and transformers

        machine = Machine(self.device, self.chunk)
        settings = filled_in(settings)
        if self.dry_run:
            print("\n".join(plan(settings, self.texts)))
            return
        run = RunFolder(self.out, settings, self.texts)
        with run.opened():
            evaluate(settings, self.texts, run, machine)
            tables = longcontext.build(self.out)
        if self.json:
            print(longcontext.tables_json(tables))
        else:
            print(f"{longcontext.tables_text(tables)}\n\nReport: {(self.out / 'report.html').resolve()}")


@dataclasses.dataclass(frozen=True)
class Convert:
    """Turn a softmax model into an SSMax model and save it as a new folder.

    The new folder loads with AutoModelForCausalLM after "import ssmax.hf", or with trust_remote_code=True.
    """

    source: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(help="Folder of a transformers model, or its name on a hub.")
    ]
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help="New folder.")]
    init: Annotated[
        str,
        tyro.conf.arg(
            help="matched: on average as sharp as before, the paper's start. identity: s = 0, b = 1, the same model, to be "
            "trained on. Or a number for s."
        ),
    ] = "matched"
    train_length: Annotated[int | None, tyro.conf.arg(help="What matched is matched to. Default: the config's.")] = None
    bias: Annotated[bool | None, tyro.conf.arg(help="Learn b as well. Default: as init says.")] = None
    layers: Annotated[
        tuple[int, ...] | None, tyro.conf.arg(help="Indices of layers. Default: all that attend in full.")
    ] = None
    law: Annotated[
        str,
        tyro.conf.arg(
            help="ssmax: s log n, learned. Or a law without anything to learn: ssmax-fixed (log n), qwen-1, yarn, llama-4, "
            "ministral-3; see ssmax.laws."
        ),
    ] = "ssmax"
    law_parameters: Annotated[
        dict[str, float], tyro.conf.arg(help="Parameters of such a law, as NAME VALUE; yarn needs factor.")
    ] = dataclasses.field(default_factory=dict)
    dry_run: Annotated[bool, tyro.conf.arg(help="Say what would be done, write nothing.")] = False

    def run(self) -> None:
        """Run it."""
        from ssmax.commands import convert_folder  # loads torch and transformers

        lines = convert_folder(
            self.source,
            self.target,
            dry_run=self.dry_run,
            init=_number(self.init),
            train_length=self.train_length,
            bias=self.bias,
            layers=None if self.layers is None else list(self.layers),
            law=self.law,
            law_parameters=self.law_parameters,
        )
        print("\n".join(lines))


@dataclasses.dataclass(frozen=True)
class Calibrate:
    """Fit s and b of each head on long texts, all other weights frozen, and save the model as a new folder.

    Tries each init, keeps what is best on held-out text, and prints the loss by position before and after. Where
    nothing is better than the model as it was, it says so and writes nothing.
    """

    source: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(help="Folder of a transformers model, or its name on a hub.")
    ]
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help="New folder.")]
    texts: Annotated[
        str | None,
        tyro.conf.arg(help=TEXTS_HELP),
    ] = None
    length: Annotated[
        int | None,
        tyro.conf.arg(help="Tokens of a piece of text: longer teaches more of n. Default: the config's longest."),
    ] = None
    steps: Annotated[int, tyro.conf.arg(help="Steps of each fit, one piece each.")] = 30
    inits: Annotated[
        tuple[str, ...], tyro.conf.arg(help="Where to start, one fit each: matched, identity or numbers for s.")
    ] = ("identity", "matched")
    layers: Annotated[
        tuple[int, ...] | None, tyro.conf.arg(help="Indices of layers. Default: all that attend in full.")
    ] = None
    bias: Annotated[bool, tyro.conf.arg(help="Fit b as well.")] = True
    learning_rate: Annotated[float, tyro.conf.arg(help="How far the multipliers move in a step, root mean square.")] = (
        0.006
    )
    theta_factor: Annotated[float, tyro.conf.arg(help="Multiply RoPE's theta, for longer contexts.")] = 1.0
    checkpointing: Annotated[bool, tyro.conf.arg(help="Recompute activations: far less memory, a third more time.")] = (
        False
    )
    seed: Annotated[int, tyro.conf.arg(help="Of the order of texts.")] = 0
    dry_run: Annotated[bool, tyro.conf.arg(help="Load everything, say what would be done, write nothing.")] = False

    def run(self) -> None:
        """Run it."""
        from ssmax.commands import calibrate_folder  # loads torch and transformers

        lines = calibrate_folder(
            self.source,
            self.target,
            self.texts,
            theta_factor=self.theta_factor,
            checkpointing=self.checkpointing,
            dry_run=self.dry_run,
            length=self.length,
            steps=self.steps,
            inits=[_number(init) for init in self.inits],
            layer_sets=[None if self.layers is None else list(self.layers)],
            bias=self.bias,
            learning_rate=self.learning_rate,
            seed=self.seed,
        )
        print("\n".join(lines))


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Say which layers of a model carry SSMax, by which law, and s and b of each head."""

    source: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(help="Folder of a transformers model, or its name on a hub.")
    ]
    figure: Annotated[Path | None, tyro.conf.arg(help="Draw s and b of each head as well, as this .png or .svg.")] = (
        None
    )
    dry_run: Annotated[bool, tyro.conf.arg(help="Write no figure.")] = False

    def run(self) -> None:
        """Run it."""
        from ssmax.commands import inspect_folder

        print("\n".join(inspect_folder(self.source, None if self.dry_run else self.figure)))


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; exit status 2 for what the user can mend, 1 for a failed run, 130 for Ctrl-C."""
    command = tyro.extras.subcommand_cli_from_dict(
        {
            "reproduce": Reproduce,
            "train": Train,
            "prepare": Prepare,
            "evaluate": Evaluate,
            "convert": Convert,
            "calibrate": Calibrate,
            "inspect": Inspect,
        },
        prog="ssmax",
        description="Scalable-Softmax (arXiv 2501.19399): attention that holds at any context length.",
        args=arguments,
    )
    sys.exit(_run(command))


def _run(command: Any) -> int:
    again = "the same command continues, finished stages are kept"
    try:
        command.run()
    except UserError as error:
        return _say(str(error), 2)
    except RunFailed as error:
        return _say(str(error), 1)
    except KeyboardInterrupt:
        return _say(f"interrupted; {again}", 130)
    except ModuleNotFoundError as error:
        return _say(f"the package {error.name!r} is missing; {EXTRAS} brings it", 2)
    except OSError as error:
        status = 1 if error.errno == errno.ENOSPC else 2
        return _say(f"{error.filename or 'the output folder'}: {error.strerror or error}; {again}", status)
    return 0


def _say(message: str, status: int) -> int:
    print(f"ssmax: {' '.join(message.split())}", file=sys.stderr)
    return status
