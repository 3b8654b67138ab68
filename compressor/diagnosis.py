"""What training did to a model's matrices: what it forgot, how near to a stationary point it ended, what collapsed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.checkpoint import local_model
from compressor.errors import BadInput
from compressor.evaluation import (
    Batch,
    EvaluationData,
    load_model,
    logits_of,
    measure_quality,
    prepared,
    require_architecture,
    resolve_device,
)
from compressor.evaluation.data import IGNORED_LABEL
from compressor.findings import Finding, find
from compressor.inspection import inspect_layers
from compressor.measure import (
    EPSILON,
    EquilibriumNorm,
    NormBalance,
    Stationarity,
    TrainedNorm,
    counted_positions,
    equilibrium_norm,
    memory_window,
    norm_balance,
    scaling_degree,
    stationarity,
    stationary_penalty,
)
from compressor.opened_model import Factory, Model, OpenedModel, open_data_for, open_model
from compressor.progress import Progress
from compressor.rank_series import RankSeries, measure_series
from compressor.recipe import TrainingRecipe
from compressor.results import SCHEMA_VERSION, InspectedLayer
from compressor.torch_state import neutral_torch_state, uncompiled

# Examples on which layers are scaled, each of which takes the model three runs.
PROBED = 8
# Mini-batches that the noise of the gradients is measured on.
NOISE_BATCHES = 32


@dataclass(frozen=True)
class DiagnosedLayer:
    """One matrix: what `inspect` measures of it, and what the training data say.

    `norm`: ||W||_F. `initial_norm`: the expected norm of its initialisation, None if unknown. `start_energy`: the share
    of ||W||_F^2 that is what decay left of the initialisation, None if unknown. `scaling_degree`: 0 if the outputs do
    not depend on the matrix's scale, 1 if they are proportional to it, None for neither or without data.
    `stationarity`: None without data. `equilibrium`: for scale-invariant matrices only.
    """

    inspected: InspectedLayer
    norm: float
    initial_norm: float | None
    start_energy: float | None
    scaling_degree: Literal[0, 1] | None = None
    stationarity: Stationarity | None = None
    equilibrium: EquilibriumNorm | None = None

    @property
    def name(self) -> str:
        return self.inspected.layer.name

    def to_dict(self) -> dict[str, Any]:
        """The fields of the inspected layer and those of the diagnosis, in the types of JSON."""
        return {
            **self.inspected.to_dict(),
            "norm": self.norm,
            "initial_norm": self.initial_norm,
            "start_energy": self.start_energy,
            "scaling_degree": self.scaling_degree,
            "stationarity": self.stationarity.to_dict() if self.stationarity else None,
            "equilibrium": self.equilibrium.to_dict() if self.equilibrium else None,
        }


@dataclass(frozen=True)
class Predictions:
    """How well the model predicts the data that it was diagnosed on, beside what needs no model.

    `value` is an accuracy, `chance` that of always answering the most frequent class; or a perplexity and that of the
    uniform distribution, the number of tokens. `loss` is in nats per prediction.
    """

    data: str
    metric: Literal["accuracy", "perplexity"]
    value: float
    loss: float
    count: int
    chance: float

    @property
    def at_chance(self) -> bool:
        """Whether it is no better than chance, by two standard errors of an accuracy."""
        if self.metric == "perplexity":
            return not self.value < self.chance
        return self.value <= self.chance + 2 * math.sqrt(self.chance * (1 - self.chance) / self.count)

    def to_dict(self) -> dict[str, Any]:
        """The fields, in the types of JSON."""
        return asdict(self) | {"at_chance": self.at_chance}


@dataclass(frozen=True)
class Diagnosis:
    """What was found, with the numbers behind it."""

    source: str
    recipe: TrainingRecipe
    layers: tuple[DiagnosedLayer, ...]
    predictions: Predictions | None
    balance: NormBalance | None
    series: RankSeries | None
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as one JSON document."""
        return {
            "schema_version": SCHEMA_VERSION,
            "source": self.source,
            "recipe": self.recipe.to_dict(),
            "predictions": self.predictions.to_dict() if self.predictions else None,
            "balance": self.balance.to_dict() if self.balance else None,
            "findings": [finding.to_dict() for finding in self.findings],
            "layers": [layer.to_dict() for layer in self.layers],
            "series": self.series.to_dict() if self.series else None,
        }


