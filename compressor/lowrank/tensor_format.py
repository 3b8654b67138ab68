"""The file format: which tensors stand for a low-rank layer, written from a dense weight and multiplied back to one.

A pair replaces `X.weight` by the tensors that its form stores (the modules of `compressor.forms` say which), and moves
`X.bias` to where the form has it. A zero-size `X.weight` stays behind in each, so that a loader that does not know the
format stops; its shape, one of `MARKERS`, says how the dense weight is laid out, which the factors of a square one
leave open. A head tied to an embedding has no tensors. A weight `X` that is not called so, such as `rnn.weight_ih_l0`,
becomes such tensors beside a zero-size `X`. Everything else is passed through.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from compressor.errors import BadInput
from compressor.factorize import Decomposition, FactorizationSettings, Metric, TiedMetric
from compressor.factorize.settings import DEFAULTS
from compressor.formatting import format_shape, format_size
from compressor.forms import (
    FORMS,
    TRANSPOSED,
    DenseWeight,
    MatrixPair,
)
from compressor.free_memory import free_memory
from compressor.io import Checkpoint, Stack, TensorInfo, require_in_range
from compressor.lowrank.stacked import put_together, put_together_infos
from compressor.lowrank.stored_pairs import StoredPair, damaged, join, stored_name
from compressor.measure.scale import power_of_two
from compressor.network import Layer, is_weight, layer_name
from compressor.planning import LayerPlan
from compressor.torch_state import CPU, float64_device, in_float64

# A relative error of which products in float32 have three digits at least.
SMALL_IN_FLOAT32 = 1e-3


def pair_infos(layer: Layer, plan: LayerPlan, dtype: torch.dtype, *, bias: TensorInfo | None) -> list[TensorInfo]:
    """Names, shapes, and dtypes of the tensors that will replace a layer, before any of them is computed."""
    assert plan.rank is not None
    form = FORMS[plan.form]
    marker = form.marker(layer)
    infos = [] if marker is None else [TensorInfo(layer.tensor, marker, dtype)]
    infos += [replace(info, name=join(layer.name, info.name)) for info in form.infos(layer, plan.rank, dtype)]
    if bias is not None:
        infos.append(TensorInfo(join(layer.name, form.bias), bias.shape, bias.dtype))
    return infos


def as_matrix(layer: DenseWeight, weight: Tensor) -> Tensor:
    """The stored weight as the `d_out x d_in` matrix that it applies to its inputs."""
    return weight.flatten(1).T if layer.kind in TRANSPOSED else weight.reshape(layer.shape)


@dataclass(frozen=True)
class DenseWeights:
    """The weights of a layer before it is factorized: its `d_out x d_in` matrix in float64, its bias, and its dtype.

    `start` is the share of its initial matrix that the layer still has, for a form of what training wrote.
    """

    matrix: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    start: Tensor | None = None


@dataclass(frozen=True)
class Factors:
    """The tensors that stand for a layer, and the relative error of the matrix that they give as they are stored."""

    tensors: dict[str, Tensor]
    error: float


def factorize(
    layer: Layer,
    plan: LayerPlan,
    weight: Tensor,
    *,
    bias: Tensor | None,
    decomposition: Decomposition | None = None,
    start: Tensor | None = None,
) -> Factors:
    """The factors of a layer that are the best in the Frobenius norm, in the weight's own dtype.

    The arithmetic is in float64, but where `decomposition` is in float32. It is that of what is factorized: of the
    layer's matrix, less `start` for a form of what training wrote.
    """
    matrix = as_matrix(layer, weight)
    in_float32 = decomposition is not None and decomposition.basis.dtype == torch.float32
    narrow = in_float32 and start is None
    wide = matrix.to(torch.float32) if narrow else in_float64(matrix)
    start = None if start is None else start.to(wide)
    factorized = written(wide, start).to(torch.float32 if in_float32 else wide.dtype)
    pair = approximate(layer, plan, factorized, decomposition=decomposition)
    tensors = stored_tensors(layer, plan, pair, dense=DenseWeights(wide, bias, weight.dtype, start), metric=None)
    error = stored_error(layer, plan, tensors, matrix=wide, metric=None, start=start)
    if narrow and error < SMALL_IN_FLOAT32:
        error = stored_error(layer, plan, tensors, matrix=in_float64(matrix), metric=None)
    return Factors(tensors, error)


def written(matrix: Tensor, start: Tensor | None) -> Tensor:
    """What the factors of a layer stand for: its `d_out x d_in` matrix, less its start where its form has one."""
    return matrix if start is None else matrix - start.to(matrix)


def approximate(
    layer: Layer,
    plan: LayerPlan,
    matrix: Tensor,
    *,
    metric: Metric | TiedMetric | None = None,
    settings: FactorizationSettings = DEFAULTS,
    decomposition: Decomposition | None = None,
) -> MatrixPair:
    """The pair of the planned rank that is nearest to a `d_out x d_in` matrix, in float64.

    The matrix is what `written` gives. `decomposition` is that of the matrix in the metric, where it is known.
    """
    assert plan.rank is not None
    form = FORMS[plan.form]
    return form.approximate(layer, matrix, plan.rank, metric=metric, settings=settings, decomposition=decomposition)


def stored_tensors(
    layer: Layer,
    plan: LayerPlan,
    pair: MatrixPair,
    *,
    dense: DenseWeights,
    metric: Metric | TiedMetric | None,
) -> dict[str, Tensor]:
    """The tensors by which a pair stands for a layer, in its planned form and the dtype of the dense one.

    Where the metric knows the mean of the inputs, the bias compensates for the change of the mean output.
    """
    matrix, bias, dtype = dense.matrix, dense.bias, dense.dtype
    form = FORMS[plan.form]
    factors = form.stored(layer, pair, dtype)
    assert plan.rank is not None
    marker = [] if form.marker(layer) is None else [matrix.new_empty(0, dtype=dtype)]
    values = [*marker, *(factors[name] for name in form.names_at(plan.rank))]
    if bias is not None:
        if isinstance(metric, Metric) and metric.mean is not None:
            change = written(matrix, dense.start) - form.product(layer, _wide(factors)).to(matrix.device)
            bias = (bias.to(matrix) + metric.mean_output(change)).to(bias.dtype)
        values.append(bias)
    infos = pair_infos(layer, plan, dtype, bias=None if bias is None else TensorInfo("", tuple(bias.shape), bias.dtype))
    return {info.name: _row_major(value.reshape(info.shape)) for info, value in zip(infos, values, strict=True)}


def _wide(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The tensors in float64, where that is computed, or in another dtype; those without fractions keep theirs."""
    if dtype != torch.float64:
        return {name: each.to(dtype) if each.is_floating_point() else each for name, each in tensors.items()}
    return {
        name: in_float64(each) if each.is_floating_point() else each.to(float64_device(each.device))
        for name, each in tensors.items()
    }


