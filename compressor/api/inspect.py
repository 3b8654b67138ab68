"""What is measured of a model's matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Unpack

from compressor.api.adapters import inspect_adapter, opened_adapter
from compressor.api.initial import measured_found, with_initial
from compressor.api.keywords import InspectKeywords
from compressor.api.option import verb
from compressor.api.options import InspectOptions
from compressor.api.requests import memory_of_jobs, selection
from compressor.engine import Run, opened_engine
from compressor.forms import DENSE, pair_name, quantization_of
from compressor.io import remote_model
from compressor.model import Model, ModelLike, inspect_layers, measured_layers, open_model, resolve_device
from compressor.planning import PLANNING, quantized_forms, window_rule_advice
from compressor.results import Inspection
from compressor.torch_state import neutral_torch_state


@neutral_torch_state()
@verb(InspectOptions)
def inspect(model: ModelLike, options: InspectOptions | None = None, **given: Unpack[InspectKeywords]) -> Inspection:
    """Measure every matrix of a model: effective ranks, memory window, surviving initialization.

    Of an adapter: how much of its rank each module uses.

    Args:
        model: A weight file, a model folder, `org/name` of the Hugging Face hub, of which only the matrices that are
            measured are read, a `torch.nn.Module`, or an adapter.
        options: The options as an object; keywords take precedence.

    Returns:
        What was measured, layer by layer.

    Raises:
        BadInput: a model, recipe or pattern that cannot be used.

    Example:
        >>> inspection = compressor.inspect("model.safetensors", recipe="train.yaml")
    """
    asked = InspectOptions.of(options, given)
    located = remote_model(model, asked.revision)
    if (adapter := opened_adapter(located)) is not None:
        return inspect_adapter(adapter, asked)
    subject = open_model(
        located,
        recipe=asked.recipe,
        factory=asked.factory,
        select=selection(asked),
        compressed="as dense",
    )
    subject, initial = with_initial(asked, subject, asked.progress)
    device = resolve_device(asked.device)
    with opened_engine(asked.engine, device, memory=memory_of_jobs(device)) as engine:
        run = Run(device, progress=asked.progress, engine=engine)
        inspected = inspect_layers(subject, asked.epsilon, run, quantized=_quantized_forms(asked, subject))
    measured = [
        replace(m, quantized=()) for m in measured_layers(subject, inspected, asked.planning_settings or PLANNING)
    ]
    return Inspection(
        source=subject.name,
        recipe=subject.recipe,
        layers=inspected,
        parameters=subject.numbers,
        weight_bytes=subject.checkpoint.weight_bytes,
        left_out=subject.checkpoint.left_out,
        weights_at=subject.checkpoint.weights_at,
        advice=window_rule_advice(measured, subject.recipe.family, "auto"),
        initial=measured_found(initial, measured),
    )


def _quantized_forms(asked: InspectOptions, subject: Model) -> Mapping[str, tuple[str, ...]]:
    """Of each width that is asked for the form of a layer's own matrix that takes the fewest bytes, by the layer."""
    if asked.bits is None:
        return {}
    settings, found = asked.planning_settings or PLANNING, dict[str, tuple[str, ...]]()
    for layer in subject.layers if asked.bits != (16,) else ():
        if layer.eligible:
            smallest: dict[int, str] = {}
            for form in quantized_forms(layer, asked.bits, settings=settings):
                quantization = quantization_of(form)
                if quantization is not None and pair_name(form) == DENSE:
                    smallest.setdefault(quantization.bits, form)
            found[layer.name] = tuple(smallest.values())
    return found
