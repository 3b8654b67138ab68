"""Whole networks: dense against keep 0.5 of the layers in each form, and as `prefer="speed"` plans it."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from latency_networks import Network, Workload
from latency_timing import Clock, Repeats, timed_in_turn
from latency_variants import NotAsStatedError, Placed, Variant, check, eligible_layers, in_one_form
from torch import Tensor, nn

import compressor
from compressor.errors import BadInput, QualityGateNotMet
from compressor.forms import DENSE, FORMS, dense_kernels
from compressor.latency import Convolution, DeviceProfile, Kernel, LayerUse, ModuleCall, Movement
from compressor.latency.profile import footprint
from compressor.network import Layer

KEEP = 0.5
BATCHES = (1, 8, 32, 128)
SPEED = "speed"

# Of a variant all layers are in the first of these forms that they take.
FORMS_OF: Mapping[str, tuple[str, ...]] = {
    "plain": ("plain", "channel"),
    "pivoted": ("pivoted", "spatial", "channel"),
}


@dataclass(frozen=True)
class ModelTiming:
    """Where networks are timed, and how.

    Attributes:
        device: Where they are.
        clock: How time is measured.
        repeats: How often they run.
        profile: The device's constants, for the predictions.
        batches: Numbers of examples.
        planned_for: Those that `prefer="speed"` is told.
    """

    device: torch.device
    clock: Clock
    repeats: Repeats
    profile: DeviceProfile
    batches: tuple[int, ...] = BATCHES
    planned_for: tuple[int, ...] = (1, 32)


@dataclass(frozen=True)
class InPlace:
    """What the dense layers that are eligible do in one forward.

    Attributes:
        seconds: The time that each takes, by its name.
        uses: How each is used, by the layer's name.
    """

    seconds: Mapping[str, float]
    uses: Mapping[str, LayerUse]


def planned_for_speed(model: nn.Module, layers: Sequence[Layer], timing: ModelTiming) -> Variant:
    """The network as the package compresses it under `prefer="speed"`; an error where it refuses."""
    # Most of the networks have random weights: what they would lose says nothing.
    small = compressor.compress(
        model,
        keep=KEEP,
        prefer="speed",
        batch=timing.planned_for,
        calibration="none",
        device=str(timing.device),
        timing_settings=compressor.TimingSettings(profile=timing.profile),
    )
    assert small.model is not None
    by_name = {layer.name: layer for layer in layers}
    placed = []
    for plan in small.plan.layers:
        each = Placed(by_name[plan.name], plan.form, plan.rank or 0)
        if each.parameters != plan.parameters:
            raise NotAsStatedError(f"{plan.name}: the plan says {plan.parameters} numbers")
        placed.append(each)
    return Variant(SPEED, small.model.eval(), tuple(placed))


def variants_of(model: nn.Module, timing: ModelTiming) -> tuple[list[Variant], str | None]:
    """Every variant of a network, and why there is none for speed where it is refused."""
    layers = eligible_layers(model)
    found = []
    for name, forms in FORMS_OF.items():
        variant = in_one_form(model, layers, forms, keep=KEEP, profile=timing.profile)
        found.append(replace(variant, name=name))
    try:
        found.append(planned_for_speed(model, layers, timing))
    except (BadInput, QualityGateNotMet) as refused:
        return found, str(refused)
    return found, None


def measured_network(
    network: Network, dtype: torch.dtype, timing: ModelTiming, *, compiled: bool = False
) -> Iterator[dict[str, Any]]:
    """Rows of the table: one each workload and batch."""
    torch.manual_seed(0)
    model = network.build().to(timing.device, dtype).eval()
    variants, refused = variants_of(model, timing)
    for workload in network.workloads:
        run = workload.prepare(model, 2)
        with torch.inference_mode():
            for variant in variants:
                check(variant, model, run)
        for batch in timing.batches:
            row = {
                "network": network.name,
                "workload": workload.name,
                "dtype": str(dtype).removeprefix("torch."),
                "batch": batch,
                "refused": refused,
            }
            measure = measured_compiled if compiled else measured_cell
            yield row | measure(model, variants, workload, batch=batch, timing=timing)


@torch.inference_mode()
def measured_cell(
    model: nn.Module, variants: Sequence[Variant], workload: Workload, *, batch: int, timing: ModelTiming
) -> dict[str, Any]:
    """The times of a network and its variants in one workload, beside the ideal and what is predicted."""
    modules = [model, *(variant.module for variant in variants)]
    calls = [partial(workload.prepare(module, batch), module) for module in modules]
    timed = timed_in_turn(calls, timing.clock, timing.repeats)
    layers = [each.layer for each in variants[0].placed]
    place = in_place(model, layers, calls[0], clock=timing.clock)
    dense = timed.seconds(0)
    whole = max(dense, sum(place.seconds.values()))
    share = sum(place.seconds.values()) / whole
    dtype = next(model.parameters()).dtype
    found = {}
    for number, variant in enumerate(variants, start=1):
        ratio, kept = timed.ratio(number), kept_parameters(variant.placed)
        ideal = 1 - saved_ideally(variant.placed, place.seconds) / whole
        expected = expected_of(variant.placed, place.uses, timing.profile, dtype=dtype)
        found[variant.name] = {
            "ratio": ratio.to_dict(),
            "ideal": round(ideal, 3),
            "of_ideal": round(ideal / ratio.median, 3),
            "predicted_ratio": round(1 - share * (1 - expected.pairs / expected.dense), 3),
            "kept": round(kept, 3),
            "dense_layers": sum(p.form == DENSE for p in variant.placed),
            "above_ideal": {
                name: round(share * seconds / expected.dense, 3) for name, seconds in expected.above_ideal.items()
            },
        }
    return {
        "dense_milliseconds": round(dense * 1e3, 3),
        "share_of_layers": round(share, 3),
        "ideal": round(1 - (1 - KEEP) * share, 3),
        "repeats": len(timed.repeats),
        "variants": found,
    }


def kept_parameters(placed: Sequence[Placed]) -> float:
    """The share of the eligible layers' numbers that is stored."""
    return sum(each.parameters for each in placed) / sum(each.layer.parameters for each in placed)


