"""ssmax export: a model for other engines."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

__all__ = ["Export"]


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a model for another engine, which then computes it exactly, or say why it would not.

    gguf: one file for stock llama.cpp, tokenizer included. It takes models of the families Llama, Mistral and Qwen 2 whose layers are all
    converted, without b.
    """

    format: Annotated[Literal["gguf"], tyro.conf.Positional, tyro.conf.arg(help="The format.")]
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help="Folder of a model and its tokenizer.")]
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help="New file.")]
    dtype: Annotated[
        Literal["f32", "f16", "q8_0"], tyro.conf.arg(help="Precision of the matrices; q8_0 is blocks of eight bits.")
    ] = "f16"
    dry_run: Annotated[bool, tyro.conf.arg(help="Check the model, write nothing.")] = False

    def run(self) -> None:
        """Run it."""
        from ssmax.serving.gguf import export_gguf  # loads torch and transformers

        print("\n".join(export_gguf(self.source, self.target, self.dtype, dry_run=self.dry_run)))
