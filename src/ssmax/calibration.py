"""calibrate: fit s and b of each head of a model on a few long texts, with all other weights frozen."""

import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from ssmax.arguments import whole_number
from ssmax.conversion import convert, revert
from ssmax.evaluation import loss_by_position
from ssmax.evaluation.reading import check_reads_text, eval_mode
from ssmax.modules.whole import scale_parameters, whole_or_not_at_all
from ssmax.nn import SSMaxScale

HELD_OUT = 4  # held-out pieces, if the caller gives no held-out text
LOSS_POSITIONS = 1024  # positions of a piece whose loss a step takes: at most 1024 x vocabulary logits
CHECKS = 6  # measurements of the held-out loss in one fit
PATIENCE = 2  # such measurements without a gain before a fit ends


@dataclass(frozen=True)
class Trial:
    """One fit: its starting point, its best held-out loss (mean over octaves of position, nats), and the step of that loss."""

    init: str | float
    layers: list[int]
    loss: float
    step: int


@dataclass(frozen=True)
class Calibration:
    """The result of calibrate.

    Attributes:
        length: tokens in each piece of text.
        pieces: number of held-out pieces that the losses average.
        positions: last position of each octave (63, 127, ...).
        before: held-out loss of each octave before the fit, in nats per token.
        after: the same after the fit.
        mean_before: held-out loss over all positions before the fit.
        mean_after: the same after the fit.
        trials: all fits.
        chosen: the fit that was kept. None if none was better than the model as it was; the model is then unchanged.
    """

    length: int
    pieces: int
    positions: list[int]
    before: list[float]
    after: list[float]
    mean_before: float
    mean_after: float
    trials: list[Trial]
    chosen: Trial | None

    def __str__(self) -> str:
        lines = [f"Loss by position, {self.pieces} held-out pieces of {self.length:,} tokens (nats)"]
        lines.append(f"{'position':>15}  {'before':>7}  {'after':>7}  {'change':>7}")
        first = 0
        for last, before, after in zip(self.positions, self.before, self.after, strict=True):
            lines.append(f"{f'{first:,} - {last:,}':>15}  {before:7.4f}  {after:7.4f}  {after - before:+7.4f}")
            first = last + 1
        change = self.mean_after - self.mean_before
        lines.append(f"{'all':>15}  {self.mean_before:7.4f}  {self.mean_after:7.4f}  {change:+7.4f}")
        lines += [
            f"{'kept' if trial is self.chosen else 'tried'}: init {trial.init}, {len(trial.layers)} layers, "
            f"best at step {trial.step}: {trial.loss:.4f} (mean over octaves)"
            for trial in self.trials
        ]
        if self.chosen is None:
            lines.append("No fit was better than the model as it was: nothing has changed.")
        elif change > 0:
            lines.append(f"Note: better over octaves, but over all positions the loss ROSE by {change:.4f} nats.")
        return "\n".join(lines)


