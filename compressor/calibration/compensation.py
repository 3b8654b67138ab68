"""Layers refitted, in forward order, to the inputs that they get in the compressed model.

Once earlier layers are truncated, a layer gets other inputs x' than the inputs x that it was trained for. The matrix
that reproduces its outputs best solves a ridge regression toward the original weights W,

    T = argmin E||W x - T x'||^2 + ridge ||T - W||^2 = (W E[x x'^T] + ridge W) (E[x' x'^T] + ridge I)^-1,

so that in directions which calibration never excites the layer stays as it was; T is then truncated in the metric of x'
and of the gradients. (SVD-LLM, Wang et al., ICLR 2025, refits one factor toward zero.) For every layer the strength of
the ridge, and whether to refit at all, is chosen by the holdout error. The statistics of batch normalization move in
the same walk by as much as their inputs moved.

A layer in an initial form is `S + pair`, where S is what is left of its initial weights: then `T - S` is truncated, and
the pair's outputs are compared with `W x - S x'`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.calibration.activation_cache import CachedFactors
from compressor.calibration.calibration import Calibration
from compressor.calibration.decompositions import decomposition_of
from compressor.calibration.examples import PARTS, Part
from compressor.calibration.replacements import STATISTICS, Compensated, Replacements, statistics_of, with_statistics
from compressor.calibration.truncation import (
    by_themselves,
    matrix_and_bias,
    quantize_by_themselves,
    truncated,
    uncompensated,
)
from compressor.calibration.walk import Kept, Walk
from compressor.factorize import (
    Decomposition,
    FactorPair,
    GroupedMetric,
    GroupedPair,
    Metric,
    SpatialPair,
    coordinates,
    grouped_truncated_svd,
    weighed,
)
from compressor.forms import FORMS, MatrixPair, quantization_of
from compressor.lowrank import (
    DenseWeights,
    approximate,
    filled_layer,
    stored_matrix,
    stored_tensors,
    written,
)
from compressor.measure.moments import Centered, groups_of, input_vectors, kept_vectors, wide_enough
from compressor.model import evaluation_mode
from compressor.network import Layer, SeparateExperts
from compressor.planning import LayerPlan
from compressor.torch_state import brought_to, in_float64, sum_in_float64


def compensate(calibration: Calibration, planned: Sequence[LayerPlan], name: str = "compensate") -> Compensated:
    """Refit the planned low-rank layers in forward order; layers that stay dense are left as they are.

    `name` is that of the plan in the journal.

    The inputs of embeddings are the same tokens whatever other layers lost, so there is nothing to refit; the inputs of
    bare parameters are unknown.
    """
    low_rank = [plan for plan in planned if plan.rank is not None]
    as_they_are = [plan for plan in low_rank if calibration.layers[plan.name].kind in ("embedding", "parameter")]
    start = uncompensated(calibration, as_they_are)
    plans = {plan.name: plan for plan in low_rank if plan not in as_they_are}
    names = {calibration.layers[name].module: name for name in plans}
    left = {*names, *_batch_normalizations(calibration.model)}
    # By jobs beside each other, and not one after another when its turn comes.
    quantize_by_themselves(calibration, list(plans.values()))
    factors, moved = (
        CachedFactors(calibration.run.device, calibration.run.journal.temporary(), start.factors),
        dict[str, nn.Module](),
    )

    def put(place: str, tensors: Mapping[str, Tensor]) -> None:
        name, layer = names[place], calibration.layers[names[place]]
        factors.put(name, tensors)
        dense = calibration.model.get_submodule(place)
        start = calibration.start(layer, plans[name].share)
        low_rank_layer = filled_layer(layer, plans[name], dense, tensors=factors[name], start=start)
        walk.placed.update(dict.fromkeys((place, *layer.places), low_rank_layer))

    def move(place: str, module: nn.Module) -> None:
        moved[place] = walk.placed[place] = module

    def refit(group: Sequence[str], fit: _InputStatistics | None, holdout: _InputStatistics | None) -> None:
        first = calibration.model.get_submodule(group[0])
        if isinstance(first, _BatchNorm):
            found = None if fit is None or holdout is None else _moved(first, fit, holdout)
            if found is not None:
                move(group[0], found)
            return
        for place in group:
            plan = plans[names[place]]
            if fit is None or holdout is None or plan.name not in calibration.metrics:
                put(place, truncated(calibration, plan))
            else:
                put(place, _refit(calibration, plan, fit=fit, holdout=holdout))

    def statistics_size(group: Sequence[str]) -> int:
        return _statistics_size(calibration.layers[names[group[0]]]) if group[0] in names else 0

    with evaluation_mode(calibration.run.device, calibration.model):
        walk = Walk(calibration, start.modules, name=name)
        for segment in range(calibration.segments.count):
            if (kept := walk.kept_before()) is not None:
                left -= set(kept.places)
                for each, tensors in kept.factors.items():
                    put(calibration.layers[each].module, tensors)
                for place, statistics in kept.statistics.items():
                    move(place, with_statistics(calibration.model.get_submodule(place), statistics))
                walk.skip()
                continue
            passed: list[str] = []
            for stage in walk.stages(left):
                sizes = [statistics_size(group) for group in stage.groups]
                for groups in _in_parts(stage.groups, sizes, calibration.settings.statistics_bytes):
                    firsts = [group[0] for group in groups]
                    fit, holdout = (_statistics(walk, part, firsts, once=stage.once) for part in PARTS)
                    for group in groups:
                        refit(group, fit[group[0]], holdout[group[0]])
                        left -= set(group)
                        passed += group
            own = {names[place]: factors[names[place]] for place in passed if place in names}
            walk.advance(partial(_kept, own, passed, moved))
            calibration.run.report("compensate", segment + 1, calibration.segments.count)
    # Layers that the first calibration batch does not reach are truncated as they are.
    rest = uncompensated(calibration, [plan for name, plan in plans.items() if name not in factors])
    for each, tensors in rest.factors.items():
        factors.put(each, tensors)
    return Compensated(Replacements(calibration, low_rank, factors, moved=moved))


def _statistics_size(layer: Layer) -> int:
    """The bytes of three moments in float64, of the fit and of the holdout examples."""
    return 2 * 3 * 8 * layer.groups * layer.shape[1] ** 2


def _kept(factors: Mapping[str, Mapping[str, Tensor]], passed: Sequence[str], moved: Mapping[str, nn.Module]) -> Kept:
    """What a segment with these factors and places has become."""
    statistics = {place: statistics_of(moved[place]) for place in passed if place in moved}
    return Kept(factors, statistics, passed)


@dataclass(frozen=True)
class _InputStatistics:
    """Moments of a layer's inputs: x in the dense model and y in the compressed one, position by position, in float64.

    For batch normalization the second moments are those of each channel alone. Of a convolution with groups all have a
    first dimension more, of the groups. `xx` is None of the fit examples of all but batch normalization: no target
    depends on it.
    """

    xx: Tensor | None
    xy: Tensor
    yy: Tensor
    x: Tensor
    y: Tensor

    def to(self, device: torch.device) -> _InputStatistics:
        """The same on a device: a layer of a model that is spread over several may lie on another."""
        xx = None if self.xx is None else brought_to(device, self.xx)
        return _InputStatistics(xx, *(brought_to(device, each) for each in (self.xy, self.yy, self.x, self.y)))

    def centered(self, x: Tensor | None, y: Tensor | None) -> _InputStatistics:
        """The same moments about x and y; about zero where these are None."""
        if x is None or y is None:
            return self
        xx = self.xx
        if xx is not None:
            xx = xx - _outer(self.x, x) - _outer(x, self.x) + _outer(x, x)
        return _InputStatistics(
            xx,
            self.xy - _outer(self.x, y) - _outer(x, self.y) + _outer(x, y),
            self.yy - _outer(self.y, y) - _outer(y, self.y) + _outer(y, y),
            self.x - x,
            self.y - y,
        )


def _outer(x: Tensor, y: Tensor) -> Tensor:
    """The outer product of two vectors, or of those of every group."""
    return x.unsqueeze(-1) * y.unsqueeze(-2)


def _refit(
    calibration: Calibration, plan: LayerPlan, *, fit: _InputStatistics, holdout: _InputStatistics
) -> dict[str, Tensor]:
    """The tensors of the layer refitted with the best ridge, or as it is where its holdout error is no larger."""
    layer, settings = calibration.layers[plan.name], calibration.settings
    dense = calibration.model.get_submodule(layer.module)
    matrix, bias = matrix_and_bias(calibration, layer, dense)
    start = calibration.start(layer, plan.share)
    metric = calibration.metrics[plan.name]
    assert isinstance(metric, Metric)
    fit, holdout = (each.to(calibration.run.device) for each in (fit, holdout))
    approximated = partial(approximate, layer, plan, settings=settings.factorization)
    found = decomposition_of(calibration, layer, start)
    alone = None if quantization_of(plan.form) is None else next(by_themselves(calibration, [plan]))
    if alone is None:
        pair = approximated(written(matrix, start), metric=metric, decomposition=found)
    else:
        pair = _Stored(stored_matrix(layer, plan, alone))
    factored = partial(_factored, groups=layer.groups)
    of_groups = None if bias is None else _by_groups(bias, layer.groups)
    chosen = before = _Target(_by_groups(matrix, layer.groups), of_groups, metric, metric.mean, metric.mean, start)
    x, y = (None, None) if before.x is None else (fit.x, fit.y)
    error_before = error_after = _Outputs.of(before, holdout)
    if x is not None:
        error_after = _Outputs.of(replace(before, x=x, y=y), holdout)
    near = factored(pair)
    if plan.rank and _is_quantized_pair(layer, plan.form):
        near = _nearest(written(matrix, start), plan.rank, metric, decomposition=found)
    target = _ridge_target(
        replace(before, x=x, y=y), near, fit.centered(x, y), outputs=error_after, ridges=settings.ridges
    )
    if target is not None:
        refitted = approximated(written(target.matrix.view_as(matrix), start), metric=target.metric)
        # Differences below the precision of the moments, whose products are in float32, say nothing.
        rounding = torch.finfo(torch.float32).eps * error_before.dense
        if error_after.error(factored(refitted)) < error_before.error(factored(pair)) - rounding:
            chosen, pair = target, refitted
    if chosen is before and alone is not None:
        return alone
    bias = None if chosen.bias is None else chosen.bias.flatten()
    weights = DenseWeights(chosen.matrix.view_as(matrix), bias, _dtype(dense), start)
    return stored_tensors(layer, plan, pair, dense=weights, metric=chosen.metric)


@dataclass(frozen=True)
class _Stored:
    """What stands for a matrix already."""

    matrix: Tensor

    def product(self) -> Tensor:
        return self.matrix


def _factored(pair: MatrixPair, *, groups: int = 1) -> FactorPair:
    """The pair as two matrices, the first with the columns that the product is made of; as two stacks for groups."""
    if isinstance(pair, FactorPair):
        return pair
    if isinstance(pair, GroupedPair):
        return FactorPair(
            torch.stack([each.up for each in pair.pairs]), torch.stack([each.down for each in pair.pairs])
        )
    product = _by_groups(pair.product(), groups)
    if isinstance(pair, SpatialPair):
        columns = torch.linalg.qr(pair.up.flatten(1)).Q
        return FactorPair(up=columns, down=columns.T @ product)
    # What is quantized is of no low rank.
    return FactorPair(up=torch.eye(product.shape[-2]).to(product), down=product)


def _nearest(matrix: Tensor, rank: int, metric: Metric, *, decomposition: Decomposition) -> FactorPair:
    """The factors of this rank that are the nearest to a matrix, or to the rows of each group."""
    if not isinstance(metric, GroupedMetric):
        return decomposition.pair(matrix, rank, metric)
    groups = len(metric.inputs)
    return _factored(
        grouped_truncated_svd(matrix, rank, groups, metric=metric, decomposition=decomposition), groups=groups
    )


def _by_groups(rows: Tensor, groups: int) -> Tensor:
    """The rows of a matrix, or numbers, of each group, where there are several."""
    return rows if groups == 1 else rows.view(groups, -1, *rows.shape[1:])


def _is_quantized_pair(layer: Layer, form: str) -> bool:
    """Whether a form is that of quantized factors of the layer's own matrix."""
    return quantization_of(form) is not None and FORMS[form].truncates and FORMS[form].sides(layer) == layer.block_shape


