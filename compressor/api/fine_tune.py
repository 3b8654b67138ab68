"""A fine-tune compressed as what it adds to its base: compare, measure, plan, and write an adapter or pairs."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from compressor.adapters import AppliedAdapter
from compressor.api.announced import comparison_seconds, fine_tune_steps, timed_work
from compressor.api.evaluate import evaluate_models
from compressor.api.on_data import (
    OpenedData,
    calibrated_on,
    held_on_device,
    open_data,
    planned_on,
    require_allowed_drop,
)
from compressor.api.options import CompressOptions
from compressor.api.requests import (
    output_target,
    provenance,
    requested_budget,
    requested_quantized_forms,
    selection,
    timing_settings,
    widths_of,
)
from compressor.api.work_folder import kept_calibration
from compressor.api.workload import CompressionWork, first_run
from compressor.api.write import Output, written
from compressor.calibration.drop import DropGate
from compressor.calibration.search import PlannedModel, PlanRequest
from compressor.engine import Run
from compressor.errors import BadInput
from compressor.evaluation import process_memory
from compressor.fine_tuning.adaptation import Adaptation, adapted_module
from compressor.fine_tuning.adapter import (
    Adapter,
    llama_cpp_obstacles,
    require_pairs,
    vllm_obstacles,
    vllm_rank,
)
from compressor.fine_tuning.correspondence import Correspondence, renamed, same_names
from compressor.fine_tuning.in_loss import (
    adaptation_of,
    as_differences,
    as_written,
    measured_as_written,
    started_on_base,
)
from compressor.fine_tuning.plan import (
    Changes,
    Kind,
    StoredChanges,
    given_differences,
    measured_changes,
    most_stored_bytes,
    planned_adaptation,
    stored_changes,
)
from compressor.fine_tuning.verification import verify_with_peft
from compressor.io import Naming, portable_name, refuse_adapter
from compressor.lowrank import StoredErrors
from compressor.model import Model, open_model, open_runnable, resolve_device
from compressor.network import module_architecture, with_ties
from compressor.planning import Budget
from compressor.progress import expect, takes_steps
from compressor.report.fine_tune_card import adapter_card
from compressor.report.wording import warning_words
from compressor.results import BeforeAfter, Compression, FineTune


def compress_fine_tune(
    model: Model, base: Model, asked: CompressOptions, *, of: AppliedAdapter | None = None
) -> Compression:
    """Compress the difference of a fine-tune to its base.

    A folder gives a LoRA adapter folder, or a file of pairs where the output is named .safetensors or numbers are to
    have less than 16 bits; a file gives a file of pairs; a module gives a copy of the base with pairs beside its
    layers. Such a module is what `data` measure. With calibration, or a limit on the drop, ranks are those that lose
    the fine-tune least; the base is then what its training started from. A fine-tune that is made `of` an adapter gives
    one whose ranks are at most those of its modules, and its share to keep is one of their numbers.
    """
    started = time.monotonic()
    if model.in_memory != base.in_memory:
        what, remedy = "a module and files cannot be compared", "give both as modules, or both as files"
        raise BadInput(what, option="base", remedy=remedy)
    run = Run(resolve_device(asked.device), asked.seed, asked.progress)
    with kept_calibration(asked, model, run) as running:
        return _compressed(model, base, asked, run=running, started=started, of=of)


@dataclass(frozen=True)
class _Named:
    """A fine-tune and its base with the same names of tensors; how they were found where they were others."""

    subject: Model
    base: Model
    correspondence: Correspondence | None = None


def _in_names_of_base(model: Model, base: Model, asked: CompressOptions) -> _Named:
    """A fine-tune in the network of its base, where its names are others or not all are there."""
    subject = model.with_ties()
    if model.in_memory or asked.factory is not None:
        return _Named(subject, base)
    refuse_adapter(base.checkpoint)
    start = with_ties(base.checkpoint.apart_like(subject.checkpoint), subject.architecture)
    if same_names(subject.checkpoint, start):
        return _Named(subject, base)
    assert isinstance(asked.base, str | Path)
    opened = open_model(asked.base, select=selection(asked)).with_ties()
    found = renamed(subject.checkpoint, opened.checkpoint)
    if found is None:  # which the comparison refuses
        return _Named(subject, base)
    network = opened.with_tensors(found.checkpoint, model.name, found.own)
    # Its files, and what they say of it and its training, are still its own.
    own = model.checkpoint
    checkpoint = replace(
        found.checkpoint,
        source=own.source,
        form=own.form,
        files=own.files,
        folder=own.folder,
        metadata=own.metadata,
        left_out=own.left_out,
        training=own.training,
    )
    named = replace(network, checkpoint=checkpoint, _find_recipe=lambda: model.recipe)
    return _Named(named, opened, found.correspondence)


def _compressed(
    model: Model,
    base: Model,
    asked: CompressOptions,
    *,
    run: Run,
    started: float,
    of: AppliedAdapter | None,
) -> Compression:
    named = _in_names_of_base(model, base, asked)
    subject, base = named.subject, named.base
    data = open_data(asked, subject, run)
    # An adapter holds no integers, so that bits are only there where they are asked for.
    quantized = requested_quantized_forms(
        asked, subject, calibrated=data.calibration is not None and "bits" in asked.given
    )
    kind = _kind(subject, asked.output, quantized=bool(quantized))
    naming = Naming("folder", "-adapter") if kind == "adapter" else Naming("file", "-difference")
    naming = naming if of is None else Naming("folder", "-compressed")
    target = output_target(asked, subject, naming, others=[base.checkpoint])
    made_by = provenance(asked, subject.checkpoint)
    applied = not asked.dry_run and (kind == "module" or data.report is not None)
    if takes_steps(run.progress) and any(layer.eligible for layer in subject.layers):
        given, writes = asked.plan is not None, target is not None
        work = _timed_work(asked, subject, data, quantized=quantized, run=run)
        compared = comparison_seconds(subject, base, to_all=kind == "adapter")
        expect(run.progress, fine_tune_steps(compared, work, given=given, applied=applied, writes=writes))
    changes = measured_changes(subject, base, kind, provenance=made_by, quantized=quantized, run=run)
    changes = changes if of is None else _of_adapter(changes, of)
    if data.calibration is None and data.search is None:
        adaptation = planned_adaptation(changes, requested_budget(asked), asked.plan)
    else:
        with held_on_device(subject, data, run):
            adaptation = adaptation_of(changes, _planned_in_loss(changes, asked, data, run=run, of=of))
    if not adaptation.paired and not adaptation.in_full:
        raise BadInput(
            f"needs nothing beside its base ({adaptation.plan.budget})",
            where=subject.name,
            remedy="use the base, or allow a smaller drop",
        )
    stored = stored_changes(changes, adaptation, device=run.device, progress=run.progress)
    if stored.adapter is not None:
        require_pairs(stored.adapter)
    errors, module, evaluation, verified = dict[str, float](), None, None, None
    if applied:
        # What was loaded here needs no copy.
        dense = copy.deepcopy(base.module) if base.in_memory else base.module
        names = subject.architecture or module_architecture(dense)
        done = StoredErrors(len(adaptation.paired), run.progress, errors)
        module = adapted_module(adaptation, dense, device=run.device, done=done, module_name=names.module_name)
        if data.report is not None:
            timing = timing_settings(asked)
            evaluation = evaluate_models(model, open_runnable(module), data.report, run=run, timing=timing)
            require_allowed_drop(evaluation, asked, subject.name)
    with written(stored.artifact, target) as made:
        if stored.adapter is not None and target is not None:
            verified = finish_adapter(made, stored.adapter, name=target.name, errors=stored.errors.of)
    tuned, correspondence = model.checkpoint, named.correspondence
    only_in_base = 0 if correspondence is None else correspondence.only_in_base
    compression = Compression(
        source=subject.name,
        output=None if target is None else str(target.path),
        recipe=subject.recipe,
        plan=adaptation.plan.with_errors(errors | stored.errors.of),
        parameters=BeforeAfter(
            tuned.elements if of is None else of.adapter.checkpoint.elements,
            adaptation.numbers if stored.adapter is None else stored.artifact.elements,
        ),
        bytes=BeforeAfter(tuned.weight_bytes, stored.artifact.bytes),
        evaluation=evaluation,
        seconds=time.monotonic() - started,
        peak_memory_bytes=process_memory(),
        skipped=tuple(layer for layer in changes.layers if not layer.eligible),
        spectra={m.layer.name: m.singular_values for m in changes.measured},
        model=module if kind == "module" else None,
        fine_tune=replace(
            _fine_tune(adaptation, stored, base=base.name, verified_with=verified),
            unchanged=len(subject.checkpoint.tensors) - only_in_base - len(changes.difference.changed),
            correspondence=correspondence,
            rounding_shares={m.layer.name: m.rounding_share for m in changes.measured},
            only_rounding=changes.only_rounding,
        ),
        bits=widths_of(quantized),
    )
    compression = replace(compression, warnings=warning_words(compression))
    return replace(compression, pushed=None if target is None else target.push())


def _timed_work(
    asked: CompressOptions, subject: Model, data: OpenedData, *, quantized: Mapping[str, tuple[str, ...]], run: Run
) -> CompressionWork:
    """What is done with the differences, which take as long as the layers themselves."""
    first, eligible = None, [layer for layer in subject.layers if layer.eligible]
    with held_on_device(subject, data, run):
        if data.calibration is not None:
            first = first_run(subject.streamed, eligible, data.calibration, device=run.device)
        return timed_work(asked, subject, data, quantized=quantized, first=first, run=run)


def _of_adapter(changes: Changes, of: AppliedAdapter) -> Changes:
    """The changes with ranks of at most those of an adapter's modules, on the base that it names."""
    measured = [replace(m, rank_cap=of.modules[m.layer.name].rank) for m in changes.measured]
    named = (of.adapter.config or {}).get("base_model_name_or_path")
    base_name = portable_name(named) if isinstance(named, str) and named else changes.base_name
    return replace(changes, measured=measured, base_name=base_name)


