"""How matrices and factors are quantized, and the tensors that stand for them in a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from compressor.factorize import (
    FactorizationSettings,
    FactorPair,
    GroupedMetric,
    GroupedPair,
    Metric,
    PivotedPair,
    TiedMetric,
    nearest_kronecker_metric,
    weighed,
)
from compressor.forms.pair_form import Values
from compressor.forms.weights import TURNED
from compressor.io import TensorInfo
from compressor.network import Kind
from compressor.quantize import (
    Quantization,
    QuantizationSettings,
    QuantizedMatrix,
    SimulatedMatrix,
    Simulation,
    gptq,
    quantize_to_nearest,
    unpack,
)


@dataclass(frozen=True, eq=False)
class QuantizedFactors:
    """The parts of a quantized layer by the names of what they stand for, `weight` or `down.weight`, and its matrix.

    A part that is not quantized, such as an order, is a tensor.
    """

    rank: int
    parts: Mapping[str, QuantizedMatrix | SimulatedMatrix | Tensor]
    matrix: Tensor

    def product(self) -> Tensor:
        return self.matrix


def part_infos(info: TensorInfo, quantization: Quantization) -> list[TensorInfo]:
    """The tensors in the place of one `NAME.weight` that is quantized."""
    rows, columns = flattened(info.shape)
    stem = info.name.removesuffix("weight")
    found = quantization.fitted(columns).infos((rows, columns), info.dtype)
    shape = TensorInfo("weight_shape", (len(info.shape),), torch.int64)
    return [replace(each, name=stem + each.name) for each in (*found[:-1], shape)]


def part_tensors(name: str, part: QuantizedMatrix, info: TensorInfo) -> dict[str, Tensor]:
    """The same tensors, from a part that stands for a tensor of this shape."""
    scales = part.scales.to(part_infos(info, part.quantization)[1].dtype)
    if torch.equal(scales.to(torch.float64), part.scales.to(torch.float64)):
        part = replace(part, scales=scales)
    else:  # the dtype of the weight does not have such small scales, and the integers fit no other ones
        part = quantize_to_nearest(part.product(), part.quantization, scale_dtype=scales.dtype)
    tensors = part.tensors() | {"weight_shape": torch.tensor(info.shape, dtype=torch.int64)}
    return {name.removesuffix("weight") + each: tensor for each, tensor in tensors.items()}


def part_of_tensors(
    name: str, quantization: Quantization, tensors: Mapping[str, Tensor], *, shape: Sequence[int] | None = None
) -> Tensor:
    """The `NAME.weight` that stored tensors stand for, in the dtype of the scales and differentiable in them.

    Its shape is read from the tensors where it is not known: on an accelerator that waits.
    """
    stem = name.removesuffix("weight")
    scales = tensors[f"{stem}weight_scale"]
    shape = tensors[f"{stem}weight_shape"].tolist() if shape is None else shape
    rows, columns = flattened(shape)
    zeros = tensors.get(f"{stem}weight_zero_point")
    zeros = None if zeros is None else unpack(zeros.T, quantization.bits, rows).T
    integers = unpack(tensors[f"{stem}weight_packed"], quantization.bits, columns)
    return QuantizedMatrix(quantization, integers, scales, zeros).product(scales.dtype).reshape(*shape)


def is_fitted(quantization: Quantization, inputs: int) -> bool:
    return quantization.fitted(inputs) == quantization


def flattened(shape: Iterable[int]) -> tuple[int, int]:
    first, *rest = shape
    return first, math.prod(rest)


# From a matrix and its metric: to nearest without one, and with the group size that its inputs have.
Quantize = Callable[[Tensor, Metric | None], QuantizedMatrix | SimulatedMatrix]


def quantized(
    matrix: Tensor,
    metric: Metric | None,
    *,
    quantization: Quantization,
    settings: QuantizationSettings,
) -> QuantizedMatrix:
    """A matrix quantized as it is stored."""
    if isinstance(metric, GroupedMetric):
        quantize = partial(quantized, quantization=quantization, settings=settings)
        return _joined_quantized_rows([quantize(*each) for each in _blocks(matrix, metric)])
    fitted = quantization.fitted(matrix.shape[1])
    if metric is None or matrix.numel() == 0:
        return quantize_to_nearest(matrix, fitted, scale_dtype=torch.bfloat16, settings=settings)
    return gptq(matrix, fitted, metric, scale_dtype=torch.bfloat16, settings=settings)


def quantized_for_errors(
    matrix: Tensor,
    metric: Metric | None,
    *,
    quantization: Quantization,
    settings: FactorizationSettings,
    simulation: Simulation | None = None,
) -> QuantizedMatrix | SimulatedMatrix:
    """A matrix with an error of that size, in less time.

    Of a metric that has moments in common with others `simulation` knows their factors.
    """
    if isinstance(metric, GroupedMetric):
        quantize = partial(quantized_for_errors, quantization=quantization, settings=settings)
        return _joined_rows([quantize(*each) for each in _blocks(matrix, metric)])
    if metric is None or matrix.numel() == 0 or quantization.bits < settings.simulated_bits:
        return quantized(matrix, metric, quantization=quantization, settings=QuantizationSettings(rounds=0))
    return (simulation or Simulation(metric)).matrix(matrix, quantization.fitted(matrix.shape[1]), metric)


def _blocks(matrix: Tensor, metric: GroupedMetric) -> Iterator[tuple[Tensor, Metric]]:
    """The rows of each group of a matrix, and their metric."""
    blocks = metric.blocks
    yield from zip(matrix.chunk(len(blocks)), blocks, strict=True)


def _joined_rows(parts: Sequence[QuantizedMatrix | SimulatedMatrix]) -> QuantizedMatrix | SimulatedMatrix:
    """One matrix with the rows of all; simulated where any of them is."""
    whole = [part for part in parts if isinstance(part, QuantizedMatrix)]
    if len(whole) < len(parts):
        return SimulatedMatrix(torch.cat([part.product() for part in parts]))
    return _joined_quantized_rows(whole)


def _joined_quantized_rows(parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """One matrix with the rows of all, which have the same quantization."""
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    return QuantizedMatrix(
        parts[0].quantization,
        torch.cat([part.integers for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zeros) if zeros else None,
    )


def single_metric(metric: Metric | TiedMetric | None) -> Metric | None:
    return nearest_kronecker_metric(metric) if isinstance(metric, TiedMetric) else metric


def quantized_as_stored(
    matrix: Tensor, metric: Metric | None, *, quantize: Quantize, turned: bool
) -> QuantizedMatrix | SimulatedMatrix:
    """A matrix quantized as it is stored: its transpose where `turned`."""
    if not turned:
        return quantize(matrix, metric)
    return quantize(matrix.T, None if metric is None else metric.transposed)


def matrix_of(part: QuantizedMatrix | SimulatedMatrix, *, turned: bool) -> Tensor:
    return part.product().T if turned else part.product()


def plain_parts(
    kind: Kind, pair: FactorPair, matrix: Tensor, *, metric: Metric | None, quantize: Quantize
) -> dict[str, QuantizedMatrix | SimulatedMatrix]:
    """The factors of a plain or channel pair: `down`, and then `up` as refitted to it.

    The columns of `up` share scales, so they are made equally long before.
    """
    sizes = pair.up.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    up, rows = pair.up / sizes, sizes[:, None] * pair.down
    of_down = None if metric is None else Metric(metric.inputs, up.T @ weighed(up, metric.gradients))
    turned = kind in TURNED
    down = quantized_as_stored(rows, of_down, quantize=quantize, turned=turned)
    rows = matrix_of(down, turned=turned)
    moment, up = _refitted(up, rows, matrix, metric=metric)
    of_up = None if metric is None else Metric(moment, metric.gradients)
    return {
        "down.weight": down,
        "up.weight": quantized_as_stored(up, of_up, quantize=quantize, turned=kind == "transposed convolution"),
    }


def grouped_parts(
    pair: GroupedPair, matrix: Tensor, *, metric: GroupedMetric | None, quantize: Quantize
) -> dict[str, QuantizedMatrix | SimulatedMatrix | Tensor]:
    """The factors of a grouped pair: those of each group are quantized by themselves."""
    blocks = matrix.chunk(len(pair.pairs))
    metrics = [None] * len(blocks) if metric is None else metric.blocks
    found = [
        plain_parts("convolution", own, block, metric=of_block, quantize=quantize)
        for own, block, of_block in zip(pair.pairs, blocks, metrics, strict=True)
    ]
    return {name: _joined_rows([parts[name] for parts in found]) for name in ("down.weight", "up.weight")}


def pivoted_parts(
    pair: PivotedPair, matrix: Tensor, *, metric: Metric | None, quantize: Quantize
) -> dict[str, QuantizedMatrix | SimulatedMatrix | Tensor]:
    """The factors of a pivoted pair: rows of the matrix, and then the others' coefficients as refitted to these."""
    of_down = of_up = None
    inverse = torch.argsort(pair.order.long())  # place in the pair to row of the matrix
    rank = len(pair.down)
    if metric is not None:
        outputs = torch.cat([torch.eye(rank).to(pair.up), pair.up])[pair.order.long()]
        of_down = Metric(metric.inputs, outputs.T @ weighed(outputs, metric.gradients))
    down = quantize(pair.down, of_down)
    others = inverse[rank:]
    moment, up = _refitted(pair.up, down.product(), matrix[others], metric=metric)
    if metric is not None:
        gradients = metric.gradients
        of_up = Metric(moment, gradients[others] if gradients.dim() == 1 else gradients[others][:, others])
    return {"down.weight": down, "up.weight": quantize(up, of_up), "order": pair.order}