@dataclass(frozen=True)
class _Target:
    """A matrix and bias to be truncated in a metric; with a bias, about the means x and y of the inputs.

    In an initial form what is truncated is the matrix without the `start`, to which the pair is added. Of a convolution
    with groups all have a first dimension more, of the groups.
    """

    matrix: Tensor
    bias: Tensor | None
    metric: Metric
    x: Tensor | None
    y: Tensor | None
    start: Tensor | None = None


@dataclass(frozen=True)
class _Outputs:
    """What the error of a pair `W'` on inputs y is computed from, for the outputs `W x - S y` and the metric G of
    gradients, where S is the start that the pair is added to, if there is one.

    `dense` is `tr(G W xx W^T)`, the size of the dense outputs, and `total` that of what the pair is for, the error of
    leaving it out; `cross` is `G (W xy - S yy)`.
    """

    dense: float
    total: float
    cross: Tensor
    yy: Tensor
    gradients: Tensor

    @classmethod
    def of(cls, dense: _Target, inputs: _InputStatistics) -> _Outputs:
        """Those of a dense matrix W about the means of its target."""
        matrix, start, gradients = dense.matrix, dense.start, dense.metric.gradients
        inputs = inputs.centered(dense.x, dense.y)
        assert inputs.xx is not None, "errors are those on holdout examples"
        weighted = weighed(matrix, gradients)
        total = size = float((weighted @ inputs.xx * matrix).sum())
        cross = weighted @ inputs.xy
        if start is not None:
            of_start = weighed(start @ inputs.yy, gradients)
            total += float(((of_start - 2 * cross) * start).sum())
            cross = cross - of_start
        return cls(size, total, cross, inputs.yy, gradients)

    def error(self, pair: FactorPair) -> float:
        """E||W x - S y - W' y||^2 in the metric of the gradients, in the space of the pair's columns."""
        up, down = pair.up, pair.down
        agreeing = (up.mT @ self.cross * down).sum()
        own = (up.mT @ weighed(up, self.gradients) * (down @ self.yy @ down.mT)).sum()
        return self.total + float(own - 2 * agreeing)  # one number, for which the device is waited for


