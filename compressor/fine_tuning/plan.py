"""What a fine-tune adds to its base: measured, planned, and what is stored of it at the ranks of a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from compressor.engine import Run
from compressor.errors import BadInput, QualityGateNotMet
from compressor.fine_tuning.adaptation import Adaptation, pair_file_artifact
from compressor.fine_tuning.adapter import (
    UNCHANGED,
    Adapter,
    adaptable_layers,
    adapter_artifact,
    adapter_of,
    require_no_fused_experts,
)
from compressor.fine_tuning.difference import Difference, compare_checkpoints
from compressor.fine_tuning.mixture import expert_blocks, with_common_ranks
from compressor.forms import CHANNEL, DENSE, PLAIN, pair_name
from compressor.initial import share_left
from compressor.io import Artifact, Provenance, portable_name
from compressor.lowrank import StoredErrors
from compressor.measure import EPSILON
from compressor.model import InspectedLayer, Model, inspect_layers, measured_layers
from compressor.network import Layer, with_ties
from compressor.planning import (
    Budget,
    LayerPlan,
    MeasuredLayer,
    Plan,
    apply_edits,
    choose_ranks,
    default_budget,
    given_plan,
    is_worthwhile,
)
from compressor.progress import Progress

Kind = Literal["adapter", "pairs", "module"]

# What a difference may be stored as, in 16 bits or quantized.
_FORMS = (DENSE, PLAIN.name, CHANNEL.name)


@dataclass(frozen=True)
class Changes:
    """What a fine-tune adds to its base, before the ranks are chosen.

    Args:
        kind: What it becomes: a LoRA adapter folder, a file of pairs, or pairs in a copy of the base module.
        subject: The fine-tune.
        difference: Its difference to the base.
        layers: Its layers; those that have not changed, or cannot have a pair, say why.
        measured: What the planning needs to know of the others.
        advice: What the memory window says of the fine-tuning.
        base_name: What an adapter calls the base.
        provenance: What was asked for, which the output will say.
    """

    kind: Kind
    subject: Model
    difference: Difference
    layers: tuple[Layer, ...]
    measured: list[MeasuredLayer]
    advice: str | None
    base_name: str
    provenance: Provenance | None = None

    @cached_property
    def base_digest(self) -> str | None:
        """The SHA-256 of the base; None of a module in memory."""
        base = self.difference.base
        return None if base.source is None else base.digest()

    @property
    def only_rounding(self) -> tuple[str, ...]:
        """The layers whose difference is all rounding, as far as can be told."""
        known = self.difference.rounding
        return tuple(
            m.layer.name
            for m in self.measured
            if m.layer.tensor in known and known[m.layer.tensor].explains(float(m.singular_values[0]))
        )

    def adaptation(self, planned: tuple[LayerPlan, ...], budget: Budget) -> Adaptation:
        """The pairs of a plan, and all else that changed; a layer at rank 0 is left as it is in the base."""
        by = Plan(self.subject.name, self.subject.digest, budget, planned, self.advice)
        recipe, digest = self.subject.recipe, self.base_digest
        at_zero = {each.name for each in planned if each.rank == 0 and each.quantization is None}
        left = {layer.tensor for layer in self.layers if layer.name in at_zero}
        layers = tuple(replace(each, skip=UNCHANGED) if each.name in at_zero else each for each in self.layers)
        difference = replace(self.difference, changed=self.difference.changed - left) if left else self.difference
        return Adaptation(difference, layers, by, recipe, digest, provenance=self.provenance)


def measured_changes(
    subject: Model,
    base: Model,
    kind: Kind,
    *,
    provenance: Provenance | None,
    quantized: Mapping[str, tuple[str, ...]],
    run: Run,
) -> Changes:
    """Compare a fine-tune with its base, and measure the differences.

    `quantized` are the quantized forms that they may be stored in, by the names of the layers. Raises `BadInput` where
    they cannot be compared, or no layer that changed is eligible.
    """
    start = with_ties(base.checkpoint.apart_like(subject.checkpoint), subject.architecture)
    # PEFT adds to all of the base.
    to_all = kind == "adapter"
    difference = compare_checkpoints(subject.checkpoint, start, subject.recipe, to_all=to_all, progress=run.progress)
    layers = tuple(changed_or_skipped(layer, difference) for layer in subject.layers)
    if kind == "adapter":
        require_no_fused_experts(difference, subject.checkpoint.stacks)
        layers = adaptable_layers(difference, subject.architecture, layers)
    forms = {name: tuple(each for each in own if pair_name(each) in _FORMS) for name, own in quantized.items()}
    _require_eligible(layers, subject.name)
    changed = replace(subject, checkpoint=difference.checkpoint, layers=layers)
    inspected = inspect_layers(changed, EPSILON, run, quantized=forms)
    measured = measured_differences(subject, inspected, difference)
    return Changes(
        kind=kind,
        subject=subject,
        difference=difference,
        layers=layers,
        measured=measured,
        advice=window_advice(inspected),
        base_name=portable_name(base.name),
        provenance=provenance,
    )


def _require_eligible(layers: Sequence[Layer], name: str) -> None:
    """Refuse a difference that no pair can stand for, before any of it is decomposed."""
    if not any(layer.eligible for layer in layers):
        raise BadInput(
            "no layer that changed is eligible",
            where=name,
            remedy="see why with 'compress inspect MODEL', and widen `include` or narrow `exclude`",
        )


def planned_adaptation(changes: Changes, budget: Budget | None, given: Plan | str | Path | None) -> Adaptation:
    """The pairs of the ranks that a budget asks for, or the given plan.

    Raises `BadInput` for a plan that does not fit, or a budget that cannot be met, and `QualityGateNotMet` where
    nothing was asked and little would be saved.
    """
    architecture = changes.subject.architecture
    stacked = changes.kind == "adapter" and architecture is not None
    blocks = expert_blocks(architecture.module) if stacked and architecture is not None else ()

    def with_budget(planned: tuple[LayerPlan, ...], of: Budget) -> tuple[LayerPlan, ...]:
        if given is not None:
            return planned
        return with_common_ranks(planned, of, measured=changes.measured, layers=changes.layers, blocks=blocks)

    def file_bytes(planned: tuple[LayerPlan, ...]) -> int:
        asked = budget or Budget("plan")
        return stored_changes(changes, changes.adaptation(with_budget(planned, asked), asked)).artifact.bytes

    chosen, planned = _planned_ranks(changes, budget, given, file_bytes=file_bytes)
    planned = with_budget(planned, chosen)
    adaptation = changes.adaptation(planned, chosen)
    if budget is None and given is None:
        _require_worthwhile(changes, adaptation)
    return adaptation


def _require_worthwhile(changes: Changes, adaptation: Adaptation) -> None:
    name, budget = changes.subject.name, adaptation.plan.budget
    if not adaptation.paired:
        raise QualityGateNotMet(
            f"{name}: no layer's difference can be made smaller safely ({budget}); ask for a size with"
            " `keep=0.2`, or for a larger `tolerance`"
        )
    if not is_worthwhile(stored_changes(changes, adaptation).artifact.bytes, changes.subject.checkpoint.weight_bytes):
        raise QualityGateNotMet(
            f"{name}: what was added to the base would take nearly as much as the fine-tune itself ({budget});"
            " ask for a size with `keep=0.2`, or for a larger `tolerance`"
        )


@dataclass(frozen=True)
class StoredChanges:
    """What is stored for an adaptation, an adapter where it is one, and the errors of its pairs."""

    adapter: Adapter | None
    artifact: Artifact
    errors: StoredErrors


def stored_changes(
    changes: Changes, adaptation: Adaptation, *, device: torch.device | None = None, progress: Progress | None = None
) -> StoredChanges:
    """What is stored for an adaptation; its pairs are computed on `device` when it is written."""
    where, errors = device or torch.device("cpu"), StoredErrors(len(adaptation.paired), progress)
    if changes.kind == "adapter":
        adapter = adapter_of(adaptation, changes.subject.architecture, changes.base_name)
        return StoredChanges(adapter, adapter_artifact(adapter, where, errors), errors)
    artifact = pair_file_artifact(adaptation, where, errors)
    return StoredChanges(None, replace(artifact, form="module") if changes.kind == "module" else artifact, errors)


def most_stored_bytes(changes: Changes, planned: tuple[LayerPlan, ...], budget: Budget) -> int:
    """What is stored for the differences at the ranks of a plan, in bytes, if all biases and statistics move too."""
    ends, tuned = ("running_mean", "running_var"), changes.difference.tuned.tensors
    movable = {layer.bias for layer in changes.layers if layer.eligible and layer.bias is not None}
    movable |= {name for name in tuned if name.endswith(ends)}
    moved = replace(changes.difference, changed=changes.difference.changed | movable)
    adaptation = replace(changes, difference=moved).adaptation(planned, budget)
    return stored_changes(changes, adaptation).artifact.bytes


def changed_or_skipped(layer: Layer, difference: Difference) -> Layer:
    """The layer, skipped where it is that of the base, has rows that the base has not, or can have no pair here."""
    if layer.tensor not in difference.changed:
        return replace(layer, skip=layer.skip or UNCHANGED)
    if layer.tensor in difference.extended:
        return replace(layer, skip=layer.skip or "tokens were added to it, and it is stored in full")
    return layer if layer.groups == 1 else replace(layer, skip=layer.skip or f"{layer.groups} groups")


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
        binds = bound is not None and bound < min(m.layer.shape) and not m.layer.is_tied
        if binds and share_left(subject.recipe.of_parameter(m.layer.tensor)) != difference.share(m.layer.tensor):
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
                own_values={},
            )
        )
    return measured


def given_differences(given: Plan | str | Path) -> tuple[Plan, str]:
    """A plan of differences and where it is from; `BadInput` where they have no such forms."""
    edited, where = given_plan(given)
    for layer in edited.layers:
        if pair_name(layer.form) not in _FORMS:
            raise BadInput(
                f"{layer.name} is to be {layer.form}",
                where=where,
                remedy="a difference is stored in plain and channel pairs, or quantized without one",
            )
    return edited, where


def _planned_ranks(
    changes: Changes,
    budget: Budget | None,
    given: Plan | str | Path | None,
    *,
    file_bytes: Callable[[tuple[LayerPlan, ...]], int],
) -> tuple[Budget, tuple[LayerPlan, ...]]:
    if given is not None:
        edited, where = given_differences(given)
        return Budget("plan"), apply_edits(edited, changes.measured, where)
    chosen = budget or default_budget(changes.measured, changes.subject.recipe.family)
    return chosen, choose_ranks(changes.measured, chosen, "plain", file_bytes=file_bytes)


def window_advice(inspected: tuple[InspectedLayer, ...]) -> str | None:
    """What the memory window says of a fine-tuning whose bound does not decide."""
    bounds = [each.window.learned_rank_bound for each in inspected if each.window is not None]
    known = [bound for bound in bounds if bound is not None]
    sides = [min(each.layer.shape) for each in inspected if each.window is not None]
    if not known:
        return None
    if all(bound >= side for bound, side in zip(bounds, sides, strict=True) if bound is not None):
        return f"the fine-tuning can have written rank {min(known):,} and more: its memory window bounds nothing here"
    return None
