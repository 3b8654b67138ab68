"""A fine-tune compressed as what it adds to its base: compare, measure, plan, and write an adapter or pairs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from compressor.api.write import Output, written
from compressor.errors import BadInput, QualityGateNotMet
from compressor.evaluation import Evaluation
from compressor.fine_tuning.adaptation import Adaptation, adapted_module, pair_file_artifact
from compressor.fine_tuning.adapter import (
    UNCHANGED,
    Adapter,
    adaptable_layers,
    adapter_artifact,
    adapter_of,
    require_pairs,
    vllm_obstacles,
    vllm_rank,
)
from compressor.fine_tuning.difference import Difference, compare_checkpoints, share_left
from compressor.fine_tuning.mixture import expert_blocks, with_common_ranks
from compressor.fine_tuning.verification import verify_with_peft
from compressor.io import (
    Artifact,
    Checkpoint,
    Naming,
    Target,
    checked_target,
    portable_name,
)
from compressor.io.output import require_no_output
from compressor.lowrank import StoredErrors
from compressor.measure import EPSILON
from compressor.model import (
    InspectedLayer,
    Model,
    inspect_layers,
    measured_layers,
)
from compressor.network import Layer, module_architecture, with_ties
from compressor.planning import (
    Budget,
    LayerPlan,
    MeasuredLayer,
    Plan,
    apply_edits,
    choose_ranks,
    default_budget,
    is_worthwhile,
    read_plan,
)
from compressor.progress import Progress
from compressor.report.fine_tune_card import adapter_card
from compressor.results import BeforeAfter, Compression, FineTune

Kind = Literal["adapter", "pairs", "module"]


def compress_fine_tune(
    model: Model,
    base: Model,
    *,
    output: str | Path | None,
    budget: Budget | None,
    plan: Plan | str | Path | None,
    device: torch.device,
    dry_run: bool,
    overwrite: bool,
    progress: Progress | None,
    evaluated: Callable[[nn.Module], Evaluation] | None,
) -> Compression:
    """Compress the difference of a fine-tune to its base; the parameters are those of `compress`.

    A folder gives a LoRA adapter folder, or a file of pairs where the output is named .safetensors; a file gives a file
    of pairs; a module gives a copy of the base with pairs beside its layers. `evaluated` measures such a module.
    """
    started = time.monotonic()
    if model.in_memory != base.in_memory:
        raise BadInput("a module and files cannot be compared", remedy="give both as modules, or both as files")
    subject = model.with_ties()
    start = with_ties(base.checkpoint, subject.architecture)
    kind = _kind(subject, output)
    target = None if dry_run else _target(subject, start, output, kind, overwrite=overwrite)
    # PEFT adds to all of the base.
    difference = compare_checkpoints(subject.checkpoint, start, None if kind == "adapter" else subject.recipe, progress)
    layers = tuple(_layer(layer, difference) for layer in subject.layers)
    if kind == "adapter":
        layers = adaptable_layers(difference, subject.architecture, layers)
    changes = replace(subject, checkpoint=difference.checkpoint, layers=layers)
    inspected = inspect_layers(changes, EPSILON, device, progress)
    measured = measured_differences(changes, inspected, difference)
    if not measured:
        raise BadInput(
            "no layer that changed is eligible",
            where=subject.name,
            remedy="see why with 'compress inspect MODEL', and widen `include` or narrow `exclude`",
        )
    digest, base_digest = (each.digest() if each.source is not None else None for each in (subject.checkpoint, start))
    form = _Form(
        kind=kind,
        subject=subject,
        base_name=portable_name(base.name),
        difference=difference,
        layers=layers,
        advice=_advice(inspected),
        digest=digest,
        base_digest=base_digest,
        device=device,
        progress=progress,
    )

    blocks = (
        expert_blocks(subject.architecture.module) if kind == "adapter" and subject.architecture is not None else ()
    )

    def with_budget(planned: tuple[LayerPlan, ...], of: Budget) -> tuple[LayerPlan, ...]:
        return with_common_ranks(planned, measured, layers, blocks, of) if plan is None else planned

    def file_bytes(planned: tuple[LayerPlan, ...]) -> int:
        asked = budget or Budget("plan")
        return form.stored(form.adaptation(with_budget(planned, asked), asked)).artifact.bytes

    chosen, planned = _planned(measured, budget, plan, subject, file_bytes)
    planned = with_budget(planned, chosen)
    if budget is None and plan is None and all(layer.rank is None for layer in planned):
        raise QualityGateNotMet(
            f"{subject.name}: no layer's difference can be made smaller safely ({chosen}); ask for a size with"
            " `keep=0.2`, or for a larger `tolerance`"
        )
    adaptation = form.adaptation(planned, chosen)
    stored = form.stored(adaptation)
    if budget is None and plan is None and not is_worthwhile(stored.artifact.bytes, subject.checkpoint.weight_bytes):
        raise QualityGateNotMet(
            f"{subject.name}: what was added to the base would take nearly as much as the fine-tune itself ({chosen});"
            " ask for a size with `keep=0.2`, or for a larger `tolerance`"
        )
    if stored.adapter is not None:
        require_pairs(stored.adapter)
    errors, module, evaluation, verified = stored.errors, None, None, None
    if not dry_run and (kind == "module" or evaluated is not None):
        # What was loaded here needs no copy.
        dense = copy.deepcopy(base.module) if base.in_memory else base.module
        names = subject.architecture or module_architecture(dense)
        module = adapted_module(adaptation, dense, device, errors, names.module_name)
        evaluation = None if evaluated is None else evaluated(module)
    with written(stored.artifact, target) as made:
        if stored.adapter is not None and target is not None:
            verified = finish_adapter(made, stored.adapter, target.name, errors.of)
    tuned = subject.checkpoint
    return Compression(
        source=subject.name,
        output=None if target is None else str(target.path),
        recipe=subject.recipe,
        plan=adaptation.plan.with_errors(errors.of),
        parameters=BeforeAfter(sum(info.elements for info in tuned.tensors.values()), stored.artifact.elements),
        bytes=BeforeAfter(tuned.weight_bytes, stored.artifact.bytes),
        evaluation=evaluation,
        seconds=time.monotonic() - started,
        peak_memory_bytes=0,
        skipped=tuple(layer for layer in layers if not layer.eligible),
        spectra={m.layer.name: m.singular_values for m in measured},
        model=module if kind == "module" else None,
        fine_tune=_fine_tune(adaptation, stored, base.name, verified),
    )


@dataclass(frozen=True)
class _Stored:
    """What is stored for an adaptation, an adapter where it is one, and the errors of its pairs."""

    adapter: Adapter | None
    artifact: Artifact
    errors: StoredErrors


@dataclass(frozen=True)
class _Form:
    """All that is known before the ranks: what they become is the same for every plan that is tried."""

    kind: Kind
    subject: Model
    base_name: str
    difference: Difference
    layers: tuple[Layer, ...]
    advice: str | None
    digest: str | None
    base_digest: str | None
    device: torch.device
    progress: Progress | None

    def adaptation(self, planned: tuple[LayerPlan, ...], budget: Budget) -> Adaptation:
        by = Plan(self.subject.name, self.digest, budget, planned, self.advice)
        return Adaptation(self.difference, self.layers, by, self.subject.recipe, self.base_digest)

    def stored(self, adaptation: Adaptation) -> _Stored:
        errors = StoredErrors(len(adaptation.paired), self.progress)
        if self.kind == "adapter":
            adapter = adapter_of(adaptation, self.subject.architecture, self.base_name)
            return _Stored(adapter, adapter_artifact(adapter, self.device, errors), errors)
        artifact = pair_file_artifact(adaptation, self.device, errors)
        return _Stored(None, replace(artifact, form="module") if self.kind == "module" else artifact, errors)


def finish_adapter(made: Output, adapter: Adapter, name: str, errors: Mapping[str, float]) -> str | None:
    """Try an adapter that is not yet in its place with PEFT, and write its card; the version of PEFT.

    None where PEFT is not installed; BadInput where it does not make of the adapter what this stands for.
    """
    assert isinstance(made.model, Path)
    verified_with = verify_with_peft(made.model, adapter)
    made.write_card(
        lambda _: adapter_card(adapter, name=name, weight_bytes=made.bytes, errors=errors, verified_with=verified_with)
    )
    return verified_with


def _fine_tune(adaptation: Adaptation, stored: _Stored, base: str, verified: str | None) -> FineTune:
    difference, adapter = adaptation.difference, stored.adapter
    return FineTune(
        base=base,
        base_bytes=difference.base.weight_bytes,
        written_as="LoRA adapter" if adapter is not None else "factor pairs",
        unchanged=len(difference.tuned.tensors) - len(difference.changed),
        in_full=adaptation.in_full if adapter is None else tuple(adapter.saved.tensors.values()),
        max_lora_rank=None if adapter is None else vllm_rank(adapter),
        vllm_obstacles=() if adapter is None else vllm_obstacles(adapter),
        verified_with=verified,
        rounding_share=difference.rounding_share(layer.tensor for layer, _ in adaptation.paired),
    )


def _kind(subject: Model, output: str | Path | None) -> Kind:
    if subject.checkpoint.source is None:
        return "module"
    as_file = output is not None and Path(output).suffix == ".safetensors"
    return "pairs" if as_file or subject.checkpoint.folder is None else "adapter"


def _target(
    subject: Model, base: Checkpoint, output: str | Path | None, kind: Kind, *, overwrite: bool
) -> Target | None:
    if kind == "module":
        require_no_output(output)
        return None
    named = Naming("folder", "-adapter") if kind == "adapter" else Naming("file", "-difference")
    return checked_target(subject.checkpoint, output, named, overwrite=overwrite, others=[base])


def _layer(layer: Layer, difference: Difference) -> Layer:
    return layer if layer.tensor in difference.changed else replace(layer, skip=layer.skip or UNCHANGED)


def measured_differences(
    subject: Model, inspected: tuple[InspectedLayer, ...], difference: Difference
) -> list[MeasuredLayer]:
    """What the planning needs to know of differences: the window rule's bound is that of all steps of the fine-tuning.

    Training started from the base, so `W_T - p_T W_0` is of rank `B * R * T` at most
    (`MemoryWindow.learned_rank_bound`), and no other difference is: the rule applies where the share of the base that
    was taken away is `p_T`, and the bound is below the full rank. Pairs are plain, and none fits what rounding added.
    """
    windows = {each.layer.name: each.window for each in inspected}
    measured = []
    for m in measured_layers(subject, inspected):
        window = windows[m.layer.name]
        bound = None if window is None else window.learned_rank_bound
        unknown = "the rank bound of the fine-tuning is unknown or vacuous"
        binds = bound is not None and bound < min(m.layer.shape)
        if binds and share_left(subject.recipe.of_parameter(m.layer.tensor)) != difference.shares.get(
            m.layer.tensor, 1.0
        ):
            binds, unknown = False, "weight decay has changed the rest of the base, which no rank bound is for"
        rounded = difference.rounding.get(m.layer.tensor)
        learned = None if rounded is None else int((m.singular_values > rounded.edge).sum())
        measured.append(
            replace(
                m,
                rounding_share=0.0 if rounded is None else rounded.share,
                above_rounding=learned,
                rank_cap=None if learned is None else max(1, learned),
                above_edge=min(m.layer.shape) if binds else None,
                surviving_share=0.0 if binds else None,
                rank_bound=bound if binds else None,
                unknown_start=unknown,
                spatial_values=None,
            )
        )
    return measured


def _planned(
    measured: list[MeasuredLayer],
    budget: Budget | None,
    given: Plan | str | Path | None,
    subject: Model,
    file_bytes: Callable[[tuple[LayerPlan, ...]], int],
) -> tuple[Budget, tuple[LayerPlan, ...]]:
    if given is not None:
        edited = given if isinstance(given, Plan) else read_plan(Path(given))
        where = "the plan" if isinstance(given, Plan) else str(given)
        layers = apply_edits(edited, measured, where)
        if strange := [layer.name for layer in layers if layer.form not in ("dense", "plain", "channel")]:
            raise BadInput(
                f"{strange[0]} is to be {next(each.form for each in layers if each.name == strange[0])}",
                where=where,
                remedy="a difference is stored in plain and channel pairs",
            )
        return Budget("plan"), layers
    chosen = budget or default_budget(measured, subject.recipe.family)
    return chosen, choose_ranks(measured, chosen, "plain", file_bytes)


def _advice(inspected: tuple[InspectedLayer, ...]) -> str | None:
    """What the memory window says of a fine-tuning whose bound does not decide."""
    bounds = [each.window.learned_rank_bound for each in inspected if each.window is not None]
    known = [bound for bound in bounds if bound is not None]
    sides = [min(each.layer.shape) for each in inspected if each.window is not None]
    if not known:
        return None
    if all(bound >= side for bound, side in zip(bounds, sides, strict=True) if bound is not None):
        return f"the fine-tuning can have written rank {min(known):,} and more: its memory window bounds nothing here"
    return None
