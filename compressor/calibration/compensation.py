"""Layers refitted, in forward order, to what they will really be given.

Once earlier layers are truncated, a layer sees other inputs x' than the x it was made for. The matrix that answers them
best solves a ridge regression toward the original weights W,

    T = argmin E||W x - T x'||^2 + ridge ||T - W||^2 = (W E[x x'^T] + ridge W) (E[x' x'^T] + ridge I)^-1,

so that in directions which calibration never excites the layer goes on doing what it did; T is then truncated in the
metric of x' and of the gradients. (SVD-LLM, Wang et al., ICLR 2025, refits one factor toward zero.) For every layer
the strength of the ridge, and whether to refit at all, is what loses least on the holdout examples. Statistics of
batch normalization move in the same walk by as much as their inputs moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.calibration.calibrate import Calibration, entering, with_layers
from compressor.calibration.segments import State
from compressor.data import Batch
from compressor.factorize import FactorPair, Metric, SpatialPair
from compressor.lowrank import (
    LowRankEmbedding,
    TiedHead,
    approximate,
    as_matrix,
    carry_over,
    filled_layer,
    stored_tensors,
)
from compressor.measure.moments import input_vectors, kept_vectors, outer_products, patches, wide_enough
from compressor.model import evaluation_mode
from compressor.network import Layer, SeparateExperts
from compressor.planning import LayerPlan
from compressor.progress import Progress

# Relative to the mean of the inputs' second moments; the best on the holdout data is taken.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Compensated:
    """The tensors that stand for the layers, by name, and the modules, by their place in the model, that carry it.

    Among the modules are batch normalizations with statistics of their own.
    """

    factors: Mapping[str, Mapping[str, Tensor]]
    modules: Mapping[str, nn.Module]

    @property
    def statistics(self) -> dict[str, Tensor]:
        """The changed means and variances of batch normalizations, by their names in the model."""
        return {
            f"{place}.{name}": getattr(module, name)
            for place, module in self.modules.items()
            if isinstance(module, _BatchNorm)
            for name in ("running_mean", "running_var")
        }


def uncompensated(calibration: Calibration, planned: Sequence[LayerPlan]) -> Compensated:
    """Every layer truncated by itself, on the inputs of the dense model."""
    factors: dict[str, Mapping[str, Tensor]] = {}
    modules: dict[str, nn.Module] = {}
    with evaluation_mode(calibration.device, calibration.model):
        for plan in planned:
            if plan.rank is None:
                continue
            layer = calibration.layers[plan.name]
            factors[plan.name] = _truncated(calibration, layer, plan)
            # A module that has several parameters factorized is the same one each time.
            dense = modules.get(layer.module) or calibration.model.get_submodule(layer.module)
            low_rank = filled_layer(layer, plan, dense, factors[plan.name])
            modules |= dict.fromkeys((layer.module, *layer.places), low_rank)
            if layer.head is not None:
                assert isinstance(low_rank, LowRankEmbedding)
                head = calibration.model.get_submodule(layer.head)
                tied = TiedHead(low_rank, head.bias).train(head.training)  # type: ignore[arg-type]
                carry_over(head, tied)
                modules[layer.head] = tied
    return Compensated(factors, modules)


def _truncated(calibration: Calibration, layer: Layer, plan: LayerPlan) -> dict[str, Tensor]:
    metric = calibration.metrics.get(plan.name)
    dense = calibration.model.get_submodule(layer.module)
    matrix, bias = _matrix(layer, dense, calibration.device)
    pair = approximate(layer, plan, matrix, metric=metric)
    return stored_tensors(layer, plan, pair, matrix, bias, metric, getattr(dense, layer.parameter).dtype)


def compensate(
    calibration: Calibration,
    planned: Sequence[LayerPlan],
    progress: Progress | None = None,
) -> Compensated:
    """The planned low-rank layers refitted in forward order; layers that stay dense are left as they are.

    Embeddings are given the same tokens whatever was done to other layers, so there is nothing to make good in them,
    and of the parameters of modules it is not known what they are given.
    """
    low_rank = [plan for plan in planned if plan.rank is not None]
    as_they_are = [plan for plan in low_rank if calibration.layers[plan.name].kind in ("embedding", "parameter")]
    start = uncompensated(calibration, as_they_are)
    plans = {plan.name: plan for plan in low_rank if plan not in as_they_are}
    places = {calibration.layers[name].module: name for name in plans}
    left = _walked_places(calibration, places)
    factors: dict[str, Mapping[str, Tensor]] = dict(start.factors)
    modules: dict[str, nn.Module] = dict(start.modules)
    segments = calibration.segments
    with evaluation_mode(calibration.device, calibration.model):
        for segment in range(segments.count):
            for group in groups_run(calibration, segment, left):
                left -= set(group)
                first = calibration.model.get_submodule(group[0])
                fit, holdout = (_statistics(calibration, segment, part, first, modules) for part in ("fit", "holdout"))
                if isinstance(first, _BatchNorm):
                    if fit is not None and holdout is not None and (moved := _moved(first, fit, holdout)) is not None:
                        modules[group[0]] = moved
                    continue
                for place in group:
                    name = places[place]
                    layer, plan = calibration.layers[name], plans[name]
                    if fit is None or holdout is None or name not in calibration.metrics:
                        factors[name] = _truncated(calibration, layer, plan)
                    else:
                        factors[name] = _refitted(calibration, layer, plan, fit, holdout)
                    low_rank_layer = filled_layer(layer, plan, calibration.model.get_submodule(place), factors[name])
                    modules |= dict.fromkeys((place, *layer.places), low_rank_layer)
            if segment < segments.count - 1:
                advance(calibration, segment, modules)
            if progress:
                progress("compensate", segment + 1, segments.count)
    # What the first calibration batch does not pass through is truncated as it is.
    rest = uncompensated(calibration, [plan for name, plan in plans.items() if name not in factors])
    return Compensated({**factors, **rest.factors}, {**modules, **rest.modules})


@dataclass(frozen=True)
class _InputStatistics:
    """Of what a layer is given: x in the dense model and y in the compressed one, position by position, in float64.

    For batch normalization the second moments are those of each channel alone.
    """

    xx: Tensor
    xy: Tensor
    yy: Tensor
    x: Tensor
    y: Tensor

    def centered(self, x: Tensor, y: Tensor) -> _InputStatistics:
        """The same of x and y less what is given."""
        return _InputStatistics(
            self.xx - torch.outer(self.x, x) - torch.outer(x, self.x) + torch.outer(x, x),
            self.xy - torch.outer(self.x, y) - torch.outer(x, self.y) + torch.outer(x, y),
            self.yy - torch.outer(self.y, y) - torch.outer(y, self.y) + torch.outer(y, y),
            self.x - x,
            self.y - y,
        )


def _refitted(
    calibration: Calibration, layer: Layer, plan: LayerPlan, fit: _InputStatistics, holdout: _InputStatistics
) -> dict[str, Tensor]:
    """The candidate that loses least on the holdout examples."""
    dense = calibration.model.get_submodule(layer.module)
    matrix, bias = _matrix(layer, dense, calibration.device)
    metric = calibration.metrics[plan.name]
    assert isinstance(metric, Metric)
    candidates = [_Target(matrix, bias, metric, metric.mean, metric.mean)]
    x, y = (None, None) if metric.mean is None else (fit.x, fit.y)
    about = fit if x is None or y is None else fit.centered(x, y)
    identity = torch.eye(len(about.yy), dtype=about.yy.dtype, device=about.yy.device)
    scale = about.yy.diagonal().mean()
    for relative in RIDGES if 0 < scale < torch.inf else ():
        ridge = relative * scale
        moment = about.yy + ridge * identity
        target = torch.linalg.solve(moment, matrix @ about.xy + ridge * matrix, left=False)
        shifted = bias
        if bias is not None and x is not None and y is not None:
            shifted = (bias.to(matrix) + matrix @ x - target @ y).to(bias.dtype)
        candidates.append(_Target(target, shifted, Metric(moment, metric.gradients, y), x, y))
    best: tuple[float, _Target, FactorPair | SpatialPair] | None = None
    for each in candidates:
        pair = approximate(layer, plan, each.matrix, metric=each.metric)
        about = holdout if each.x is None or each.y is None else holdout.centered(each.x, each.y)
        error = _error(matrix, pair.product(), about, metric.gradients)
        if best is None or error < best[0]:
            best = (error, each, pair)
    assert best is not None
    _, chosen, pair = best
    return stored_tensors(layer, plan, pair, chosen.matrix, chosen.bias, chosen.metric, _dtype(dense))


@dataclass(frozen=True)
class _Target:
    """A matrix and bias to be truncated in a metric; with a bias, about the means x and y of the inputs."""

    matrix: Tensor
    bias: Tensor | None
    metric: Metric
    x: Tensor | None
    y: Tensor | None


def _error(matrix: Tensor, low_rank: Tensor, inputs: _InputStatistics, gradients: Tensor) -> float:
    """E||W x - W' y||^2 in the metric of the gradients."""
    moved = matrix @ inputs.xx @ matrix.T - 2 * (matrix @ inputs.xy) @ low_rank.T + low_rank @ inputs.yy @ low_rank.T
    return float((gradients * moved).sum())