def _ridge_target(
    dense: _Target, pair: FactorPair, fit: _InputStatistics, *, outputs: _Outputs, ridges: Sequence[float]
) -> _Target | None:
    """The layer refitted with the ridge of least holdout error; None where its inputs are all zero.

    The ridges are compared by pairs that are found without a decomposition, from the layer's own. All moments are about
    the means of `dense`.
    """
    matrix, gradients, x, y = dense.matrix, dense.metric.gradients, dense.x, dense.y
    scale = float(fit.yy.diagonal(dim1=-2, dim2=-1).mean())
    wanted = matrix @ fit.xy
    without_start = wanted if dense.start is None else wanted - dense.start @ fit.yy
    toward = written(matrix, dense.start)
    best: tuple[float, float, Tensor] | None = None
    for relative in ridges if 0 < scale < float("inf") else ():
        ridge = relative * scale
        factor, failed = torch.linalg.cholesky_ex(_ridged(fit.yy, ridge))
        if failed.any():
            continue
        error = outputs.error(_truncated_near(pair, without_start + ridge * toward, factor, gradients=gradients))
        if best is None or error < best[0]:
            best = error, ridge, factor
    if best is None:
        return None
    _, ridge, factor = best
    target = torch.cholesky_solve((wanted + ridge * matrix).mT, factor).mT
    shifted = dense.bias
    if dense.bias is not None and x is not None and y is not None:
        shifted = (dense.bias.to(matrix) + _outputs_of(matrix, x) - _outputs_of(target, y)).to(dense.bias.dtype)
    metric = replace(dense.metric, inputs=_ridged(fit.yy, ridge), mean=y)
    return _Target(target, shifted, metric, x, y, dense.start)


