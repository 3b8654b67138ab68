"""All layers of a compressed model fitted together to the dense model's predictions.

EfficientQAT trains the scales of all blocks at once after it trained block by block (Chen et al., ACL 2025). Here
roundings and factors are fitted too, and the target is what the dense model predicts, which needs no labels. A few
examples are soon overfitted, and on these alone next to nothing is gained on the holdout; so a language model writes
many more texts itself. A pass that does not lower the holdout loss is undone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compressor.calibration.activation_cache import ActivationCache, CachedFactors
from compressor.calibration.calibration import Calibration, dense_outputs, frozen, of_segment, with_layers
from compressor.calibration.examples import CalibrationData, Chunk
from compressor.calibration.fitted_weights import fitted_weights
from compressor.calibration.holdout import cost_of_predictions, holdout_loss
from compressor.calibration.more_texts import texts_to_write, written_texts
from compressor.calibration.refinement import Fit, fit_to_dense, in_parts
from compressor.calibration.replacements import Compensated
from compressor.calibration.segments import State
from compressor.calibration.settings import RefinementSettings
from compressor.lowrank import join
from compressor.model import evaluation_mode
from compressor.system_errors import is_out_of_memory

logger = logging.getLogger(__name__)


def fits_end_to_end(calibration: Calibration) -> bool:
    """Whether layers can be fitted together: all are in memory meanwhile, and a few examples would be overfitted."""
    most = calibration.settings.end_to_end.most_weights
    weights = sum(layer.parameters for layer in calibration.layers.values())
    if not texts_to_write(calibration):
        return False
    if weights > most:
        logger.info("%d weights are not refined end to end: at most %d are", weights, most)
        return False
    return True


def refine_end_to_end(
    calibration: Calibration, start: Compensated, name: str = "end to end", *, fit: Fit = fit_to_dense
) -> Compensated:
    """Fit the layers of `start` together to the dense model's predictions; `start` stays as it is.

    `name` is that of the plan in the journal.

    Embeddings and bare parameters are not fitted, nor is a model that cannot be differentiated with respect to its
    layers, or whose holdout loss does not fall.
    """
    layers = {
        layer: calibration.layers[layer].module
        for layer in start.factors
        if calibration.layers[layer].kind not in ("embedding", "parameter")
    }
    journal = calibration.cache.journal
    factors = CachedFactors(calibration.run.device, calibration.run.journal.temporary(), start.factors)
    found = journal.tensors(f"{name}/factors", partial(_fitted, calibration, start, layers, fit=fit))
    for layer in layers if found else ():
        factors.put(layer, {key: found[key] for key in start.factors[layer]})
    return Compensated(start.modules.with_factors(factors))


def _fitted(calibration: Calibration, start: Compensated, layers: Mapping[str, str], *, fit: Fit) -> dict[str, Tensor]:
    """The tensors of the fitted layers by their names in a file; none where the loss does not fall."""
    settings = calibration.settings.end_to_end.fitting
    with evaluation_mode(calibration.run.device, calibration.model), frozen(calibration.model):
        modules = deepcopy({place: start.modules[place] for place in start.modules})  # together: some share tensors
        inside = {place: modules[place] for place in dict.fromkeys(layers.values())}
        try:
            fitted = _on_more_texts(calibration, settings)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            logger.warning("the layers are not fitted end to end, for the model does not continue texts: %s", error)
            return {}
        losses = [partial(_mean_cost, fitted, modules, part) for part in _parts(fitted)]
        judged = partial(_judged, calibration, modules, iter(range(1, settings.passes + 2)))
        try:
            with fitted_weights(inside.values(), rounding=settings.rounding):
                fell = fit(inside, losses, judged, seed=calibration.run.seed, settings=settings)
        except RuntimeError as error:  # such as for a tensor that is changed in place after a layer took it
            if is_out_of_memory(error):
                raise
            logger.warning("the layers are not fitted end to end: %s", error)
            return {}
    if not fell:
        return {}
    found: dict[str, Tensor] = {}
    for layer, place in layers.items():
        found |= {join(layer, key): each for key, each in modules[place].state_dict().items()}
    return found


def _judged(calibration: Calibration, modules: Mapping[str, nn.Module], calls: Iterator[int]) -> float:
    """The holdout loss, of which is told: it is computed before the first pass and after each."""
    loss = holdout_loss(calibration, modules)
    total = calibration.settings.end_to_end.fitting.passes + 1
    calibration.run.report("refine end to end", next(calls, total), total)
    return loss


def _on_more_texts(calibration: Calibration, settings: RefinementSettings) -> Calibration:
    """The calibration with the fit examples and texts that the model writes, and its predictions on them."""
    data, run = calibration.data, calibration.run
    given = tuple(data.read(chunk) for chunk in data.chunks("fit")[:: calibration.settings.refit_every])
    fit = (*given, *written_texts(calibration))
    found = replace(
        calibration,
        data=CalibrationData(fit, (), data.labeled),
        settings=replace(calibration.settings, refinement=settings, refit_every=1),
        cache=ActivationCache(run.device, run.journal.temporary()),
    )
    segments, last = found.segments, found.segments.count - 1
    kept = {last} if segments.head is not None else {segment for segment, _ in segments.sources(last)}
    for chunk in found.data.chunks("fit"):
        state: State = ()
        for segment in range(last + 1):
            state = segments.run(found.model, segment, found.data.read(chunk), state=state)
            if segment in kept:
                found.cache.dense("fit", segment).write(chunk.batch, segments.new_outputs(segment, state))
    return found


def _parts(calibration: Calibration) -> list[Chunk]:
    """The fit batches in parts of a few examples."""
    last = calibration.segments.count - 1
    together, alone = partial(dense_outputs, calibration, last), partial(_outputs, calibration, {})
    return [
        part
        for chunk in calibration.data.chunks("fit")
        for part in in_parts(calibration, chunk, together=together, alone=alone)
    ]


def _mean_cost(calibration: Calibration, modules: Mapping[str, nn.Module], chunk: Chunk) -> Tensor:
    """Mean cost per prediction on a chunk."""
    [last] = _outputs(calibration, modules, chunk)
    cost, rows = cost_of_predictions(calibration, chunk, last, modules=modules)
    return cost / max(rows, 1)  # an example may be all padding


def _outputs(calibration: Calibration, modules: Mapping[str, nn.Module], chunk: Chunk) -> State:
    """What the last segment outputs, with gradients in the memory of one segment's activations.

    Each segment runs again when it is run backward (Chen et al., "Training deep nets with sublinear memory cost",
    2016).
    """
    segments, batch = calibration.segments, calibration.data.read(chunk)

    def run(segment: int, *state: Tensor) -> State:
        with with_layers(calibration.model, of_segment(segments, segment, modules)) as model:
            return segments.run(model, segment, batch, state=state)

    state: State = ()
    for segment in range(segments.count):
        if torch.is_grad_enabled() and segment > 0:
            state = checkpoint(run, segment, *state, use_reentrant=False, preserve_rng_state=False)
        else:
            state = run(segment, *state)
    return state
