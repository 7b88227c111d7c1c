"""ssmax export: write a model for other engines."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ssmax.cli.options import Flag, option

__all__ = ["Export"]


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
        Literal["f32", "f16", "q8_0"], option("Precision of the matrices of gguf: 32, 16 or 8 bits for each number.")
    ] = "f16"
    dry_run: Annotated[Flag, option("Check the model, and write nothing.")] = False

    def run(self) -> None:
        """Run it."""
        if self.format == "onnx":
            from ssmax.serving.onnx import export_onnx  # loads torch and transformers

            print("\n".join(export_onnx(self.source, self.target, dry_run=self.dry_run)))
            return
        from ssmax.serving.gguf import export_gguf  # loads torch and transformers

        print("\n".join(export_gguf(self.source, self.target, self.dtype, dry_run=self.dry_run)))
