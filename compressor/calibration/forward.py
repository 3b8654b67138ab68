"""The model run forward a segment at a time, with the inputs of each segment kept on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration.calibration import Calibration, dense_inputs
from compressor.calibration.criterion import outputs_of, rows_within
from compressor.calibration.examples import Chunk, Part
from compressor.calibration.segments import State
from compressor.data import Batch
from compressor.errors import BadInput
from compressor.measure.moments import LayerSums, MomentCollector, kept_rows, require_finite
from compressor.torch_state import all_answers


def cache_outputs(
    calibration: Calibration, parts: Sequence[Part], layers: Mapping[str, nn.Module], *, reported: int = 0
) -> None:
    """Run all segments on some parts of the data, and cache the outputs of each, without the model's predictions.

    On the examples that are not run backward the moments of the layers' inputs are taken meanwhile. So many parts of
    the step were `reported` before.
    """
    segments, data, cache = calibration.segments, calibration.data, calibration.cache
    forward = [[chunk for chunk in each.chunks if chunk not in each.backward] for each in calibration.slices]
    chunks = [chunk for part in parts for chunk in calibration.chunks(part)]
    for segment in range(segments.count - (segments.head is None)):
        # All of the data run through one block after the other, each of which is then read once.
        finite: dict[Chunk, Tensor] = {}
        if any(forward) and not cache.has_inputs(segment) and not cache.moments.knows(f"backward-{segment}"):
            with collecting(calibration, layers, segment) as (model, collector), torch.no_grad():
                sums = LayerSums()
                for own in forward:
                    for chunk in own:
                        outputs = noted_outputs(calibration, model, segment, chunk=chunk, collector=collector)
                        finite[chunk] = _kept(calibration, segment, chunk=chunk, outputs=outputs)
                    sums.add(collector.taken().inputs, {})
                require_finite(layers, sums)
                cache.write_inputs(segment, sums.inputs)
        with calibration.running(segment) as model:
            for chunk in chunks:
                if chunk not in finite and not cache.dense(chunk.part, segment).holds(chunk.batch):
                    outputs = _outputs(calibration, model, segment, chunk=chunk)
                    finite[chunk] = _kept(calibration, segment, chunk=chunk, outputs=outputs)
        for chunk, sound in zip(finite, all_answers(list(finite.values())), strict=True):
            if not sound:
                cache.dense(chunk.part, segment).drop(chunk.batch)
                raise overflow(calibration.model, data.read(chunk), layers)
        calibration.run.report("run", reported + segment + 1, reported + segments.count)
    if segments.head is None:
        calibration.run.report("run", reported + segments.count, reported + segments.count)


def noted_outputs(
    calibration: Calibration, model: nn.Module, segment: int, *, chunk: Chunk, collector: MomentCollector
) -> State:
    """The new outputs of a segment on one batch, which is run for the inputs of its layers too."""
    with collector.masked(calibration.data.read(chunk).masks):
        outputs = _outputs(calibration, model, segment, chunk=chunk)
        _note_head(calibration, model, segment, outputs=outputs, collector=collector)
    return outputs


def _outputs(calibration: Calibration, model: nn.Module, segment: int, *, chunk: Chunk) -> State:
    """The new outputs of a segment on one batch."""
    state, batch = dense_inputs(calibration, segment, chunk), calibration.data.read(chunk)
    return calibration.segments.new_outputs(segment, calibration.segments.run(model, segment, batch, state=state))


def _kept(calibration: Calibration, segment: int, *, chunk: Chunk, outputs: State) -> Tensor:
    """Keep the new outputs of a segment on one batch; whether they are finite."""
    calibration.cache.dense(chunk.part, segment).write(chunk.batch, outputs)
    return torch.stack([torch.isfinite(each).all() for each in outputs]).all()


@contextmanager
def collecting(
    calibration: Calibration, layers: Mapping[str, nn.Module], segment: int
) -> Iterator[tuple[nn.Module, MomentCollector]]:
    """The model that a segment is run of, and what collects the moments of the segment's layers."""
    with calibration.running(segment) as model:
        running = {name: model.get_submodule(calibration.layers[name].module) for name in layers}
        inside = calibration.segments.own_layers(model, segment, running)
        with MomentCollector({name: layers[name] for name in inside}, inside) as collector:
            yield model, collector


def _note_head(
    calibration: Calibration, model: nn.Module, segment: int, *, outputs: State, collector: MomentCollector
) -> None:
    """Add the inputs of the head, or of the layers in it, which is applied to what the last segment outputs."""
    segments = calibration.segments
    if segments.head is None or segment < segments.count - 1:
        return
    head, [last] = model.get_submodule(segments.head.name), outputs
    itself = [name for name, layer in collector.hooked.items() if layer is head]
    for name in itself:
        collector.note_input(name, last)
    if not itself and set(collector.hooked.values()) & set(head.modules()):
        rows = kept_rows(last, collector.masks)
        for part in torch.split(rows, rows_within(calibration.settings.logit_bytes, segments.width(last))):
            with collector.masked(()):
                segments.outputs(model, part)


def overflow(model: nn.Module, batch: Batch, layers: Mapping[str, nn.Module]) -> BadInput:
    """The error that names the first layer whose input is not finite."""
    found: list[str] = []

    def note(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], *, name: str) -> None:
        if not torch.isfinite(arguments[0] if arguments else next(iter(named.values()))).all():
            found.append(name)

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(partial(note, name=name), with_kwargs=True).remove)
        outputs_of(model, batch.inputs)
    what = f"the activations of layer {found[0]} are" if found else "what the model computes is"
    remedy = "use the model in a wider dtype, or other data"
    return BadInput(f"{what} not finite on the calibration data", remedy=remedy)