@whole_or_not_at_all()
def calibrate(
    model: PreTrainedModel,
    texts: Sequence[str] | Sequence[Tensor] | Tensor,
    tokenizer: Any = None,
    *,
    held_out: Sequence[str] | Sequence[Tensor] | Tensor | None = None,
    length: int | None = None,
    inits: Sequence[str | float] = ("identity", "matched"),
    layer_sets: Sequence[list[int] | None] = (None,),
    bias: bool = True,
    steps: int = 30,
    learning_rate: float = 0.006,
    seed: int = 0,
) -> Calibration:
    """Fit s and b of each head on long texts, with all other weights frozen, and keep the best fit on held-out text.

    Each init is fitted with each layer set, from the same start, by momentum along the gradient at unit length. The fit with
    the lowest held-out loss stays in the model. If none beats the model as it was, the model is unchanged. The loss of a piece
    is taken at positions spread evenly over log position, so that each octave of n counts alike; the held-out loss is the mean
    over octaves. With activation checkpointing the fit needs less memory and a third more time.

    Args:
        model: a transformers model, converted in place; or a converted model, whose fit starts from its present s and b.
        texts: documents, as strings (needs tokenizer) or as token ids (1-D each, or one (B, T) tensor).
        tokenizer: the model's tokenizer, for strings.
        held_out: documents for the held-out loss. Default: the last quarter of texts, at most 4 pieces.
        length: tokens in each piece. Default: the config's max_position_embeddings. Shorter is faster, but teaches less of n.
        inits: starting points to try, as in ssmax.convert.
        layer_sets: layers to try, as in ssmax.convert. None is every layer with full attention.
        bias: fit b as well. "identity" needs it.
        steps: steps of each fit, one piece each.
        learning_rate: change of the multipliers in a step (root mean square). It falls to a twentieth over the steps.
        seed: seed of the order of pieces and of the positions.

    Returns:
        A Calibration: losses before and after, and all fits. Printed, it is a table.

    Raises:
        TypeError: texts are strings and tokenizer is missing.
        ValueError: model is not a causal language model of transformers, fewer than two pieces of this length, or arguments
            that convert refuses.
        FloatingPointError: a loss that is not finite.

    After an error the model is as it was.

    Example:
        >>> print(ssmax.calibrate(model, texts, tokenizer, length=4096))
    """
    check_reads_text(model)
    seed = whole_number(seed, "seed", 0)
    tokens = piece_length(model.config, length)
    if steps < 1 or not inits or not layer_sets:
        raise ValueError(
            f"steps must be at least 1, inits and layer_sets not empty; got {steps}, {inits}, {layer_sets}"
        )
    fit_pieces, held_pieces = _split(texts, held_out, tokenizer, tokens)
    was_converted = hasattr(model.config, "ssmax")
    if was_converted and not any(isinstance(module, SSMaxScale) for module in model.modules()):
        law = model.config.ssmax["law"]
        fits = "is trained as a whole; calibrate fits s log n + b" if scale_parameters(model) else "learns nothing"
        raise ValueError(f"the model has law {law!r}, which {fits}")
    if any(parameter.is_meta for parameter in scale_parameters(model)):
        raise ValueError("the model's s is offloaded, or on the meta device; load it whole to calibrate it")
    options: list[Any] = [(init, layers) for init in inits for layers in layer_sets]
    options = [(model.config.ssmax["init"], model.config.ssmax["layers"])] if was_converted else options
    checks = min(steps, CHECKS)
    progress = tqdm(total=len(options) * steps + 1, desc="calibrate", disable=None, leave=False)
    with _frozen(model), progress:
        before = _held_out_loss(model, held_pieces)
        progress.update()
        if not before.isfinite().all():
            raise FloatingPointError("the model's loss on the held-out text is not finite, before the fit")
        best_loss, kept, trials = _octaves(before).mean().item(), None, []
        for init, layers in options:
            if not was_converted:
                convert(model, init, train_length=tokens, bias=bias, layers=layers)
            original = _state(model)
            try:
                loss, step, state = _fit(
                    model, fit_pieces, held_pieces, steps, steps // checks, learning_rate, seed, progress
                )
                trials.append(Trial(init, list(model.config.ssmax["layers"]), loss, step))
                if loss < best_loss:
                    best_loss, kept = loss, (trials[-1], state)
            finally:
                _restore(model, original) if was_converted else revert(model)
        if kept is not None:
            if not was_converted:
                convert(model, kept[0].init, train_length=tokens, bias=bias, layers=kept[0].layers)
            _restore(model, kept[1])
            model.config.ssmax = {**model.config.ssmax, "calibrated_at": tokens}
        after = before if kept is None else _held_out_loss(model, held_pieces)
    edges = _edges(tokens - 1)
    return Calibration(
        length=tokens,
        pieces=len(held_pieces),
        positions=[last - 1 for last in edges],
        before=_octaves(before).tolist(),
        after=_octaves(after).tolist(),
        mean_before=before.mean().item(),
        mean_after=after.mean().item(),
        trials=trials,
        chosen=None if kept is None else kept[0],
    )