def _outputs_of(matrix: Tensor, inputs: Tensor) -> Tensor:
    """What a matrix makes of inputs, or those of every group."""
    return matrix @ inputs if matrix.dim() == 2 else (matrix @ inputs.unsqueeze(2)).squeeze(2)


def _truncated_near(pair: FactorPair, right: Tensor, factor: Tensor, *, gradients: Tensor) -> FactorPair:
    """The matrix T of `T L L^T = right` truncated: a step of subspace iteration from the rows of a pair."""
    columns = torch.linalg.qr(right @ pair.down.mT).Q
    down = torch.cholesky_solve((coordinates(columns, gradients) @ right).mT, factor).mT
    return FactorPair(up=columns, down=down)


def _ridged(moment: Tensor, ridge: float) -> Tensor:
    """The moment of inputs with a multiple of the identity added."""
    ridged = moment.clone()
    ridged.diagonal(dim1=-2, dim2=-1).add_(ridge)
    return ridged


def _moved(dense: _BatchNorm, fit: _InputStatistics, holdout: _InputStatistics) -> nn.Module | None:
    """A batch normalization whose statistics moved as its inputs did; None where the holdout error does not fall.

    The change on the same examples is added to the statistics from training, so that few examples do not make them
    noisy. The mean may move without the variance: the variance that a truncated layer lost is noise to later layers,
    and scaling up the rest does not bring it back.
    """
    assert dense.running_mean is not None
    assert dense.running_var is not None
    mean, variance = in_float64(dense.running_mean), in_float64(dense.running_var)
    assert fit.xx is not None
    before, after = fit.xx - fit.x**2, fit.yy - fit.y**2
    # A channel that hardly varies, relative to its size, does not tell how its variance changes.
    noise = torch.finfo(torch.float32).eps
    varies = (before > noise * fit.xx) & (after > noise * fit.yy)
    moved_mean, moved_variance = mean + fit.y - fit.x, variance * torch.where(varies, after / before, 1.0)

    def error(running_mean: Tensor, running_variance: Tensor) -> float:
        assert holdout.xx is not None
        a, b = (variance + dense.eps).rsqrt(), (running_variance + dense.eps).rsqrt()
        shift = b * running_mean - a * mean
        squares = a**2 * holdout.xx - 2 * a * b * holdout.xy + b**2 * holdout.yy
        weight = 1.0 if dense.weight is None else in_float64(dense.weight) ** 2
        return float((weight * (squares + shift**2 + 2 * shift * (a * holdout.x - b * holdout.y))).sum())

    candidates = [(mean, variance), (moved_mean, variance), (moved_mean, moved_variance)]
    chosen = min(candidates, key=lambda statistics: error(*statistics))
    if chosen is candidates[0]:
        return None
    return with_statistics(dense, dict(zip(STATISTICS, chosen, strict=True)))