def _share_of_layers(budget: Budget, changes: Changes, of: AppliedAdapter) -> Budget:
    """A share of an adapter's numbers as one of those of the layers that it changes."""
    if budget.kind != "keep" or budget.value is None:
        return budget
    whole = sum(m.layer.stored_parameters for m in changes.measured)
    return replace(budget, value=(math.floor(budget.value * of.numbers) + 0.5) / whole)


def _planned_in_loss(
    changes: Changes, asked: CompressOptions, data: OpenedData, *, run: Run, of: AppliedAdapter | None
) -> PlannedModel:
    """A plan by what the differences are worth to the fine-tune: in the metric of the loss, or by a measured drop."""
    subject, measured = started_on_base(changes), measured_as_written(changes)
    budget = requested_budget(asked)
    request = PlanRequest(
        budget=budget if of is None or budget is None else _share_of_layers(budget, changes, of),
        given=None if asked.plan is None else as_written(given_differences(asked.plan)[0]),
        shard_size=asked.max_shard_size,
        bytes_of=lambda plan: most_stored_bytes(changes, as_differences(plan).layers, plan.budget),
    )
    calibration = None
    if data.calibration is not None:
        calibration = calibrated_on(asked, subject, measured, data=data.calibration, run=run)
    gate = None if data.search is None else DropGate(data.search, run)
    return planned_on(subject, measured, request, calibration=calibration, gate=gate, limit=asked.max_drop)