@neutral_torch_state()
def diagnose(
    model: Model,
    *,
    data: str | Path | None = None,
    data_samples: int | None = None,
    recipe: TrainingRecipe | str | Path | None = None,
    recipe_file: str | Path | None = None,
    factory: Factory | None = None,
    series: str | Path | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    device: str = "auto",
    progress: Progress | None = None,
) -> Diagnosis:
    """Find out what training did to the eligible matrices of a model, and say what follows, one sentence a finding.

    `data` are what the model was trained on: of built-in ones the training split, at most `data_samples` examples,
    evenly spaced. With them the gradient of the mean cross-entropy is compared with the weights, in evaluation mode;
    augmentation, label smoothing and dropout of the training are not in it. Without them only what the weights and the
    recipe tell is said. `series` is a folder with checkpoints of the same run, whose names tell their step or epoch.
    The other parameters are those of `inspect`.

    The gradient of every eligible layer is held in float64 on the CPU. Raises `BadInput` for a model, recipe, pattern,
    data or series that cannot be used.
    """
    model = uncompiled(local_model(model))
    subject = open_model(model, recipe, recipe_file, factory, include, exclude)
    if not any(layer.eligible for layer in subject.layers):
        raise BadInput("has no layer that can be diagnosed", where=subject.name, remedy="see 'compress inspect MODEL'")
    if data is not None and not isinstance(model, nn.Module):
        require_architecture(subject.checkpoint, factory)
    chosen = resolve_device(device)
    examples = (
        None
        if data is None
        else open_data_for(data, subject.checkpoint, "train", data_samples, module=subject.architecture)
    )
    evolved = None if series is None else measure_series(series, subject, chosen, progress)
    inspected = [each for each in inspect_layers(subject, EPSILON, chosen, progress) if each.layer.eligible]
    predictions: Predictions | None = None
    seen: dict[str, _Seen] = {}
    if examples is not None:
        runnable = load_model(model, factory)
        predictions, seen = _on_data(runnable, subject, examples, chosen, progress)
    layers = tuple(_diagnosed(each, subject.recipe, seen.get(each.layer.name), evolved) for each in inspected)
    balance = _balance(layers, subject.recipe)
    findings = find(subject.recipe, layers, predictions, balance)
    return Diagnosis(subject.name, subject.recipe, layers, predictions, balance, evolved, findings)


@dataclass(frozen=True)
class _Seen:
    """What the data show of one layer."""

    weight: Tensor
    gradient: Tensor | None
    scaling_degree: Literal[0, 1] | None
    uses: int | None
    classes: int | None
    gradient_square: float | None


def _diagnosed(
    inspected: InspectedLayer, recipe: TrainingRecipe, seen: _Seen | None, series: RankSeries | None
) -> DiagnosedLayer:
    layer, start = inspected.layer, inspected.initialisation
    assert inspected.singular_values is not None
    assert start is not None
    own = recipe.of_parameter(layer.tensor)
    norm = math.hypot(*inspected.singular_values)
    random_start = start.init_std is not None and recipe.base_model is None
    initial = start.init_std * math.sqrt(math.prod(layer.shape)) if random_start and start.init_std else None
    energy = (start.share * initial / norm) ** 2 if start.share is not None and initial and norm > 0 else None
    uses = inspected.uses
    if seen is not None and seen.uses is not None:
        # Fewer than every position: an expert gets the tokens that are routed to it.
        uses = seen.uses if uses is None else min(uses, seen.uses)
    classes = seen.classes if seen is not None else None
    span = classes - 1 if classes is not None else None
    window = memory_window(own, layer.shape, uses, gradient_span=span)
    if series is not None and window.steps is not None and recipe.total_steps is not None and norm > 0:
        length = recipe.total_steps / recipe.total_epochs if recipe.total_epochs else None
        before = series.norm_before(layer.name, recipe.total_steps - window.steps, steps_per_epoch=length)
        if before:
            window = memory_window(own, layer.shape, uses, gradient_span=span, norm_ratio=before / norm)
    diagnosed = DiagnosedLayer(replace(inspected, uses=uses, window=window), norm, initial, energy)
    if seen is None:
        return diagnosed
    invariant = seen.scaling_degree == 0
    found = None
    if seen.gradient is not None:
        found = stationarity(seen.weight, seen.gradient, own, scale_invariant=invariant)
    held = equilibrium_norm(own, norm, seen.gradient_square) if invariant else None
    return replace(diagnosed, scaling_degree=seen.scaling_degree, stationarity=found, equilibrium=held)


def _balance(layers: Sequence[DiagnosedLayer], recipe: TrainingRecipe) -> NormBalance | None:
    """The balance of the layers that the outputs are proportional to, under an optimizer that keeps it."""
    if recipe.family == "adaptive":
        return None
    norms = {}
    for each in layers:
        if each.scaling_degree == 1:
            start = each.inspected.initialisation
            penalty, _ = stationary_penalty(recipe.of_parameter(each.inspected.layer.tensor))
            exponent = start.forgetting_exponent if start else None
            norms[each.name] = TrainedNorm(each.norm, each.initial_norm, penalty, exponent)
    return norm_balance(norms)


