"""Walks the stages for a file, a folder or a module; the only place that knows them all."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Unpack

from torch import nn

from compressor.api.adapters import compress_adapter, opened_adapter, require_no_adapter_options
from compressor.api.adapters_on_base import compress_adapter_on_base
from compressor.api.announced import search_settings, sizes_at_once, timed_work
from compressor.api.calibration_data import calibration_settings
from compressor.api.evaluate import evaluate_models
from compressor.api.fine_tune import compress_fine_tune
from compressor.api.flags import in_flags
from compressor.api.initial import measured_found, with_initial
from compressor.api.keywords import CompressKeywords, PlanKeywords
from compressor.api.latency import Prepared, prepared, requested_speed, require_speed, target_profile
from compressor.api.needs import (
    NEEDS,
    CalibrationSize,
    Held,
    ModelSize,
    Places,
    SizesInWorkers,
    SlicesInWorkers,
    evaluation_bytes,
    in_time,
    model_size,
    needs_of,
    output_bytes,
    require_available,
)
from compressor.api.on_data import (
    OpenedData,
    calibrated_on,
    held_on_device,
    open_data,
    planned_on,
    require_allowed_drop,
)
from compressor.api.option import verb
from compressor.api.options import CompressOptions, PlanOptions
from compressor.api.requests import (
    memory_of_jobs,
    output_folder,
    output_target,
    preferred,
    provenance,
    requested_budget,
    requested_quantized_forms,
    selection,
    timing_settings,
    widths_of,
)
from compressor.api.work_folder import expect_data, kept_calibration, kept_work, note_output
from compressor.api.workload import FirstRun, first_run, texts_to_fit
from compressor.api.write import Output, written
from compressor.arguments import require_copyable
from compressor.calibration.drop import DropGate
from compressor.calibration.search import PlannedModel, PlanRequest
from compressor.calibration.uniform import QuantizedAlike, on_data, quantized_alike
from compressor.data import EvaluationData
from compressor.engine import InProcess, Run, opened_engine
from compressor.errors import BadInput, QualityGateNotMet
from compressor.evaluation import Evaluation, UniformQuantization, device_words, process_memory
from compressor.formatting import format_percent, format_size
from compressor.forms import from_initial, pair_name
from compressor.freed_memory import freed_memory
from compressor.initial import InitialFound
from compressor.io import Artifact, Naming, Target, form_of
from compressor.lowrank import (
    KeptDecompositions,
    Rewriting,
    StoredErrors,
    compressed_artifact,
    require_read_back,
    rewritten_infos,
    rewritten_numbers,
    with_factors,
)
from compressor.measure import EPSILON, Precision
from compressor.model import (
    Decomposing,
    Model,
    ModelLike,
    inspect_layers,
    measured_layers,
    open_model,
    open_runnable,
    resolve_device,
)
from compressor.network import roles_of_experts
from compressor.planning import (
    PLANNING,
    LayerPlan,
    MeasuredLayer,
    Plan,
    is_worthwhile,
    worthwhile_size,
)
from compressor.progress import expect, takes_steps
from compressor.report.model_card import compressed_card
from compressor.report.wording import needs_words, warning_words
from compressor.results import BeforeAfter, Compression, Needs
from compressor.torch_state import neutral_torch_state

logger = logging.getLogger(__name__)


@neutral_torch_state()
@verb(PlanOptions)
def plan(model: ModelLike, options: PlanOptions | None = None, **given: Unpack[PlanKeywords]) -> Plan:
    """Choose the ranks that `compress` would choose, without the work.

    Only `max_drop` uses `data`, and compresses in memory to find the ranks. The refinement, which only `effort="best"`
    has, changes a rank only there, where it may let a smaller size be chosen; else only the holdout loss.

    Args:
        model: As for `compress`.
        options: The options as an object; keywords take precedence.

    Returns:
        The plan: a rank and a form for every eligible layer, and why.

    Raises:
        BadInput: as `compress`.
        QualityGateNotMet: as `compress`.
    """
    asked = PlanOptions.of(options, given)
    return compress(model, CompressOptions.of(None, {**asked.as_given(), "dry_run": True})).plan


@neutral_torch_state()
@verb(CompressOptions)
def compress(
    model: ModelLike, options: CompressOptions | None = None, **given: Unpack[CompressKeywords]
) -> Compression:
    """Make a trained model smaller: measure, plan, factorize, rewrite, and evaluate on `data` where it is given.

    Without a budget, the window rule decides where the recipe is of the SGD family, else a tolerance that is safe
    without data. `max_drop` tries a few sizes in memory for the smallest whose drop on `data` is at most that: the
    validation split of built-in data decides and the test split is reported; of other data every second example
    decides. One standard error is added to a measured drop, and only the last candidates are refined. A quarter of the
    calibration examples are the holdout, by which candidates are compared; with `effort="fast"`, which compares none, a
    sixteenth.

    `data` and `calibration` take the path of a file or folder, the name of built-in data, or an object: a tensor or
    array of examples (images as N x C x H x W), a pair (inputs, labels), a mapping of arrays, a data set of PyTorch or
    Hugging Face, a loader or another iterable of batches, or an iterable of texts or PIL images. An iterable is read
    once and kept. The standard error of a drop in a `metric` is estimated by running it without each of ten parts of
    the data, which takes nine more passes.

    With a `base`, the difference to it is compressed instead of the weights: a folder gives a LoRA adapter folder for
    PEFT, or factor pairs where `output` is named .safetensors; a file gives pairs, and a module a copy of the base with
    pairs beside its layers. With `bits` the difference is stored in them, in a file.

    An adapter, a LoRA folder of PEFT or a file of factors, is resized: `rank`, `energy`, and `tolerance` are of each of
    its modules, `keep` and `max_size` of all together. With its `base` and `calibration`, or a `max_drop`, ranks and
    factors are those by which base and adapter together lose least.

    A file gives a safetensors file and a folder a folder, at `output` or as `NAME-compressed` beside the input; a
    module gives `Compression.model` and is itself left as it is. The same input, options and number of threads give the
    same bytes, but for the times that a card states. Ranks chosen for speed also depend on what was timed: the profile
    of the device, pairs that turned out slower than dense, and with `max_latency` the whole model. A `plan` fixes them.

    Args:
        model: A weight file, a model folder, `org/name` of the Hugging Face hub, a `torch.nn.Module`, or an adapter.
        options: The options as an object, for pipelines that keep them in files; keywords take precedence.

    Returns:
        The plan, the sizes, the evaluation, and for a module the compressed model.

    Raises:
        BadInput: the request or an input is bad.
        QualityGateNotMet: nothing was asked and nothing can be removed safely, or `max_drop` is missed; nothing is
            written.
        CompressorError: the output was written, and could not be pushed.

    Example:
        >>> small = compressor.compress("model/", output="small/", keep=0.6, calibration="corpus.txt")
    """
    started = time.monotonic()
    asked = CompressOptions.of(options, given)
    # What is refused before anything is opened.
    requested_budget(asked)
    target_profile(asked)
    if (adapter := opened_adapter(model, asked.revision)) is not None:
        on_base = asked.base is not None or asked.calibrates or asked.max_drop is not None
        return compress_adapter_on_base(adapter, asked) if on_base else compress_adapter(adapter, asked)
    require_no_adapter_options(asked)
    subject = open_model(
        model,
        recipe=asked.recipe,
        factory=asked.factory,
        select=selection(asked),
        revision=asked.revision,
        compressed="as dense" if asked.base is None else "refused",
    )
    _require_no_speed(asked, subject)
    if subject.in_memory:
        require_copyable(subject.module)
    if asked.base is not None:
        return compress_fine_tune(subject, open_runnable(asked.base, asked.factory), asked)
    subject, initial = with_initial(asked, subject, asked.progress)
    device = resolve_device(asked.device)
    with opened_engine(asked.engine, device, memory=memory_of_jobs(device)) as engine:
        run = Run(device, asked.seed, asked.progress, engine=engine)
        with kept_work(asked, subject, run) as working, kept_calibration(asked, subject, working) as running:
            compression = _compressed(asked, subject, initial, run=running)
    return replace(compression, seconds=time.monotonic() - started)


def _compressed(asked: CompressOptions, subject: Model, initial: InitialFound | None, *, run: Run) -> Compression:
    """The compression of an opened model; how long all of it took is not known here."""
    target = output_target(asked, subject, Naming(form_of(subject.checkpoint), "-compressed"))
    places = Places.now(run.device, asked.work_dir, output_folder(asked, subject))
    data = open_data(asked, subject, run)
    expect_data(run, data.calibration, data.search)
    with held_on_device(subject, data, run):
        needs = _announced(asked, subject, data, places=places, run=run)
        decomposing = _decomposing(asked, data, places, run=run)
        kept = None if decomposing is None else decomposing.kept
        quantized = requested_quantized_forms(asked, subject, calibrated=data.calibration is not None)
        # With calibration their errors are those in its metric, but of a plan, whose layers it may not reach.
        by_weights = quantized if data.calibration is None or asked.plan is not None else None
        inspected = inspect_layers(subject, EPSILON, run, decomposing=decomposing, quantized=by_weights)
        measured = measured_layers(subject, inspected, asked.planning_settings or PLANNING)
        measured = [
            replace(m, rank_multiple=asked.rank_multiple or 1, quantized=_of_layer(quantized, m)) for m in measured
        ]
        _require_some(measured, subject.name)
        if not any(each.start for each in measured):
            # Nothing is left of them, so that the result is, to the byte, the one without them.
            asked, subject = replace(asked, initial=None), replace(subject, initial=None)
        speed = None
        if preferred(asked, subject, quantizes=any(quantized.values())) == "speed":
            speed = requested_speed(asked, subject, (data.calibration, data.search, data.report), run=run)
            measured = list(_experts_together(subject, measured))
        ready = prepared(speed, subject, measured, request=_request(asked, subject, measured))
        subject.let_go()
        planned, alike = _planned(asked, subject, ready, data=data, gate=_gate(data, kept, run), run=run)
    rewriting = replace(_rewriting(asked, subject, planned), decompositions=kept)
    errors = StoredErrors(len(rewriting.factorized), run.progress)
    module = subject.with_separate_experts if subject.in_memory and not asked.dry_run else None
    if subject.in_memory and target is not None:
        rewriting = with_factors(rewriting, run)
    artifact = compressed_artifact(rewriting, asked.max_shard_size, run=run, errors=errors, module=module)
    beside = target if subject.in_memory else None
    with written(artifact, None if subject.in_memory else target) as made, _file_beside(artifact, beside) as file:
        if isinstance(path := file or made.model, Path):
            require_read_back(path, rewriting)
        compressed_model = (
            None if made.model is None else open_runnable(made.model, subject.factory, initial=subject.initial)
        )
        # Of its own examples, unasked, none could be made, and so all layers keep 16 bits.
        uncalibrated = asked.bits is None and asked.plan is None and planned.plan.calibration is None
        latency = require_speed(ready.speed, subject, compressed_model, limit=asked.max_latency)
        evaluation = _evaluated(asked, subject, compressed_model, data=data.report, run=run)
        compression = replace(
            _compression(subject, measured, rewriting, artifact=artifact, made=made),
            output=None if target is None else str(target.path),
            plan=replace(
                planned.plan.with_errors(errors.of),
                initial=measured_found(initial, measured, planned.weighted or None),
            ),
            evaluation=evaluation,
            latency=latency,
            timed_on=device_words(run.device) if latency else None,
            needs=needs,
            bits=() if uncalibrated else widths_of(quantized),
        )
        compression = replace(compression, warnings=(*planned.warnings, *warning_words(compression)))
        uniform = _uniform(asked, subject, alike, data=None if evaluation is None else data.report, run=run)
        if target is not None:
            card, source = in_flags(compression), subject.checkpoint
            config = None if source.config is None else rewriting.spec_of_modules.described(source.config)
            described = partial(compressed_card, compression=card, source=source, name=target.name, config=config)
            made.write_card(described)
            note_output(run, target.path)
    compression = replace(
        compression,
        uniform=uniform,
        inspected=tuple(each for each in inspected if each.layer.eligible),
        measured=tuple(planned.weighted or ready.measured),
    )
    pushed = None if target is None else target.push()
    return replace(compression, form=asked.form, pushed=pushed)


def _require_no_speed(asked: CompressOptions, subject: Model) -> None:
    """Refuse to make pairs fast that a model has already: they would be compared with dense layers that are gone."""
    wanted = {"max_latency", "target_device"} & asked.given | ({"prefer"} if asked.prefer == "speed" else set())
    if subject.squeezes and wanted:
        option = min(wanted)
        raise BadInput(
            "is compressed already, so that there are no dense layers to be faster than",
            where=subject.name,
            option=option,
            remedy=f"leave out `{option}`, or give the original",
        )


@contextmanager
def _file_beside(artifact: Artifact, target: Target | None) -> Iterator[Path | None]:
    """The file of a module that is compressed in memory, where one is asked for."""
    if target is None:
        yield None
        return
    with written(replace(artifact, form="file"), target) as made:
        assert isinstance(made.model, Path)
        yield made.model


def _decomposing(asked: CompressOptions, data: OpenedData, places: Places, *, run: Run) -> Decomposing | None:
    """How large layers are decomposed when they are measured; None where calibration will decompose them."""
    if data.calibration is not None:
        return None
    precision, budget = Precision(), requested_budget(asked)
    if budget is not None and budget.kind == "tolerance" and budget.value is not None:
        # The dropped energy that is asked for is to be known to a thousandth.
        precision = replace(precision, loss=min(precision.loss, 1e-3 * budget.value**2))
    searched = budget is not None and budget.kind == "max-drop"
    if asked.dry_run and not searched:
        return Decomposing(precision)
    # They take as much as a model in float32, which is not always there, and not ours alone.
    room = 0
    with suppress(OSError):
        room = shutil.disk_usage(places.temporary).free // 2
    return Decomposing(precision, KeptDecompositions(run.journal.part("decompositions"), room, precision))


def _experts_together(subject: Model, measured: Sequence[MeasuredLayer]) -> Sequence[MeasuredLayer]:
    """The layers, of which those that do the same in all experts of a block are to run in one product.

    Those of models whose files hold each by itself are stored and run like that.
    """
    roles = {} if subject.architecture is None else roles_of_experts(subject.architecture.module)
    held = subject.checkpoint.held_by
    return [
        replace(m, together=roles[m.layer.module], quantized=())
        if m.layer.module in roles and m.layer.tensor in held
        else m
        for m in measured
    ]


def _request(asked: CompressOptions, subject: Model, measured: Sequence[MeasuredLayer]) -> PlanRequest:
    """What the plan must meet. Experts that run together are plain pairs, the fastest."""
    plain = asked.form == "auto" and any(m.together is not None for m in measured)
    return PlanRequest(
        budget=requested_budget(asked),
        given=asked.plan,
        form="plain" if plain else asked.form,
        shard_size=asked.max_shard_size,
        provenance=provenance(asked, subject.checkpoint),
        settings=asked.planning_settings or PLANNING,
    )


def _of_layer(quantized: Mapping[str, tuple[str, ...]], m: MeasuredLayer) -> tuple[str, ...]:
    """The quantized forms of a layer; of what training wrote only where it correlates with its initial weights."""
    forms = quantized.get(m.layer.name, ())
    return tuple(form for form in forms if m.start is not None or not from_initial(form))


def _with_errors_by_weights(subject: Model, measured: Sequence[MeasuredLayer], run: Run) -> Sequence[MeasuredLayer]:
    """The layers with the errors of their quantized forms in the Frobenius norm, where no calibration gives them."""
    quantized = {m.layer.name: m.quantized for m in measured if m.quantized}
    if not quantized:
        return measured
    inspected = inspect_layers(subject, EPSILON, run, quantized=quantized)
    errors = {m.layer.name: m.own_errors for m in measured_layers(subject, inspected)}
    return [replace(m, own_errors={**m.own_errors, **errors.get(m.layer.name, {})}) for m in measured]


def _gate(data: OpenedData, decompositions: KeptDecompositions | None, run: Run) -> DropGate | None:
    """What drops in quality are measured on, where there are data for that."""
    return None if data.search is None else DropGate(data.search, run, decompositions)


def _planned(
    asked: CompressOptions, subject: Model, ready: Prepared, *, data: OpenedData, gate: DropGate | None, run: Run
) -> tuple[PlannedModel, Sequence[QuantizedAlike]]:
    """The ranks that are asked for, and with calibration the factors; the errors are those of `compress`.

    And beside them the model with all its layers quantized alike.
    """
    measured, request, calibrated = ready.measured, ready.request, None
    if data.calibration is not None:
        calibrated = calibrated_on(asked, subject, measured, data=data.calibration, run=run)
        if calibrated is None and asked.bits is None:
            measured = [replace(m, quantized=()) for m in measured]
        elif calibrated is None:
            measured = _with_errors_by_weights(subject, measured, run)
    planned = planned_on(subject, measured, request, calibration=calibrated, gate=gate, limit=asked.max_drop)
    if request.budget is None:
        _require_worthwhile(subject, measured, planned.plan, request=request)
    if planned.plan.budget.kind != "plan":
        _require_smaller(subject, measured, planned.plan, dry_run=asked.dry_run)
    alike = quantized_alike(subject, measured, request, calibration=calibrated, run=run)
    return replace(planned, plan=ready.stated(subject, planned.plan)), alike


def _uniform(
    asked: CompressOptions,
    subject: Model,
    alike: Sequence[QuantizedAlike],
    *,
    data: EvaluationData | None,
    run: Run,
) -> tuple[UniformQuantization, ...]:
    """What uniform quantizations lose, on the data too where there are some and the effort allows it."""
    if data is None or not calibration_settings(asked).uniform:
        return tuple(each.quantization for each in alike)
    return tuple(on_data(subject, alike, data, run=run))


def _rewriting(asked: CompressOptions, subject: Model, planned: PlannedModel) -> Rewriting:
    """The checkpoint with what becomes of its layers."""
    return replace(
        subject.rewriting(planned.plan),
        factors=planned.factors,
        statistics=planned.statistics,
        provenance=provenance(asked, subject.checkpoint),
    )


def _evaluated(
    asked: CompressOptions,
    subject: Model,
    compressed_model: Model | None,
    *,
    data: EvaluationData | None,
    run: Run,
) -> Evaluation | None:
    """What was made compared with the dense model; `QualityGateNotMet` where it lost more than was allowed."""
    if data is None or compressed_model is None:
        return None
    evaluation = evaluate_models(subject, compressed_model, data, run=run, timing=timing_settings(asked))
    require_allowed_drop(evaluation, asked, subject.name)
    return evaluation


def _compression(
    subject: Model, measured: Sequence[MeasuredLayer], rewriting: Rewriting, *, artifact: Artifact, made: Output
) -> Compression:
    """What is known of a compression before it is evaluated."""
    checkpoint = subject.checkpoint
    return Compression(
        source=subject.name,
        output=None,
        recipe=subject.recipe,
        plan=rewriting.plan,
        parameters=BeforeAfter(subject.numbers, rewritten_numbers(rewriting)),
        bytes=BeforeAfter(checkpoint.weight_bytes, made.bytes),
        evaluation=None,
        seconds=0.0,
        peak_memory_bytes=process_memory(),
        skipped=tuple(layer for layer in subject.layers if not layer.eligible),
        spectra={
            m.layer.name: m.own_values.get(pair_name(p.form), m.singular_values)
            for m, p in zip(measured, rewriting.plan.layers, strict=True)
        },
        command="" if rewriting.provenance is None else rewriting.provenance.command,
        model=made.model if isinstance(made.model, nn.Module) else None,
        has_attention=subject.has_attention,
        left_out=checkpoint.left_out,
        weights_at=checkpoint.weights_at,
        not_copied=made.not_copied,
    )


def _require_some(measured: Sequence[MeasuredLayer], name: str) -> None:
    if not measured:
        raise BadInput(
            "no layer of this model is eligible",
            where=name,
            remedy="see why with 'compress inspect MODEL', and widen `include` or narrow `exclude`",
        )


def _require_worthwhile(
    subject: Model, measured: Sequence[MeasuredLayer], chosen: Plan, *, request: PlanRequest
) -> None:
    """Raise `QualityGateNotMet` where nothing was asked and little was saved, naming a size that saves enough."""

    def file_bytes(layers: tuple[LayerPlan, ...]) -> int:
        return request.file_bytes(subject, replace(chosen, layers=layers))

    before, after = subject.checkpoint.weight_bytes, file_bytes(chosen.layers)
    if is_worthwhile(after, before, measured[0].settings):
        return
    suggested = worthwhile_size(
        measured, request.form, file_bytes=file_bytes, dense_bytes=before, settings=measured[0].settings
    )
    faster = "" if measured[0].latency is None else " and faster; `prefer='size'` asks for smaller alone"
    remedy = (
        f"low rank does not make these weight files worthwhile smaller{faster}"
        if suggested is None
        else f"ask for a size with `keep={suggested.value:g}`, better with `calibration=DATA`"
    )
    nothing = all(layer.rank is None for layer in chosen.layers)
    little = f"what can be removed safely leaves {format_percent(after, before)} of the weight files"
    found = "nothing can be removed safely" if nothing else little
    raise QualityGateNotMet(f"{subject.name}: {found} ({chosen.budget}); {remedy}")


def _require_smaller(subject: Model, measured: Sequence[MeasuredLayer], chosen: Plan, *, dry_run: bool) -> None:
    """Raise `QualityGateNotMet` where every layer stays dense, or tensors grow, as copies of tied ones do.

    A model that is no larger than a `max_size` as it is has what was asked for.
    """
    unchanged = all(layer.rank is None for layer in chosen.layers)
    if unchanged and chosen.budget.kind != "max-size" and not dry_run:
        by_size = ", or for its size alone with `prefer='size'`" if any(m.latency for m in measured) else ""
        raise QualityGateNotMet(
            f"{subject.name}: every layer would stay dense ({chosen.budget}), so that nothing would be smaller; ask for"
            f" less, such as `keep=0.8`, or for a larger `tolerance`{by_size}"
        )
    before = sum(info.nbytes for info in subject.stored)
    after = sum(info.nbytes for info in rewritten_infos(subject.rewriting(chosen)))
    if after > before:
        why = "some that are quantized become dense" if subject.decoded else "some that were tied become copies"
        raise QualityGateNotMet(
            f"{subject.name}: the tensors would grow from {format_size(before)} to {format_size(after)}, because {why};"
            " keep less, leave these layers out with `exclude`, or give the ranks as a `plan`"
        )


def _announced(asked: CompressOptions, subject: Model, data: OpenedData, *, places: Places, run: Run) -> Needs:
    """What `compress` is expected to take; `BadInput` where there is not enough of it.

    A progress that estimates the whole is told what steps it will go through, and what they will cost. For this, and
    for a dry run, a short measurement says how long decompositions and running the model take.
    """
    eligible = [layer for layer in subject.layers if layer.eligible]
    first = None
    logger.debug("%d layers are eligible; computed on %s", len(eligible), device_words(run.device))
    if eligible and data.calibration is not None:
        first = first_run(subject.streamed, eligible, data.calibration, device=run.device)
    size = model_size(subject.checkpoint, eligible, () if first is None else first.blocks)
    size = size.kept_by(requested_budget(asked), asked.plan)
    quantized = requested_quantized_forms(asked, subject, calibrated=data.calibration is not None)
    examples = None
    if first is not None and data.calibration is not None:
        settings = calibration_settings(asked, data.calibration)
        examples = CalibrationSize.of(data.calibration, first.footprint, settings)
        if any(quantized.values()):
            texts = texts_to_fit(subject.streamed, eligible, data.calibration, device=run.device, settings=settings)
            examples = replace(examples, texts=texts)
        if settings.refine and (search := search_settings(asked)) is not None:
            examples = replace(examples, candidates=search.most_refined)
        examples = replace(examples, sizes=SizesInWorkers.of(sizes_at_once(asked, subject, data, run=run), run))
        if subject.files is not None:
            examples = replace(examples, slices=SlicesInWorkers.of(data.calibration, settings, run))
    held = replace(_held_models(asked, subject, data, size=size, first=first, run=run), jobs=run.engine.here)
    if isinstance(run.engine, InProcess):
        held = replace(held, jobs_memory=run.engine.memory)
    needs = needs_of(size, examples, places, held=held)
    require_available(replace(needs, output=replace(needs.output, needed=0)) if asked.dry_run else needs)
    if eligible and (asked.dry_run or takes_steps(run.progress)):
        work = timed_work(asked, subject, data, quantized=quantized, first=first, run=run)
        expect(run.progress, work.steps(given=asked.plan is not None, writes=not asked.dry_run))
        needs = in_time(needs, work.steps(given=asked.plan is not None, writes=True))
    if (needs.most_seconds or 0.0) > NEEDS.worth_saying:
        logger.info("this takes %s", needs_words(needs))
    return needs


def _held_models(
    asked: CompressOptions, subject: Model, data: OpenedData, *, size: ModelSize, first: FirstRun | None, run: Run
) -> Held:
    """The models in memory: the dense one to run it, beside the compressed one where this is measured or returned.

    Workers on this machine that measure several sizes at a time have one each; those that plan them too are counted
    with what calibration takes.
    """
    runs = data.calibration is not None or data.search is not None
    measuring = 0
    if first is not None and data.report is not None:
        at_once = max(data.report.batch_size, *timing_settings(asked).batch)
        measuring = evaluation_bytes(first.footprint, min(at_once, data.report.count))
    freed = freed_memory().slack if run.device.type == "cpu" and (runs or data.report is not None) else 0
    if subject.in_memory:
        return Held(0, 0 if asked.dry_run else output_bytes(size) + measuring, freed)
    compared = size.dense + output_bytes(size) + measuring if data.report is not None and not asked.dry_run else 0
    calibrating = size.streamed if runs else 0
    if data.calibration is None and sizes_at_once(asked, subject, data, run=run) > 1:
        calibrating += run.engine.here * (size.streamed + size.factors)
    return Held(calibrating, compared, freed)
