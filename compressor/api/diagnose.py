"""What training did to a model's matrices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compressor.api.requests import selection, stated
from compressor.data import open_data_for
from compressor.diagnosis.findings import all_findings
from compressor.diagnosis.gradients import SeenLayer, measured_on_data
from compressor.diagnosis.layers import balance_of, diagnosed_layer
from compressor.diagnosis.series import measure_series
from compressor.diagnosis.types import Predictions
from compressor.errors import BadInput
from compressor.measure import EPSILON
from compressor.model import (
    Factory,
    ModelLike,
    inspect_layers,
    open_model,
    resolve_device,
)
from compressor.progress import Progress
from compressor.recipe import TrainingRecipe
from compressor.results import Diagnosis
from compressor.torch_state import neutral_torch_state


@neutral_torch_state()
def diagnose(
    model: ModelLike,
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
    subject = open_model(model, recipe=stated(recipe, recipe_file), factory=factory, select=selection(include, exclude))
    if not any(layer.eligible for layer in subject.layers):
        raise BadInput("has no layer that can be diagnosed", where=subject.name, remedy="see 'compress inspect MODEL'")
    if data is not None:
        subject.require_runnable()
    chosen = resolve_device(device)
    examples = None if data is None else open_data_for(data, subject.preprocessing, split="train", limit=data_samples)
    evolved = None if series is None else measure_series(series, subject, chosen, progress)
    inspected = [each for each in inspect_layers(subject, EPSILON, chosen, progress) if each.layer.eligible]
    predictions: Predictions | None = None
    seen: dict[str, SeenLayer] = {}
    if examples is not None:
        predictions, seen = measured_on_data(subject, examples, chosen, progress)
    layers = tuple(diagnosed_layer(each, subject.recipe, seen.get(each.layer.name), evolved) for each in inspected)
    balance = balance_of(layers, subject.recipe)
    findings = all_findings(subject.recipe, layers, predictions, balance)
    return Diagnosis(subject.name, subject.recipe, layers, predictions, balance, evolved, findings)
