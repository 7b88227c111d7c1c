"""How a source of text is spelled, for every command that takes one."""

__all__ = ["TEXTS_HELP"]

TEXTS_HELP = (
    "A file of text or of rows (.parquet, .jsonl, .json, .csv and more, also packed), a folder of either, a data set saved on disk, "
    "or one on a hub as NAME:SUBSET#COLUMN (each but the name may be left out); several with their shares as A=0.7,B=0.3. What cannot be read is named. "
    "Default: Python's own standard library."
)
