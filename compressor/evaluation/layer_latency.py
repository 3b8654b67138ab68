"""Planned layers timed beside the dense ones before any factor is computed: alone, and in the whole model."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from compressor.engine import Journal, Run
from compressor.evaluation.cost import TIMING, TimingSettings, measure_latency
from compressor.forms import FORMS, TRANSPOSED, from_initial
from compressor.io import TensorInfo
from compressor.latency import LayerUse
from compressor.lowrank import Factors, Rewriting, filled_layer, rewritten_module
from compressor.lowrank.stored_pairs import join
from compressor.lowrank.tensor_format import pair_infos
from compressor.network import Layer
from compressor.planning import LayerPlan, MeasuredLayer, Times, WorkloadLatency


def unfilled_module(rewriting: Rewriting, dense: nn.Module, device: torch.device) -> nn.Module:
    """A copy of the dense model with the layers of a plan, whose factors are random: as fast as the compressed one."""
    factors = {layer.name: _random_factors(rewriting, layer, plan) for layer, plan in rewriting.factorized}
    return rewritten_module(replace(rewriting, factors=factors), dense, Run(device), done=lambda _name, _error: None)


def _random_factors(rewriting: Rewriting, layer: Layer, plan: LayerPlan) -> Factors:
    bias = None if layer.bias is None else rewriting.info(layer.bias)
    infos = pair_infos(layer, plan, rewriting.info(layer.tensor).dtype, bias=bias)
    generator = torch.Generator().manual_seed(0)
    known = {} if plan.rank is None else FORMS[plan.form].known_tensors(layer, plan.rank)
    tensors = {info.name: _random(info, generator) for info in infos}
    return Factors(tensors | {join(layer.name, name): tensor for name, tensor in known.items()}, 0.0)


def _random(info: TensorInfo, generator: torch.Generator) -> Tensor:
    """Numbers that neither overflow nor vanish from layer to layer, which is slow; and an order that is one."""
    if not info.dtype.is_floating_point:
        return torch.arange(info.elements, dtype=info.dtype).reshape(info.shape)
    inputs = max(1, info.elements // max(1, info.shape[0]))
    return torch.randn(info.shape, generator=generator).div_(math.sqrt(inputs)).to(info.dtype)


def _with_weights(dense: nn.Module) -> nn.Module:
    """A layer, or a copy with random weights where its own are not in memory."""
    if not any(parameter.is_meta for parameter in dense.parameters()):
        return dense
    copied, generator = copy.deepcopy(dense).to_empty(device="cpu"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in copied.state_dict().items():
            tensor.copy_(_random(TensorInfo(name, tuple(tensor.shape), tensor.dtype), generator))
    return copied


@dataclass(frozen=True)
class _Shape:
    """What the time of a layer depends on."""

    kind: str
    tensor_shape: tuple[int, ...]
    groups: int
    form: str
    rank: int
    use: LayerUse


@dataclass
class PairTimer:
    """Times pairs beside the dense layers of a model, each by itself, for `timing.layer_seconds` in all.

    Layers of one shape are timed once, also by a run that was interrupted: what is in the journal is not timed again.
    """

    dense: nn.Module
    device: torch.device
    timing: TimingSettings = TIMING
    found: dict[_Shape, Times] = field(default_factory=dict)
    spent: float = 0.0
    journal: Journal = field(default_factory=Journal)

    def timed(self, rewriting: Rewriting, measured: Sequence[MeasuredLayer]) -> tuple[LayerPlan, ...]:
        """The plans of a rewriting with what its pairs take, those first whose dense layers take longest.

        Nothing is said of those that are left when the time is over, of embeddings, and of weights that a module
        multiplies with in code of its own.
        """
        layers = {layer.name: layer for layer, _ in rewriting.factorized}
        shapes = [_shapes(m, plan) for m, plan in zip(measured, rewriting.plan.layers, strict=True)]
        demand: dict[_Shape, float] = {}
        examples: dict[_Shape, LayerPlan] = {}
        alone: dict[_Shape, float] = {}
        for plan, of_layer in zip(rewriting.plan.layers, shapes, strict=True):
            for shape, known in zip(of_layer, plan.latency or (), strict=False):
                if shape is not None:
                    demand[shape] = demand.get(shape, 0.0) + known.predicted.dense
                    examples.setdefault(shape, plan)
                    alone.setdefault(shape, known.predicted.dense / shape.use.calls)
        for shape in sorted(demand.keys() - self.found.keys(), key=lambda each: (-demand[each], examples[each].name)):
            left = self.timing.layer_seconds - self.spent
            if left <= 0:
                break
            if self._expected(alone[shape]) > left:
                continue
            layer, plan = layers[examples[shape].name], examples[shape]
            measure = partial(self._time, rewriting, layer, plan, use=shape.use)
            dense, chosen, spent = self.journal.value(f"time of {shape}", measure)
            self.found[shape], self.spent = Times(dense, chosen), self.spent + spent
        return tuple(
            replace(plan, latency=tuple(map(self._with_measured, plan.latency, of_layer))) if plan.latency else plan
            for plan, of_layer in zip(rewriting.plan.layers, shapes, strict=True)
        )

    def _with_measured(self, latency: WorkloadLatency, shape: _Shape | None) -> WorkloadLatency:
        return latency if shape is None else replace(latency, measured=self.found.get(shape))

    @property
    def _quick(self) -> TimingSettings:
        return replace(
            self.timing,
            warm_ups=min(2, self.timing.warm_ups),
            fewest_repeats=min(5, self.timing.fewest_repeats),
            enough_seconds=min(0.05, self.timing.enough_seconds),
        )

    def _expected(self, seconds: float) -> float:
        """The least that timing takes of a dense layer that is predicted to take so many seconds, and of its pair."""
        return 2 * seconds * (self._quick.warm_ups + self._quick.fewest_repeats)

    def _time(
        self, rewriting: Rewriting, layer: Layer, plan: LayerPlan, *, use: LayerUse
    ) -> tuple[float, float, float]:
        """The seconds of a dense layer and of its pair, and those that timing them took."""
        dense = _with_weights(self.dense.get_submodule(layer.module))
        pair = filled_layer(layer, plan, dense, tensors=_random_factors(rewriting, layer, plan).tensors)
        quick = self._quick
        inputs = {"input": _inputs(layer, use)}
        latency = measure_latency(pair, inputs, baseline=dense, device=self.device, timing=quick)
        assert latency.baseline_seconds is not None
        assert latency.ratio is not None
        before = latency.baseline_seconds
        spent = (latency.repeats + quick.warm_ups) * (before + latency.compressed_seconds)
        # By the ratio of pairs, so that a change in the machine's load cancels.
        return use.calls * before, use.calls * before * latency.ratio, spent


def _shapes(m: MeasuredLayer, plan: LayerPlan) -> tuple[_Shape | None, ...]:
    """What is to be timed of a layer in each workload; None where nothing is."""
    if m.latency is None:
        return ()
    if plan.rank is None or from_initial(plan.form) or m.layer.kind in ("embedding", "parameter"):
        return (None,) * len(m.latency.uses)
    alike = partial(_Shape, m.layer.kind, m.layer.tensor_shape, m.layer.groups, plan.form, plan.rank)
    return tuple(None if use is None else alike(use) for use in m.latency.uses)


def _inputs(layer: Layer, use: LayerUse) -> Tensor:
    """What a layer gets in one call."""
    generator = torch.Generator().manual_seed(0)
    if "convolution" in layer.kind:
        channels = layer.tensor_shape[0] if layer.kind in TRANSPOSED else layer.groups * layer.tensor_shape[1]
        return torch.randn(use.batch, channels, *use.in_size, generator=generator)
    return torch.randn(use.rows, layer.shape[1], generator=generator)