def _on_data(
    model: nn.Module,
    subject: OpenedModel,
    data: EvaluationData,
    device: torch.device,
    progress: Progress | None,
) -> tuple[Predictions, dict[str, _Seen]]:
    """Run the model forwards and backwards over the data."""
    eligible = {layer.name: layer for layer in subject.layers if layer.eligible}
    places = {name: layer.module for name, layer in eligible.items()}
    weights = {
        name: model.get_submodule(layer.module).get_parameter(layer.parameter) for name, layer in eligible.items()
    }
    modules = {name: model.get_submodule(layer.module) for name, layer in eligible.items() if layer.kind != "parameter"}
    with prepared(device, model):
        quality = measure_quality(model, data, device=device)
        gradients, counts = _gradients(model, weights, data, progress)
        chance = float(counts.max() / counts.sum()) if quality.metric == "accuracy" else float(len(counts))
        batch = data.read(range(min(data.count, data.batch_size, PROBED)))
        examples = len(next(iter(batch.inputs.values())))
        with counted_positions(model) as positions, _last_output_noted(modules) as last:
            logits = logits_of(model, batch.inputs)
        with _batch_statistics(model, examples):
            degrees = {
                name: scaling_degree(weight, lambda: logits_of(model, batch.inputs)) for name, weight in weights.items()
            }
        invariant = {name: weights[name] for name, degree in degrees.items() if degree == 0}
        squares = _gradient_squares(model, invariant, data, subject.recipe.batch_size)
    seen = {
        name: _Seen(
            weight,
            gradients[name],
            degrees[name],
            math.ceil(positions[places[name]] / examples) if places[name] in positions else None,
            logits.shape[-1] if _is_output(last.get(name), logits) else None,
            squares.get(name),
        )
        for name, weight in weights.items()
    }
    predictions = Predictions(data.name, quality.metric, quality.value, quality.loss, quality.count, chance)
    return predictions, seen


def _gradients(
    model: nn.Module, weights: Mapping[str, Tensor], data: EvaluationData, progress: Progress | None
) -> tuple[dict[str, Tensor | None], Tensor]:
    """Gradients of the mean cross-entropy at every weight, None where it does not reach; and how often each class is
    the label.
    """
    sums: dict[str, Tensor | None] = dict.fromkeys(weights)
    counts = torch.zeros(0, dtype=torch.int64)
    with torch.enable_grad(), _only_gradients_of(model, list(weights.values())):
        for done, batch in enumerate(data, start=1):
            loss, labels, classes = _summed_loss(model, batch, data)
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, found, strict=True):
                if gradient is not None:
                    more, sofar = gradient.detach().to("cpu", torch.float64), sums[name]
                    sums[name] = more if sofar is None else sofar.add_(more)
            counted = torch.bincount(labels.cpu(), minlength=classes)
            counts = counted if not len(counts) else counts + counted
            if progress:
                progress("gradients", done, -(-data.count // data.batch_size))
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
    model: nn.Module, weights: Mapping[str, Tensor], data: EvaluationData, batch_size: int | None
) -> dict[str, float]:
    """E||g||^2 of the mean loss of a random mini-batch at every weight; {} where the data are less than one."""
    if not weights or batch_size is None or batch_size > data.count:
        return {}
    generator = torch.Generator().manual_seed(0)
    sums = dict.fromkeys(weights, 0.0)
    everything = list(weights.values())
    with torch.enable_grad(), _only_gradients_of(model, everything), _batch_statistics(model, batch_size):
        for _ in range(NOISE_BATCHES):
            drawn = torch.randperm(data.count, generator=generator)[:batch_size].tolist()
            loss, labels, _ = _summed_loss(model, data.read(drawn), data)
            found = torch.autograd.grad(loss / len(labels), everything, allow_unused=True)
            for name, gradient in zip(weights, found, strict=True):
                sums[name] += 0.0 if gradient is None else float(gradient.double().square().sum())
    return {name: total / NOISE_BATCHES for name, total in sums.items()}


@contextmanager
def _only_gradients_of(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Let gradients reach these of a model's parameters and no others."""
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
    """Normalise by the batch's statistics, as in training, where there are several examples; change none that are kept.

    With the kept ones a matrix before batch normalisation is not scale-invariant, and in training it was.
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
    """The output of the module that ran last while the block runs, by its name; that of no other is kept."""
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
    """Whether a layer's output is what the loss is taken of."""
    return output is not None and output.data_ptr() == logits.data_ptr() and output.shape == logits.shape
