"""The folder of a run: its configuration, its finished stages, and a lock for the process that works in it. No torch."""

import dataclasses
import fcntl
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ssmax.errors import UserError
from ssmax.runs.files import write_atomically
from ssmax.runs.rows import is_whole
from ssmax.versions import __version__

# Names of half-written files and folders; write_atomically and written_whole put the process's number in them.
HALF_WRITTEN = re.compile(r"\..+\.\d+\.tmp")


def versions() -> dict[str, str]:
    """Return the versions of the packages that numbers depend on. A run does not mix versions."""
    return {"ssmax": __version__, **{name: metadata.version(name) for name in ("torch", "transformers")}}


@dataclass(frozen=True)
class RunFolder:
    """The folder of one recipe on one corpus. A stage is done once its file of rows exists.

    Attributes:
        folder: its path.
        recipe: a frozen dataclass with jobs, stages(job), once (stages that belong to no job) and
            later (values for fields that older versions did not have).
        corpus: --corpus of the command line.
    """

    folder: Path
    recipe: Any
    corpus: str | None

    @property
    def rows_file(self) -> Path:
        """The file of all rows of the finished run."""
        return self.folder / "rows.jsonl"

    @property
    def stages(self) -> list[str]:
        """Names of all stages, in the order of their rows."""
        return [
            *self.recipe.once,
            *(f"{job.name}.{stage}" for job in self.recipe.jobs for stage in self.recipe.stages(job)),
        ]

    def stage_file(self, name: str) -> Path:
        """Return the file of rows of one stage; it exists once the stage is done."""
        return self.folder / "stages" / f"{name}.jsonl"

    def todo(self, job: Any) -> list[str]:
        """Return the stages of a job that are not done, in their order. A continued run starts with the first of them."""
        return [stage for stage in self.recipe.stages(job) if not self.stage_file(f"{job.name}.{stage}").exists()]

    @property
    def finished(self) -> bool:
        """Whether all stages are done and all rows are written."""
        return is_whole(self.rows_file) and all(self.stage_file(name).exists() for name in self.stages)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Lock the folder inside the block, check its configuration, and delete half-written files.

        The system releases the lock when this process ends, also by a kill.

        Raises:
            UserError: the folder belongs to another configuration, or another process works in it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process runs in {self.folder}; wait for it, or give another --out") from None
            if not self._check(fingerprint=None) and self.rows_file.exists():
                raise UserError(f"{self.rows_file} exists, and is not of a run of this folder; give another --out")
            if self.claimed:  # else the files may be anybody's
                self._delete_half_written()
            yield

    def _delete_half_written(self):
        """Delete what a run that was killed has left."""
        for path in [path for path in self.folder.rglob(".*.tmp") if HALF_WRITTEN.fullmatch(path.name)]:
            # missing_ok: it may lie in a folder of this list that is removed already.
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    @property
    def claimed(self) -> bool:
        """Whether the folder belongs to a configuration already."""
        return self._file.exists()

    def claim(self, fingerprint: str) -> None:
        """Write the configuration and the hash of its corpus, or raise UserError if the folder belongs to another one."""
        if not self._check(fingerprint):
            settings = self._settings() | {"corpus_fingerprint": fingerprint}
            write_atomically(self._file, json.dumps(settings, indent=1) + "\n")

    @property
    def _file(self):
        return self.folder / "recipe.json"

    def _settings(self):
        recipe = json.loads(json.dumps(dataclasses.asdict(self.recipe)))
        return {"recipe": recipe, "corpus": self.corpus, "versions": versions()}

    def _check(self, fingerprint):
        """Compare with the folder's configuration, and return whether it has one."""
        if not self._file.exists():
            return False
        try:
            kept = json.loads(self._file.read_bytes())
            made_with = dict(kept.get("versions", {}))
            kept = {
                **json.loads(json.dumps(self.recipe.later)),
                **kept["recipe"],
                "corpus": kept["corpus"],
                "the corpus's hash": kept["corpus_fingerprint"],
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self._file} is damaged; give another --out, or delete that folder") from None
        settings = self._settings()
        wanted = {**settings["recipe"], "corpus": settings["corpus"]}
        if fingerprint is not None:
            wanted["the corpus's hash"] = fingerprint
        changed = [
            f"{name} was {kept.get(name)!r}, is {wanted[name]!r}" for name in wanted if kept.get(name) != wanted[name]
        ]
        if changed:
            raise UserError(
                f"{self.folder} holds a run of another configuration ({', '.join(changed[:3])}); "
                "give another --out, or delete that folder"
            )
        if not is_whole(self.rows_file):  # written last: a finished run cannot mix versions any more
            for name, version in settings["versions"].items():
                if made_with.get(name, version) != version:
                    raise UserError(
                        f"{self.folder} was begun with {name} {made_with[name]}, this is {version}; continue with that "
                        "version, or give another --out"
                    )
        return True
