"""README.md: the model card of a saved model."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData, metadata_load, try_to_load_from_cache
from torch import Tensor
from transformers import PreTrainedModel

from ssmax.hf.portable.code_file import CODE_FILE, PREFIX, formula
from ssmax.hf.portable.mlx_file import MLX_FILE
from ssmax.hf.private import NAME_KEY
from ssmax.private import saved_name
from ssmax.runs.files import write_atomically
from ssmax.versions import INSTALL, SUPPORTED

CARD = "README.md"
TEMPLATE = (
    "This model card has been automatically generated"  # in the card that transformers pushes where there is none
)
TAGS = ["ssmax", "scalable-softmax", "long-context", "arxiv:2501.19399"]
# Fields of a source's card that also hold for the converted model.
INHERITED = ("license", "license_name", "license_link", "base_model", "language")
SIGNED = "<!-- Written by ssmax ({}). A card that was changed is kept. -->\n"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
FILE_NAME = re.compile(r"(?:\./)?([\w-][\w.-]*(?:/[\w-][\w.-]*)*)")

HEAD = """---
{data}
---

# {title}

In {scaled} of its attention modules, each query is multiplied by {formula} before attention
([Scalable-Softmax](https://arxiv.org/abs/2501.19399)). n is the number of keys that the query sees{learned}.
{origin}"""

TEXT = """
## How to load it

```python
{load}
```

{alone}{mlx}

**Without ssmax and `trust_remote_code`, it is another model.** `{base}.from_pretrained` then loads the softmax model, without the scales.
transformers prints a table of unexpected keys that end in `ssmax.weight`, and raises no error.
{training}{values}{losses}"""

ALONE = """`{code}.py` in this folder needs only transformers {version} or later. With the package ssmax ({install}),
`import ssmax.hf` can replace it."""

# Families with a softcap.
CAPPED = """The model needs the package ssmax ({install}). Its logits are capped, and `{code}.py` in this folder
refuses to compute that without the package."""

AUTO = """from transformers import {auto}

model = {auto}.from_pretrained(path, trust_remote_code=True)  # path: this folder, or this repository's name"""

# No Auto class makes the saved class.
NO_AUTO = """from transformers.dynamic_module_utils import get_class_from_dynamic_module

{kind} = get_class_from_dynamic_module("{code}.{kind}", path)  # path: this folder, or this repository's name
model = {kind}.from_pretrained(path)"""

MLX = f"""
`{MLX_FILE}` computes it in mlx-lm, with `--trust-remote-code`."""

ONNX = f"""
## How to run it

`model.onnx` computes the model in float32, in ONNX Runtime and OpenVINO. n is counted from `attention_mask`. config.json is
that of the softmax model: what SSMax adds is in the graph.

- Inputs: {{inputs}}
- Outputs: {{outputs}}

Written by `ssmax export onnx` ({INSTALL.replace("NAME", "export")}).
"""

TRAINING = """
**Training.** What a scale learns must not be decayed. transformers' Trainer decays it where `weight_decay` is not 0 (the default is 0), unless `ssmax.hf` is
imported.
"""


def write_card(
    model: PreTrainedModel,
    auto: str | None,
    folder: Path,
    losses: Sequence[tuple[str, float, float]] = (),
    measured: str = "",
    values: bool = True,
) -> None:
    """Write the card of a converted model into a folder, unless the folder has a card that somebody wrote or changed.

    License, base model and language come from the source's own card or config. What is not known is
    left out.

    Args:
        model: a converted model.
        auto: the Auto class that loads it; None if there is none.
        folder: folder of the saved model.
        losses: loss by position, if it was measured: (positions, before, after), in nats per token.
        measured: the text on which it was measured, in words.
        values: show the learned values. False if a state_dict is saved, whose values may differ.
    """
    path = folder / CARD
    if path.exists() and not _ours(path):
        return
    text = _text(model, auto, losses, measured, values)
    write_atomically(path, text + SIGNED.format(_digest(text)))


def write_onnx_card(model: PreTrainedModel, folder: Path, inputs: str, outputs: str) -> None:
    """Write the card of a converted model that was exported to ONNX.

    Args:
        model: the converted model.
        folder: folder of model.onnx.
        inputs: names of the graph's inputs.
        outputs: names of its outputs.
    """
    text = _head(model, _scales(model), library_name="onnx", tags=TAGS) + ONNX.format(inputs=inputs, outputs=outputs)
    write_atomically(folder / CARD, text)


def keep_card(folder: Path, card: bytes) -> None:
    """Restore the card in a folder if transformers has replaced it by its empty template, as it does before a push."""
    path = folder / CARD
    if path.exists() and TEMPLATE in path.read_text(errors="replace"):
        write_atomically(path, card)


def _ours(path):
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    text = "".join(lines[:-1])
    return bool(lines) and lines[-1] == SIGNED.format(_digest(text))


def _digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _text(model, auto, losses, measured, values):
    scales, base = _scales(model), _base(model)
    first = next(iter(scales.values()))
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    task = "text-generation" if auto == "AutoModelForCausalLM" else None
    head = _head(model, scales, library_name="transformers", pipeline_tag=task, tags=sorted([*TAGS, "custom_code"]))
    return head + TEXT.format(
        load=AUTO.format(auto=auto) if auto else NO_AUTO.format(kind=f"{PREFIX}{base}", code=CODE_FILE),
        alone=(CAPPED if capped else ALONE).format(
            code=CODE_FILE,
            version=".".join(map(str, SUPPORTED["transformers"][0])),
            install=INSTALL.replace("NAME", "hf"),
        ),
        mlx=MLX if getattr(model.config, "model_file", None) == MLX_FILE else "",
        base=base,
        training=TRAINING if next(first.parameters(), None) is not None else "",
        values=_values(scales) if values else "",
        losses=_losses(losses, measured),
    )


def _head(model, scales, **data):
    """Return the first part of a card: its data, and what the model is."""
    first, (facts, known) = next(iter(scales.values())), _facts(model)
    named = facts.get("base_model") if known else None
    return HEAD.format(
        data=ModelCardData(**data, **facts).to_yaml(),
        title=f"{named if isinstance(named, str) else _base(model)} with Scalable-Softmax",
        scaled=len(scales),
        formula=formula(first),
        learned=_learned(list(first.learned)),
        origin=_origin(facts, known),
    )


def _learned(names):
    if not names:
        return ""
    return f"; {' and '.join(names)} {'is' if len(names) == 1 else 'are'} learned, one for each head"


def _scales(model):
    return {saved_name(name): module.ssmax for name, module in model.named_modules() if hasattr(module, "ssmax")}


def _base(model):
    return next(kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.")).__name__


def _facts(model: PreTrainedModel) -> tuple[dict[str, Any], bool]:
    """Return license, base model and language of the source model, as far as its card or config names them.

    Also return whether the model is known to be made from that base model. Otherwise its source was.
    """
    source = str(getattr(model.config, NAME_KEY, "") or "")
    folder = Path(source)
    if source and folder.is_dir():
        facts, named = _card_data(folder / CARD), _config_name(folder / "config.json")
    elif HUB_NAME.fullmatch(source):
        card = try_to_load_from_cache(source, CARD)
        facts, named = _card_data(Path(card)) if isinstance(card, str) else {}, source
    else:
        return {}, False
    beside = FILE_NAME.fullmatch(facts.get("license_link", ""))  # a file of the source
    if HUB_NAME.fullmatch(named):
        link = {"license_link": f"https://huggingface.co/{named}/blob/main/{beside[1]}"} if beside else {}
        return {**facts, **link, "base_model": named}, True
    return facts, "base_model" in facts and _ours(folder / CARD)


def _card_data(path):
    try:
        data = metadata_load(path) or {}
    except Exception:  # no card, or one whose data yaml cannot read: nothing is known then
        return {}
    return {name: data[name] for name in INHERITED if name in data and _is_plain(name, data[name])}


def _is_plain(name, value):
    words = value if isinstance(value, list) and name in ("base_model", "language") else [value]
    link = re.compile(rf"https?://\S+|{FILE_NAME.pattern}")
    pattern = {"base_model": HUB_NAME, "license_link": link}.get(name, re.compile(r"[\w. ()+,-]{1,80}"))
    return bool(words) and all(isinstance(word, str) and pattern.fullmatch(word) for word in words)


def _config_name(path):
    try:
        config = json.loads(path.read_bytes())
        named = config.get(NAME_KEY, "")
    except (OSError, ValueError, AttributeError):
        return ""
    return named if isinstance(named, str) and not Path(named).exists() else ""


def _origin(facts, known):
    license = "" if "license" in facts else " Its license, which is not recorded here, also applies to this one."
    named = facts.get("base_model", [])
    names = ", ".join(named if isinstance(named, list) else [named])
    if known:
        return f"\nMade from {names}.{license}\n"
    older = f"; its own card names {names} as its base model" if names else ""
    return f"\nThe model that it was made from is not recorded here{older}.{license}\n"


def _values(scales):
    """Return a table of the learned values of each module; nothing if none are learned, or they are not all on this process."""
    rows = [(name, list(scale.learned.values())) for name, scale in scales.items()]
    if not all(parts and all(type(part.data) is Tensor and not part.is_meta for part in parts) for _, parts in rows):
        return ""
    names = list(next(iter(scales.values())).learned)
    quantiles = torch.tensor([0.0, 0.5, 1.0])
    lines = [
        f"\n## {' and '.join(names)}\n",
        "| attention module | " + " | ".join(f"{name}: least | median | largest" for name in names) + " |",
        "|---|" + "---:|" * 3 * len(names),
    ]
    for name, parts in rows:
        cells = [f"{float(x):.4f}" for part in parts for x in part.detach().float().cpu().quantile(quantiles)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _losses(losses, measured):
    if not losses:
        return ""
    rows = [f"| {name} | {before:.4f} | {after:.4f} | {after - before:+.4f} |" for name, before, after in losses]
    head = ["| positions | softmax model before | this model | change |", "|---|---:|---:|---:|"]
    return "\n".join([f"\n## Loss by position\n\nIn nats per token, {measured}.\n", *head, *rows]) + "\n"
