"""The weights that a model started from, as the options name them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from compressor.api.options import InitialOptions, StoredInitialOptions
from compressor.errors import BadInput, first_line
from compressor.formatting import format_size
from compressor.forms import has_own_errors, pair_of
from compressor.free_memory import free_memory
from compressor.initial import (
    SEARCH,
    Draws,
    InitialFound,
    InitialWeights,
    SeedSearch,
    StartedLayer,
    false_hits,
    find_kept,
    find_seed,
    initial_name,
    read_kept,
    record,
    what_is_searched,
)
from compressor.measure import Spectrum, effective_ranks
from compressor.model import Model, given_initial, require_of_model, untrained_builder
from compressor.network import Layer
from compressor.planning import MeasuredLayer
from compressor.progress import Progress
from compressor.torch_state import CPU

logger = logging.getLogger(__name__)


def with_initial(asked: InitialOptions, subject: Model, progress: Progress | None) -> tuple[Model, InitialFound | None]:
    """The model with the initial weights that are asked for, and what is known of these before layers are measured.

    Where none are asked for, what its training run kept of its start is used, or what the seed draws that its recipe
    states, if there is one.

    Raises:
        BadInput: they cannot be drawn or read, or are of another model.
    """
    if subject.squeezes:
        if asked.initial is not None:
            what = "is compressed already, and what is left of its initialization is not looked for"
            raise BadInput(
                what, where=subject.name, option="initial", remedy="leave out `initial`, or give the original"
            )
        return subject, None
    if asked.initial is None:
        return _stated(subject)
    if asked.initial == "auto":
        return _searched(subject, progress)
    if isinstance(asked.initial, int):
        initial = _from_seed(subject, asked.initial)
    else:
        initial = given_initial(asked.initial, like=subject)
        require_of_model(initial, subject)
    return replace(subject, initial=initial), InitialFound(initial.source, initial.seed, "given")


def _stated(subject: Model) -> tuple[Model, InitialFound | None]:
    """The model with what a record or a seed draws that is stated beside it, where nothing stands against trying it.

    Weights that are kept beside it are not used unasked: what is made with these does not load without them.
    """
    source = subject.checkpoint.source
    kept = None if source is None else find_kept(source)
    if kept is not None and kept.suffix != ".json":
        logger.info("%s has the weights that training started from; `initial=%s` compresses with them", kept, kept)
        kept = None
    try:
        initial = _from_stated_seed(subject) if kept is None else read_kept(kept, numbers=subject.checkpoint.elements)
    except Exception as error:  # whatever a user's own code raises: it was not asked for
        logger.info("where training started is stated, and cannot be used: %s", first_line(error))
        return subject, None
    if initial is None:
        return subject, None
    return replace(subject, initial=initial), InitialFound(initial.source, initial.seed, "stated")


def _from_stated_seed(subject: Model) -> InitialWeights | None:
    """What the seed draws that a recipe states; None without one, or where the untrained model cannot be built."""
    seed = subject.recipe.seed
    if seed is None or not any(layer.eligible for layer in subject.layers):
        return None
    # It is built in float32, and not what was asked for.
    needed, free = 4 * subject.checkpoint.elements, free_memory(CPU)
    if free is not None and needed > free / 2:
        logger.info("seed %d is not tried: the untrained model takes %s", seed, format_size(needed))
        return None
    return None if untrained_builder(subject) is None else _from_seed(subject, seed)


@dataclass
class _Candidates:
    """How many seeds were tried, and the largest z of those that are no hit; progress is told of it."""

    progress: Progress | None
    tried: int = 0
    largest: float = 0.0

    def __call__(self, tried: int, total: int, largest: float) -> None:
        self.tried, self.largest = tried, largest
        if self.progress is not None:
            self.progress("search the seed", tried, total)


def _searched(subject: Model, progress: Progress | None) -> tuple[Model, InitialFound]:
    """The model with what the seed draws that is found for it, if one is."""
    started = time.monotonic()
    stated = [] if subject.recipe.seed is None else [subject.recipe.seed]
    draws, layers, candidates = _recorded(subject, 0), _eligible(subject), _Candidates(progress)
    hit = find_seed(draws, subject.checkpoint, layers, stated=stated, report=candidates)
    search = SeedSearch(
        searched=what_is_searched(draws, layers, stated=stated),
        tried=candidates.tried,
        seconds=time.monotonic() - started,
        z=None if hit is None else max(hit.z.values()),
        next_best=candidates.largest,
        with_overwritten=hit is not None and hit.with_overwritten,
        false_hits=false_hits(draws, layers),
    )
    if hit is None:
        return subject, InitialFound("", None, "searched", search=search)
    initial = InitialWeights.from_draws(hit.draws)
    return replace(subject, initial=initial), InitialFound(initial.source, hit.seed, "searched", search=search)


def require_use(asked: StoredInitialOptions, *models: Model | None) -> None:
    """Refuse initial weights that none of the models needs."""
    if asked.initial is not None and not any(model is not None and model.needs_initial for model in models):
        what = f"{' and '.join(model.name for model in models if model is not None)} needs no initial weights"
        raise BadInput(what, option="initial", remedy="leave out `initial`")


def _from_seed(subject: Model, seed: int) -> InitialWeights:
    """What a seed draws, with the default initialization that is overwritten or without it, whichever correlates."""
    draws = _recorded(subject, seed)
    alone = replace(SEARCH, seeds=0, customary=())
    found = find_seed(draws, subject.checkpoint, _eligible(subject), stated=[seed], settings=alone)
    return InitialWeights.from_draws(draws if found is None else found.draws)


def _recorded(subject: Model, seed: int) -> Draws:
    """The record of the initialization of a model."""
    build = untrained_builder(subject)
    if build is None:
        what = "a seed needs what builds the untrained model"
        remedy = "pass `factory`, a transformers folder, or a checkpoint of the initial model instead of the seed"
        raise BadInput(what, where=subject.name, option="initial", remedy=remedy)
    draws, eligible = record(build, seed).draws, _eligible(subject)
    if eligible and not any(name in draws.names for each in eligible for name in (initial_name(each), each.tensor)):
        what = "what this model draws at first cannot be recorded, so that a seed does not tell its initial weights"
        saved = "`torch.save(build().state_dict(), 'initial.pt')`"
        remedy = f"save the untrained model right after the seed is set, {saved}, and give that"
        raise BadInput(what, where=subject.name, option="initial", remedy=remedy)
    return draws


def _eligible(subject: Model) -> list[Layer]:
    return [layer for layer in subject.layers if layer.eligible]


def measured_found(
    found: InitialFound | None, measured: Sequence[MeasuredLayer], weighted: Sequence[MeasuredLayer] | None = None
) -> InitialFound | None:
    """What was found, with the layers that correlate; their shares are those of the `weighted` ones where there are."""
    if found is None:
        return None
    layers = []
    for plain, each in zip(measured, weighted or measured, strict=True):
        if each.start is None or plain.start is None:
            continue
        written = _written(plain)
        if written is not None:
            ranks = effective_ranks(plain.singular_values), effective_ranks(written)
            layers.append(StartedLayer(plain.layer.name, each.start, *ranks))
    return replace(found, eligible=len(measured), layers=tuple(layers))


def _written(measured: MeasuredLayer) -> Spectrum | None:
    """The singular values of what training wrote, of a matrix of the layer's own sides."""
    for form, values in measured.own_values.items():
        if (pair := pair_of(form)) is not None and not has_own_errors(pair):
            return values
    return None
