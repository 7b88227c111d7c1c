"""ssmax evaluate, convert, calibrate, inspect and export (any model of transformers), bench (the cost of SSMax) and demo."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ssmax.cli.options import TEXTS_HELP, UNPREFIXED, Flag, flat, option, option_groups
from ssmax.compare.settings import Settings
from ssmax.errors import UserError
from ssmax.runs.failures import AGAIN
from ssmax.runs.folder import RunFolder

EvaluateOptions: Any = option_groups(Settings)
Source: Any = Annotated[
    str, tyro.conf.Positional, option("Folder of a transformers model, or its name on a hub.", metavar="SOURCE")
]
Target: Any = Annotated[Path, tyro.conf.Positional, option("Folder to write. It must not exist yet.", metavar="TARGET")]
Texts: Any = Annotated[str | None, option(TEXTS_HELP, unset="Python's standard library", metavar="SOURCE")]
Layers: Any = Annotated[
    tuple[str, ...] | None,
    option(
        "Layers to convert: indices, or names as ssmax inspect shows them.",
        unset="all with full attention",
        metavar="[LAYER ...]",
    ),
]


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Measure models at long context, side by side: loss by position, sharpness of attention, retrieval.

    Takes any causal model of transformers, converted or not. Leaves OUT/rows.jsonl (every number),
    OUT/figures/ (PNG and SVG) and OUT/report.html, and prints tables. The same command continues an
    interrupted run and repeats nothing that is finished.

    Example: ssmax evaluate SmolLM2 SmolLM2-ssmax --length 8192 --tasks needle several
    """

    again = AGAIN

    models: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            help="Folders of transformers models with their tokenizers, or names on a hub.",
            metavar="MODEL ...",
            help_behavior_hint="",
        ),
    ]
    texts: Texts = None
    out: Annotated[Path, option("Folder of the run.")] = Path("runs/evaluate")
    device: Annotated[str, option("cpu, cuda, cuda:1 or mps. auto: the fastest of this machine.")] = "auto"
    chunk: Annotated[int, option("Tokens in a forward pass. Fewer need less memory; another run may change it.")] = 1024
    json: Annotated[Flag, option("Print the tables as JSON.")] = False
    dry_run: Annotated[
        Flag, option("Read texts and tokenizers, say how many tokens the run reads, and write nothing.")
    ] = False
    options: Annotated[EvaluateOptions, UNPREFIXED] = dataclasses.field(default_factory=EvaluateOptions)

    def run(self) -> None:
        """Run it."""
        settings = Settings("evaluate", self.models, **flat(self.options))
        from ssmax.compare import report  # loads numpy
        from ssmax.compare.run import Machine, evaluate, filled_in, plan  # loads torch and transformers

        machine = Machine(self.device, self.chunk)
        settings = filled_in(settings)
        if self.dry_run:
            print("\n".join(plan(settings, self.texts)))
            return
        run = RunFolder(self.out, settings, self.texts)
        with run.opened():
            evaluate(settings, self.texts, run, machine)
            tables = report.build(self.out)
        if self.json:
            print(report.tables_json(tables))
        else:
            print(f"{report.tables_text(tables)}\n\nReport: {(self.out / 'report.html').resolve()}")


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert a softmax model to SSMax and save it as a new folder.

    The new folder loads with AutoModelForCausalLM after "import ssmax.hf", or with
    trust_remote_code=True.

    Example: ssmax convert SmolLM2 SmolLM2-ssmax --init identity
    """

    again = "nothing was written"

    source: Source
    target: Target
    init: Annotated[
        str,
        option(
            "matched: s = 1 / mean(log n), on average as sharp as before (the paper's start). identity: s = 0 and b = 1, the "
            "same model, to be trained further. Or a number for s."
        ),
    ] = "matched"
    train_length: Annotated[
        int | None, option("Training length for matched, in tokens.", unset="from the config", metavar="INT")
    ] = None
    bias: Annotated[bool | None, option("Learn b as well.", unset="only with identity", metavar="{True,False}")] = None
    layers: Layers = None
    law: Annotated[
        str,
        option(
            "ssmax: s log n, with s learned. Other learned laws: ssmax-power, query-aware, temperature. Laws that learn "
            "nothing: ssmax-fixed (log n), qwen-1, yarn, llama-4, ministral-3. See docs/laws.md."
        ),
    ] = "ssmax"
    law_parameters: Annotated[
        dict[str, float],
        option("Parameters of the law; yarn needs: factor 4.", metavar="[NAME FLOAT ...]"),
    ] = dataclasses.field(default_factory=dict)
    dry_run: Annotated[Flag, option("Say what would be done, and write nothing.")] = False

    def run(self) -> None:
        """Run it."""
        from ssmax.model_folders import convert_folder  # loads torch and transformers

        lines = convert_folder(
            self.source,
            self.target,
            dry_run=self.dry_run,
            init=_number(self.init),
            train_length=self.train_length,
            bias=self.bias,
            layers=_layers(self.layers),
            law=self.law,
            law_parameters=self.law_parameters,
        )
        print("\n".join(lines))


@dataclasses.dataclass(frozen=True)
class Fit:
    """How s and b are fitted."""

    length: Annotated[
        int | None,
        option("Tokens in each piece of text. Longer pieces teach more of n.", unset="from the config", metavar="INT"),
    ] = None
    steps: Annotated[int, option("Steps of each fit, one piece of text each.")] = 30
    inits: Annotated[tuple[str, ...], option("Starting points, one fit each: matched, identity, or numbers for s.")] = (
        "identity",
        "matched",
    )
    layers: Layers = None
    bias: Annotated[bool, option("Fit b as well.")] = True
    learning_rate: Annotated[float, option("Change of the multipliers in a step (root mean square).")] = 0.006
    seed: Annotated[int, option("Seed of the order of the texts.")] = 0


@dataclasses.dataclass(frozen=True)
class Calibrate:
    """Fit s and b of each head on long texts, with all other weights frozen, and save the model as a new folder.

    Tries each starting point, keeps the best on held-out text, and prints the loss by position
    before and after. If no fit is better than the model as it was, it says so and writes nothing.

    Example: ssmax calibrate SmolLM2 SmolLM2-ssmax --texts books/ --length 4096
    """

    again = "nothing was written"

    source: Source
    target: Target
    texts: Texts = None
    theta_factor: Annotated[float, option("Factor of RoPE's theta, saved with the model, for longer contexts.")] = 1.0
    checkpointing: Annotated[Flag, option("Recompute activations: less memory, a third more time.")] = False
    dry_run: Annotated[Flag, option("Load everything, say what would be done, and write nothing.")] = False
    fit: Annotated[Fit, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=Fit)

    def run(self) -> None:
        """Run it."""
        from ssmax.model_folders import calibrate_folder  # loads torch and transformers

        fit = dict(vars(self.fit))
        layers = _layers(fit.pop("layers"))
        lines = calibrate_folder(
            self.source,
            self.target,
            self.texts,
            theta_factor=self.theta_factor,
            checkpointing=self.checkpointing,
            dry_run=self.dry_run,
            **fit | {"inits": list(map(_number, self.fit.inits)), "layer_sets": [layers]},
        )
        print("\n".join(lines))


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show which layers of a model carry SSMax, by which law, and s and b of each head.

    Example: ssmax inspect SmolLM2-ssmax --figure scales.png
    """

    source: Source
    figure: Annotated[
        Path | None, option("File to draw s and b of each head in, .png or .svg.", unset="no figure", metavar="PATH")
    ] = None
    dry_run: Annotated[Flag, option("Draw no figure.")] = False

    def run(self) -> None:
        """Run it."""
        from ssmax.model_folders import inspect_folder

        print("\n".join(inspect_folder(self.source, None if self.dry_run else self.figure)))


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure the cost of SSMax on this machine, as a ratio to plain attention.

    Contenders run in turn, in one process. Each is compared with a float64 reference first; a wrong
    one is not timed. Prints a table and leaves OUT/CASE.jsonl (every number, with versions) and
    OUT/CASE.png. Run nothing else at the same time.

    Example: ssmax bench attention decode --out bench
    """

    cases: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="[CASE ...]",
            help="attention: forward and backward by length. decode: sharp decoding after long caches. grouped: a decode step "
            "whose query heads share keys. generate: tokens a "
            "second of generate, by cache, and which layers are sharp. blocks: keys that a prefill could skip. model: a converted "
            "Llama. modules: nn.TransformerEncoder and nanoGPT. evaluation: measurements, against a plain forward pass. training: the "
            "recipe tiny, against a bare loop. peer: against the package scalable-softmax. gradient: errors of the gradients of s "
            "and b in bfloat16. kernel: impl='triton' on a GPU; --dry-run compiles it without one. kernel-gradient: the same "
            "errors with impl='triton', in Triton's interpreter. scale: measured cost and memory, against the formulae.",
            help_behavior_hint="(default: all that can run on this machine)",
        ),
    ] = ()
    model: Annotated[
        Path | None,
        option(
            "For generate: folder of a model with its tokenizer; a model without SSMax is converted in memory.",
            unset="the small model that ships with ssmax",
            metavar="PATH",
        ),
    ] = None
    contexts: Annotated[
        tuple[int, ...] | None, option("For generate: tokens of the prompt.", unset="8192 32768", metavar="[INT ...]")
    ] = None
    batches: Annotated[
        tuple[int, ...] | None, option("For generate: prompts at once.", unset="1 4", metavar="[INT ...]")
    ] = None
    out: Annotated[Path, option("Folder for rows and figures.")] = Path("bench")
    dry_run: Annotated[Flag, option("List the cases and their minutes, and measure nothing.")] = False

    def run(self) -> None:
        """Run it."""
        from ssmax.bench.command import bench  # loads torch

        given = {"model": self.model, "contexts": self.contexts, "batches": self.batches}
        given = {name: value for name, value in given.items() if value is not None}
        bench(list(self.cases), self.out, dry_run=self.dry_run, **given)


def _layers(given: tuple[str, ...] | None) -> list[int | str] | None:
    return None if given is None else [int(name) if name.isdecimal() else name for name in given]


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a model for another engine that computes the same, or say why that is not possible.

    gguf: one file for stock llama.cpp, with the tokenizer. It takes models of the families Llama,
    Mistral and Qwen 2 whose layers are all converted, without b.

    onnx: a folder with the tokenizer and a graph for ONNX Runtime and OpenVINO, in float32. The
    graph has a KV cache if all layers attend in full. It takes the models that transformers' own
    exporter takes.

    Example: ssmax export gguf SmolLM2-ssmax SmolLM2-ssmax.gguf --dtype f16
    """

    again = "nothing was written"

    format: Annotated[Literal["gguf", "onnx"], tyro.conf.Positional, option("Format of the file or folder.")]
    source: Annotated[str, tyro.conf.Positional, option("Folder of a model and its tokenizer.", metavar="SOURCE")]
    target: Annotated[
        Path, tyro.conf.Positional, option("File or folder to write. It must not exist yet.", metavar="TARGET")
    ]
    dtype: Annotated[
        Literal["f32", "f16", "q8_0"] | None,
        option(
            "Precision of the matrices of gguf: 32, 16 or 8 bits for each number.",
            unset="f16",
            metavar="{f32,f16,q8_0}",
        ),
    ] = None
    dry_run: Annotated[Flag, option("Check the model, and write nothing.")] = False

    def run(self) -> None:
        """Run it."""
        if self.format == "onnx":
            if self.dtype is not None:
                raise UserError("--dtype is for gguf; the graph of onnx computes in float32")
            from ssmax.serving.onnx import export_onnx  # loads torch and transformers

            print("\n".join(export_onnx(self.source, self.target, dry_run=self.dry_run)))
            return
        from ssmax.serving.gguf import export_gguf  # loads torch and transformers

        print("\n".join(export_gguf(self.source, self.target, self.dtype or "f16", dry_run=self.dry_run)))


@dataclasses.dataclass(frozen=True)
class Demo:
    """Show what SSMax changes, in a minute: two small models that ship with the package read long texts.

    Prints loss by position, needles found and the attention of the best head. Leaves a page with a
    slider over the context length. Downloads nothing.

    Example: ssmax demo --out demo.html
    """

    out: Annotated[Path, option("Page to write, an HTML file that opens offline.")] = Path("ssmax-demo.html")

    def run(self) -> None:
        """Run it."""
        from ssmax.demo.run import demo  # loads torch and transformers

        print("\n".join(demo(self.out)))
