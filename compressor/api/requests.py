"""What the options come to: a budget, the layers that are meant, the data to measure on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from compressor.api.options import (
    CompressOptions,
    DataOptions,
    EmbeddingOptions,
    EvaluateOptions,
    LayerOptions,
    MetricOptions,
    PlanOptions,
)
from compressor.calibration.drop import require_possible_drop
from compressor.choices import Preference, Split
from compressor.data import EvaluationData, Preprocessing, Sample, open_data, open_search_data, require_apart
from compressor.evaluation import TIMING, TimingSettings
from compressor.forms import quantization_of
from compressor.free_memory import free_memory
from compressor.io import Checkpoint, Naming, Provenance, Target, checked_target, form_of
from compressor.io.output import require_no_output
from compressor.model import LayerSelection, Model
from compressor.planning import PLANNING, Budget, checked_budget, given_plan, quantized_forms
from compressor.planning.budget import BudgetKind


def requested_budget(asked: PlanOptions) -> Budget | None:
    """The budget that is asked for, None where nothing is; `BadInput` for one out of its range."""
    kinds: tuple[BudgetKind, ...] = ("keep", "max-size", "tolerance", "rank", "energy", "max-latency", "max-drop")
    given = {kind: value for kind in kinds if (value := getattr(asked, kind.replace("-", "_"))) is not None}
    if not given:
        if asked.plan is not None:
            return Budget("plan")
        return None if asked.only_width is None else Budget("bits", asked.only_width)
    kind = next(iter(given))
    value = given.pop(kind)
    return checked_budget(Budget(kind, value, given.get("max-latency"), given.get("max-drop")))


def requested_quantized_forms(asked: PlanOptions, subject: Model, *, calibrated: bool) -> Mapping[str, tuple[str, ...]]:
    """The quantized forms that each layer may take, by its name: those of a plan, or those of the widths allowed."""
    if asked.plan is not None:
        planned, _ = given_plan(asked.plan)
        return {layer.name: (layer.form,) for layer in planned.layers if layer.quantization is not None}
    if (widths := asked.widths(calibrated=calibrated)) == (16,):
        return {}
    settings, initial = asked.planning_settings or PLANNING, subject.initial is not None
    return {
        layer.name: quantized_forms(layer, widths, initial=initial, settings=settings)
        for layer in subject.layers
        if layer.eligible
    }


def widths_of(quantized: Mapping[str, tuple[str, ...]]) -> tuple[int, ...]:
    """The bits of the quantized forms of layers, the most first."""
    known = (quantization_of(form) for forms in quantized.values() for form in forms)
    return tuple(sorted({each.bits for each in known if each is not None}, reverse=True))


def preferred(asked: PlanOptions, model: Model, *, quantizes: bool) -> Preference:
    """Whether forms and ranks are chosen for speed or for size; those of a given plan are chosen already.

    A bare file is stored, and its size is what counts; folders and modules are there to be run. Where layers may be
    quantized it is size too: not every device multiplies integers faster, and they are about bytes. So it is of a model
    that is compressed already: its pairs keep their form, and are faster at lower ranks.
    """
    if asked.plan is not None or model.squeezes:
        return "size"
    if asked.prefer is not None:
        return asked.prefer
    bare = not model.in_memory and model.checkpoint.folder is None
    return "size" if (bare or quantizes) and not {"max_latency", "target_device"} & asked.given else "speed"


def timing_settings(asked: CompressOptions | EvaluateOptions) -> TimingSettings:
    """How forwards are timed, at the batch sizes that are asked for."""
    settings = asked.timing_settings or TIMING
    return replace(settings, batch=asked.batch) if "batch" in asked.given else settings


def provenance(asked: PlanOptions, checkpoint: Checkpoint) -> Provenance | None:
    """What the output says of how it was asked for; None of a module."""
    return None if checkpoint.source is None else Provenance(asked.command(checkpoint.name), asked.portable())


def memory_of_jobs(device: torch.device) -> int | None:
    """The most bytes that layers which are worked on at a time may take: a quarter of what is free, if that is known.

    The machine is used by others too, and what is free now is not all free later.
    """
    free = free_memory(device)
    return None if free is None else free // 4


def selection(asked: LayerOptions) -> LayerSelection:
    """The layers that the options ask for."""
    embeddings = isinstance(asked, EmbeddingOptions) and asked.embeddings
    return LayerSelection(asked.include, asked.exclude, embeddings)


def preprocessing(asked: DataOptions, model: Model) -> Preprocessing:
    """What prepares data for the model: what was given, else its own."""
    return model.preprocessing.with_objects(asked.tokenizer, asked.processor)


def reported_data(asked: MetricOptions, model: Model, split: Split = "test") -> EvaluationData:
    """Data for a report, with the metric to measure by."""
    sample = Sample(split, asked.data_samples, metric=asked.custom_metric)
    return open_data(asked.data, preprocessing(asked, model), sample)


def output_target(
    asked: CompressOptions, model: Model, naming: Naming, *, others: Sequence[Checkpoint] = ()
) -> Target | None:
    """Where the result goes; None where nothing is written.

    A module whose initial weights are known may have a file: in memory its layers are dense.
    """
    if model.in_memory and (model.initial is None or asked.push_to is not None):
        require_no_output(asked.output, asked.push_to)
    if asked.dry_run or (model.in_memory and asked.output is None):
        return None
    target = checked_target(model.checkpoint, asked.output, naming, overwrite=asked.overwrite, others=others)
    return target.pushed_to(asked.push_to)


def output_folder(asked: CompressOptions, model: Model) -> Path | None:
    """The folder in which the result appears, or of a dry run would appear; None of a module."""
    if model.in_memory:
        return None
    naming = Naming(form_of(model.checkpoint), "-compressed")
    return naming.place(model.checkpoint, asked.output).absolute().parent


def data_to_measure_on(asked: CompressOptions, model: Model) -> tuple[EvaluationData | None, EvaluationData | None]:
    """Data that decide about the size, where a drop does, and data for the report."""
    data = asked.data
    if data is None:
        return None, None
    if asked.calibrates and not asked.calibrates_itself:
        require_apart(asked.calibration, data)
    if asked.max_drop is None:
        return None, reported_data(asked, model)
    sample = Sample(limit=asked.data_samples, metric=asked.custom_metric)
    deciding, reported = open_search_data(data, preprocessing(asked, model), sample)
    require_possible_drop(asked.max_drop, deciding)
    return deciding, reported
