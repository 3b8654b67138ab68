"""What replacing modules of the dense model costs on the holdout examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from compressor.calibration.activation_cache import ActivationCache
from compressor.calibration.calibration import Calibration, dense_outputs, of_segment, with_layers
from compressor.calibration.criterion import divergence, rows_within, summed_in_parts
from compressor.measure.moments import kept_rows
from compressor.model import evaluation_mode


def holdout_loss(calibration: Calibration, modules: Mapping[str, nn.Module]) -> float:
    """Mean cost per prediction, on the holdout examples, of replacing modules of the dense model.

    For a likelihood this is the Kullback-Leibler divergence from the dense model in nats: the increase in loss on
    targets drawn from it, which the second-order estimate predicts. Otherwise it is half the squared change of the
    outputs. Infinite if it is not finite.
    """
    total, count = 0.0, 0
    segments, last, model = calibration.segments, calibration.segments.count - 1, calibration.model
    chunks = calibration.data.chunks("holdout")
    states = ActivationCache(calibration.run.device, calibration.run.journal.temporary())
    with evaluation_mode(calibration.run.device, model):
        for segment in range(last + 1):
            own = of_segment(segments, segment, modules)
            inputs, outputs = (states.compressed("holdout", "judged", each) for each in (segment, segment + 1))
            for chunk in chunks:
                batch = calibration.data.read(chunk)
                with with_layers(model, own) as changed:
                    state = inputs.read(chunk.batch) if segment > 0 else ()
                    state = segments.run(changed, segment, batch, state=state)
                inputs.drop(chunk.batch)
                if segment < last:
                    outputs.write(chunk.batch, state)
                    continue
                [before] = dense_outputs(calibration, last, chunk)
                cost, rows = cost_of_predictions(calibration, before, state[0], masks=batch.masks, modules=own)
                total += float(cost)
                count += rows
    return total / count if math.isfinite(total) else math.inf


def cost_of_predictions(
    calibration: Calibration,
    before: Tensor,
    after: Tensor,
    *,
    masks: Sequence[Tensor],
    modules: Mapping[str, nn.Module],
) -> tuple[Tensor, int]:
    """The cost of the predictions of a compressed model against the dense one's, summed over rows, and their number.

    `before` and `after` are what the last segment outputs in the dense model, and in the one with other `modules`.
    """
    segments, model, criterion = calibration.segments, calibration.model, calibration.criterion
    dense, compressed = kept_rows(before, masks), kept_rows(after, masks)

    def cost(part: Tensor, place: slice) -> Tensor:
        with torch.no_grad():
            expected = segments.outputs(model, dense[place])
        return divergence(expected, segments.outputs(model, part, modules), (), criterion=criterion)[0]

    head = None if segments.head is None else modules.get(segments.head.name)
    trained = [] if head is None else [each for each in head.parameters() if each.requires_grad]
    at_once = rows_within(calibration.settings.logit_bytes, segments.width(after))
    return summed_in_parts(cost, compressed, at_once=at_once, parameters=trained), len(dense)