def _row_major(tensor: Tensor) -> Tensor:
    """A copy with the strides that a loader gives it: `contiguous` keeps others where a side is 1, and kernels mind."""
    return tensor.clone(memory_format=torch.contiguous_format)


def stored_error(
    layer: Layer,
    plan: LayerPlan,
    tensors: Mapping[str, Tensor],
    *,
    matrix: Tensor,
    metric: Metric | TiedMetric | None,
    start: Tensor | None = None,
) -> float:
    """The relative error of a layer: how far what is stored is from its dense matrix, beside the matrix itself.

    In the metric of the loss where there is one, else in the Frobenius norm.
    """
    change = matrix - stored_matrix(layer, plan, tensors, dtype=matrix.dtype, start=start).to(matrix.device)
    scale = power_of_two(matrix)
    total, changed = (
        _squared_norm(each) if metric is None else metric.squared_size(each)
        for each in (matrix / scale, change / scale)
    )
    return (changed / total) ** 0.5 if total > 0 else 0.0


def _squared_norm(matrix: Tensor) -> float:
    if matrix.dtype == torch.float32:  # a row at a time: a sum of millions of squares has fewer digits
        return float(in_float64(torch.linalg.vector_norm(matrix, dim=1)).square().sum())
    return float(matrix.square().sum())


def stored_matrix(
    layer: Layer,
    plan: LayerPlan,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float64,
    start: Tensor | None = None,
) -> Tensor:
    """The `d_out x d_in` matrix that the stored factors of a layer give, and its start if it has one, in a dtype."""
    form = FORMS[plan.form]
    assert plan.rank is not None
    own = {name: tensors[join(layer.name, name)] for name in form.names_at(plan.rank)}
    product = form.product(layer, _wide(own, dtype))
    return product if start is None else start.to(product.device, dtype) + product.to(dtype)


def dense_weight(checkpoint: Checkpoint, pair: StoredPair) -> Tensor:
    """The dense tensor a pair stands for, multiplied in float64 and rounded to the factors' dtype."""
    return require_in_range(pair.tensors["weight"], multiplied(checkpoint, pair).to(pair.dtype))


def multiplied(checkpoint: Checkpoint, pair: StoredPair) -> Tensor:
    """The dense tensor a pair stands for, in float64."""
    require_usable(checkpoint, pair)
    require_memory(pair, checkpoint.source)
    matrix = FORMS[pair.form].product(pair, _wide(pair.read_factors(checkpoint.read)))
    return (matrix.T if pair.kind in TRANSPOSED else matrix).reshape(pair.tensor_shape).contiguous()