def _moved(dense: _BatchNorm, fit: _InputStatistics, holdout: _InputStatistics) -> nn.Module | None:
    """Batch normalization whose statistics moved as its inputs did; None where that does not help on holdout data.

    The change on the same examples is added to what training left, so that few examples do not make them noisy. The
    mean may move without the variance: what a truncated layer lost of that is noise to the layers that follow, and
    scaling up the rest does not bring it back.
    """
    assert dense.running_mean is not None
    assert dense.running_var is not None
    mean, variance = dense.running_mean.double(), dense.running_var.double()
    before, after = fit.xx - fit.x**2, fit.yy - fit.y**2
    # A channel that hardly varies beside its size says nothing about how its variance changes.
    noise = torch.finfo(torch.float32).eps
    varies = (before > noise * fit.xx) & (after > noise * fit.yy)
    moved_mean, moved_variance = mean + fit.y - fit.x, variance * torch.where(varies, after / before, 1.0)

    def error(running_mean: Tensor, running_variance: Tensor) -> float:
        a, b = (variance + dense.eps).rsqrt(), (running_variance + dense.eps).rsqrt()
        shift = b * running_mean - a * mean
        squares = a**2 * holdout.xx - 2 * a * b * holdout.xy + b**2 * holdout.yy
        weight = 1.0 if dense.weight is None else dense.weight.double() ** 2
        return float((weight * (squares + shift**2 + 2 * shift * (a * holdout.x - b * holdout.y))).sum())

    candidates = [(mean, variance), (moved_mean, variance), (moved_mean, moved_variance)]
    chosen = min(candidates, key=lambda statistics: error(*statistics))
    if chosen is candidates[0]:
        return None
    moved = deepcopy(dense)
    for kept, value in zip((moved.running_mean, moved.running_var), chosen, strict=True):
        assert kept is not None
        kept.copy_(value)
    return moved


