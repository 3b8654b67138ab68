"""What training did to a model's matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from compressor.api.announced import diagnosis_steps
from compressor.api.initial import measured_found, with_initial
from compressor.api.keywords import DiagnoseKeywords
from compressor.api.option import verb
from compressor.api.options import DiagnoseOptions
from compressor.api.requests import preprocessing, selection
from compressor.data import Sample, open_data
from compressor.diagnosis.findings import all_findings
from compressor.diagnosis.gradients import SeenLayer, measured_on_data
from compressor.diagnosis.layers import balance_of, diagnosed_layer
from compressor.diagnosis.series import checkpoints_of, measure_series
from compressor.diagnosis.types import Predictions
from compressor.engine import Run
from compressor.errors import BadInput
from compressor.measure import EPSILON
from compressor.model import (
    ModelLike,
    inspect_layers,
    measured_layers,
    open_model,
    resolve_device,
)
from compressor.progress import expect, takes_steps
from compressor.results import Diagnosis
from compressor.torch_state import neutral_torch_state


@neutral_torch_state()
@verb(DiagnoseOptions)
def diagnose(model: ModelLike, options: DiagnoseOptions | None = None, **given: Unpack[DiagnoseKeywords]) -> Diagnosis:
    """Find out what training did to the eligible matrices of a model, and say what follows, one sentence a finding.

    With `data`, of which built-in ones give the training split, the gradient of the mean cross-entropy is compared with
    the weights, in evaluation mode; augmentation, label smoothing and dropout of the training are not in it. Without
    them only what the weights and the recipe tell is said. The gradient of every eligible layer is held in float64 on
    the CPU.

    Args:
        model: A weight file, a model folder, `org/name` of the Hugging Face hub, or a `torch.nn.Module`.
        options: The options as an object; keywords take precedence.

    Returns:
        The layers, the balance of their norms, and the findings.

    Raises:
        BadInput: a model, recipe, pattern, data or series that cannot be used.

    Example:
        >>> compressor.diagnose("model/", data="train.jsonl").findings
    """
    asked = DiagnoseOptions.of(options, given)
    subject = open_model(model, recipe=asked.recipe, factory=asked.factory, select=selection(asked))
    if not any(layer.eligible for layer in subject.layers):
        raise BadInput("has no layer that can be diagnosed", where=subject.name, remedy="see 'compress inspect MODEL'")
    if asked.data is not None:
        subject.require_runnable()
    subject, initial = with_initial(asked, subject, asked.progress)
    chosen = resolve_device(asked.device)
    data, series, progress = asked.data, asked.series, asked.progress
    limit = asked.data_samples
    examples = None if data is None else open_data(data, preprocessing(asked, subject), Sample("train", limit))
    if takes_steps(progress):
        checkpoints = 0 if series is None else len(checkpoints_of(Path(series))[1])
        expect(progress, diagnosis_steps(subject, examples, checkpoints=checkpoints, device=chosen))
    evolved = None if series is None else measure_series(series, subject, chosen, progress=progress)
    run = Run(chosen, progress=progress)
    inspected = [each for each in inspect_layers(subject, EPSILON, run) if each.layer.eligible]
    predictions: Predictions | None = None
    seen: dict[str, SeenLayer] = {}
    if examples is not None:
        predictions, seen = measured_on_data(subject, examples, chosen, progress=progress)
    layers = tuple(
        diagnosed_layer(each, subject.recipe, seen.get(each.layer.name), series=evolved) for each in inspected
    )
    balance = balance_of(layers, subject.recipe)
    findings = all_findings(subject.recipe, layers, predictions=predictions, balance=balance)
    found = measured_found(initial, measured_layers(subject, inspected))
    return Diagnosis(subject.name, subject.recipe, layers, predictions, balance, evolved, findings, found)