def _batch_normalizations(model: nn.Module) -> Iterator[str]:
    """Places of the batch normalizations that keep statistics."""
    for place, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            yield place


def _in_parts(groups: Sequence[Sequence[str]], sizes: Sequence[int], limit: int) -> Iterator[list[Sequence[str]]]:
    """Groups together as far as their sizes stay within a limit, one at least."""
    part: list[Sequence[str]] = []
    total = 0
    for group, size in zip(groups, sizes, strict=True):
        if part and total + size > limit:
            yield part
            part, total = [], 0
        part, total = [*part, group], total + size
    yield part


@dataclass
class _Sums:
    """What the statistics of a layer are the means of; `comparable` while its calls are at the same positions."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    comparable: bool = True

    def add(self, products: Mapping[str, Tensor], count: int) -> None:
        self.count += count
        self.sums = {name: self.sums[name] + each if self.sums else each for name, each in products.items()}

    def mean(self) -> _InputStatistics | None:
        if self.count == 0 or not self.comparable:
            return None
        found = {name: each / self.count for name, each in self.sums.items()}
        return _InputStatistics(found.get("xx"), *(found[name] for name in ("xy", "yy", "x", "y")))


def _statistics(walk: Walk, part: Part, places: Sequence[str], *, once: bool) -> dict[str, _InputStatistics | None]:
    """Moments of layers' inputs, in the dense model and in the one compressed so far, over a part of the data.

    Over some batches of the fit examples, where the settings say so.

    Of an expert these are the tokens that both models route to it. None where a layer gets no inputs, or inputs at
    other positions. Where each is called `once`, the models run no further than to the last of them.
    """
    model, data = walk.calibration.model, walk.calibration.data
    layers = {place: model.get_submodule(place) for place in places}
    sums = {place: _Sums() for place in places}
    every = walk.calibration.settings.refit_every if part == "fit" else 1
    for chunk in data.chunks(part)[::every]:
        dense, compressed = (
            _calls(model, layers, partial(run, chunk), once=once) for run in (walk.run_dense, walk.run_compressed)
        )
        for place, layer in layers.items():
            together = _of_the_same_positions(dense[place], compressed[place])
            if together is None:
                sums[place].comparable = False
            for before, after in together or ():
                x, y = (_vectors(layer, each, data.read(chunk).masks) for each in (before, after))
                sums[place].add(_products(layer, x, y, dense=part == "holdout"), len(x))
    return {place: each.mean() for place, each in sums.items()}


def _products(layer: nn.Module, x: Tensor, y: Tensor, *, dense: bool) -> dict[str, Tensor]:
    """The sums that `_InputStatistics` are the means of; that of the `dense` inputs' squares where it is asked for."""
    if isinstance(layer, _BatchNorm):
        squares = {"xx": (x * x).sum(0), "xy": (x * y).sum(0), "yy": (y * y).sum(0)}
        return squares | {"x": sum_in_float64(x), "y": sum_in_float64(y)}
    of_x, of_y, groups = Centered.of(x), Centered.of(y), groups_of(layer)
    if groups == 1:
        return _products_of(of_x, of_y, dense=dense)
    of_groups = zip(of_x.parts(groups), of_y.parts(groups), strict=True)
    parts = [_products_of(*each, dense=dense) for each in of_groups]
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def _products_of(x: Centered, y: Centered, *, dense: bool) -> dict[str, Tensor]:
    found = {"xx": x.second_moment()} if dense else {}
    return found | {"xy": x.product(y), "yy": y.second_moment(), "x": x.sum, "y": y.sum}


