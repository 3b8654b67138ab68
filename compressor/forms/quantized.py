"""Quantized forms: a layer's matrix, or the factors of a pair, as integers with scales.

`PAIR@QUANTIZATION` stores each `NAME.weight` of a pair, flattened to two dimensions, as `NAME.weight_packed`,
`NAME.weight_scale`, `NAME.weight_zero_point` where it has zero points, and `NAME.weight_shape`, which has the shape
that it was flattened from. `dense@QUANTIZATION` stores the layer's own matrix so, without a zero-size `X.weight`; its
rank is that of a low-rank correction of what quantizing lost, a pair of 8 bits, and 0 where there is none.

Scales are chosen among the numbers that bfloat16 and float16 share: so what is chosen does not depend on the dtype.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from compressor.factorize import (
    Decomposition,
    FactorizationSettings,
    FactorPair,
    GroupedMetric,
    GroupedPair,
    Metric,
    PivotedPair,
    SpatialPair,
    TiedMetric,
    pivoted_pair,
)
from compressor.forms.channel import CHANNEL
from compressor.forms.grouped import GROUPED
from compressor.forms.kernels import dense_kernels, dequantization, quantized_kernels
from compressor.forms.layers import MARKERS
from compressor.forms.pair_form import (
    Approximations,
    MatrixPair,
    PairForm,
    StoredPairShape,
    Values,
    decomposition_in,
)
from compressor.forms.pivoted import PIVOTED
from compressor.forms.plain import PLAIN
from compressor.forms.quantized_layers import (
    QuantizedConvolution,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedTransposedConvolution,
    quantized_layer,
    quantized_matrix,
    quantized_pair,
)
from compressor.forms.quantized_parts import (
    Quantize,
    QuantizedFactors,
    defect_of_scales,
    flattened,
    grouped_parts,
    is_fitted,
    matrix_of,
    part_infos,
    part_names,
    part_of_tensors,
    pivoted_parts,
    plain_parts,
    quantized,
    quantized_as_stored,
    quantized_for_errors,
    shape_tensors,
    single_metric,
    stored_parts,
)
from compressor.forms.weights import TURNED, Count, DenseWeight, StoredWeight, kind_of
from compressor.io import TensorInfo
from compressor.latency import IntegerProduct, Kernel, LayerUse, ModuleCall, Movement, Size
from compressor.measure import Spectrum, truncation_errors
from compressor.network import Kind
from compressor.quantize import (
    Quantization,
    QuantizationSettings,
    QuantizedMatrix,
    SimulatedMatrix,
)
from compressor.torch_state import in_float64

_CLASSES = (QuantizedLinear, QuantizedEmbedding, QuantizedConvolution, QuantizedTransposedConvolution)

# What rounding costs is known by its average in a matrix of so many numbers: of smaller ones the error is formed.
_MANY = 2**18

# What a quantized layer asks before it multiplies takes as long as so many calls of a module.
_CALLS_OF_CHECKS = 4


@lru_cache(maxsize=256)
def _sizes(form: QuantizedPair, weight: StoredWeight) -> npt.NDArray[np.int64]:
    """The bytes of a pair at rank 0, 1, ..: plans ask for them again and again, of layers of the same shape."""
    ranks = range(min(form.sides(weight)) + 1)
    return np.array([form.nbytes(weight, rank, 2) if rank else 0 for rank in ranks], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class _QuantizedForm(PairForm):
    """What has parts that are quantized: `parts` says which, before they are."""

    quantization: Quantization
    has_own_errors: bool = True
    build: Callable[..., nn.Module] = quantized_layer
    classes: tuple[type[nn.Module], ...] = _CLASSES

    @property
    def _how(self) -> dict[str, Any]:
        """What its unfilled layers are built from."""
        own = self.quantization
        return {"bits": own.bits, "zero_points": own.zero_points, "fitted": self._group_size}

    def _group_size(self, inputs: int) -> int | None:
        return self.quantization.fitted(inputs).group_size

    @abstractmethod
    def parts(self, weight: DenseWeight, rank: int, dtype: torch.dtype) -> list[TensorInfo]:
        """The tensors before they are quantized."""

    def parameters(self, weight: DenseWeight, rank: Count) -> Count:
        return -(-self.nbytes(weight, rank, 2) // 2)

    def nbytes(self, weight: DenseWeight, rank: Count, itemsize: int) -> Count:
        if isinstance(rank, int):
            return sum(info.nbytes for info in self.infos(weight, rank, torch.float16))
        return self._nbytes_at(weight, rank)

    @abstractmethod
    def _nbytes_at(self, weight: DenseWeight, ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The bytes at many ranks."""

    def known_tensors(self, weight: DenseWeight, rank: int) -> dict[str, Tensor]:
        return shape_tensors(self.parts(weight, rank, torch.float32))

    def stored(self, weight: DenseWeight, pair: MatrixPair, dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(pair, QuantizedFactors)
        return stored_parts(pair, self.parts(weight, pair.rank, dtype))

    def _quantize(self, settings: FactorizationSettings) -> Quantize:
        work = QuantizationSettings(rounds=settings.quantization_rounds)
        return partial(quantized, quantization=self.quantization, settings=work)

    def _quantize_for_errors(self, approximations: Approximations) -> Quantize:
        return partial(
            quantized_for_errors,
            quantization=self.quantization,
            settings=approximations.settings,
            simulation=approximations.simulation,
        )


@dataclass(frozen=True, kw_only=True)
class QuantizedPair(_QuantizedForm):
    """A pair whose factors are quantized."""

    pair: PairForm

    @classmethod
    def of(cls, pair: PairForm, quantization: Quantization) -> QuantizedPair:
        """The form whose factors are those of a pair."""
        names = tuple(name for each in pair.names for name in part_names(each, quantization))
        name = f"{pair.name}@{quantization.name}"
        return cls(name=name, names=names, bias=pair.bias, pair=pair, quantization=quantization, classes=pair.classes)

    def layer(self, dense: nn.Module, rank: int) -> nn.Module:
        return quantized_pair(self.pair.layer(dense, rank), **self._how)

    def marker(self, weight: DenseWeight) -> tuple[int, ...] | None:
        return (*MARKERS[weight.kind], self.quantization.bits)

    def takes(self, weight: DenseWeight) -> bool:
        if not self.pair.takes(weight):
            return False
        # From the first factor's tensors its groups are read, and those of the other are chosen by these.
        first = self.pair.infos(weight, 1, torch.float16)[0]
        alike = weight.kind == "embedding" or is_fitted(self.quantization, math.prod(first.shape[1:]))
        return alike and (weight.kind != "transposed convolution" or self.quantization.group_size is None)

    def sides(self, weight: DenseWeight) -> tuple[int, int]:
        return self.pair.sides(weight)

    def _nbytes_at(self, weight: DenseWeight, ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        of_weight = StoredWeight(weight.kind, weight.tensor_shape, weight.groups)
        sizes: npt.NDArray[np.int64] = _sizes(self, of_weight)[ranks]
        return sizes

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

    def suits_kernels(self, weight: DenseWeight, ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        suits = np.ones(len(ranks), dtype=np.bool_)
        if weight.kind in ("linear", "transposed linear"):
            for kernel in self.kernels(weight, ranks, LayerUse(rows=1), itemsize=2):
                if isinstance(kernel, IntegerProduct) and np.any(kernel.taken):
                    suits &= kernel.taken
        return suits

    def infos(self, weight: DenseWeight, rank: int, dtype: torch.dtype) -> list[TensorInfo]:
        return [each for info in self.parts(weight, rank, dtype) for each in self._infos_of(info)]

    def parts(self, weight: DenseWeight, rank: int, dtype: torch.dtype) -> list[TensorInfo]:
        return self.pair.infos(weight, rank, dtype)

    def _infos_of(self, info: TensorInfo) -> list[TensorInfo]:
        return part_infos(info, self.quantization) if info.name.endswith("weight") else [info]

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
        return self._quantized(weight, found, matrix, metric=metric, quantize=self._quantize(settings))

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
        assert isinstance(found, FactorPair | GroupedPair | SpatialPair)
        one, rank = single_metric(metric), found.rank
        parts: Mapping[str, QuantizedMatrix | SimulatedMatrix | Tensor]
        if isinstance(found, FactorPair) and self.pair is PIVOTED:
            parts = pivoted_parts(pivoted_pair(found), in_float64(matrix), metric=one, quantize=quantize)
        elif isinstance(found, FactorPair):
            parts = plain_parts(weight.kind, found, in_float64(matrix), metric=one, quantize=quantize)
        elif isinstance(found, GroupedPair):
            assert one is None or isinstance(one, GroupedMetric)
            parts = grouped_parts(found, in_float64(matrix), metric=one, quantize=quantize)
        else:
            exact = self.pair.stored(weight, found, torch.float64)
            parts = {name: quantize(each.flatten(1), None) for name, each in exact.items()}
        shapes = {info.name: info.shape for info in self.pair.infos(weight, rank, torch.float32)}
        tensors = {
            name: each if isinstance(each, Tensor) else each.product().reshape(shapes[name])
            for name, each in parts.items()
        }
        return QuantizedFactors(rank, parts, self.pair.product(weight, tensors))

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
        return len(tensors[f"{factor}.weight_scale"]) // weight.groups

    def defect(self, rank: int, read: Values) -> str | None:
        defect = defect_of_scales(self.names, read)
        return self.pair.defect(rank, read) if defect is None else defect

    def merged(self, kind: Kind, tensors: Mapping[str, Tensor]) -> FactorPair | PivotedPair:
        return self.pair.merged(kind, self._dequantized(tensors))

    def errors_in(self, approximations: Approximations) -> Spectrum:
        """At some ranks they are computed: what quantizing adds there, as a share of what the pair captures, is
        interpolated."""
        if self.pair.has_own_errors:
            truncated = approximations.errors(self.pair)
        else:
            truncated = truncation_errors(approximations.decomposition.values)
        last = len(truncated) - 1
        # A pair of a higher rank has more numbers than the matrix.
        sides = self.sides(approximations.weight)
        largest = min(last, max(1, math.prod(sides) // sum(sides)))
        ranks = np.unique(np.geomspace(1, largest, approximations.settings.quantized_ranks).round().astype(np.int64))
        added = [
            self._added(approximations, int(rank), truncated[rank]) / max(1e-30, 1 - truncated[rank] ** 2)
            for rank in ranks
        ]
        shares = np.interp(np.log(np.arange(1, last + 1)), np.log(ranks), added)
        kept = np.clip(1 - truncated[1:] ** 2, 0, 1)
        return np.concatenate([truncated[:1], np.sqrt(truncated[1:] ** 2 + shares * kept)])

    def _added(self, approximations: Approximations, rank: int, truncated: float) -> float:
        """What quantizing adds to the squared error of the pair of a rank, which is that of truncation."""
        found, quantize = approximations.pair(self.pair, rank), self._quantize_for_errors(approximations)
        weight, matrix, metric = approximations.weight, approximations.matrix, approximations.metric
        pair = self._quantized(weight, found, matrix, metric=metric, quantize=quantize)
        return max(0.0, approximations.relative_error(pair.product()) ** 2 - truncated**2)


@dataclass(frozen=True, kw_only=True)
class QuantizedDense(_QuantizedForm):
    """A layer's own matrix that is quantized; at a rank above 0 with a low-rank correction of 8 bits."""

    least_rank: int = 0
    truncates: bool = False
    bias: str = "bias"

    @classmethod
    def of(cls, quantization: Quantization) -> QuantizedDense:
        """The form in a quantization."""
        name = f"dense@{quantization.name}"
        return cls(name=name, names=part_names("weight", quantization), quantization=quantization)

    def layer(self, dense: nn.Module, rank: int) -> nn.Module:
        weight = dense.weight
        assert isinstance(weight, Tensor)
        correction = _correction(kind_of(dense), weight.dim()).layer(dense, rank) if rank > 0 else None
        return quantized_matrix(dense, correction, **self._how)

    def names_at(self, rank: int) -> tuple[str, ...]:
        return self.names if rank == 0 else (*self.names, *_correction("linear", 2).names)

    def marker(self, weight: DenseWeight) -> tuple[int, ...] | None:
        return None if weight.kind == "linear" else (*MARKERS[weight.kind], self.quantization.bits)

    def sides(self, weight: DenseWeight) -> tuple[int, int]:
        return _correction_of(weight).sides(weight)

    def takes(self, weight: DenseWeight) -> bool:
        _, columns = flattened(self._shape(weight))
        # Without a marker only the packed width tells the bits.
        told = weight.kind != "linear" or columns >= 32
        return len(weight.tensor_shape) >= 2 and told and is_fitted(self.quantization, columns)

    def _nbytes_at(self, weight: DenseWeight, ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        correction = _correction_of(weight).nbytes(weight, np.maximum(ranks, 1), 2)
        return self.nbytes(weight, 0, 2) + np.where(ranks > 0, correction, 0)

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
        own = TensorInfo("weight", self._shape(weight), dtype)
        return [own, *(_correction_of(weight).parts(weight, rank, dtype) if rank > 0 else [])]

    def _shape(self, weight: DenseWeight) -> tuple[int, ...]:
        """The shape of what is quantized: the layer's matrix, or its tensor."""
        return weight.shape if weight.kind == "transposed linear" else weight.tensor_shape

    def recognizes(self, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return "weight" in shapes

    def read(self, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> StoredPairShape | None:
        shape = shapes["weight"]
        tensor_shape = shape[::-1] if kind == "transposed linear" else shape
        if "down.weight" not in shapes:
            return StoredPairShape(0, tensor_shape)
        found = _correction(kind, len(shape)).read(kind, shapes)
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
        turned, quantize = weight.kind in TURNED, self._quantize(settings)
        own = quantized_as_stored(in_float64(matrix), single_metric(metric), quantize=quantize, turned=turned)
        product = matrix_of(own, turned=turned)
        if rank == 0:
            return QuantizedFactors(0, {"weight": own}, product)
        left = in_float64(matrix) - product
        correction = _correction_of(weight).approximate(weight, left, rank, metric=metric, settings=settings)
        assert isinstance(correction, QuantizedFactors)
        return QuantizedFactors(rank, {"weight": own, **correction.parts}, product + correction.matrix)

    def product(self, weight: DenseWeight, tensors: Mapping[str, Tensor]) -> Tensor:
        own = part_of_tensors("weight", self.quantization, tensors, shape=flattened(self._shape(weight)))
        own = own.T if weight.kind in TURNED else own
        return own + _correction_of(weight).product(weight, tensors) if "down.weight_packed" in tensors else own

    def defect(self, rank: int, read: Values) -> str | None:
        return defect_of_scales(self.names_at(rank), read)

    def merged(self, kind: Kind, tensors: Mapping[str, Tensor]) -> FactorPair | PivotedPair:
        raise NotImplementedError

    def errors_in(self, approximations: Approximations) -> Spectrum:
        """Of the quantized matrix alone at rank 0, and at few bits of what the best correction of a rank leaves."""
        weight, matrix, metric = approximations.weight, approximations.matrix, approximations.metric
        settings = approximations.settings
        simulated = self.quantization.bits >= settings.simulated_bits and matrix.numel() >= _MANY
        if simulated and approximations.simulation is not None:
            error = math.sqrt(approximations.relative_cost(self.quantization))
            corrected = self.quantization.bits <= settings.corrected_bits and error > 0
            return error * approximations.corrected if corrected else np.array([error])
        turned, quantize = weight.kind in TURNED, self._quantize_for_errors(approximations)
        own = quantized_as_stored(in_float64(matrix), single_metric(metric), quantize=quantize, turned=turned)
        found = matrix_of(own, turned=turned)
        error = approximations.relative_error(found)
        if self.quantization.bits > settings.corrected_bits or error == 0:
            return np.array([error])
        left = decomposition_in(weight, in_float64(matrix) - found, metric, settings=settings)
        return np.asarray(error * truncation_errors(left.values), dtype=np.float64)


@cache
def _correction(kind: Kind, dimensions: int) -> QuantizedPair:
    pair = GROUPED if kind == "grouped convolution" else CHANNEL if dimensions > 2 else PLAIN
    return QuantizedPair.of(pair, Quantization(8))


def _correction_of(weight: DenseWeight) -> QuantizedPair:
    return _correction(weight.kind, len(weight.tensor_shape))