def saved_ideally(placed: Sequence[Placed], seconds: Mapping[str, float]) -> float:
    """The seconds that are saved where each layer takes as much less time as it stores fewer numbers."""
    saved = {each.layer.name: 1 - each.parameters / each.layer.parameters for each in placed}
    return sum(saved[name] * taken for name, taken in seconds.items())


@torch.inference_mode()
def measured_compiled(
    model: nn.Module, variants: Sequence[Variant], workload: Workload, *, batch: int, timing: ModelTiming
) -> dict[str, Any]:
    """The same of what `torch.compile` makes of each, as ratios to the compiled dense network."""
    torch.compiler.reset()  # of one function PyTorch keeps only a few versions, and then runs it eagerly
    calls = []
    for module in [model, *(variant.module for variant in variants)]:
        calls.append(partial(workload.prepare(module, batch), torch.compile(module, dynamic=False)))
    timed = timed_in_turn(calls, timing.clock, timing.repeats)
    return {
        "dense_milliseconds": round(timed.seconds(0) * 1e3, 3),
        "repeats": len(timed.repeats),
        "variants": {
            variant.name: {"ratio": timed.ratio(number).to_dict()} for number, variant in enumerate(variants, start=1)
        },
    }


def in_place(model: nn.Module, layers: Sequence[Layer], call: Callable[[], Any], *, clock: Clock) -> InPlace:
    """Time the dense layers inside the network, without what the hooks that do it take."""
    began: list[Any] = []
    stamps: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
    uses: dict[str, list[LayerUse]] = defaultdict(list)

    def before(*_: Any) -> None:
        began.append(clock.mark())

    def after(module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor, *, name: str) -> None:
        stamps[name].append((began.pop(), clock.mark()))
        uses[name].append(use_of(module, inputs[0], outputs))

    def watched(module: nn.Module, name: str) -> list[Any]:
        hook = partial(after, name=name)
        return [module.register_forward_pre_hook(before), module.register_forward_hook(hook)]

    handles = [handle for layer in layers for handle in watched(model.get_submodule(layer.module), layer.name)]
    repeats = []
    for _ in range(3):
        stamps.clear()
        uses.clear()
        call()
        repeats.append({name: sum(clock.seconds(*each) for each in found) for name, found in stamps.items()})
    for handle in handles:
        handle.remove()
    used = {name: replace(each[0], calls=len(each)) for name, each in uses.items()}
    empty = nn.Identity()
    watched(empty, "")
    nothing = torch.zeros(1, device=next(model.parameters()).device)
    for _ in range(200):
        empty(nothing)
    hooks = statistics.median(clock.seconds(*each) for each in stamps[""])
    seconds = {name: statistics.median(each[name] for each in repeats) for name in used}
    return InPlace({name: max(0.0, seconds[name] - use.calls * hooks) for name, use in used.items()}, used)