def _walked_places(calibration: Calibration, places: Iterable[str]) -> set[str]:
    """Places of what the walk changes: the given ones, and batch normalizations that keep statistics."""
    return {*places} | {
        place
        for place, module in calibration.model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def groups_run(calibration: Calibration, segment: int, places: Iterable[str]) -> list[list[str]]:
    """Those of the places that a segment runs, in order, layers that are given one tensor together.

    Every batch normalization is a group of its own.
    """
    model = calibration.model
    wanted = {place: model.get_submodule(place) for place in places}
    groups: dict[Any, list[str]] = {}
    inputs: list[Tensor] = []  # kept, so that an address stands for one tensor

    with ExitStack() as stack:
        for place, module in wanted.items():

            def note(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], place: str = place) -> None:
                x = arguments[0] if arguments else next(iter(named.values()))
                inputs.append(x)
                alone = place if isinstance(layer, _BatchNorm) else None
                if not any(place in group for group in groups.values()):
                    groups.setdefault((id(x), x._version, patches(layer), alone), []).append(place)

            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        batch = calibration.data.fit[0]
        calibration.segments.run(model, segment, batch, entering(calibration, "fit", segment, 0))
    return list(groups.values())


def _statistics(
    calibration: Calibration, segment: int, part: str, layer: nn.Module, modules: Mapping[str, nn.Module]
) -> _InputStatistics | None:
    """What a layer is given in the dense model and in the one compressed so far, over all examples of a part.

    Of an expert these are the tokens that are routed to it in both. None where it is given nothing, or not the same
    positions.
    """
    sums: list[Tensor] | None = None
    count = 0
    for index, batch in enumerate(batches_of(calibration, part)):
        dense, compressed = (_given(calibration, segment, part, index, layer, replaced) for replaced in ({}, modules))
        together = _of_the_same_positions(dense, compressed)
        if together is None:
            return None
        for before, after in together:
            x, y = (_vectors(layer, each, batch.masks) for each in (before, after))
            count += len(x)
            one = [*_products(layer, x, y), x.sum(0, dtype=torch.float64), y.sum(0, dtype=torch.float64)]
            sums = one if sums is None else [a + b for a, b in zip(sums, one, strict=True)]
    return None if sums is None or count == 0 else _InputStatistics(*(each / count for each in sums))


