"""The steps that commands announce: `compress` with or without a base, `diagnose`, and `merge`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from compressor.adapters import Adapter
from compressor.api.calibration_data import calibration_settings
from compressor.api.on_data import OpenedData
from compressor.api.options import CompressOptions
from compressor.api.requests import requested_budget, timing_settings
from compressor.api.workload import (
    FORWARD_AND_BACKWARD,
    CompressionWork,
    EvaluationWork,
    FirstRun,
    Workers,
    least_seconds,
    timed_decompositions,
    work_on_calibration,
    work_on_data,
    work_on_quantization,
)
from compressor.calibration.drop import tried_at_once
from compressor.data import EvaluationData
from compressor.diagnosis.gradients import NOISE_BATCHES, PROBED
from compressor.engine import Run
from compressor.errors import BadInput
from compressor.fine_tuning.difference import compare_tensors
from compressor.merging.combination import Combination
from compressor.merging.comparison import compared_layers, overlap_of
from compressor.merging.overlap import MEASURED_EXAMPLES
from compressor.model import Model
from compressor.planning import PLANNING, PlanningSettings, quantized_forms
from compressor.progress import Step


def timed_work(
    asked: CompressOptions,
    subject: Model,
    data: OpenedData,
    *,
    quantized: Mapping[str, Sequence[str]],
    first: FirstRun | None,
    run: Run,
) -> CompressionWork:
    """What `compress` will do, in seconds; `quantized` are the forms that layers may take, by their names."""
    eligible = [layer for layer in subject.layers if layer.eligible]
    workers = Workers.of(run)
    with workers.timing():
        decompositions = timed_decompositions(subject.checkpoint, eligible, run.device)
        known = None if data.calibration is None else calibration_settings(asked, data.calibration)
        quantization = work_on_quantization(subject.checkpoint, eligible, quantized, device=run.device, settings=known)
    calibration = trial = evaluation = None
    if any(each is not None for each in (data.calibration, data.search, data.report)):
        dense, settings = subject.streamed, calibration_settings(asked, data.calibration)
        if data.calibration is not None and first is not None:
            calibration = work_on_calibration(
                dense, eligible, data.calibration, first=first, run=run, settings=settings
            )
            if calibration is not None and subject.files is None:
                calibration = replace(calibration, workers=workers)
            if calibration is not None:
                uniform = (asked.planning_settings or PLANNING).uniform_widths if settings.uniform else ()
                plain = {layer.name: quantized_forms(layer, uniform[-1:])[:1] for layer in eligible if uniform}
                alike = quantization or work_on_quantization(
                    subject.checkpoint, eligible, plain, device=run.device, settings=settings
                )
                calibration = replace(
                    calibration, quantization=quantization, uniform=alike, uniform_widths=len(uniform)
                )
        timing = timing_settings(asked)
        trial = None if data.search is None else work_on_data(dense, data.search, run.device)
        evaluation = None if data.report is None else work_on_data(dense, data.report, run.device, timing=timing)
    at_once = sizes_at_once(asked, subject, data, run=run)
    return CompressionWork(
        decompositions,
        calibration,
        trial,
        evaluation,
        search_settings(asked),
        at_once=at_once,
        workers=workers,
        quantization=quantization,
    )


def sizes_at_once(asked: CompressOptions, subject: Model, data: OpenedData, *, run: Run) -> int:
    """How many sizes a search by drop tries at a time."""
    if data.search is None or search_settings(asked) is None:
        return 1
    return tried_at_once(subject, data.search, run.engine)


def search_settings(asked: CompressOptions) -> PlanningSettings | None:
    """The settings of a search by drop; None where none was asked for."""
    budget = requested_budget(asked)
    searched = budget is not None and budget.kind == "max-drop"
    return (asked.planning_settings or PLANNING) if searched else None


def comparison_seconds(subject: Model, base: Model, *, to_all: bool) -> tuple[float, ...]:
    """What comparing each tensor of a fine-tune with its base is expected to take, by the matrix in the middle."""
    tuned, start = subject.checkpoint, base.checkpoint.apart_like(subject.checkpoint)
    costs = tuple(float(info.elements) for info in tuned.tensors.values())
    both = [
        info
        for name, info in tuned.tensors.items()
        if len(info.shape) > 1 and name in start.tensors and start.tensors[name].shape == info.shape
    ]
    if not both:
        return costs
    middle = sorted(both, key=lambda info: info.elements)[len(both) // 2]
    compare = partial(compare_tensors, tuned, start, middle.name, recipe=subject.recipe, to_all=to_all)
    try:
        rate = least_seconds(compare, torch.device("cpu")) / middle.elements
    except BadInput:  # which the comparison says of all of them in turn
        return costs
    return tuple(rate * each for each in costs)


def fine_tune_steps(
    compared: Sequence[float], work: CompressionWork, *, given: bool, applied: bool, writes: bool
) -> list[Step]:
    """From a fine-tune and its base to what is stored; where it is `applied`, pairs are found for this and to write.

    Layers that did not change are not measured, so that this costs at most what it does of all.
    """
    measure, *planned = work.steps(given=given, writes=False)
    steps = [Step("compare", tuple(compared)), replace(measure, certain=False), *planned]
    factorize = Step("factorize", (work.factor_seconds,))
    if applied:
        steps += [factorize, *([] if work.reported is None else [work.reported.step()])]
    return [*steps, factorize] if writes else steps


def diagnosis_steps(
    subject: Model, data: EvaluationData | None, *, checkpoints: int, device: torch.device
) -> list[Step]:
    """From the matrices, those of a series of `checkpoints` first, to their gradients."""
    layers = [layer for layer in subject.layers if layer.eligible]
    decompositions = timed_decompositions(subject.checkpoint, layers, device)
    steps = [Step("series", decompositions * checkpoints)] if checkpoints else []
    steps.append(Step("measure", decompositions))
    work = None if data is None else work_on_data(subject.with_separate_experts, data, device)
    if data is None or work is None:
        return steps
    forward, batches = work.forward, math.ceil(data.count / data.batch_size)
    backward = FORWARD_AND_BACKWARD * forward.of_batch(min(data.count, data.batch_size))
    probed = 3 * forward.of_batch(min(data.count, data.batch_size, PROBED))
    steps += [
        Step("evaluate", (work.quality_seconds(),)),
        Step("gradients", (backward,) * batches),
        Step("scale invariance", (probed,) * len(layers)),
    ]
    size = subject.recipe.batch_size
    if size is not None and size <= data.count:
        # Of scale-invariant layers alone, of which there may be none.
        noise = FORWARD_AND_BACKWARD * forward.of_batch(size)
        steps.append(Step("gradient noise", (noise,) * NOISE_BATCHES, certain=False))
    return steps


def merge_steps(combination: Combination, tasks: Sequence[EvaluationData], device: torch.device) -> list[Step]:
    """From networks and data of each to the merged one and its quality; a layer in the middle is timed."""
    matrices = combination.networks[0].matrices
    sides = {name: matrices[name].shape for name in compared_layers(combination)}
    multiplications = {name: float(rows * columns * min(rows, columns)) for name, (rows, columns) in sides.items()}
    steps = list[Step]()
    work = [
        work_on_data(part.model.module, data, device) for part, data in zip(combination.networks, tasks, strict=False)
    ]
    known = [each for each in work if each is not None]
    if len(known) == len(combination.networks):
        # The layers of the others and of the base are applied beside those of the network that is run.
        applied = [_measured_seconds(each) * (1 + len(combination.parts)) for each in known]
        steps.append(Step("interference", tuple(applied)))
    if multiplications:
        middle = sorted(multiplications, key=multiplications.__getitem__)[len(multiplications) // 2]
        rate = least_seconds(lambda: overlap_of(combination, middle, device), device) / multiplications[middle]
        steps.append(Step("measure", tuple(rate * each for each in multiplications.values())))
    infos = {info.name: info.elements for info in combination.infos()}
    name = sorted(matrices, key=lambda each: matrices[each].parameters)[len(matrices) // 2] if matrices else None
    rate = 1.0
    if name is not None:
        merged = list(combination.merged(name))
        elements = sum(tensor.numel() for _, tensor in merged)
        rate = least_seconds(lambda: list(combination.merged(name)), device) / max(1, elements)
    steps.append(Step("merge", tuple(rate * each for each in infos.values())))
    if len(known) == len(combination.networks):
        # Both networks are run on all of the data, and on some.
        evaluated = (2 * (each.quality_seconds() + _measured_seconds(each)) for each in known)
        steps.append(Step("evaluate", tuple(evaluated)))
    return steps


def _measured_seconds(work: EvaluationWork) -> float:
    """Running a network on the examples that overlap and change of outputs are measured on."""
    return work.forward.of(min(work.examples, MEASURED_EXAMPLES))


def adapter_steps(adapter: Adapter, *, measures: bool) -> list[Step]:
    """From an adapter to one of other ranks: both its spectra and its factors are a decomposition of each module."""
    costs = tuple(float(module.numbers * module.rank) for module in adapter.modules)
    return [*([Step("measure", costs)] if measures else []), Step("factorize", costs)]