def piece_length(config: PreTrainedConfig, length: int | None) -> int:
    """Return length, or by default the config's max_position_embeddings. Raise ValueError if there is none or it is below 16."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None) if length is None else length
    if length is None:
        raise ValueError("calibrate needs length: the config has no max_position_embeddings")
    if length < 16:
        raise ValueError(f"length must be at least 16 tokens, got {length}")
    return length


def _fit(model, pieces, held_pieces, steps, check_every, learning_rate, seed, progress):
    """Run one fit; return its best held-out loss, the step of that loss, and s and b at that step."""
    scales = [module for module in model.modules() if isinstance(module, SSMaxScale)]
    s, b = [scale.s for scale in scales], [scale.b for scale in scales if scale.b is not None]
    for parameter in (*s, *b):
        parameter.requires_grad_(True)
    # Learn two numbers of similar effect: the multiplier's change over one standard deviation of log n, and its middle value.
    middle = math.log(len(pieces[0])) / 2
    deviation = middle / math.sqrt(3) if b else middle
    slope = parameters_to_vector(s).detach() * deviation
    learned = torch.stack([slope, parameters_to_vector(b).detach() + slope * middle / deviation] if b else [slope])
    optimizer = torch.optim.SGD([learned], lr=learning_rate, momentum=0.9, dampening=0.9)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    generator = torch.Generator().manual_seed(seed)
    best = (_octaves(_held_out_loss(model, held_pieces)).mean().item(), 0, _state(model))
    for step, index in zip(range(1, steps + 1), _shuffled(len(pieces), generator), strict=False):
        loss = _piece_loss(model, pieces[index], generator)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is not finite at step {step}; the model is as it was")
        found = torch.autograd.grad(loss, [*s, *b])
        ds, db = torch.cat(found[: len(s)]), torch.cat(found[len(s) :]) if b else None
        gradient = torch.stack([ds / deviation] if db is None else [(ds - db * middle) / deviation, db])
        # One unit length for all heads together. Adam would scale each head's gradient, and most of these are noise.
        learned.grad = gradient / gradient.square().mean().sqrt()
        optimizer.step()
        decay.step()
        with torch.no_grad():
            vector_to_parameters(learned[0] / deviation, s)
            if b:
                vector_to_parameters(learned[1] - learned[0] * middle / deviation, b)
        progress.update()
        if step % check_every == 0 or step == steps:
            held = _octaves(_held_out_loss(model, held_pieces)).mean().item()
            progress.set_postfix(loss=f"{held:.4f}")
            if held < best[0]:
                best = (held, step, _state(model))
            elif step - best[1] >= PATIENCE * check_every:
                progress.update(steps - step)
                break
    return best


def _piece_loss(model, piece, generator):
    piece = piece.to(model.device)
    last = len(piece) - 1
    # Positions are drawn evenly over log position, each at most once.
    spread = 1 / (torch.arange(last) + 1.0)
    at = torch.multinomial(spread, min(LOSS_POSITIONS, last), generator=generator).sort().values.to(piece.device)
    inputs = {"input_ids": piece[None, :-1], "use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs, logits_to_keep=at).logits
    else:
        logits = model(**inputs).logits[:, at]
    losses = cross_entropy(logits[0].float(), piece[at + 1], reduction="none")
    # In short pieces all positions are used; weights then make each octave count alike.
    weight = spread[at.cpu()].to(losses) if last <= LOSS_POSITIONS else torch.ones_like(losses)
    return (losses * weight).sum() / weight.sum()


def _held_out_loss(model, pieces):
    """Return the mean loss at each position, (length - 1,)."""
    return torch.stack([loss_by_position(model, piece[None])[0] for piece in pieces]).mean(0).double().cpu()


def _edges(count):
    """Return the ends of octaves of position: 64, 128, ..., count."""
    return [*(2**power for power in range(6, 64) if 2**power < count), count]


def _octaves(losses):
    edges = [0, *_edges(len(losses))]
    return torch.stack([losses[first:last].mean() for first, last in itertools.pairwise(edges)])


def _shuffled(count, generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".ssmax." in name}


@torch.no_grad()
def _restore(model, state):
    for name, value in state.items():
        model.get_parameter(name).copy_(value)


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Freeze all weights and turn dropout off inside the block; restore both afterwards."""
    learns = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    try:
        with eval_mode(model):
            for module in model.modules():
                if getattr(module, "gradient_checkpointing", False):
                    # transformers checkpoints activations in training mode only; dropout, a child module, stays off.
                    module.training = True
            yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learns.get(name, True))


def _split(texts, held_out, tokenizer, length):
    """Return the pieces to fit on and the held-out pieces, each a list of (length,) tensors."""
    documents = _pieces(texts, tokenizer, length)
    if held_out is not None:
        held_pieces = _chain(_pieces(held_out, tokenizer, length))
        if not documents or not held_pieces:
            raise ValueError(
                f"{'texts' if not documents else 'held_out'} has no document of {length} tokens; give a smaller length"
            )
        return _chain(documents), held_pieces
    if sum(map(len, documents)) < 2:
        raise ValueError(
            f"texts must give at least two pieces of {length} tokens, one to fit on and one to look at; got "
            f"{sum(map(len, documents))}; give longer texts or a smaller length"
        )
    # Whole documents are held out where there are several.
    units = documents if len(documents) > 1 else [[piece] for piece in documents[0]]
    count = math.ceil(len(units) / 4)
    fit, held = _chain(units[:-count]), _chain(units[-count:])
    return fit, held[:: math.ceil(len(held) / HELD_OUT)]


def _chain(lists):
    return list(itertools.chain.from_iterable(lists))


def _pieces(texts, tokenizer, length):
    documents = []
    for text in [texts] if isinstance(texts, str) or getattr(texts, "ndim", 2) == 1 else texts:
        if isinstance(text, str):
            if tokenizer is None:
                raise TypeError("texts are strings; calibrate needs the model's tokenizer to read them")
            text = tokenizer(text, verbose=False)["input_ids"]
        ids = torch.as_tensor(text)
        if ids.ndim != 1 or ids.is_floating_point():
            raise ValueError(f"token ids must be 1-D integers for each document, got {ids.dtype} {tuple(ids.shape)}")
        documents.append([piece for piece in ids.long().split(length) if len(piece) == length])
    return [pieces for pieces in documents if pieces]
