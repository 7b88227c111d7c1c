"""Finds arguments that an option with several values took by mistake."""

import dataclasses
import itertools
import re
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union

import tyro

from ssmax.errors import UserError
from ssmax.paper.recipes import RECIPES

UNIONS = (Union, types.UnionType)


def layer(value: str) -> str:
    """Return the index of a layer, or its name, which holds an index; raise ValueError for other text."""
    if not re.fullmatch(r"\d+|(\w+\.)+\d+(\.\w+)+", value):
        raise ValueError(value)
    return value


# Options whose values are any text, and what fits; wrong values are reported by the library.
TEXTS: dict[str, Any] = {"--inits": Literal["identity", "matched"] | float, "--layers": layer}


def check_values(commands: dict[str, Any], arguments: list[str]) -> None:
    """Raise UserError if an option that takes several values took an argument that was not meant for it.

    Args:
        commands: the class of each command, whose fields are its options.
        arguments: arguments of the command line.
    """
    if not arguments or arguments[0] not in commands:
        return
    name, *rest = arguments
    positionals = [field for field, kind in _fields(commands[name]) if tyro.conf.Positional in kind.__metadata__]
    needed = sum(field.default is dataclasses.MISSING and field.name != "models" for field in positionals)
    first = len(list(itertools.takewhile(lambda argument: not argument.startswith("-"), rest)))
    if not positionals or (first and needed <= first):
        return
    options = dict(_options_of_several(commands[name]))
    options |= {name: kind for name, kind in TEXTS.items() if name in options}
    for at, argument in enumerate(rest):
        kind = options.get(argument.replace("_", "-"))
        values = list(itertools.takewhile(lambda value: not value.startswith("--"), rest[at + 1 :])) if kind else []
        strange = [value for value in values if not _fits(value, kind)]
        if strange and not (needed and len(strange) == needed == len(values) - 1):  # a case that tyro parses rightly
            meant = positionals[0].name.removesuffix("s")
            raise UserError(
                f"{argument} took {strange[0]!r} as one of its values; put the {meant} first: "
                f"ssmax {name} {' '.join(strange)} {argument} ..."
            )


def _fields(command: Any) -> Iterator[tuple[Any, Any]]:
    hints = typing.get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        kind = hints[field.name]
        yield field, kind if typing.get_origin(kind) is Annotated else Annotated[kind, None]


def _options_of_several(command: Any) -> Iterator[tuple[str, Any]]:
    """Yield each option that takes several values, and the type of one value."""
    for field, kind in _fields(command):
        plain = kind.__origin__
        if dataclasses.is_dataclass(plain):
            yield from _options_of_several(plain)
        elif tyro.conf.Positional not in kind.__metadata__:
            for choice in typing.get_args(plain) if typing.get_origin(plain) in UNIONS else (plain,):
                if typing.get_origin(choice) is tuple:
                    yield f"--{field.name.replace('_', '-')}", typing.get_args(choice)[0]


def _fits(value: str, kind: Any) -> bool:
    if typing.get_origin(kind) in UNIONS:
        return any(_fits(value, choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    try:
        return kind(value) not in RECIPES
    except ValueError:
        return False
