"""The gradients of a model on its training data, compared with its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.data import IGNORED_LABEL, Batch, EvaluationData
from compressor.diagnosis.types import Predictions
from compressor.errors import BadInput
from compressor.evaluation import measure_quality
from compressor.measure import counted_positions, scaling_degree
from compressor.model import Model, evaluation_mode, logits_of
from compressor.network import Layer
from compressor.progress import Progress
from compressor.torch_state import in_float64

# Examples on which the scaling degree is measured, with three forward passes per layer.
PROBED = 8
# Mini-batches from which the gradient noise is measured.
NOISE_BATCHES = 32


@dataclass(frozen=True)
class SeenLayer:
    """Measurements of one layer on the data."""

    weight: Tensor
    gradient: Tensor | None
    scaling_degree: Literal[0, 1] | None
    uses: int | None
    classes: int | None
    gradient_square: float | None


def measured_on_data(
    subject: Model,
    data: EvaluationData,
    device: torch.device,
    *,
    progress: Progress | None,
) -> tuple[Predictions, dict[str, SeenLayer]]:
    """Run forward and backward passes over the data, and measure the layers and the predictions."""
    tell: Progress = progress or (lambda *_: None)
    model = subject.with_separate_experts
    eligible = {layer.name: layer for layer in subject.layers if layer.eligible}
    places = {name: layer.module for name, layer in eligible.items()}
    modules = {name: model.get_submodule(layer.module) for name, layer in eligible.items() if layer.kind != "parameter"}
    with evaluation_mode(device, model):
        weights = _weights(model, eligible)  # which may be other parameters than where it came from
        quality = measure_quality(model, data, device=device)
        tell("evaluate", 1, 1)
        gradients, counts = _gradients(model, weights, data=data, tell=tell)
        chance = float(counts.max() / counts.sum()) if quality.metric == "accuracy" else float(len(counts))
        batch = data.read(range(min(data.count, data.batch_size, PROBED)))
        examples = len(next(iter(batch.inputs.values())))
        with counted_positions(model) as positions, _last_output_noted(modules) as last:
            logits = logits_of(model, batch.inputs)
        with _batch_statistics(model, examples):
            degrees = {}
            for name, weight in weights.items():
                degrees[name] = scaling_degree(weight, lambda: logits_of(model, batch.inputs))
                tell("scale invariance", len(degrees), len(weights))
        invariant = {name: weights[name] for name, degree in degrees.items() if degree == 0}
        squares = _gradient_squares(model, invariant, data=data, batch_size=subject.recipe.batch_size, tell=tell)
    seen = {
        name: SeenLayer(
            weight,
            gradients[name],
            degrees[name],
            math.ceil(positions[places[name]] / examples) if places[name] in positions else None,
            logits.shape[-1] if _is_output(last.get(name), logits) else None,
            squares.get(name),
        )
        for name, weight in _weights(model, eligible).items()
    }
    assert quality.loss is not None  # which the caller's own metric would lack
    predictions = Predictions(data.name, quality.metric, quality.value, quality.loss, quality.count, chance)
    return predictions, seen


def _weights(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    return {name: model.get_submodule(layer.module).get_parameter(layer.parameter) for name, layer in layers.items()}


def _gradients(
    model: nn.Module, weights: Mapping[str, Tensor], *, data: EvaluationData, tell: Progress
) -> tuple[dict[str, Tensor | None], Tensor]:
    """Gradients of the mean cross-entropy at every weight, None for one that is not reached; and the count of each
    label.
    """
    sums: dict[str, Tensor | None] = dict.fromkeys(weights)
    counts = torch.zeros(0, dtype=torch.int64)
    with torch.enable_grad(), _only_gradients_of(model, list(weights.values())):
        for done, batch in enumerate(data, start=1):
            loss, labels, classes = _summed_loss(model, batch, data)
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, found, strict=True):
                if gradient is not None:
                    more, sofar = gradient.detach().cpu().double(), sums[name]
                    sums[name] = more if sofar is None else sofar.add_(more)
            counted = torch.bincount(labels.cpu(), minlength=classes)
            counts = counted if not len(counts) else counts + counted
            tell("gradients", done, math.ceil(data.count / data.batch_size))
    for name, total in sums.items():
        if total is not None and not torch.isfinite(total).all():
            raise BadInput(
                f"the gradient of the loss at layer {name} is not finite",
                where=data.name,
                remedy="use the model in a wider dtype, or other data",
            )
    return {name: None if total is None else total / counts.sum() for name, total in sums.items()}, counts


def _summed_loss(model: nn.Module, batch: Batch, data: EvaluationData) -> tuple[Tensor, Tensor, int]:
    """The sum of a batch's cross-entropies, its labels, and the number of classes."""
    logits = logits_of(model, batch.inputs)
    if data.task == "language-modeling":
        logits = logits[:, :-1]
    labels = batch.labels.flatten()
    predicted = labels != IGNORED_LABEL
    labels, logits = labels[predicted], logits.flatten(0, -2)[predicted.to(logits.device)]
    rows = logits.float() if logits.dtype != torch.float64 else logits
    loss = nn.functional.cross_entropy(rows, labels.to(logits.device), reduction="sum")
    return loss, labels, logits.shape[-1]


def _gradient_squares(
    model: nn.Module, weights: Mapping[str, Tensor], *, data: EvaluationData, batch_size: int | None, tell: Progress
) -> dict[str, float]:
    """E||g||^2 of the mean loss of a random mini-batch at every weight; {} if the data are less than a batch."""
    if not weights or batch_size is None or batch_size > data.count:
        return {}
    generator = torch.Generator().manual_seed(0)
    sums = dict.fromkeys(weights, 0.0)
    everything = list(weights.values())
    with torch.enable_grad(), _only_gradients_of(model, everything), _batch_statistics(model, batch_size):
        for done in range(1, NOISE_BATCHES + 1):
            drawn = torch.randperm(data.count, generator=generator)[:batch_size].tolist()
            loss, labels, _ = _summed_loss(model, data.read(drawn), data)
            found = torch.autograd.grad(loss / len(labels), everything, allow_unused=True)
            for name, gradient in zip(weights, found, strict=True):
                sums[name] += 0.0 if gradient is None else float(in_float64(gradient).square().sum())
            tell("gradient noise", done, NOISE_BATCHES)
    return {name: total / NOISE_BATCHES for name, total in sums.items()}


@contextmanager
def _only_gradients_of(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Enable gradients for these parameters of a model only."""
    wanted = {id(weight) for weight in weights}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _batch_statistics(model: nn.Module, examples: int) -> Iterator[None]:
    """Normalize by the statistics of the batch, as in training, if it has several examples; update no running
    statistics.

    With the running statistics a matrix before a batch normalization would not be scale-invariant, and in training it
    was.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    flags = [(module, module.training, module.track_running_stats) for module in norms]
    if examples > 1:
        for module in norms:
            module.training, module.track_running_stats = True, False
    try:
        yield
    finally:
        for module, training, tracking in flags:
            module.training, module.track_running_stats = training, tracking


@contextmanager
def _last_output_noted(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Record the name and output of the module that runs last inside the context."""
    last: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            last.clear()
            if isinstance(output, Tensor):
                last[name] = output

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    try:
        yield last
    finally:
        for handle in handles:
            handle.remove()


def _is_output(output: Tensor | None, logits: Tensor) -> bool:
    """Whether a layer's output is the one that the loss is computed from."""
    return output is not None and output.data_ptr() == logits.data_ptr() and output.shape == logits.shape