def _vectors(layer: nn.Module, x: Tensor, masks: Sequence[Tensor]) -> Tensor:
    if isinstance(layer, _BatchNorm):
        return in_float64(x.movedim(1, -1).flatten(0, -2))
    return wide_enough(kept_vectors(input_vectors(layer, x), x, masks))


@dataclass(frozen=True)
class _Call:
    """The input of a layer in one call; inside an expert also which tokens of the batch it has."""

    x: Tensor
    tokens: Tensor | None


def _of_the_same_positions(dense: Sequence[_Call], compressed: Sequence[_Call]) -> list[tuple[Tensor, Tensor]] | None:
    """Inputs in two models, call by call; of an expert, only the tokens that both models route to it.

    None where the calls cannot be compared.
    """
    if any(call.tokens is not None for call in (*dense, *compressed)):
        if len(dense) != 1 or len(compressed) != 1:  # one of the models routes nothing to it
            return []
        (before,), (after,) = dense, compressed
        assert before.tokens is not None
        assert after.tokens is not None
        kept = torch.isin(before.tokens, after.tokens), torch.isin(after.tokens, before.tokens)
        return [(before.x[kept[0]], after.x[kept[1]])]
    if [call.x.shape for call in dense] != [call.x.shape for call in compressed]:
        return None
    return [(before.x, after.x) for before, after in zip(dense, compressed, strict=True)]


class _AllCalled(Exception):  # noqa: N818 - it is no error
    """Raised where nothing more is to be noted."""


def _calls(
    model: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[], object], *, once: bool
) -> dict[str, list[_Call]]:
    """The calls of layers during a run of the model, or of a part of it, which ends when all were called `once`."""
    calls: dict[str, list[_Call]] = {place: [] for place in layers}
    routes: dict[nn.Module, list[Tensor]] = {}
    experts = _experts_of(model, layers)

    def note(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], *, place: str) -> None:
        x = (arguments[0] if arguments else next(iter(named.values()))).detach().clone()
        own = experts.get(place)
        calls[place].append(_Call(x, None if own is None else routes[own.mixture][own.number]))
        if once and all(calls.values()):
            raise _AllCalled

    def note_routes(mixture: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        assert isinstance(mixture, SeparateExperts)
        routes[mixture] = mixture.tokens(*arguments, **named)

    with ExitStack() as stack:
        for mixture in {each.mixture for each in experts.values()}:
            stack.callback(mixture.register_forward_pre_hook(note_routes, with_kwargs=True).remove)
        for place, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(partial(note, place=place), with_kwargs=True).remove)
        with suppress(_AllCalled):
            run()
    return calls


@dataclass(frozen=True)
class _Expert:
    mixture: SeparateExperts
    number: int


def _experts_of(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, _Expert]:
    """The experts that layers belong to, by place, without the layers that are in none."""
    places = {layer: place for place, layer in layers.items()}
    found = {}
    for mixture in model.modules():
        if isinstance(mixture, SeparateExperts):
            for number, expert in enumerate(mixture.experts):
                own = (places[module] for module in expert.modules() if module in places)
                found.update(dict.fromkeys(own, _Expert(mixture, number)))
    return found


def _dtype(dense: nn.Module) -> torch.dtype:
    weight = dense.weight
    assert isinstance(weight, Tensor)
    return weight.dtype