def require_memory(pair: StoredPair, source: Path | None) -> None:
    """Refuse to multiply a pair where there is no memory for the product: a few numbers can stand for any size."""
    free = free_memory(CPU)
    needed = math.prod(pair.tensor_shape) * (torch.float64.itemsize + pair.dtype.itemsize)
    if free is not None and needed > free:
        what = f"{pair.name or 'it'} stands for {format_shape(pair.tensor_shape)} numbers, which take"
        what += f" {format_size(needed)}, and {format_size(free)} of memory are free"
        raise BadInput(what, where=source, remedy="use a machine that has more, unless the file is damaged")


def require_usable(checkpoint: Checkpoint, pair: StoredPair) -> None:
    """Raise BadInput if the values of a pair's tensors are invalid."""
    defect = FORMS[pair.form].defect(pair.rank, lambda name: checkpoint.read(join(pair.name, name)))
    if defect is not None:
        raise damaged(join(pair.name, defect), checkpoint)


def dense_infos(checkpoint: Checkpoint, pairs: Mapping[str, StoredPair]) -> dict[str, tuple[TensorInfo, str | None]]:
    """For every tensor of the restored checkpoint its shape and dtype, and the tensor to copy it from.

    The source is None for a weight that has to be multiplied back.
    """
    factors: dict[str, tuple[TensorInfo, str | None]] = {}
    consumed: set[str] = set()
    for pair in pairs.values():
        tensors = {role: stored_name(checkpoint, name) for role, name in pair.tensors.items()}
        consumed.update(tensors.values())
        weight = TensorInfo(pair.tensor, pair.tensor_shape, pair.dtype)
        factors[weight.name] = (weight, None)
        if pair.has_bias:
            info = checkpoint.tensors[tensors["bias"]]
            name = join(pair.name, "bias")
            factors[name] = (TensorInfo(name, info.shape, info.dtype), tensors["bias"])
    consumed.update(tensor for tensor, _ in _further_places(checkpoint, pairs))
    passed = {name: (info, name) for name, info in checkpoint.tensors.items() if name not in consumed}
    return passed | factors


def dense_aliases(checkpoint: Checkpoint, pairs: Mapping[str, StoredPair]) -> dict[str, str]:
    """Further names of tensors of the restored checkpoint: those of layers and of heads that share a low-rank one."""
    infos = dense_infos(checkpoint, pairs)
    aliases = {alias: name for alias, name in checkpoint.aliases.items() if name in infos}
    for tensor, pair in _further_places(checkpoint, pairs):
        aliases[tensor] = pair.tensor
        if pair.has_bias:
            aliases[join(layer_name(tensor), "bias")] = join(pair.name, "bias")
    for pair in pairs.values():
        aliases |= {f"{head}.weight": pair.tensor for head in _tied_heads(checkpoint, pair)}
    return {alias: name for alias, name in aliases.items() if alias not in infos}


def _further_places(checkpoint: Checkpoint, pairs: Mapping[str, StoredPair]) -> Iterator[tuple[str, StoredPair]]:
    """The other names of a low-rank layer in the checkpoint: those of its dense weight."""
    owners = {stored_name(checkpoint, pair.first): pair for pair in pairs.values()}
    for alias, name in checkpoint.aliases.items():
        if (pair := owners.get(name)) is None:
            continue
        first = FORMS[pair.form].names_at(pair.rank)[0]
        layer = alias.removesuffix(first).removesuffix(".")
        if layer == pair.name or alias != join(layer, first):
            continue
        yield (join(layer, "weight") if is_weight(pair.tensor) else layer), pair


def _tied_heads(checkpoint: Checkpoint, pair: StoredPair) -> Iterator[str]:
    """The output heads that a module's own state dict says are tied to a low-rank embedding."""
    down = stored_name(checkpoint, pair.first)
    for name in (down, *(alias for alias, of in checkpoint.aliases.items() if of == down)):
        if pair.kind == "embedding" and name.endswith(".down_weight"):
            yield name.removesuffix(".down_weight")


def dense_tensors(
    checkpoint: Checkpoint, pairs: Mapping[str, StoredPair], stacks: Sequence[Stack] = ()
) -> Iterator[tuple[str, Tensor]]:
    """The restored checkpoint, one tensor at a time; of layers that the original held in one, this one."""
    infos = dense_infos(checkpoint, pairs)
    parts = {name: info for name, (info, _) in infos.items()}
    held = {stack.tensor: stack for stack in stacks}

    def read(name: str) -> Tensor:
        if (copied_from := infos[name][1]) is not None:
            return checkpoint.read(copied_from)
        return dense_weight(checkpoint, pairs[layer_name(name)])

    for name, info in put_together_infos(checkpoint, parts, stacks).items():
        yield name, put_together(held[name], info, read) if name in held else read(name)