def _refitted(up: Tensor, down: Tensor, matrix: Tensor, *, metric: Metric | None) -> tuple[Tensor, Tensor]:
    """The moment of the outputs of `down`, and the `up` that fits it best, by least squares towards the one it was."""
    weighted = down if metric is None else weighed(down.T, metric.inputs).T
    moment = weighted @ down.T
    ridge = 1e-10 * float(moment.diagonal().mean()) or 1.0
    own = moment + ridge * torch.eye(len(moment)).to(moment)
    fitted: Tensor = torch.linalg.solve(own, (matrix @ weighted.T + ridge * up).T).T
    return own, fitted


def shape_tensors(infos: Iterable[TensorInfo]) -> dict[str, Tensor]:
    """The tensors that say what shapes were quantized, of those of a pair or a matrix."""
    return {f"{each.name}_shape": torch.tensor(each.shape) for each in infos if each.name.endswith("weight")}


def stored_parts(pair: QuantizedFactors, infos: Iterable[TensorInfo]) -> dict[str, Tensor]:
    """The tensors of the parts, which stand for tensors of these names and shapes."""
    stored: dict[str, Tensor] = {}
    for info in infos:
        part = pair.parts[info.name]
        assert not isinstance(part, SimulatedMatrix)
        stored |= {info.name: part} if isinstance(part, Tensor) else part_tensors(info.name, part, info)
    return stored


def defect_of_scales(names: Iterable[str], read: Values) -> str | None:
    scales = (name for name in names if name.endswith("weight_scale"))
    bad = next((name for name in scales if not bool(read(name).isfinite().all())), None)
    return None if bad is None else f"{bad} has scales that are not finite"


def part_names(name: str, quantization: Quantization) -> tuple[str, ...]:
    """The names of the tensors in the place of one of a pair."""
    if not name.endswith("weight"):
        return (name,)
    zero = ("weight_zero_point",) if quantization.zero_points else ()
    return tuple(
        name.removesuffix("weight") + each for each in ("weight_packed", "weight_scale", *zero, "weight_shape")
    )