def use_of(module: nn.Module, inputs: Tensor, outputs: Tensor) -> LayerUse:
    """How a call uses a layer."""
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Conv2d):
        sizes = {"in_size": tuple(inputs.shape[2:]), "out_size": tuple(outputs.shape[2:])}
        return LayerUse(batch=inputs.shape[0], bias=bias, **sizes)
    return LayerUse(rows=math.prod(inputs.shape[:-1]), bias=bias)


@dataclass(frozen=True)
class Expected:
    """What the cost model expects of the eligible layers together.

    Attributes:
        dense: Seconds of the dense layers.
        pairs: Seconds of what is in their place.
        above_ideal: Seconds by which the terms exceed the share of those of the dense layers that is kept.
    """

    dense: float
    pairs: float
    above_ideal: Mapping[str, float]


def expected_of(
    placed: Sequence[Placed], uses: Mapping[str, LayerUse], profile: DeviceProfile, *, dtype: torch.dtype
) -> Expected:
    """What the cost model expects of the layers of a variant."""
    dense: Counter[str] = Counter()
    pairs: Counter[str] = Counter()
    for each in placed:
        if each.layer.name not in uses:
            continue
        use = uses[each.layer.name]
        before = dense_kernels(each.layer, use, itemsize=dtype.itemsize)
        after = (
            before
            if each.form == DENSE
            else FORMS[each.form].kernels(each.layer, each.rank, use, itemsize=dtype.itemsize)
        )
        for total, kernels in ((dense, before), (pairs, after)):
            for kernel in kernels:
                for name, seconds in terms(profile, kernel, dtype).items():
                    total[name] += use.calls * seconds
    above = {name: pairs[name] - KEEP * dense[name] for name in pairs}
    return Expected(dense.total(), pairs.total(), above)


def terms(profile: DeviceProfile, kernel: Kernel, dtype: torch.dtype) -> dict[str, float]:
    """The seconds that the cost model expects of a kernel, by what they are due to."""
    seconds = float(profile.seconds(kernel, dtype))
    if isinstance(kernel, ModuleCall):
        return {"launches": seconds}
    if isinstance(kernel, Movement):
        return {"reordering" if kernel.how == "order" else "copies": seconds}
    speeds = profile.of(dtype)
    speed = speeds.products
    if isinstance(kernel, Convolution):
        speed = speeds.convolutions.get(footprint(kernel.kernel), speed)
    parts = {
        "launches": speed.launch,
        "bytes": float(kernel.nbytes) / speed.bandwidth,
        "arithmetic": float(kernel.flops) / speed.flops,
    }
    return {name: seconds * part / sum(parts.values()) for name, part in parts.items()}
