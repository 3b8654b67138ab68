"""Differences by what they are worth to the fine-tune: their plan in the metric of the loss, or by a measured drop.

A difference is what training wrote on initial weights, which are the base: what finds ranks and factors of such forms
with calibration finds those of differences. Here the one is told as the other, and back.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compressor.calibration.search import PlannedModel
from compressor.fine_tuning.adaptation import Adaptation
from compressor.fine_tuning.difference import Difference
from compressor.fine_tuning.mixture import expert_blocks
from compressor.fine_tuning.plan import Changes
from compressor.forms import CHANNEL, FORMS, PLAIN, from_initial, pair_of
from compressor.initial import InitialWeights, Start, initial_name
from compressor.io import StoredTensor, TensorInMemory
from compressor.lowrank import Factors, join
from compressor.model import Model
from compressor.network import Layer
from compressor.planning import LayerPlan, MeasuredLayer, Plan

_WRITTEN = "initial+"


def started_on_base(changes: Changes) -> Model:
    """The fine-tune as a model whose training started from the base."""
    base = changes.difference.base
    tensors: dict[str, StoredTensor] = {}
    for layer in changes.layers:
        if layer.eligible:
            tensors |= dict.fromkeys((initial_name(layer), layer.tensor), base.stored(layer.tensor))
    initial = InitialWeights(changes.base_name, tensors, checkpoint_name=changes.base_name, digest=changes.base_digest)
    return replace(changes.subject, layers=changes.layers, initial=initial)


def measured_as_written(changes: Changes) -> list[MeasuredLayer]:
    """The differences as what training wrote, on the share of the base that is taken for each."""
    return [_as_written(m, changes.difference) for m in changes.measured]


def _as_written(m: MeasuredLayer, difference: Difference) -> MeasuredLayer:
    share = difference.share(m.layer.tensor)
    known = difference.shares.get(m.layer.tensor)
    # What is predicted is used as it is, and not fitted again in the metric of the loss.
    start = Start(
        correlation=1.0,
        z=float("inf"),
        predicted=share,
        fitted=share if known is None else known.fitted,
        share=share,
        written=1.0,
    )
    pairs = [pair.name for pair in (PLAIN, CHANNEL) if pair.takes(m.layer)]
    return replace(
        m,
        own_values={_WRITTEN + name: m.singular_values for name in pairs},
        own_errors={_WRITTEN + name: errors for name, errors in m.own_errors.items()},
        quantized=tuple(_WRITTEN + name for name in m.quantized),
        start=start,
        only_written=True,
    )


def as_written(plan: Plan) -> Plan:
    """A plan of differences as one of what training wrote."""
    layers = tuple(
        each if each.rank is None or from_initial(each.form) else replace(each, form=_WRITTEN + each.form)
        for each in plan.layers
    )
    return replace(plan, layers=layers)


def as_differences(plan: Plan) -> Plan:
    """A plan of what training wrote as one of differences."""
    layers = tuple(replace(each, form=pair_of(each.form) or each.form, share=None) for each in plan.layers)
    return replace(plan, layers=layers)


def adaptation_of(changes: Changes, planned: PlannedModel) -> Adaptation:
    """What is stored of the differences by a plan of what training wrote, with the factors that were found for it.

    Biases that moved with their layers, and statistics of batch normalizations, take the place of the fine-tune's.
    """
    difference = changes.difference
    moved = _moved_biases(changes, planned) | {name: value for name, (_, value) in planned.statistics.items()}
    values = {name: TensorInMemory(value.cpu()) for name, value in moved.items()}
    tuned = difference.tuned.changed(values) if values else difference.tuned
    own = replace(difference, tuned=tuned, changed=difference.changed | moved.keys())
    plan = as_differences(planned.plan)
    adaptation = replace(changes, difference=own).adaptation(plan.layers, plan.budget)
    relative, forms = _sizes(planned), {each.name: each.form for each in plan.layers}
    found = {
        layer.name: _pair_alone(layer, forms[layer.name], planned.factors[layer.name], size=relative.get(layer.name))
        for layer in changes.layers
        if layer.name in planned.factors
    }
    layers = tuple(_relative_to_difference(each, relative.get(each.name)) for each in plan.layers)
    return replace(
        adaptation,
        plan=replace(adaptation.plan, layers=layers, calibration=plan.calibration, search=plan.search),
        found=found,
    )


def _moved_biases(changes: Changes, planned: PlannedModel) -> dict[str, Tensor]:
    """The biases that take up what a change of their layers makes of the inputs' mean, where these can be stored."""
    architecture = changes.subject.architecture
    if changes.kind == "adapter" and architecture is not None and expert_blocks(architecture.module):
        return {}  # PEFT has no biases beside the pairs of experts
    moved = {}
    for layer in changes.layers:
        if layer.bias is None or layer.name not in planned.factors:
            continue
        before, found = changes.difference.tuned.read(layer.bias), planned.factors[layer.name].tensors
        after = found.get(join(layer.name, "bias"))
        if after is not None and not torch.equal(after.to(before), before):
            moved[layer.bias] = after.to(before.dtype)
    return moved


def _sizes(planned: PlannedModel) -> dict[str, float]:
    """The norm of each difference beside that of its whole layer, in the metric of the loss."""
    sizes = {}
    for m in planned.weighted:
        errors = next((m.own_errors[form] for form in m.own_values if form in m.own_errors), None)
        if errors is not None and errors[0] > 0:
            sizes[m.layer.name] = float(errors[0])
    return sizes


def _relative_to_difference(plan: LayerPlan, size: float | None) -> LayerPlan:
    return plan if size is None else replace(plan, error=plan.error / size)


def _pair_alone(layer: Layer, form: str, found: Factors, *, size: float | None) -> Factors:
    """What was found for a layer without its bias, marked as a pair of the difference, whose error is beside that."""
    marker = join(layer.name, "weight")
    tensors = {name: each for name, each in found.tensors.items() if name != join(layer.name, "bias")}
    if (before := tensors.pop(marker, None)) is not None and (shape := FORMS[form].marker(layer)) is not None:
        tensors[marker] = before.new_empty(shape)
    return Factors(tensors, found.error if size is None else found.error / size)