def finish_adapter(made: Output, adapter: Adapter, *, name: str, errors: Mapping[str, float]) -> str | None:
    """Try an adapter that is not yet in its place with PEFT, and write its card; the version of PEFT.

    None where PEFT is not installed; BadInput where it does not make of the adapter what this stands for.
    """
    assert isinstance(made.model, Path)
    verified_with = verify_with_peft(made.model, adapter)
    made.write_card(
        lambda _: adapter_card(adapter, name=name, weight_bytes=made.bytes, errors=errors, verified_with=verified_with)
    )
    return verified_with


def _fine_tune(adaptation: Adaptation, stored: StoredChanges, *, base: str, verified_with: str | None) -> FineTune:
    difference, adapter = adaptation.difference, stored.adapter
    added = difference.vocabulary
    return FineTune(
        base=base,
        base_bytes=difference.base.weight_bytes,
        written_as="LoRA adapter"
        if adapter is not None
        else "quantized layers"
        if adaptation.plan.quantized
        else "factor pairs",
        unchanged=0,
        in_full=adaptation.in_full if adapter is None else tuple(adapter.saved.tensors.values()),
        max_lora_rank=None if adapter is None else vllm_rank(adapter),
        vllm_obstacles=() if adapter is None else vllm_obstacles(adapter),
        llama_cpp_obstacles=() if adapter is None else llama_cpp_obstacles(adapter),
        verified_with=verified_with,
        rounding_share=difference.rounding_share(layer.tensor for layer, _ in adaptation.paired),
        shares=adaptation.shares,
        vocabulary=None if added is None else BeforeAfter(added.before, added.after),
    )


def _kind(subject: Model, output: str | Path | None, *, quantized: bool) -> Kind:
    if subject.checkpoint.source is None:
        return "module"
    as_file = output is not None and Path(output).suffix == ".safetensors"
    if quantized and subject.checkpoint.folder is not None and output is not None and not as_file:
        raise BadInput(
            f"{Path(output).name} would be a LoRA adapter, which holds no numbers of less than 16 bits",
            option="output",
            remedy="name a file with .safetensors, or leave out the bits",
        )
    return "pairs" if as_file or quantized or subject.checkpoint.folder is None else "adapter"
