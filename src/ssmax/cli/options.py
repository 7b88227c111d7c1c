"""Options of the command line: their help and defaults, and groups of them made from the fields of a dataclass."""

import dataclasses
import re
from typing import Annotated, Any

import tyro

TEXTS_HELP = (
    "A text file, a file of rows (.parquet, .jsonl, .json, .csv and more, also compressed), a folder of either, a data set on "
    "disk, or one on a hub as NAME:SUBSET#COLUMN (SUBSET and COLUMN may be left out). Several, with their shares: A=0.7,B=0.3."
)


UNPREFIXED = tyro.conf.arg(name="", prefix_name=False)  # a dataclass of options whose own name is not shown
LONG_NUMBER = re.compile(r"\d+\.\d{5,}")
Flag: Any = Annotated[bool, tyro.conf.FlagCreatePairsOff]  # no --no-dry-run beside --dry-run


def option(text: str, *, unset: str | None = None, metavar: str | None = None) -> Any:
    """Return an option's help; unset says what holds where its value is None."""

    def default(label: str) -> str:
        value = unset if label == "None" and unset else label.strip("'") or "none"
        return "" if label == "False" else f"(default: {LONG_NUMBER.sub(lambda x: f'{float(x[0]):.3g}', value)})"

    return tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint=default)


def option_groups(spec: Any, leave_out: tuple[str, ...] = (), **own: Any) -> Any:
    """Return a dataclass with one dataclass of options for each group of spec's fields, which tyro shows in one box.

    Args:
        spec: a dataclass whose options have group and help in their metadata.
        leave_out: names of fields that are not options.
        own: other types for some of its fields, whose default is then None.
    """
    groups: dict[str, list[Any]] = {}
    for field in dataclasses.fields(spec):
        if "help" in field.metadata and field.name not in leave_out:
            kind = own.get(field.name, Annotated[field.type, option(field.metadata["help"])])  # pyrefly: ignore
            default = None if field.name in own else field.default
            groups.setdefault(field.metadata["group"], []).append((field.name, kind, default))
    return dataclasses.make_dataclass(
        f"{spec.__name__}Options",
        [
            (name, Annotated[made, tyro.conf.OmitArgPrefixes], dataclasses.field(default_factory=made))  # pyrefly: ignore
            for name, fields in groups.items()
            for made in [dataclasses.make_dataclass(name, fields, frozen=True)]
        ],
        frozen=True,
    )


def flat(options: Any) -> dict[str, Any]:
    """Return the values of all groups by name."""
    return {name: value for group in vars(options).values() for name, value in vars(group).items()}


def with_values(options: Any, spec: Any) -> Any:
    """Return the groups with the values of spec's fields; values that are None stay None."""
    return dataclasses.replace(
        options,
        **{
            name: dataclasses.replace(group, **{k: getattr(spec, k) for k, v in vars(group).items() if v is not None})
            for name, group in vars(options).items()
        },
    )


def parse(command: Any, arguments: list[str], prog: str, default: Any = tyro.MISSING_NONPROP) -> Any:
    """Parse the arguments of a command. --help shows the whole help, also together with other arguments."""
    helped = {"-h", "--help"} & set(arguments)  # tyro would leave out the options that are given
    return tyro.cli(command, args=["--help"] if helped else arguments, prog=prog, default=default)
