"""The model run backward a segment at a time, for the moments of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from compressor.calibration.calibration import Calibration, dense_inputs
from compressor.calibration.criterion import hidden_rows, rows_within, sampled_loss
from compressor.calibration.examples import Chunk
from compressor.calibration.forward import collecting, noted_outputs, overflow
from compressor.calibration.prepare import Collectors
from compressor.calibration.segments import State
from compressor.calibration.sums import SegmentSums
from compressor.data import Batch
from compressor.measure.moments import MomentCollector, VectorSum, accumulate, gram, kept_rows, packed, with_padding
from compressor.torch_state import in_float64


class BackwardPass:
    """Forms the sums of a calibration's segments from the last to the first, with the gradients between them on disk.

    `layers` are those of the dense model.
    """

    def __init__(
        self, calibration: Calibration, layers: Mapping[str, nn.Module], collectors: Collectors | None = None
    ) -> None:
        self._calibration, self._layers, self._collectors = calibration, layers, collectors
        # Of the slice that is at hand:
        self._seed = calibration.run.seed
        self._generator: torch.Generator | None = None
        self._boundary: dict[int, VectorSum] = {}
        self._predictions = 0

    def sums(self, segment: int) -> SegmentSums:
        """The sums of a segment over the slices, each formed by itself."""
        calibration, found = self._calibration, SegmentSums()
        # What is not run backward was summed up when it was run forward, where the outputs of the segment are kept.
        forward_too = not calibration.cache.has_inputs(segment)
        with collecting(calibration, self._layers, segment) as (model, collector), torch.enable_grad():
            for each in calibration.slices:
                # Targets are drawn for each slice by itself, whoever draws those of the others.
                self._generator, self._seed = None, (calibration.run.seed + each.number) % 2**64
                for chunk in each.chunks if forward_too else each.backward:
                    if chunk in each.backward:
                        with collector.masked(calibration.data.read(chunk).masks):
                            self._step(model, segment, chunk, collector=collector)
                    else:
                        with torch.no_grad():
                            noted_outputs(calibration, model, segment, chunk=chunk, collector=collector)
                found.add(self._taken(collector))
        return found

    def can_begin(self, segment: int) -> bool:
        """Whether the gradients that a segment begins with are kept."""
        calibration = self._calibration
        if segment == calibration.segments.count - 1:
            return True
        gradients = calibration.cache.gradients(segment + 1)
        return all(gradients.holds(chunk.batch) for each in calibration.slices for chunk in each.backward)

    def drop(self, segment: int) -> None:
        """Remove the gradients that a segment began with."""
        for each in self._calibration.slices:
            for chunk in each.backward:
                self._calibration.cache.gradients(segment + 1).drop(chunk.batch)

    def _taken(self, collector: MomentCollector) -> SegmentSums:
        """The sums since they were taken last."""
        found = SegmentSums(
            layers=collector.taken(),
            boundary={place: packed(each) for place, each in self._boundary.items()},
            collected={} if self._collectors is None else self._collectors.taken(),
            predictions=self._predictions,
        )
        self._boundary, self._predictions = {}, 0
        return found

    def _step(self, model: nn.Module, segment: int, chunk: Chunk, *, collector: MomentCollector) -> None:
        """Run a segment forward and backward on one batch, and cache the gradients at its inputs."""
        calibration = self._calibration
        batch, last = calibration.data.read(chunk), segment == calibration.segments.count - 1
        state = dense_inputs(calibration, segment, chunk)
        for each in state:
            each.requires_grad_(True)
        outputs = self._run(model, segment, batch, state=state)
        if last:
            gradients: Sequence[Tensor] = (self._gradient(outputs[0], batch, collector),)
        else:
            gradients = calibration.cache.gradients(segment + 1).read(chunk.batch)
        # An output that depends on none of the layers and inputs of the segment has no gradient.
        reachable = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
        if reachable:
            torch.autograd.backward([each for each, _ in reachable], [gradient for _, gradient in reachable])
        if not state:
            return
        received = tuple(torch.zeros_like(each) if each.grad is None else each.grad for each in state)
        calibration.cache.gradients(segment).write(chunk.batch, received)
        for place, gradient in enumerate(calibration.segments.new_outputs(segment - 1, received)):
            self._note_boundary(place, hidden_rows(gradient, batch.masks))

    def _note_boundary(self, place: int, vectors: Tensor) -> None:
        product = in_float64(gram(vectors))
        accumulate(self._boundary, place, VectorSum(product, product.new_zeros(0), len(vectors)))

    def _run(self, model: nn.Module, segment: int, batch: Batch, *, state: State) -> State:
        segments = self._calibration.segments
        # Copies, because a segment may work in place on its inputs, which a leaf does not allow.
        copies = tuple(each.clone() for each in state)
        run: Callable[[], State] = partial(segments.run, model, segment, batch, state=copies)
        if self._collectors is not None:
            logits = segment == segments.count - 1 and segments.head is None
            run = self._collectors.embeddings.watched(run, batch.masks, logits=logits)
        return run()

    def _gradient(self, last: Tensor, batch: Batch, collector: MomentCollector) -> Tensor:
        """The gradient of the sampled loss at what the last segment outputs, with a few rows of logits at a time."""
        calibration, segments = self._calibration, self._calibration.segments
        rows = kept_rows(last.detach(), batch.masks)
        self._predictions += len(rows)
        if self._generator is None:  # the last layer of a model that is spread over devices may lie on any of them
            self._generator = torch.Generator(last.device).manual_seed(self._seed)
        found, losses = [], []
        for part in torch.split(rows, rows_within(calibration.settings.logit_bytes, segments.width(last))):
            leaf = part.clone().requires_grad_(True)
            with collector.masked(()):
                loss = sampled_loss(self._outputs(leaf), (), calibration.criterion, generator=self._generator)
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            found.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
        if not torch.isfinite(torch.stack(losses)).all():
            raise overflow(calibration.model, batch, self._layers)
        return with_padding(torch.cat(found), last, batch.masks)

    def _outputs(self, rows: Tensor) -> Tensor:
        """The model's outputs from rows of what the last segment outputs."""
        head, model = self._calibration.segments.head, self._calibration.model
        if head is None or self._collectors is None:
            return self._calibration.segments.outputs(model, rows)
        [outputs] = self._collectors.embeddings.watched(lambda: (head(model, rows[None]),), ())()
        return outputs[0]
