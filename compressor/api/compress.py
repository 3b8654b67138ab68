"""Walks the stages for a file, a folder or a module; the only place that knows them all."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor.api.evaluate import evaluate_models
from compressor.api.fine_tune import compress_fine_tune
from compressor.api.requests import (
    SHARD_SIZE,
    as_size,
    data_to_measure_on,
    named_data,
    requested,
    require_fine_tune,
    require_known_kinds,
    require_what_is_needed,
    selection,
    stated,
    training_options,
)
from compressor.api.workload import (
    decomposition_costs,
    steps_of_compression,
    timed_decompositions,
    work_on_calibration,
    work_on_data,
)
from compressor.api.write import Output, written
from compressor.arguments import as_count, as_count_if_given, as_patterns, require_copyable, require_model
from compressor.calibration import CalibrationData, calibrate, split_examples
from compressor.calibration.drop import plan_within_drop
from compressor.calibration.search import PlannedModel, open_calibration_data, plan_ranks
from compressor.data import EvaluationData, open_data_for
from compressor.errors import BadInput, QualityGateNotMet
from compressor.evaluation import Evaluation, require_accepted
from compressor.io import Checkpoint, Naming, Target, TensorInfo, checked_target, form_of
from compressor.io.output import require_no_output
from compressor.lowrank import (
    Rewriting,
    StoredErrors,
    compressed_artifact,
    rewritten_infos,
    weight_file_bytes,
)
from compressor.measure import EPSILON
from compressor.model import (
    Factory,
    Model,
    ModelLike,
    inspect_layers,
    measured_layers,
    open_model,
    open_runnable,
    resolve_device,
)
from compressor.planning import (
    Budget,
    FormRequest,
    LayerPlan,
    MeasuredLayer,
    Plan,
    is_worthwhile,
    within_limit,
    worthwhile_size,
)
from compressor.progress import Progress, expect, takes_steps
from compressor.recipe import TrainingRecipe
from compressor.report.model_card import compressed_card
from compressor.report.wording import command_words, format_size, needs_calibration, percent, warning_words
from compressor.results import BeforeAfter, Compression
from compressor.torch_state import neutral_torch_state

logger = logging.getLogger(__name__)


@neutral_torch_state()
def plan(
    model: ModelLike,
    *,
    revision: str | None = None,
    base: ModelLike | None = None,
    keep: float | str | None = None,
    max_size: int | str | None = None,
    max_drop: float | None = None,
    tolerance: float | str | None = None,
    recipe: TrainingRecipe | str | Path | None = None,
    recipe_file: str | Path | None = None,
    factory: Factory | None = None,
    data: str | Path | None = None,
    data_samples: int | None = None,
    calibration: str | Path | Iterable[Any] | None = None,
    calibration_samples: int | None = None,
    calibration_sequence_length: int | None = None,
    refine: bool = True,
    seed: int = 0,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    embeddings: bool = False,
    form: FormRequest = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> Plan:
    """The ranks that `compress` would choose, and why, without the work; raises what `compress` raises.

    Only `max_drop` uses the data, and compresses in memory to find them. The refinement changes no rank, only the loss
    that is told: without it a plan is made faster.
    """
    return compress(
        model,
        revision=revision,
        base=base,
        keep=keep,
        max_size=max_size,
        max_drop=max_drop,
        tolerance=tolerance,
        recipe=recipe,
        recipe_file=recipe_file,
        factory=factory,
        data=data,
        data_samples=data_samples,
        calibration=calibration,
        calibration_samples=calibration_samples,
        calibration_sequence_length=calibration_sequence_length,
        refine=refine,
        seed=seed,
        include=include,
        exclude=exclude,
        embeddings=embeddings,
        form=form,
        device=device,
        dry_run=True,
        progress=progress,
    ).plan


@neutral_torch_state()
def compress(
    model: ModelLike,
    *,
    revision: str | None = None,
    base: ModelLike | None = None,
    output: str | Path | None = None,
    push_to: str | None = None,
    keep: float | str | None = None,
    max_size: int | str | None = None,
    max_drop: float | None = None,
    tolerance: float | str | None = None,
    plan: Plan | str | Path | None = None,
    recipe: TrainingRecipe | str | Path | None = None,
    recipe_file: str | Path | None = None,
    factory: Factory | None = None,
    data: str | Path | None = None,
    data_samples: int | None = None,
    calibration: str | Path | Iterable[Any] | None = None,
    calibration_samples: int | None = None,
    calibration_sequence_length: int | None = None,
    refine: bool = True,
    seed: int = 0,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    embeddings: bool = False,
    form: FormRequest = "auto",
    max_shard_size: int | str = SHARD_SIZE,
    device: str = "auto",
    allow_miss: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Compression:
    """Make a trained model smaller: measure, plan, factorize, rewrite, and evaluate on `data` where it is given.

    Of the data at most `data_samples` examples are used, evenly spaced; all by default. With `embeddings` these are
    among the eligible layers, each together with an output head that is tied to it.

    At most one of `keep` (fraction of the eligible parameters, 0.6 or "60%"), `max_size` (bytes of the weight files),
    `max_drop` (accuracy as a fraction, or increase in perplexity), `tolerance` (relative error per layer) and `plan`;
    with none of them the window rule where the recipe is of the SGD family, else a tolerance that is safe without data.

    `max_drop` tries a few sizes in memory for the smallest whose drop on `data` is at most that. The validation split
    of built-in data decides, and their test split gives the evaluation; of other data every second example decides,
    and the others give it. What decides is the drop with one standard error added; `plan.search` tells what was tried.
    Where the evaluation shows a larger drop than was allowed nothing is written, unless `allow_miss` is set.

    `org/name`, where there is no such path, is a model of the Hugging Face hub, at a `revision` or its default branch.
    A folder that was written is sent to the hub as `push_to`: a repository made for it is private, weights that one
    has already are replaced only with `overwrite`, and those that are compressed never.

    `calibration` is data, or an iterable of batches, by which ranks and factors are chosen so that the loss notices
    least: at most `calibration_samples` of its examples, by default all of an iterable and 128 of other data; texts in
    windows of `calibration_sequence_length` tokens (the model's own by default). A quarter of them are the holdout, to
    choose what loses least; `seed` draws the targets. With `refine` the factors are at last fitted, a block at a time,
    to what the dense model makes of these examples, and kept so only where the holdout examples agree; without is
    faster.

    With a `base`, the model that this one was fine-tuned from, the difference to it is compressed instead of the
    weights: a folder gives a LoRA adapter folder, for PEFT, or factor pairs where `output` is named .safetensors; a
    file gives pairs, and a module (and its base) a copy of the base with pairs beside its layers.

    A file gives a safetensors file and a folder a folder, at `output` or as `NAME-compressed` beside the input; a
    module gives `Compression.model` and is itself left as it is. Nothing is written in a `dry_run`. The same input
    gives the same bytes.

    Raises `BadInput` for a request or input that is bad and `QualityGateNotMet` when nothing was asked and nothing can
    be removed safely, or when `max_drop` is missed; no output is left behind. Raises
    `CompressorError` when the output was written, and could not be pushed.
    """
    started = time.monotonic()
    require_model(model)
    include, exclude = as_patterns(include, "include"), as_patterns(exclude, "exclude")
    seed = as_count(seed, "seed", least=0, most=2**64 - 1)
    calibration_samples = as_count_if_given(calibration_samples, "calibration_samples", least=2)
    data_samples = as_count_if_given(data_samples, "data_samples", least=1)
    require_known_kinds(output, data, recipe_file, plan, calibration, form)
    budget = requested(keep, max_size, max_drop, tolerance, plan, form)
    if base is not None:
        require_fine_tune(
            budget,
            calibration,
            calibration_samples,
            calibration_sequence_length,
            form,
            push_to,
            max_shard_size,
            seed,
            refine=refine,
            embeddings=embeddings,
        )
    require_what_is_needed(budget, data, calibration, refine=refine, allow_miss=allow_miss)
    subject = open_model(
        model,
        recipe=stated(recipe, recipe_file),
        factory=factory,
        select=selection(include, exclude, embeddings=embeddings),
        revision=revision,
    )
    if subject.in_memory:
        require_copyable(subject.module)
    if base is not None:
        return _compressed_fine_tune(
            subject,
            open_runnable(base, factory),
            data,
            data_samples,
            resolve_device(device),
            progress,
            output=output,
            budget=budget,
            plan=plan,
            dry_run=dry_run,
            overwrite=overwrite,
        )
    checkpoint = subject.checkpoint
    target = _target(checkpoint, output, push_to, dry_run=dry_run, overwrite=overwrite)
    if data is not None or calibration is not None:
        subject.require_runnable()
    torch_device = resolve_device(device)
    deciding, reported = data_to_measure_on(data, data_samples, subject, max_drop, calibration)
    samples = open_calibration_data(calibration, subject, calibration_samples, calibration_sequence_length)
    shard_size = as_size(max_shard_size, "max_shard_size")

    if samples is None:
        _warn_of_missing_data(subject, budget)
    examples = None if samples is None else _examples(subject, samples, torch_device, calibration_samples)
    _announce(
        progress,
        subject,
        examples,
        deciding,
        None if dry_run else reported,
        torch_device,
        given=plan is not None,
        refine=refine,
        writes=not dry_run,
    )
    inspected = inspect_layers(subject, EPSILON, torch_device, progress)
    measured = measured_layers(subject, inspected)
    _require_some(measured, subject.name)
    calibrated = None
    if examples is not None:
        dense, layers = subject.with_separate_experts, [m.layer for m in measured]
        calibrated = calibrate(dense, layers, examples, device=torch_device, seed=seed, progress=progress)
    if deciding is not None and budget is not None:
        planned = plan_within_drop(
            subject,
            measured,
            budget,
            form,
            shard_size,
            calibrated,
            deciding,
            torch_device,
            progress,
            refine=refine,
        )
    else:
        planned = plan_ranks(subject, measured, budget, plan, form, shard_size, calibrated, progress, refine=refine)
    chosen = planned.plan
    if budget is None:
        _require_worthwhile(subject, measured, chosen, form, shard_size)
    if chosen.budget.kind != "plan":
        _require_smaller(subject, chosen, dry_run=dry_run)

    asked = {
        "revision": revision,
        "keep": keep,
        "max-size": max_size,
        "max-drop": max_drop,
        "allow-miss": allow_miss,
        "tolerance": tolerance,
        "plan": Path(plan) if isinstance(plan, str) else plan,
        **training_options(subject.recipe, recipe, recipe_file),
        "data": named_data(data),
        "data-samples": data_samples,
        "calibration": named_data(calibration),
        "calibration-samples": None if calibration is None else calibration_samples,
        "sequence-length": calibration_sequence_length,
        "no-refine": not refine,
        "seed": seed or None,
        "model": Path(factory) if isinstance(factory, str) else factory,
        "include": include,
        "exclude": exclude,
        "embeddings": embeddings,
        "form": None if form == "auto" else form,
        "max-shard-size": None if max_shard_size == SHARD_SIZE else max_shard_size,
    }
    compression = write_compressed(
        subject,
        measured,
        planned,
        target,
        shard_size,
        reported,
        torch_device,
        progress,
        command="" if checkpoint.source is None else command_words(checkpoint.name, asked),
        allow_miss=allow_miss,
        dry_run=dry_run,
    )
    return replace(
        compression,
        inspected=tuple(each for each in inspected if each.layer.eligible),
        measured=tuple(planned.weighted or measured),
        form=form,
        pushed=None if target is None else target.push(),
        seconds=time.monotonic() - started,
    )


def write_compressed(
    subject: Model,
    measured: Sequence[MeasuredLayer],
    planned: PlannedModel,
    target: Target | None,
    shard_size: int,
    reported: EvaluationData | None,
    device: torch.device,
    progress: Progress | None,
    *,
    command: str,
    allow_miss: bool,
    dry_run: bool,
) -> Compression:
    """The plan carried out: the output written whole with its card, and measured."""
    checkpoint, chosen = subject.checkpoint, planned.plan
    rewriting = Rewriting(checkpoint, subject.recipe, subject.layers, chosen, planned.factors, planned.statistics)
    errors = StoredErrors(len(rewriting.factorized), progress)
    module = subject.with_separate_experts if subject.in_memory and not dry_run else None
    artifact = compressed_artifact(rewriting, shard_size, device=device, errors=errors, module=module)

    def evaluation_of(small: ModelLike | None) -> Evaluation | None:
        if reported is None or small is None:
            return None
        compressed_model = open_runnable(small, subject.factory)
        evaluation = evaluate_models(subject, compressed_model, reported, device, progress)
        _require_allowed_drop(evaluation, chosen.budget, subject.name, allow_miss=allow_miss)
        return evaluation

    def result(made: Output, evaluation: Evaluation | None) -> Compression:
        compression = Compression(
            source=subject.name,
            output=None if target is None else str(target.path),
            recipe=subject.recipe,
            plan=chosen.with_errors(errors.of),
            parameters=BeforeAfter(_elements(checkpoint.tensors.values()), artifact.elements),
            bytes=BeforeAfter(checkpoint.weight_bytes, made.bytes),
            evaluation=evaluation,
            seconds=0.0,
            peak_memory_bytes=_peak_memory_bytes(),
            skipped=tuple(layer for layer in subject.layers if not layer.eligible),
            spectra={
                m.layer.name: m.singular_values if p.form != "spatial" or m.spatial_values is None else m.spatial_values
                for m, p in zip(measured, chosen.layers, strict=True)
            },
            command=command,
            model=made.model if isinstance(made.model, nn.Module) else None,
            has_attention=subject.has_attention,
            left_out=checkpoint.left_out,
            weights_at=checkpoint.weights_at,
            not_copied=made.not_copied,
        )
        return replace(compression, warnings=warning_words(compression))

    with written(artifact, target) as made:
        evaluation = evaluation_of(made.model)
        compression = result(made, evaluation)
        if target is not None:
            made.write_card(partial(compressed_card, compression=compression, source=checkpoint, name=target.name))
    return compression


def _target(
    checkpoint: Checkpoint, output: str | Path | None, push_to: str | None, *, dry_run: bool, overwrite: bool
) -> Target | None:
    """Where the result goes; None where nothing is written."""
    if checkpoint.source is None:
        require_no_output(output)
    if dry_run and push_to is not None:
        raise BadInput("`push_to` and `dry_run` contradict each other", remedy="leave one of them out")
    if checkpoint.source is None and push_to is not None:
        what, remedy = "`push_to` sends a model folder, and none is written", "compress a folder, or leave it out"
        raise BadInput(what, remedy=remedy)
    if checkpoint.source is None or dry_run:
        return None
    named = Naming(form_of(checkpoint), "-compressed")
    return checked_target(checkpoint, output, named, overwrite=overwrite).pushed_to(push_to)


def _compressed_fine_tune(
    model: Model,
    base: Model,
    data: str | Path | None,
    data_samples: int | None,
    device: torch.device,
    progress: Progress | None,
    **request: Any,
) -> Compression:
    """`compress_fine_tune`, evaluated on `data` where they are given."""
    reported = None
    if data is not None:
        model.require_runnable()
        reported = open_data_for(data, model.preprocessing, limit=data_samples)

    def evaluated(small: nn.Module) -> Evaluation:
        assert reported is not None
        return evaluate_models(model, open_runnable(small), reported, device, progress)

    compression = compress_fine_tune(
        model,
        base,
        device=device,
        progress=progress,
        evaluated=None if reported is None else evaluated,
        **request,
    )
    return replace(compression, peak_memory_bytes=_peak_memory_bytes(), warnings=warning_words(compression))


def _require_some(measured: Sequence[MeasuredLayer], name: str) -> None:
    if not measured:
        raise BadInput(
            "no layer of this model is eligible",
            where=name,
            remedy="see why with 'compress inspect MODEL', and widen `include` or narrow `exclude`",
        )


def _warn_of_missing_data(subject: Model, budget: Budget | None) -> None:
    """Say before the work what compressing attention layers by their weights alone can do, and how to avoid it."""
    asked = budget or Budget("tolerance")
    if not needs_calibration(asked, has_attention=subject.has_attention):
        return
    size = " with a size, such as `keep=0.8`, and" if asked.kind in ("tolerance", "window-rule") else " with"
    logger.warning(
        "%s has attention layers: compressed by its weights alone it may lose most of what it knows; to avoid that, run"
        " it%s `calibration=FILE`, about a hundred examples (or builtin:stdlib for text, builtin:digits for images)",
        subject.name,
        size,
    )


def _require_worthwhile(
    subject: Model, measured: Sequence[MeasuredLayer], chosen: Plan, form: FormRequest, shard_size: int
) -> None:
    """Raise `QualityGateNotMet` where nothing was asked and little was saved, naming a size that saves enough."""

    def file_bytes(layers: tuple[LayerPlan, ...]) -> int:
        plan = replace(chosen, layers=layers)
        return weight_file_bytes(Rewriting(subject.checkpoint, subject.recipe, subject.layers, plan), shard_size)

    before, after = subject.checkpoint.weight_bytes, file_bytes(chosen.layers)
    if is_worthwhile(after, before):
        return
    suggested = worthwhile_size(measured, form, file_bytes, before)
    remedy = (
        "low rank does not make these weight files worthwhile smaller"
        if suggested is None
        else f"ask for a size with `keep={suggested.value:g}`, better with `calibration=DATA`"
    )
    nothing = all(layer.rank is None for layer in chosen.layers)
    little = f"what can be removed safely leaves {percent(after, before)} of the weight files"
    found = "nothing can be removed safely" if nothing else little
    raise QualityGateNotMet(f"{subject.name}: {found} ({chosen.budget}); {remedy}")


def _require_smaller(subject: Model, chosen: Plan, *, dry_run: bool) -> None:
    """Raise `QualityGateNotMet` where every layer stays dense, or tensors grow, as copies of tied ones do.

    A model that is no larger than a `max_size` as it is has what was asked for.
    """
    unchanged = all(layer.rank is None for layer in chosen.layers)
    if unchanged and chosen.budget.kind != "max-size" and not dry_run:
        raise QualityGateNotMet(
            f"{subject.name}: every layer would stay dense ({chosen.budget}), so that nothing would be smaller; ask for"
            " less, such as `keep=0.8`, or for a larger `tolerance`"
        )
    before = sum(info.nbytes for info in subject.checkpoint.tensors.values())
    infos = rewritten_infos(Rewriting(subject.checkpoint, subject.recipe, subject.layers, chosen))
    after = sum(info.nbytes for info in infos)
    if after > before:
        raise QualityGateNotMet(
            f"{subject.name}: the tensors would grow from {format_size(before)} to {format_size(after)}, because some"
            " that were tied become copies; keep less, leave these layers out with `exclude`, or give the ranks as a"
            " `plan`"
        )


def _examples(
    subject: Model, samples: EvaluationData | Iterable[Any], device: torch.device, limit: int | None
) -> CalibrationData:
    """What calibration uses of its data, which the model is known to take."""
    if isinstance(samples, EvaluationData):
        require_accepted(subject.with_separate_experts, samples, device=device)
    return split_examples(samples, limit)


def _announce(
    progress: Progress | None,
    subject: Model,
    examples: CalibrationData | None,
    deciding: EvaluationData | None,
    reported: EvaluationData | None,
    device: torch.device,
    *,
    given: bool,
    refine: bool,
    writes: bool,
) -> None:
    """Tell a progress that estimates the whole what steps `compress` will go through, and what they will cost.

    A short measurement says how long running the model takes.
    """
    if not takes_steps(progress):
        return
    data = (examples, deciding, reported)
    eligible = [layer for layer in subject.layers if layer.eligible]
    decompositions = decomposition_costs(eligible)
    calibration = trial = evaluation = None
    if eligible and any(each is not None for each in data):
        dense = subject.with_separate_experts
        decompositions = timed_decompositions(subject.checkpoint, eligible, device)
        calibration = None if examples is None else work_on_calibration(dense, eligible, examples, device)
        trial = None if deciding is None else work_on_data(dense, deciding, device)
        evaluation = None if reported is None else work_on_data(dense, reported, device)
    expect(
        progress,
        steps_of_compression(decompositions, calibration, trial, evaluation, given=given, refine=refine, writes=writes),
    )


def _require_allowed_drop(evaluation: Evaluation, budget: Budget, name: str, *, allow_miss: bool) -> None:
    """Raise `QualityGateNotMet`, or only warn, when the data that did not decide show too large a drop."""
    limit = budget.value if budget.kind == "max-drop" else None
    if limit is None or evaluation.drop is None or within_limit(evaluation.drop, limit):
        return
    found = f"the drop on {evaluation.data} is {evaluation.drop:.4g}, more than `max_drop` {limit:g}"
    if not allow_miss:
        raise QualityGateNotMet(
            f"{name}: {found}; ask for a smaller drop or give more data, or write the model nevertheless with"
            " `allow_miss=True`"
        )
    logger.warning(found)


def _elements(infos: Iterable[TensorInfo]) -> int:
    return sum(info.elements for info in infos)


def _peak_memory_bytes() -> int:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
