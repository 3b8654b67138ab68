"""What replacing modules of the dense model costs on the holdout examples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from compressor.calibration.activation_cache import ActivationCache
from compressor.calibration.calibration import Calibration, dense_outputs, of_segment, rows_of, with_layers
from compressor.calibration.criterion import divergence, rows_within, summed_in_parts
from compressor.calibration.examples import Chunk
from compressor.measure.moments import kept_rows
from compressor.model import evaluation_mode
from compressor.model.streaming import parameter_of
from compressor.torch_state import in_float64


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
                cost, rows = cost_of_predictions(calibration, chunk, state[0], modules=own)
                total += float(cost)
                count += rows
    return total / count if math.isfinite(total) else math.inf


def cost_of_predictions(
    calibration: Calibration, chunk: Chunk, after: Tensor, *, modules: Mapping[str, nn.Module]
) -> tuple[Tensor, int]:
    """The cost of the predictions of a compressed model against the dense one's, summed over rows, and their number.

    `after` is what the last segment outputs on a chunk in the model with other `modules`.
    """
    segments, model, criterion = calibration.segments, calibration.model, calibration.criterion
    masks = calibration.data.read(chunk).masks
    [before] = dense_outputs(calibration, segments.count - 1, chunk)
    dense, compressed = kept_rows(before, masks), kept_rows(after, masks)
    at_once = rows_within(calibration.settings.logit_bytes, segments.width(after))
    if _shares_wide_head(calibration, modules):
        expected = kept_rows(_expected(calibration, chunk, at_once), masks)

        def divergence_of(part: Tensor, place: slice) -> Tensor:
            weights, log_total = expected[place, :-1], expected[place, -1]
            changed = in_float64(weights * (dense[place] - part)).sum()
            return changed + in_float64(segments.outputs(model, part).logsumexp(-1) - log_total).sum()

        return summed_in_parts(divergence_of, compressed, at_once=at_once), len(dense)

    def cost(part: Tensor, place: slice) -> Tensor:
        with torch.no_grad():
            outputs = segments.outputs(model, dense[place])
        return divergence(outputs, segments.outputs(model, part, modules), (), criterion=criterion)[0]

    head = None if segments.head is None else modules.get(segments.head.name)
    trained = [] if head is None else [each for each in head.parameters() if each.requires_grad]
    return summed_in_parts(cost, compressed, at_once=at_once, parameters=trained), len(dense)


def _shares_wide_head(calibration: Calibration, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the predictions of the model with other modules are those of the dense model's own linear head, of many
    classes: for few the outputs of both cost little, and their difference has more digits. Logits of fewer digits than
    float32 have too few for the difference of two logarithms of sums."""
    head = calibration.segments.head
    if head is None or head.tail is not None or head.name in modules or calibration.criterion != "likelihood":
        return False
    layer = calibration.model.get_submodule(head.name)
    wide = head.width > calibration.settings.most_classes
    if not wide or type(layer) is not nn.Linear or layer.weight.dtype not in (torch.float32, torch.float64):
        return False
    return not layer._forward_hooks and not layer._forward_pre_hooks


@torch.no_grad()
def _expected(calibration: Calibration, chunk: Chunk, at_once: int) -> Tensor:
    """Of every position of a chunk the mean row of the head's weight under the dense model's predictions, and the
    logarithm of the sum that these are normalized by: `(.., size + 1)`.

    The outputs z of a head of weight W on rows h and h' have the divergence `p (z - z') + log sum exp z' - log sum exp
    z`, with predictions p of z; and `p (z - z') = p W (h - h')`. So the dense outputs are computed once.
    """
    segments, cached = calibration.segments, calibration.cache.predictions(chunk.part)
    if not cached.holds(chunk.batch):
        [hidden] = dense_outputs(calibration, segments.count - 1, replace(chunk, rows=None))
        assert segments.head is not None
        weight = parameter_of(calibration.model, segments.head.name, "weight").detach().to(hidden.device)
        found = []
        for rows in torch.split(hidden.flatten(0, -2), at_once):
            outputs = segments.outputs(calibration.model, rows)
            found.append(torch.cat([outputs.softmax(-1) @ weight, outputs.logsumexp(-1, keepdim=True)], -1))
        cached.write(chunk.batch, [torch.cat(found).view(*hidden.shape[:-1], -1)])
    return rows_of(cached.read(chunk.batch), chunk)[0]
