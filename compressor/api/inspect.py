"""What is measured of a model's matrices."""

from __future__ import annotations

from typing import Unpack

from compressor.api.initial import measured_found, with_initial
from compressor.api.keywords import InspectKeywords
from compressor.api.option import verb
from compressor.api.options import InspectOptions
from compressor.api.requests import memory_of_jobs, selection
from compressor.engine import Run, opened_engine
from compressor.model import ModelLike, inspect_layers, measured_layers, open_model, resolve_device
from compressor.planning import PLANNING, window_rule_advice
from compressor.results import Inspection
from compressor.torch_state import neutral_torch_state


@neutral_torch_state()
@verb(InspectOptions)
def inspect(model: ModelLike, options: InspectOptions | None = None, **given: Unpack[InspectKeywords]) -> Inspection:
    """Measure every matrix of a model: effective ranks, memory window, surviving initialization.

    Args:
        model: A weight file, a model folder, `org/name` of the Hugging Face hub, or a `torch.nn.Module`.
        options: The options as an object; keywords take precedence.

    Returns:
        What was measured, layer by layer.

    Raises:
        BadInput: a model, recipe or pattern that cannot be used.

    Example:
        >>> inspection = compressor.inspect("model.safetensors", recipe="train.yaml")
    """
    asked = InspectOptions.of(options, given)
    subject = open_model(
        model, recipe=asked.recipe, factory=asked.factory, select=selection(asked), revision=asked.revision
    )
    subject, initial = with_initial(asked, subject, asked.progress)
    device = resolve_device(asked.device)
    with opened_engine(asked.engine, device, memory=memory_of_jobs(device)) as engine:
        inspected = inspect_layers(subject, asked.epsilon, Run(device, progress=asked.progress, engine=engine))
    measured = measured_layers(subject, inspected, asked.planning_settings or PLANNING)
    return Inspection(
        source=subject.name,
        recipe=subject.recipe,
        layers=inspected,
        parameters=subject.checkpoint.elements,
        weight_bytes=subject.checkpoint.weight_bytes,
        left_out=subject.checkpoint.left_out,
        weights_at=subject.checkpoint.weights_at,
        advice=window_rule_advice(measured, subject.recipe.family, "auto"),
        initial=measured_found(initial, measured),
    )
