"""The command line: ssmax reproduce."""

import dataclasses
import errno
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from ssmax import report
from ssmax.lab.errors import RunFailed, UserError
from ssmax.lab.folder import RunFolder
from ssmax.lab.recipes import RECIPES, Recipe

__all__ = ["main"]

EXTRAS = "pip install 'ssmax[lab]'"


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Train Softmax and SSMax side by side, measure them far past their training length, and report.

    Leaves runs/NAME/ with rows.jsonl (every number), figures/ (PNG and SVG) and report.html. The same command
    continues an interrupted run and repeats nothing that is finished.
    """

    recipe: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="{tiny,smoke}", help="tiny: 2 CPU cores, a quarter of an hour. smoke: a minute, shows nothing."
        ),
    ] = "tiny"
    corpus: Annotated[
        str | None,
        tyro.conf.arg(
            help="A text file, a folder of text files, or a data set on a hub. Default: Python's own standard library."
        ),
    ] = None
    out: Annotated[Path | None, tyro.conf.arg(help="Folder of the run. Default: runs/RECIPE.")] = None
    seeds: Annotated[tuple[int, ...] | None, tyro.conf.arg(help="Seeds, one model each. Default: the recipe's.")] = None
    steps: Annotated[int | None, tyro.conf.arg(help="Pretraining steps. Default: the recipe's.")] = None
    train_length: Annotated[int | None, tyro.conf.arg(help="Tokens of a training window. Default: the recipe's.")] = (
        None
    )
    learning_rate: Annotated[float | None, tyro.conf.arg(help="Of pretraining. Default: the recipe's.")] = None
    warmup_steps: Annotated[int | None, tyro.conf.arg(help="Of pretraining. Default: the recipe's.")] = None

    def run(self) -> None:
        """Run it."""
        recipe = self._recipe()
        folder = self.out or Path("runs") / recipe.name
        run = RunFolder(folder, recipe, self.corpus)
        with run.opened():
            if not run.finished:
                from ssmax.lab.reproduce import reproduce  # loads torch and transformers

                reproduce(recipe, self.corpus, run, cache=folder.parent / "cache")
            found = report.build(folder)
        print(report.claims_text(found, shutil.get_terminal_size().columns))
        print(f"Report: {(folder / 'report.html').resolve()}")

    def _recipe(self) -> Recipe:
        if self.recipe not in RECIPES:
            raise UserError(f"there is no recipe {self.recipe!r}; recipes are {', '.join(RECIPES)}")
        names = ("seeds", "steps", "train_length", "learning_rate", "warmup_steps")
        chosen = {name: value for name in names if (value := getattr(self, name)) is not None}
        for name, value in chosen.items():
            if value == () or (name != "seeds" and value <= 0) or (name == "seeds" and min(value) < 0):
                raise UserError(f"--{name.replace('_', '-')} must be positive, got {value}")
        return dataclasses.replace(RECIPES[self.recipe](), **chosen)


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; exit status 2 for what the user can mend, 1 for a failed run, 130 for Ctrl-C."""
    command = tyro.extras.subcommand_cli_from_dict(
        {"reproduce": Reproduce},
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
