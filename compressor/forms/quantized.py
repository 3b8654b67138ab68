"""Quantized forms: a layer's matrix, or the factors of a pair, as integers with scales.

`PAIR@QUANTIZATION` stores each `NAME.weight` of a pair, flattened to two dimensions, as `NAME.weight_packed`,
`NAME.weight_scale`, `NAME.weight_zero_point` where it has zero points, and `NAME.weight_shape`, which has the shape
that it was flattened from. `dense@QUANTIZATION` stores the layer's own matrix so, without a zero-size `X.weight`; its
rank is that of a low-rank correction of what quantizing lost, a pair of 8 bits, and 0 where there is none.

Scales are chosen among the numbers that bfloat16 and float16 share: so what is chosen does not depend on the dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from compressor.factorize import (
    Decomposition,
    FactorizationSettings,
    FactorPair,
    Metric,
    PivotedPair,
    SpatialPair,
    TiedMetric,
    decompose,
    decompose_tied,
    nearest_kronecker_metric,
    pivoted_pair,
    weighed,
)
from compressor.forms.channel import CHANNEL
from compressor.forms.kernels import dense_kernels, dequantization, quantized_kernels
from compressor.forms.layers import MARKERS
from compressor.forms.pair_form import MatrixPair, PairForm, StoredPairShape, Values
from compressor.forms.pivoted import PIVOTED
from compressor.forms.plain import PLAIN
from compressor.forms.quantized_layers import (
    QuantizedConvolution,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedTransposedConvolution,
    quantized_layer,
)
from compressor.forms.weights import Count, DenseWeight, StoredWeight, kind_of
from compressor.io import TensorInfo
from compressor.latency import Kernel, LayerUse, ModuleCall, Movement, Size
from compressor.measure import Precision, Spectrum, truncation_errors
from compressor.measure.scale import power_of_two
from compressor.network import Kind
from compressor.quantize import (
    Quantization,
    QuantizationSettings,
    QuantizedMatrix,
    SimulatedMatrix,
    gptq,
    quantize_to_nearest,
    simulated,
    unpack,
)
from compressor.torch_state import in_float64

_CLASSES = (QuantizedLinear, QuantizedEmbedding, QuantizedConvolution, QuantizedTransposedConvolution)
# Kinds whose quantized tensor has the rows of the matrix' inputs: a row of it is looked up, or is one channel's kernel.
_TURNED: tuple[Kind, ...] = ("embedding", "transposed convolution")

# What a quantized layer asks before it multiplies takes as long as so many calls of a module.
_CALLS_OF_CHECKS = 4


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
    rows, columns = _flat(info.shape)
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
    rows, columns = _flat(shape)
    zeros = tensors.get(f"{stem}weight_zero_point")
    zeros = None if zeros is None else unpack(zeros.T, quantization.bits, rows).T
    integers = unpack(tensors[f"{stem}weight_packed"], quantization.bits, columns)
    return QuantizedMatrix(quantization, integers, scales, zeros).product(scales.dtype).reshape(*shape)


def _is_fitted(quantization: Quantization, inputs: int) -> bool:
    return quantization.fitted(inputs) == quantization


def _flat(shape: Iterable[int]) -> tuple[int, int]:
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
    fitted = quantization.fitted(matrix.shape[1])
    if metric is None or matrix.numel() == 0:
        return quantize_to_nearest(matrix, fitted, scale_dtype=torch.bfloat16, settings=settings)
    return gptq(matrix, fitted, metric, scale_dtype=torch.bfloat16, settings=settings)


def _for_errors(
    matrix: Tensor, metric: Metric | None, *, quantization: Quantization, settings: FactorizationSettings
) -> QuantizedMatrix | SimulatedMatrix:
    """A matrix with an error of that size, in less time."""
    if metric is None or matrix.numel() == 0 or quantization.bits < settings.simulated_bits:
        return quantized(matrix, metric, quantization=quantization, settings=QuantizationSettings(rounds=0))
    return simulated(matrix, quantization.fitted(matrix.shape[1]), metric)


def _turned(metric: Metric | None) -> Metric | None:
    """The metric of the transposed matrix."""
    return None if metric is None else Metric(metric.gradients, metric.inputs)


def _single(metric: Metric | TiedMetric | None) -> Metric | None:
    return nearest_kronecker_metric(metric) if isinstance(metric, TiedMetric) else metric


def _quantized_as(
    matrix: Tensor, metric: Metric | None, *, quantize: Quantize, turned: bool
) -> QuantizedMatrix | SimulatedMatrix:
    """A matrix quantized as it is stored: its transpose where `turned`."""
    return quantize(matrix.T, _turned(metric)) if turned else quantize(matrix, metric)


def _matrix_of(part: QuantizedMatrix | SimulatedMatrix, *, turned: bool) -> Tensor:
    return part.product().T if turned else part.product()


def _plain_parts(
    kind: Kind, pair: FactorPair, matrix: Tensor, *, metric: Metric | None, quantize: Quantize
) -> dict[str, QuantizedMatrix | SimulatedMatrix | Tensor]:
    """The factors of a plain or channel pair: `down`, and then `up` as refitted to it.

    The columns of `up` share scales, so they are made equally long before.
    """
    sizes = pair.up.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    up, rows = pair.up / sizes, sizes[:, None] * pair.down
    of_down = None if metric is None else Metric(metric.inputs, up.T @ weighed(up, metric.gradients))
    turned = kind in _TURNED
    down = _quantized_as(rows, of_down, quantize=quantize, turned=turned)
    rows = _matrix_of(down, turned=turned)
    moment, up = _refitted(up, rows, matrix, metric=metric)
    of_up = None if metric is None else Metric(moment, metric.gradients)
    return {
        "down.weight": down,
        "up.weight": _quantized_as(up, of_up, quantize=quantize, turned=kind == "transposed convolution"),
    }


def _pivoted_parts(
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


@lru_cache(maxsize=256)
def _sizes(form: QuantizedPair, weight: StoredWeight) -> npt.NDArray[np.int64]:
    """The bytes of a pair at rank 0, 1, ..: plans ask for them again and again, of layers of the same shape."""
    ranks = range(min(form.sides(weight)) + 1)
    return np.array([form.nbytes(weight, rank, 2) if rank else 0 for rank in ranks], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class QuantizedPair(PairForm):
    """A pair whose factors are quantized."""

    pair: PairForm
    quantization: Quantization
    has_own_errors: bool = True
    build: Callable[..., nn.Module] = quantized_layer
    classes: tuple[type[nn.Module], ...] = _CLASSES

    @classmethod
    def of(cls, pair: PairForm, quantization: Quantization) -> QuantizedPair:
        """The form whose factors are those of a pair."""
        names = tuple(name for each in pair.names for name in _part_names(each, quantization))
        name = f"{pair.name}@{quantization.name}"
        return cls(name=name, names=names, bias=pair.bias, pair=pair, quantization=quantization, classes=pair.classes)

    def layer(self, dense: nn.Module, rank: int) -> nn.Module:
        layer = self.pair.layer(dense, rank)
        for name, part in [(name, part) for name, part in layer.named_children() if name in ("down", "up")]:
            setattr(layer, name, unfilled_part(part, self.quantization))
        _mark(layer, kind_of(dense), self.quantization)
        return layer

    def marker(self, weight: DenseWeight) -> tuple[int, ...] | None:
        return (*MARKERS[weight.kind], self.quantization.bits)

    def takes(self, weight: DenseWeight) -> bool:
        if not self.pair.takes(weight):
            return False
        # From the first factor's tensors its groups are read, and those of the other are chosen by these.
        first = self.pair.infos(weight, 1, torch.float16)[0]
        alike = weight.kind == "embedding" or _is_fitted(self.quantization, math.prod(first.shape[1:]))
        return alike and (weight.kind != "transposed convolution" or self.quantization.group_size is None)

    def sides(self, weight: DenseWeight) -> tuple[int, int]:
        return self.pair.sides(weight)

    def parameters(self, weight: DenseWeight, rank: Count) -> Count:
        return -(-self.nbytes(weight, rank, 2) // 2)

    def nbytes(self, weight: DenseWeight, rank: Count, itemsize: int) -> Count:
        if isinstance(rank, int):
            return sum(info.nbytes for info in self.infos(weight, rank, torch.float16))
        return _sizes(self, StoredWeight(weight.kind, weight.tensor_shape))[rank]

    def numbers(self, weight: DenseWeight, rank: int) -> int:
        return self.pair.numbers(weight, rank)

    def kernels(self, weight: DenseWeight, rank: Size, use: LayerUse, *, itemsize: int) -> list[Kernel]:
        kernels = self.pair.kernels(weight, rank, use, itemsize=itemsize)
        if weight.kind == "parameter":
            factors = [
                dequantization(rank, weight.shape[1], itemsize=itemsize),
                dequantization(weight.shape[0], rank, itemsize=itemsize),
            ]
            return [*factors, *kernels]
        # Quantized layers in a pair are called.
        calls = [ModuleCall(itemsize=itemsize)] * (2 + 2 * _CALLS_OF_CHECKS)
        return [*calls, *quantized_kernels(kernels, weight, self.quantization)]

    def infos(self, weight: DenseWeight, rank: int, dtype: torch.dtype) -> list[TensorInfo]:
        infos = self.pair.infos(weight, rank, dtype)
        return [each for info in infos for each in self._infos_of(info)]

    def parts(self, weight: DenseWeight, rank: int, dtype: torch.dtype) -> list[TensorInfo]:
        """The tensors of the pair before they are quantized."""
        return self.pair.infos(weight, rank, dtype)

    def _infos_of(self, info: TensorInfo) -> list[TensorInfo]:
        return part_infos(info, self.quantization) if info.name.endswith("weight") else [info]

    def known_tensors(self, weight: DenseWeight, rank: int) -> dict[str, Tensor]:
        return _shapes(self.pair.infos(weight, rank, torch.float32))

    def recognizes(self, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return self.pair.recognizes(kind, shapes)

    def read(self, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> StoredPairShape | None:
        return self.pair.read(kind, shapes)

    def approximate(
        self,
        weight: DenseWeight,
        matrix: Tensor,
        rank: int,
        *,
        metric: Metric | TiedMetric | None,
        settings: FactorizationSettings,
        decomposition: Decomposition | None = None,
    ) -> MatrixPair:
        found = self.pair.approximate(
            weight, matrix, rank, metric=metric, settings=settings, decomposition=decomposition
        )
        work = QuantizationSettings(rounds=settings.quantization_rounds)
        quantize = partial(quantized, quantization=self.quantization, settings=work)
        return self._quantized(weight, found, matrix, metric=metric, quantize=quantize)

    def _quantized(
        self,
        weight: DenseWeight,
        found: MatrixPair,
        matrix: Tensor,
        *,
        metric: Metric | TiedMetric | None,
        quantize: Quantize,
    ) -> QuantizedFactors:
        """A pair of a matrix with its factors quantized."""
        assert isinstance(found, FactorPair | SpatialPair)
        one, rank = _single(metric), found.rank
        parts: Mapping[str, QuantizedMatrix | SimulatedMatrix | Tensor]
        if isinstance(found, FactorPair) and self.pair is PIVOTED:
            parts = _pivoted_parts(pivoted_pair(found), in_float64(matrix), metric=one, quantize=quantize)
        elif isinstance(found, FactorPair):
            parts = _plain_parts(weight.kind, found, in_float64(matrix), metric=one, quantize=quantize)
        else:
            exact = self.pair.stored(weight, found, torch.float64)
            parts = {name: quantize(each.flatten(1), None) for name, each in exact.items()}
        shapes = {info.name: info.shape for info in self.pair.infos(weight, rank, torch.float32)}
        tensors = {
            name: each if isinstance(each, Tensor) else each.product().reshape(shapes[name])
            for name, each in parts.items()
        }
        return QuantizedFactors(rank, parts, self.pair.product(weight, tensors))

    def stored(self, weight: DenseWeight, pair: MatrixPair, dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(pair, QuantizedFactors)
        return _stored_parts(pair, self.pair.infos(weight, pair.rank, dtype))

    def _dequantized(
        self, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> dict[str, Tensor]:
        known = shapes or {}
        return {
            name: part_of_tensors(name, self.quantization, tensors, shape=known.get(name))
            if name.endswith("weight")
            else tensors[name]
            for name in self.pair.names
        }

    def product(self, weight: DenseWeight, tensors: Mapping[str, Tensor]) -> Tensor:
        infos = self.pair.infos(weight, self._rank(weight, tensors), torch.float32)
        return self.pair.product(weight, self._dequantized(tensors, {info.name: info.shape for info in infos}))

    def _rank(self, weight: DenseWeight, tensors: Mapping[str, Tensor]) -> int:
        if weight.kind == "embedding":  # whose factors have it as their inputs
            return int(tensors["down.weight_shape"][1])
        factor = "up" if weight.kind == "transposed convolution" else "down"
        return len(tensors[f"{factor}.weight_scale"])

    def defect(self, rank: int, read: Values) -> str | None:
        defect = _defect_of_scales(self.names, read)
        return self.pair.defect(rank, read) if defect is None else defect

    def merged(self, kind: Kind, tensors: Mapping[str, Tensor]) -> FactorPair | PivotedPair:
        return self.pair.merged(kind, self._dequantized(tensors))

    def errors_in(
        self,
        weight: DenseWeight,
        matrix: Tensor,
        *,
        metric: Metric | TiedMetric | None,
        settings: FactorizationSettings,
        decomposition: Decomposition | None = None,
    ) -> Spectrum:
        """At some ranks they are computed: what quantizing adds there, as a share of what the pair captures, is
        interpolated."""
        if self.pair.has_own_errors:
            truncated = self.pair.errors_in(weight, matrix, metric=metric, settings=settings)
        else:
            decomposition = decomposition or _decomposition(matrix, metric, settings)
            truncated = truncation_errors(decomposition.values)
        last = len(truncated) - 1
        # A pair of a higher rank has more numbers than the matrix.
        sides = self.sides(weight)
        largest = min(last, max(1, math.prod(sides) // sum(sides)))
        ranks = np.unique(np.geomspace(1, largest, settings.quantized_ranks).round().astype(np.int64))
        quantize, added = partial(_for_errors, quantization=self.quantization, settings=settings), []
        for rank in ranks:
            found = self.pair.approximate(
                weight, matrix, int(rank), metric=metric, settings=settings, decomposition=decomposition
            )
            pair = self._quantized(weight, found, matrix, metric=metric, quantize=quantize)
            error = _relative_error(matrix, pair.product(), metric)
            added.append(max(0.0, error**2 - truncated[rank] ** 2) / max(1e-30, 1 - truncated[rank] ** 2))
        shares = np.interp(np.log(np.arange(1, last + 1)), np.log(ranks), added)
        kept = np.clip(1 - truncated[1:] ** 2, 0, 1)
        return np.concatenate([truncated[:1], np.sqrt(truncated[1:] ** 2 + shares * kept)])


@dataclass(frozen=True, kw_only=True)
class QuantizedDense(PairForm):
    """A layer's own matrix that is quantized; at a rank above 0 with a low-rank correction of 8 bits."""

    quantization: Quantization
    has_own_errors: bool = True
    least_rank: int = 0
    truncates: bool = False
    bias: str = "bias"
    build: Callable[..., nn.Module] = quantized_layer
    classes: tuple[type[nn.Module], ...] = _CLASSES

    @classmethod
    def of(cls, quantization: Quantization) -> QuantizedDense:
        """The form in a quantization."""
        name = f"dense@{quantization.name}"
        return cls(name=name, names=_part_names("weight", quantization), quantization=quantization)

    def layer(self, dense: nn.Module, rank: int) -> nn.Module:
        layer = unfilled_part(dense, self.quantization)
        kind = kind_of(dense)
        if kind != "linear":
            _mark(layer, kind, self.quantization)
        if rank > 0:
            parts = dict(_correction("convolution" in kind).layer(dense, rank).named_children())
            for name in ("down", "up"):
                layer.add_module(name, parts[name])
            if "bias" in parts["up"]._parameters:
                parts["up"].register_parameter("bias", None)
        return layer

    def names_at(self, rank: int) -> tuple[str, ...]:
        return self.names if rank == 0 else (*self.names, *_correction(False).names)

    def marker(self, weight: DenseWeight) -> tuple[int, ...] | None:
        return None if weight.kind == "linear" else (*MARKERS[weight.kind], self.quantization.bits)

    def takes(self, weight: DenseWeight) -> bool:
        _, columns = _flat(self._shape(weight))
        # Without a marker only the packed width tells the bits.
        told = weight.kind != "linear" or columns >= 32
        return len(weight.tensor_shape) >= 2 and told and _is_fitted(self.quantization, columns)

    def parameters(self, weight: DenseWeight, rank: Count) -> Count:
        return -(-self.nbytes(weight, rank, 2) // 2)

    def nbytes(self, weight: DenseWeight, rank: Count, itemsize: int) -> Count:
        if isinstance(rank, int):
            return sum(info.nbytes for info in self.infos(weight, rank, torch.float16))
        own = self.nbytes(weight, 0, itemsize)
        return own + np.where(rank > 0, _correction_of(weight).nbytes(weight, np.maximum(rank, 1), itemsize), 0)

    def numbers(self, weight: DenseWeight, rank: int) -> int:
        return math.prod(weight.shape) + (_correction_of(weight).numbers(weight, rank) if rank > 0 else 0)

    def kernels(self, weight: DenseWeight, rank: Size, use: LayerUse, *, itemsize: int) -> list[Kernel]:
        dense = dense_kernels(weight, use, itemsize=itemsize)
        if weight.kind == "parameter":
            return [dequantization(*weight.shape, itemsize=itemsize), *dense]
        checks = [ModuleCall(itemsize=itemsize)] * _CALLS_OF_CHECKS
        own = [*checks, *quantized_kernels(dense, weight, self.quantization)]
        if not np.any(np.asarray(rank)):
            return own
        added = Movement(how="add", rows=use.rows, columns=weight.shape[0], itemsize=itemsize)
        return [*own, *_correction_of(weight).kernels(weight, rank, use, itemsize=itemsize), added]

    def infos(self, weight: DenseWeight, rank: int, dtype: torch.dtype) -> list[TensorInfo]:
        own = part_infos(TensorInfo("weight", self._shape(weight), dtype), self.quantization)
        return own + (_correction_of(weight).infos(weight, rank, dtype) if rank > 0 else [])

    def parts(self, weight: DenseWeight, rank: int, dtype: torch.dtype) -> list[TensorInfo]:
        """The matrix and the factors of its correction before they are quantized."""
        own = TensorInfo("weight", self._shape(weight), dtype)
        return [own, *(_correction_of(weight).parts(weight, rank, dtype) if rank > 0 else [])]

    def _shape(self, weight: DenseWeight) -> tuple[int, ...]:
        """The shape of what is quantized: the layer's matrix, or its tensor."""
        return weight.shape if weight.kind == "transposed linear" else weight.tensor_shape

    def known_tensors(self, weight: DenseWeight, rank: int) -> dict[str, Tensor]:
        correction = _correction_of(weight).known_tensors(weight, rank) if rank > 0 else {}
        return _shapes([TensorInfo("weight", self._shape(weight), torch.float32)]) | correction

    def recognizes(self, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return "weight" in shapes

    def read(self, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> StoredPairShape | None:
        shape = shapes["weight"]
        tensor_shape = shape[::-1] if kind == "transposed linear" else shape
        if "down.weight" not in shapes:
            return StoredPairShape(0, tensor_shape)
        found = _correction(len(shape) > 2).read(kind, shapes)
        return found if found is not None and found.tensor_shape == tensor_shape else None

    def approximate(
        self,
        weight: DenseWeight,
        matrix: Tensor,
        rank: int,
        *,
        metric: Metric | TiedMetric | None,
        settings: FactorizationSettings,
        decomposition: Decomposition | None = None,
    ) -> MatrixPair:
        turned = weight.kind in _TURNED
        work = QuantizationSettings(rounds=settings.quantization_rounds)
        quantize = partial(quantized, quantization=self.quantization, settings=work)
        own = _quantized_as(in_float64(matrix), _single(metric), quantize=quantize, turned=turned)
        product = _matrix_of(own, turned=turned)
        if rank == 0:
            return QuantizedFactors(0, {"weight": own}, product)
        left = in_float64(matrix) - product
        correction = _correction_of(weight).approximate(weight, left, rank, metric=metric, settings=settings)
        assert isinstance(correction, QuantizedFactors)
        return QuantizedFactors(rank, {"weight": own, **correction.parts}, product + correction.matrix)

    def stored(self, weight: DenseWeight, pair: MatrixPair, dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(pair, QuantizedFactors)
        return _stored_parts(pair, self.parts(weight, pair.rank, dtype))

    def product(self, weight: DenseWeight, tensors: Mapping[str, Tensor]) -> Tensor:
        own = part_of_tensors("weight", self.quantization, tensors, shape=_flat(self._shape(weight)))
        own = own.T if weight.kind in _TURNED else own
        return own + _correction_of(weight).product(weight, tensors) if "down.weight_packed" in tensors else own

    def defect(self, rank: int, read: Values) -> str | None:
        return _defect_of_scales(self.names_at(rank), read)

    def merged(self, kind: Kind, tensors: Mapping[str, Tensor]) -> FactorPair | PivotedPair:
        raise NotImplementedError

    def errors_in(
        self,
        weight: DenseWeight,
        matrix: Tensor,
        *,
        metric: Metric | TiedMetric | None,
        settings: FactorizationSettings,
        decomposition: Decomposition | None = None,
    ) -> Spectrum:
        """Of the quantized matrix alone at rank 0, and at few bits of what the best correction of a rank leaves."""
        turned = weight.kind in _TURNED
        quantize = partial(_for_errors, quantization=self.quantization, settings=settings)
        own = _quantized_as(in_float64(matrix), _single(metric), quantize=quantize, turned=turned)
        found = _matrix_of(own, turned=turned)
        error = _relative_error(matrix, found, metric)
        if self.quantization.bits > settings.corrected_bits or error == 0:
            return np.array([error])
        left = _decomposition(in_float64(matrix) - found, metric, settings)
        return np.asarray(error * truncation_errors(left.values), dtype=np.float64)


def _shapes(infos: Iterable[TensorInfo]) -> dict[str, Tensor]:
    """The tensors that say what shapes were quantized, of those of a pair or a matrix."""
    return {f"{each.name}_shape": torch.tensor(each.shape) for each in infos if each.name.endswith("weight")}


def _stored_parts(pair: QuantizedFactors, infos: Iterable[TensorInfo]) -> dict[str, Tensor]:
    """The tensors of the parts, which stand for tensors of these names and shapes."""
    stored: dict[str, Tensor] = {}
    for info in infos:
        part = pair.parts[info.name]
        assert not isinstance(part, SimulatedMatrix)
        stored |= {info.name: part} if isinstance(part, Tensor) else part_tensors(info.name, part, info)
    return stored


def _decomposition(
    matrix: Tensor, metric: Metric | TiedMetric | None, settings: FactorizationSettings
) -> Decomposition:
    if isinstance(metric, TiedMetric):
        return decompose_tied(matrix, metric)
    return decompose(matrix, metric, Precision(loss=settings.float32_loss))


def _relative_error(matrix: Tensor, product: Tensor, metric: Metric | TiedMetric | None) -> float:
    wide = in_float64(matrix)
    scale = power_of_two(wide)
    total, changed = (
        float(each.square().sum()) if metric is None else metric.squared_size(each)
        for each in (wide / scale, (wide - product) / scale)
    )
    return math.sqrt(changed / total) if total > 0 else 0.0


def _defect_of_scales(names: Iterable[str], read: Values) -> str | None:
    scales = (name for name in names if name.endswith("weight_scale"))
    bad = next((name for name in scales if not bool(read(name).isfinite().all())), None)
    return None if bad is None else f"{bad} has scales that are not finite"


def _mark(layer: nn.Module, kind: Kind, quantization: Quantization) -> None:
    """Let the zero-size weight of a layer say its bits too: the packed widths of short rows leave these open."""
    weight = layer._buffers["weight"]
    assert weight is not None
    layer.register_buffer("weight", weight.new_empty(*MARKERS[kind], quantization.bits))


def _part_names(name: str, quantization: Quantization) -> tuple[str, ...]:
    """The names of the tensors in the place of one of a pair."""
    if not name.endswith("weight"):
        return (name,)
    zero = ("weight_zero_point",) if quantization.zero_points else ()
    return tuple(
        name.removesuffix("weight") + each for each in ("weight_packed", "weight_scale", *zero, "weight_shape")
    )


def unfilled_part(dense: nn.Module, quantization: Quantization) -> nn.Module:
    """The quantized layer in the place of a dense one, with the group size that its inputs have."""
    weight = dense.weight
    assert isinstance(weight, Tensor)
    sides = _flat(weight.shape)
    fitted = quantization.fitted(sides[0] if type(dense).__name__ == "Conv1D" else sides[1])
    return quantized_layer(dense, **fitted.to_dict())


@cache
def _correction(of_convolution: bool) -> QuantizedPair:
    return QuantizedPair.of(CHANNEL if of_convolution else PLAIN, Quantization(8))


def _correction_of(weight: DenseWeight) -> QuantizedPair:
    return _correction(len(weight.tensor_shape) > 2)
