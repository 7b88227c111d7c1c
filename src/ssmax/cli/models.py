"""ssmax evaluate, convert, calibrate, inspect and bench: any model of transformers, and what SSMax costs."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from ssmax.cli.texts import TEXTS_HELP
from ssmax.compare import report as longcontext
from ssmax.compare.settings import Settings
from ssmax.runs.folder import RunFolder

__all__ = ["Bench", "Calibrate", "Convert", "Evaluate", "Inspect"]

EvaluateOptions: Any = dataclasses.make_dataclass(
    "EvaluateOptions",
    [
        (f.name, Annotated[f.type, tyro.conf.arg(help=f.metadata["help"])], f.default)  # pyrefly: ignore
        for f in dataclasses.fields(Settings)
        if "help" in f.metadata
    ],
    frozen=True,
)


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
    texts: Annotated[str | None, tyro.conf.arg(help=TEXTS_HELP)] = None
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
        from ssmax.compare.run import Machine, evaluate, filled_in, plan  # loads torch and transformers

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
            help="ssmax: s log n, learned. Other learned laws: ssmax-power, query-aware, temperature. Fixed laws: ssmax-fixed "
            "(log n), qwen-1, yarn, llama-4, ministral-3. See docs/laws.md."
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


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure what SSMax costs here, as a ratio to plain attention, contenders in alternation in one process.

    A contender is compared with the float64 reference first; a wrong one gets no speed. Prints a table and leaves
    OUT/CASE.jsonl (every number, with versions) and OUT/CASE.png. Let nothing else run meanwhile.
    """

    cases: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="CASE",
            help="attention: forward and backward by length. decode: sharp decoding behind long caches. model: a converted "
            "model. evaluation: measuring a model, over a plain forward. training: the recipe tiny over a bare loop, and that "
            "compiled. peer: beside the package scalable-softmax. gradient: error of ds in bfloat16. scale: cost and memory "
            "from formulae, and how far they hold here. Default: all that run here.",
        ),
    ] = ()
    out: Annotated[Path, tyro.conf.arg(help="Folder for rows and figures.")] = Path("bench")
    dry_run: Annotated[bool, tyro.conf.arg(help="List what would run and about how long; measure nothing.")] = False

    def run(self) -> None:
        """Run it."""
        from ssmax.bench.command import bench  # loads torch

        bench(list(self.cases), self.out, dry_run=self.dry_run)


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text