def _products(layer: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(layer, _BatchNorm):
        return (x * x).sum(0), (x * y).sum(0), (y * y).sum(0)
    return outer_products(x, x), outer_products(x, y), outer_products(y, y)


def _vectors(layer: nn.Module, x: Tensor, masks: Sequence[Tensor]) -> Tensor:
    if isinstance(layer, _BatchNorm):
        return x.movedim(1, -1).flatten(0, -2).double()
    return wide_enough(kept_vectors(input_vectors(layer, x), x, masks))


@dataclass(frozen=True)
class _Call:
    """What a layer is given in a call; inside an expert also which tokens of the batch these are."""

    given: Tensor
    tokens: Tensor | None


def _of_the_same_positions(dense: Sequence[_Call], compressed: Sequence[_Call]) -> list[tuple[Tensor, Tensor]] | None:
    """The inputs of two models call by call, those of an expert without the tokens that only one routes to it.

    None where the calls cannot be compared.
    """
    if any(call.tokens is not None for call in (*dense, *compressed)):
        if len(dense) != 1 or len(compressed) != 1:  # one of the models routes nothing to it
            return []
        (before,), (after,) = dense, compressed
        assert before.tokens is not None
        assert after.tokens is not None
        kept = torch.isin(before.tokens, after.tokens), torch.isin(after.tokens, before.tokens)
        return [(before.given[kept[0]], after.given[kept[1]])]
    if [call.given.shape for call in dense] != [call.given.shape for call in compressed]:
        return None
    return [(before.given, after.given) for before, after in zip(dense, compressed, strict=True)]


def _given(
    calibration: Calibration, segment: int, part: str, index: int, layer: nn.Module, modules: Mapping[str, nn.Module]
) -> list[_Call]:
    """The calls of a layer while a segment runs one batch."""
    calls: list[_Call] = []
    routes: list[Tensor] = []
    experts, expert = _expert_of(calibration.model, layer)

    def note(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = (arguments[0] if arguments else next(iter(named.values()))).detach().clone()
        calls.append(_Call(given, None if experts is None else torch.where(routes[-1] == expert)[0]))

    def note_routes(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        routes.append(arguments[1] if len(arguments) > 1 else named["top_k_index"])

    with ExitStack() as stack:
        stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        if experts is not None:
            stack.callback(experts.register_forward_pre_hook(note_routes, with_kwargs=True).remove)
        run_segment(calibration, segment, part, index, modules)
    return calls


def _expert_of(model: nn.Module, layer: nn.Module) -> tuple[SeparateExperts | None, int]:
    """The experts that a layer belongs to, and the number of its own among them."""
    for experts in model.modules():
        if isinstance(experts, SeparateExperts):
            for number, expert in experts.named_children():
                if any(module is layer for module in expert.modules()):
                    return experts, int(number)
    return None, -1


def run_segment(
    calibration: Calibration,
    segment: int,
    part: str,
    index: int,
    modules: Mapping[str, nn.Module],
    rows: slice = slice(None),
) -> State:
    """Run a segment of the dense model, or with modules in their places of the compressed one, on its own input.

    `rows` are the examples of the batch.
    """
    if modules and segment > 0 and ("compressed", part, index) in calibration.cache:
        state = calibration.cache.row(("compressed", part, index), calibration.device)
    else:
        state = entering(calibration, part, segment, index)
    batch = batches_of(calibration, part)[index][rows]
    with with_layers(calibration.model, modules) as model:
        return calibration.segments.run(model, segment, batch, tuple(each[rows] for each in state))


def advance(calibration: Calibration, segment: int, modules: Mapping[str, nn.Module]) -> None:
    """Leave on disk what the compressed segment hands to the next."""
    for part in ("fit", "holdout"):
        for index in range(len(batches_of(calibration, part))):
            state = run_segment(calibration, segment, part, index, modules)
            calibration.cache.put_row(("compressed", part, index), state)


def batches_of(calibration: Calibration, part: str) -> Sequence[Batch]:
    """Those of a part of the data: "fit" or "holdout"."""
    return calibration.data.fit if part == "fit" else calibration.data.holdout


def _matrix(layer: Layer, dense: nn.Module, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The weight as a matrix in float64, and the bias."""
    weight = getattr(dense, layer.parameter)
    bias = None if layer.kind == "parameter" else getattr(dense, "bias", None)
    wide = as_matrix(layer, weight.detach().to(device)).to(torch.float64)
    return wide, None if bias is None else bias.detach().to(device)


def _dtype(dense: nn.Module) -> torch.dtype:
    weight = dense.weight
    assert isinstance(weight, Tensor)
    return weight.dtype
