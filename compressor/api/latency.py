"""Speed: on which device and in which workloads a model is to be fast, what its plan takes there, and what it may."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.api.options import CompressOptions
from compressor.api.requests import timing_settings
from compressor.calibration import CalibrationData
from compressor.calibration.search import PlanRequest, plan_ranks
from compressor.data import EvaluationData
from compressor.engine import Run
from compressor.errors import BadInput, QualityGateNotMet
from compressor.evaluation import (
    PairTimer,
    TimedWorkload,
    TimingSettings,
    measure_latency,
    unfilled_module,
)
from compressor.formatting import format_size
from compressor.free_memory import free_memory
from compressor.latency import DeviceProfile, LayerUse, Workload, device_profile, shipped_profile
from compressor.model import Model, layer_uses, on_device, scaled
from compressor.model.example_inputs import architecture_of, example_inputs, is_transformer
from compressor.planning import (
    Budget,
    LayerLatency,
    LayerPlan,
    MeasuredLayer,
    Plan,
    TimeLimit,
    dense_seconds,
    has_pairs,
    least_seconds,
    smallest_size,
)
from compressor.planning.latency import Seconds
from compressor.torch_state import CPU

logger = logging.getLogger(__name__)

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Speed:
    """A device, and the workloads that a model is to be fast in there.

    Attributes:
        profile: What is known of the device.
        workloads: The workloads.
        inputs: Inputs for each of them; None for one that is not timed.
        uses: For each of them how it uses the layers, by name.
        at_hand: Whether the device is the one at hand, on which things can be timed.
        timing: How they are.
        run: The device at hand, and the random seed.
        rank_multiple: What ranks are to be multiples of; None for what the device likes.
    """

    profile: DeviceProfile
    workloads: tuple[Workload, ...]
    inputs: tuple[Inputs | None, ...]
    uses: tuple[Mapping[str, LayerUse], ...]
    at_hand: bool
    timing: TimingSettings
    run: Run
    rank_multiple: int | None = None

    def of_layers(self, subject: Model, measured: Sequence[MeasuredLayer]) -> list[MeasuredLayer]:
        """The layers with what is known of their time."""
        alike: dict[object, LayerLatency] = {}
        found = []
        for m in measured:
            dtype = subject.checkpoint.tensors[m.layer.tensor].dtype
            uses = tuple(each.get(m.layer.name) for each in self.uses)
            latency = alike.setdefault(
                (m.layer.kind, m.layer.tensor_shape, m.layer.groups, dtype, uses),
                LayerLatency(self.profile, dtype, self.workloads, uses),
            )
            multiple = self._multiple(m, dtype)
            found.append(replace(m, latency=latency, rank_multiple=multiple, stays_dense=self._unknown(m)))
        return found

    def _multiple(self, m: MeasuredLayer, dtype: torch.dtype) -> int:
        """What ranks are multiples of: as asked, else as the device likes it."""
        if self.rank_multiple is not None:
            return self.rank_multiple
        return self.profile.rank_multiple(m.layer.kind, dtype, width=min(m.layer.block_shape))

    def _unknown(self, m: MeasuredLayer) -> str | None:
        unknown = m.layer.kind == "parameter" and not any(m.layer.name in uses for uses in self.uses)
        return "how its module uses it is unknown" if unknown else m.stays_dense

    def in_memory(self, subject: Model) -> Speed:
        """The same, but nothing is timed where a model and its compressed copy do not fit, which is said."""
        nbytes = sum(info.nbytes for info in subject.checkpoint.tensors.values())
        needs = {CPU: nbytes if subject.in_memory else 2 * nbytes}
        needs[self.run.device] = nbytes if subject.lies_on(self.run.device) else 2 * nbytes
        for device, needed in needs.items():
            free = free_memory(device) if self.timing.most_memory is None else self.timing.most_memory
            if free is not None and needed > free:
                what = "%s: two copies take %s, more than is free on %s, so its latency is predicted and not measured"
                logger.warning(what, subject.name, format_size(needed), device.type)
                return replace(self, at_hand=False, inputs=(None,) * len(self.inputs))
        return self

    def without_long(self, subject: Model, measured: Sequence[MeasuredLayer]) -> Speed:
        """The same, but workloads that would take too long are not timed, which is said."""
        inputs = list(self.inputs)
        for place, (workload, seconds) in enumerate(zip(self.workloads, dense_seconds(measured), strict=True)):
            if seconds > self.timing.longest_forward:
                what = "%s, %s: a forward would take %.2g seconds, so its latency is predicted and not measured"
                logger.warning(what, subject.name, workload.name, seconds)
                inputs[place] = None
        return replace(self, inputs=tuple(inputs))

    @property
    def _of_gates(self) -> TimingSettings:
        return replace(self.timing, enough_seconds=min(self.timing.gate_seconds, self.timing.enough_seconds))

    def timed(self, compressed: nn.Module, dense: nn.Module) -> tuple[TimedWorkload, ...]:
        """A whole model timed beside the dense one, in every workload."""
        device, timing = self.run.device, self._of_gates
        with on_device(device, compressed, dense):
            return tuple(
                TimedWorkload(
                    workload.name, measure_latency(compressed, inputs, baseline=dense, device=device, timing=timing)
                )
                for workload, inputs in zip(self.workloads, self.inputs, strict=True)
                if inputs is not None
            )


def target_profile(asked: CompressOptions) -> DeviceProfile | None:
    """The device to plan for instead of the one at hand; `BadInput` for a name that is not known."""
    target = asked.target_device
    return shipped_profile(target) if isinstance(target, str) else target


def requested_speed(
    asked: CompressOptions,
    subject: Model,
    data: Sequence[CalibrationData | EvaluationData | None],
    *,
    run: Run,
) -> Speed | None:
    """The device and the workloads that a model is to be fast in; None of one that cannot be run, with a warning.

    Its examples come from the first of the `data`, or are random.

    Raises:
        BadInput: a latency is asked for of a model that cannot be run, or constants of a device that is not known.
    """
    shipped = target_profile(asked)
    try:
        subject.require_runnable()
        found = _workloads(subject, data, timing_settings(asked).batch, run=run)
    except BadInput as error:
        if asked.max_latency is not None:
            raise
        logger.warning("%s is compressed for its size, for how fast it would be is unknown: %s", subject.name, error)
        return None
    timing = timing_settings(asked)
    profile = shipped or timing.profile
    if profile is None:
        eligible = [layer for layer in subject.layers if layer.eligible]
        dtypes = {subject.checkpoint.tensors[layer.tensor].dtype for layer in eligible}
        images = any("convolution" in layer.kind for layer in eligible)
        measured = partial(_profile, run, sorted(dtypes, key=str), convolutions=images)
        profile = DeviceProfile.from_dict(run.journal.value("device", measured))
    if shipped is not None:
        logger.warning("planned for %s by its constants alone: nothing was measured", profile.name)
    workloads, inputs, uses = (tuple(each) for each in zip(*found, strict=True))
    return Speed(
        profile,
        workloads,
        inputs,
        uses,
        at_hand=shipped is None,
        timing=timing,
        run=run,
        rank_multiple=asked.rank_multiple,
    )


def _workloads(
    subject: Model, data: Sequence[CalibrationData | EvaluationData | None], batch: Sequence[int], *, run: Run
) -> list[tuple[Workload, Inputs, Mapping[str, LayerUse]]]:
    """Each workload with inputs for it, and how it uses the layers."""
    layers = [layer for layer in subject.layers if layer.eligible]
    found: list[tuple[Workload, Inputs, Mapping[str, LayerUse]]] = []
    for what, example in _kinds(subject, _example(subject, data, run.seed)):
        uses = layer_uses(subject, layers, example, device=run.device)
        for size in batch:
            inputs = {name: each.repeat_interleave(size, 0) for name, each in example.items()}
            by_size = {name: scaled(use, size) for name, use in uses.items()}
            found.append((Workload(f"{what}batch {size}", size), inputs, by_size))
    return found


def _example(subject: Model, data: Sequence[CalibrationData | EvaluationData | None], seed: int) -> Inputs:
    """One example: of the data where they have such, else a random one."""
    for each in data:
        if each is not None:
            batch = each.fit[0] if isinstance(each, CalibrationData) else each.read(range(1))
            if batch.inputs and batch.aligned:
                return batch[:1].inputs
    return example_inputs(subject, 1, generator=torch.Generator().manual_seed(seed))


def _kinds(subject: Model, example: Inputs) -> list[tuple[str, Inputs]]:
    """The ways in which a model is run: of one that generates text also one token after the other."""
    module = architecture_of(subject)
    tokens = example.get("input_ids")
    generates = is_transformer(module) and getattr(module, "can_generate", bool)()
    if tokens is None or tokens.shape[1] < 2 or not generates or module.config.is_encoder_decoder:
        return [("", example)]
    first = {name: each[:, :1] if each.shape == tokens.shape else each for name, each in example.items()}
    return [("decode, ", first), ("prefill, ", example)]


@dataclass(frozen=True)
class Prepared:
    """What a model is to be planned by: its layers, and what is asked for.

    `speed` is what its forwards are timed by, and `pairs` times the layers of a plan; None where nothing is timed.
    """

    measured: Sequence[MeasuredLayer]
    request: PlanRequest
    speed: Speed | None = None
    pairs: PairTimer | None = None

    def stated(self, subject: Model, plan: Plan) -> Plan:
        """The plan with what its layers take, as far as there is time left to measure it."""
        if self.pairs is None:
            return plan
        return replace(plan, layers=self.pairs.timed(subject.rewriting(plan), self.measured))


def prepared(
    speed: Speed | None, subject: Model, measured: Sequence[MeasuredLayer], *, request: PlanRequest
) -> Prepared:
    """Time a plan that is made without data, before any factor is computed, and correct what it shows to be wrong.

    Layers whose pairs turn out slower than dense get others, or stay dense. What a latency comes to is corrected once,
    by what was measured of the plan that was to meet it. Without a speed all stays as it is.

    Raises:
        QualityGateNotMet: no layer would be faster, or the model would be slower than the dense one.
    """
    if speed is None:
        return Prepared(measured, request)
    measured = speed.of_layers(subject, measured)
    _require_some_faster(speed, subject, measured, request=request)
    ratio = None if request.budget is None else request.budget.latency_limit
    limit = None if ratio is None else TimeLimit(ratio, (0.0,) * len(speed.workloads))
    request = replace(request, limit=limit)
    if not speed.at_hand:  # then the layers alone count
        return Prepared(measured, request)
    speed = speed.in_memory(subject).without_long(subject, measured)
    if not speed.at_hand:
        return Prepared(measured, request)
    with on_device(speed.run.device, subject.with_separate_experts):
        return _by_timing(speed, subject, measured, request=request)


def _by_timing(speed: Speed, subject: Model, measured: Sequence[MeasuredLayer], *, request: PlanRequest) -> Prepared:
    """What is known once plans were timed."""
    limit = request.limit
    pairs = PairTimer(subject.streamed, speed.run.device, speed.timing, journal=speed.run.journal)
    measured, plan = _without_slower(speed, subject, measured, request=request, pairs=pairs)
    # A search by drop begins with a size that it may leave for a smaller, faster one.
    searched = request.budget is not None and request.budget.kind == "max-drop"
    if plan.rewritten and not searched:
        whole = _timed_plan(speed, subject, plan)
        if limit is None:
            _require_fast(speed, subject, whole, limit=None)
        else:
            most = _most_rest(limit, measured, plan, whole=whole)
            limit = replace(limit, rest=_rest(measured, plan, whole))
            if _least_ratio(limit, measured, request) > limit.ratio:
                # Far from that plan it may be otherwise: the fastest there is tells.
                plan = _probe(subject, measured, 0.0, request=request)
                whole = _timed_plan(speed, subject, plan)
                most = np.minimum(most, _most_rest(limit, measured, plan, whole=whole))
                limit = replace(limit, rest=_rest(measured, plan, whole))
            limit = _corrected(speed, subject, measured, request=replace(request, limit=limit))
            limit = replace(limit, rest=tuple(np.minimum(limit.rest, most).tolist()))
    return Prepared(measured, replace(request, limit=limit), speed, pairs)


def _without_slower(
    speed: Speed, subject: Model, measured: Sequence[MeasuredLayer], *, request: PlanRequest, pairs: PairTimer
) -> tuple[Sequence[MeasuredLayer], Plan]:
    """The layers with what was measured of pairs that are slower than dense, and a first plan without such pairs.

    A few times a layer gets another form or rank by what was measured; then it stays dense.
    """
    for tries_left in reversed(range(speed.timing.most_corrections + 1)):
        plan = _first_plan(speed, subject, measured, request=request)
        timed = pairs.timed(subject.rewriting(plan), measured)
        slower = [_is_slower(each, speed.timing) for each in timed]
        if not any(slower):
            break
        measured = [
            _corrected_layer(m, each, speed, last=tries_left == 0) if slow else m
            for m, each, slow in zip(measured, timed, slower, strict=True)
        ]
    else:
        plan = _first_plan(speed, subject, measured, request=request)
    return measured, plan


def _corrected_layer(m: MeasuredLayer, plan: LayerPlan, speed: Speed, *, last: bool) -> MeasuredLayer:
    assert m.latency is not None
    if last:
        return replace(m, stays_dense=f"its pairs were measured to be slower on {speed.profile.name}")
    return replace(m, latency=m.latency.corrected(plan.form, plan.latency or ()))


def require_speed(
    speed: Speed | None, subject: Model, compressed: Model | None, *, limit: float | None
) -> tuple[TimedWorkload, ...]:
    """The finished model timed beside the dense one; nothing where no speed was asked for, or nothing can be timed.

    Raises:
        QualityGateNotMet: it is slower than the ratio that was asked for, or without one than the dense model.
    """
    if speed is None or compressed is None:
        return ()
    whole = speed.timed(compressed.module, subject.module)
    _require_fast(speed, subject, whole, limit=limit)
    return whole


def _require_some_faster(
    speed: Speed, subject: Model, measured: Sequence[MeasuredLayer], *, request: PlanRequest
) -> None:
    form, budget = request.form, request.budget
    if has_pairs(measured, form) or not has_pairs([replace(m, latency=None) for m in measured], form):
        return
    of_speed = {"target_device": not speed.at_hand, "max_latency": budget is not None and budget.latency_limit}
    without = " or ".join(f"`{name}`" for name, given in of_speed.items() if given)
    raise QualityGateNotMet(
        f"{subject.name}: no layer would be smaller and faster on {speed.profile.name} at any rank; ask for its size"
        f" alone with `prefer='size'`{without and f' and without {without}'}"
    )


def _require_fast(speed: Speed, subject: Model, whole: Sequence[TimedWorkload], *, limit: float | None) -> None:
    worst = max(whole, key=lambda each: each.ratio, default=None)
    if worst is None or worst.ratio <= (1.0 if limit is None else limit) * (1 + speed.timing.margin):
        return
    found = f"{subject.name}: the compressed model takes {worst.ratio:.2f}x the time of the dense one"
    found = f"{found} ({worst.workload})"
    if limit is None:
        raise QualityGateNotMet(f"{found}; keep less, or ask for its size alone with `prefer='size'`")
    raise QualityGateNotMet(f"{found}, more than `max_latency` {limit:g}; allow more, or keep less")


def _rest(measured: Sequence[MeasuredLayer], plan: Plan, whole: Sequence[TimedWorkload]) -> tuple[float, ...]:
    """What the dense model takes in each workload beside its layers, in the seconds that are predicted of these.

    Inferred from a plan whose layers are predicted to take c seconds instead of d: where the whole model takes a share
    r of its time, the rest is the t of `(t + c) / (t + d) = r`. Of pairs of forwards r is the same under any load of
    the machine and at any scale of the predictions, unlike the difference of measured and predicted seconds.
    """
    # A model that hardly gets faster consists of the rest: at most so much that numbers stay finite.
    ratios = np.minimum(_ratios(measured, whole), 0.99)
    rest = (ratios * dense_seconds(measured) - _chosen_seconds(plan)) / (1 - ratios)
    return tuple(np.maximum(0.0, np.nan_to_num(rest, nan=0.0)).tolist())


def _most_rest(
    limit: TimeLimit, measured: Sequence[MeasuredLayer], plan: Plan, *, whole: Sequence[TimedWorkload]
) -> Seconds:
    """The rest in each workload at which a plan just keeps a limit, if it was measured to do so; else infinite."""
    dense = dense_seconds(measured)
    if limit.ratio >= 1 or any(each.ratio > limit.ratio for each in whole):
        return np.full(len(dense), np.inf)
    return np.maximum(0.0, (limit.ratio * dense - _chosen_seconds(plan)) / (1 - limit.ratio) * (1 - 1e-9))


def _ratios(measured: Sequence[MeasuredLayer], whole: Sequence[TimedWorkload]) -> Seconds:
    """What was measured for each of the workloads, NaN for one that was not timed."""
    timed = {each.workload: each.ratio for each in whole}
    workloads = next(m.latency.workloads for m in measured if m.latency is not None)
    return np.array([timed.get(each.name, np.nan) for each in workloads])


def _corrected(speed: Speed, subject: Model, measured: Sequence[MeasuredLayer], *, request: PlanRequest) -> TimeLimit:
    """The limit with the rest that a plan shows that is to meet it: all of it where it misses, else half-way."""
    limit = request.limit
    assert limit is not None
    plan = plan_ranks(subject, measured, request).plan
    if not plan.rewritten:
        return limit
    whole = _timed_plan(speed, subject, plan)
    found = zip(limit.rest, _rest(measured, plan, whole), _ratios(measured, whole), strict=True)
    rest = tuple(after if ratio > limit.ratio else (before + after) / 2 for before, after, ratio in found)
    return replace(limit, rest=rest)


def _timed_plan(speed: Speed, subject: Model, plan: Plan) -> tuple[TimedWorkload, ...]:
    """A model with the shapes of a plan timed beside the dense one, once also by a run that is interrupted."""
    dense = subject.with_separate_experts

    def timed() -> list[dict[str, Any]]:
        whole = speed.timed(unfilled_module(subject.rewriting(plan), dense, speed.run.device), dense)
        return [each.to_dict() for each in whole]

    name = f"time of {[(layer.name, layer.form, layer.rank) for layer in plan.layers]}"
    return tuple(map(TimedWorkload.from_dict, speed.run.journal.value(name, timed)))


def _profile(run: Run, dtypes: Sequence[torch.dtype], *, convolutions: bool) -> dict[str, Any]:
    return device_profile(run, dtypes, convolutions=convolutions).to_dict()


def _chosen_seconds(plan: Plan) -> Seconds:
    """What the layers of a plan are predicted to take together in each workload."""
    known = [layer.latency for layer in plan.layers if layer.latency is not None]
    return np.asarray(np.array([[each.predicted.chosen for each in latency] for latency in known]).sum(axis=0))


def _first_plan(speed: Speed, subject: Model, measured: Sequence[MeasuredLayer], *, request: PlanRequest) -> Plan:
    """A plan without data, to be timed.

    For a latency one that saves a usual share of the layers' time, and for a search by drop the size that it begins
    with.
    """
    budget = request.budget
    if request.limit is not None:
        return _probe(subject, measured, speed.timing.probed_ratio, request=request)
    if budget is not None and budget.kind == "max-drop":
        share = smallest_size(measured, request.form, "parameters") / sum(m.layer.stored_parameters for m in measured)
        budget = Budget("keep", min(1.0, (1 + share) / 2))
    return plan_ranks(subject, measured, replace(request, budget=budget)).plan


def _probe(subject: Model, measured: Sequence[MeasuredLayer], ratio: float, *, request: PlanRequest) -> Plan:
    """A plan whose layers are predicted to take a ratio of their time, or nearly the least that they can."""
    limit = TimeLimit(ratio, (0.0,) * len(dense_seconds(measured)))
    probed = max(ratio, min(1.0, 1.05 * _least_ratio(limit, measured, request)))
    budget = Budget("max-latency", probed)
    return plan_ranks(subject, measured, replace(request, budget=budget, limit=replace(limit, ratio=probed))).plan


def _least_ratio(limit: TimeLimit, measured: Sequence[MeasuredLayer], request: PlanRequest) -> float:
    return limit.least_ratio(dense_seconds(measured), least_seconds(measured, request.form))


def _is_slower(plan: LayerPlan, timing: TimingSettings) -> bool:
    """Whether a pair was measured to be slower than its dense layer in any workload."""
    measured = [each.measured for each in plan.latency or () if each.measured is not None]
    return any(each.chosen > (1 + timing.margin) * each.dense for each in measured)
