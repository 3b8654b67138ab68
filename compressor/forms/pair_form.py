"""What a pair form is: the one interface through which a layer's factors are planned, stored, run, and multiplied."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from compressor.factorize import (
    Decomposition,
    FactorizationSettings,
    FactorPair,
    GroupedMetric,
    Metric,
    PivotedPair,
    TiedMetric,
    decompose,
    decompose_grouped,
    decompose_tied,
    tied_truncated_svd,
    truncated_svd,
)
from compressor.forms.kernels import pair_kernels
from compressor.forms.layers import MARKERS
from compressor.forms.weights import TURNED, Count, DenseWeight
from compressor.io import TensorInfo
from compressor.latency import Kernel, LayerUse, Size
from compressor.measure import Precision, Spectrum, truncation_errors
from compressor.measure.scale import power_of_two
from compressor.network import Kind
from compressor.quantize import Quantization, Simulation, quantizations
from compressor.torch_state import in_float64


class MatrixPair(Protocol):
    """Factors of one matrix, in float64."""

    def product(self) -> Tensor:
        """The `d_out x d_in` matrix that the pair stands for."""


# What reads a stored tensor by its name below the layer's.
Values = Callable[[str], Tensor]


@dataclass(frozen=True)
class StoredPairShape:
    """What the shapes of stored tensors tell: the rank, and the shape and groups of the dense tensor that they stand
    for."""

    rank: int
    tensor_shape: tuple[int, ...]
    groups: int = 1


@dataclass(frozen=True, kw_only=True)
class PairForm(ABC):
    """One form in which a pair can be stored: a frozen object, registered in `FORMS`.

    Tensors go by their names below the layer's, such as `down.weight`, in the order of the file. `build` makes the
    unfilled module from a dense layer, a rank, and the form's `settings`, which are plain Python values. An exported
    folder contains the source of `build` and of the `classes`, so both use only torch and what `forms/layers.py`
    defines.

    Abstract members differ from form to form. The others default to those of a pair `up @ down` of the layer's matrix.
    """

    name: str
    names: tuple[str, ...] = ("down.weight", "up.weight")
    bias: str = "up.bias"
    """Where the layer's bias is stored."""

    has_own_errors: bool = False
    """Whether its error at a rank differs from that of the truncated SVD of the layer's own matrix.

    Where it does not, the form is a choice at the ranks at which it is the smallest of all such forms. Where it does,
    it is a choice at every rank.
    """

    from_initial: bool = False
    """Whether its factors stand for what training wrote alone: the layer's matrix less a share of its initial one."""

    least_rank: int = 1
    """The smallest rank that can be stored."""

    truncates: bool = True
    """Whether it loses what is beyond its rank, to which the second-order estimate is kinder than to rounding."""

    build: Callable[..., nn.Module]
    classes: tuple[type[nn.Module], ...]

    @property
    def settings(self) -> dict[str, Any]:
        """The fields that a form has beside those of every form, such as the bits of its factors."""
        common = {each.name for each in fields(PairForm)}
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in common}

    def layer(self, dense: nn.Module, rank: int) -> nn.Module:
        """The unfilled module that takes a dense layer's place; ValueError where it cannot become such a pair."""
        return self.build(dense, rank, **self.settings)

    @property
    def compared(self) -> PairForm:
        """The form in which a pair is found fastest that stands for the same matrix: what is only compared is in it."""
        return self

    def names_at(self, rank: int) -> tuple[str, ...]:
        """The names of the tensors at a rank."""
        return self.names

    def marker(self, weight: DenseWeight) -> tuple[int, ...] | None:
        """The shape of the zero-size tensor that stays in the place of the weight; None where none does."""
        return MARKERS[weight.kind]

    @abstractmethod
    def takes(self, weight: DenseWeight) -> bool:
        """Whether a layer can become such a pair."""

    def sides(self, weight: DenseWeight) -> tuple[int, int]:
        """The sides of the matrix that is factorized, whose smaller one is the largest rank."""
        return weight.shape

    def parameters(self, weight: DenseWeight, rank: Count) -> Count:
        """How many numbers are stored, at one rank or many; quantized ones count by their bytes, 16 bits a number."""
        return rank * sum(self.sides(weight))

    def numbers(self, weight: DenseWeight, rank: int) -> int:
        """How many numbers the factors have, a quantized one counted as one."""
        return self.parameters(weight, rank)

    def nbytes(self, weight: DenseWeight, rank: Count, itemsize: int) -> Count:
        """How many bytes these numbers take, where a number of the dense weight takes `itemsize`."""
        return self.parameters(weight, rank) * itemsize

    def kernels(self, weight: DenseWeight, rank: Size, use: LayerUse, *, itemsize: int) -> list[Kernel]:
        """The kernels of one call of the layer, at one rank or many: by default those of a plain pair of its bytes.

        Args:
            weight: The dense weight.
            rank: The rank of the pair.
            use: How a workload uses the layer.
            itemsize: Bytes of a number.
        """
        inner = self.nbytes(weight, np.asarray(rank), itemsize) / (itemsize * sum(self.sides(weight)))
        return pair_kernels(weight, inner, use, itemsize=itemsize)

    def suits_kernels(self, weight: DenseWeight, ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """At which ranks kernels for integers take every factor that they take at any of the ranks."""
        return np.ones(len(ranks), dtype=np.bool_)

    @abstractmethod
    def infos(self, weight: DenseWeight, rank: int, dtype: torch.dtype) -> list[TensorInfo]:
        """Names, shapes, and dtypes of the tensors of a pair."""

    def known_tensors(self, weight: DenseWeight, rank: int) -> dict[str, Tensor]:
        """Those of the tensors that do not depend on the matrix, such as the shape of what was quantized."""
        return {}

    @abstractmethod
    def recognizes(self, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether tensors of these shapes, which have the names of this form, are in this form."""

    @abstractmethod
    def read(self, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> StoredPairShape | None:
        """What stored tensors that are in this form stand for; None where they do not fit together.

        Of quantized tensors the shapes are those of what they stand for, by its name.
        """

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
        """The pair of this rank that is nearest to a `d_out x d_in` matrix, in float64.

        `decomposition` is that of the matrix in the metric, where it is known.
        """
        if isinstance(metric, TiedMetric):
            return tied_truncated_svd(matrix, rank, metric, start=decomposition, settings=settings)
        if metric is None and decomposition is None:
            return truncated_svd(matrix, rank)
        found = decomposition or decompose(matrix, metric, Precision(loss=settings.float32_loss))
        return found.pair(matrix, rank, metric)

    @abstractmethod
    def stored(self, weight: DenseWeight, pair: MatrixPair, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors that stand for a weight, from a pair of `approximate`, by name and shaped as in `infos`."""

    @abstractmethod
    def product(self, weight: DenseWeight, tensors: Mapping[str, Tensor]) -> Tensor:
        """The `d_out x d_in` matrix of stored tensors in their own dtype, differentiable in those of numbers."""

    def defect(self, rank: int, read: Values) -> str | None:
        """What is wrong with the values of tensors stored at a rank, the name of one first; None where nothing is."""
        return None

    @abstractmethod
    def merged(self, kind: Kind, tensors: Mapping[str, Tensor]) -> FactorPair | PivotedPair:
        """The pair as weights are merged: `down` of `r x d_in`, `up` of `d_out x r`, with a convolution's kernel."""

    def own_values(self, weight: Tensor) -> Spectrum:
        """The singular values of the matrix that a form with `has_own_errors` factorizes."""
        raise NotImplementedError

    def errors_in(self, approximations: Approximations) -> Spectrum:
        """Relative errors at rank 0, 1, .. of a form with `has_own_errors`: in a metric, or in the Frobenius norm.

        Args:
            approximations: The matrix, and what was computed of it for other forms.

        Returns:
            One for each rank that the form may have; of a form without low-rank factors that of rank 0 alone.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Approximations:
    """Pairs of one matrix in several forms, and their errors: each is computed once, whichever form asks for it.

    Those of a quantized pair start from the pair itself, at every width.

    Args:
        weight: The dense weight.
        matrix: Its `d_out x d_in` matrix, or what of it is factorized.
        metric: The metric of the loss; None for the Frobenius norm.
        settings: How exact they are.
        known: The decomposition of the matrix in the metric, where there is one.
    """

    weight: DenseWeight
    matrix: Tensor
    metric: Metric | TiedMetric | None
    settings: FactorizationSettings
    known: Decomposition | None = None
    _pairs: dict[str, dict[int, MatrixPair]] = field(default_factory=dict, init=False)
    _errors: dict[str, Spectrum] = field(default_factory=dict, init=False)

    @cached_property
    def decomposition(self) -> Decomposition:
        """The decomposition of the matrix in the metric."""
        return self.known or decomposition_in(self.weight, self.matrix, self.metric, settings=self.settings)

    @cached_property
    def simulation(self) -> Simulation | None:
        """What quantizing would cost in the metric, where that is of two moments alone."""
        return Simulation(self.metric) if type(self.metric) is Metric else None

    @cached_property
    def corrected(self) -> Spectrum:
        """What the best correction of rank 0, 1, .. leaves of the error of quantizing the matrix, as a share.

        That error is noise, whose spectrum is much the same at all widths: one of them is looked at.
        """
        own, metric = self._as_stored
        width = quantizations((own.shape[0], own.shape[1]), max(2, self.settings.corrected_bits))[0]
        assert self.simulation is not None
        left = own - self.simulation.matrix(own, width, metric).product()
        if not left.any():
            return np.ones(min(own.shape) + 1)
        left = left.T if self.weight.kind in TURNED else left
        of_matrix = self.simulation.shared
        return truncation_errors(decomposition_in(self.weight, left, of_matrix, settings=self.settings).values)

    def relative_error(self, product: Tensor) -> float:
        """Of another matrix in this one's place, in the metric."""
        size = self._squared_size
        return math.sqrt(self._squared(in_float64(self.matrix) - product) / size) if size > 0 else 0.0

    def relative_cost(self, quantization: Quantization) -> float:
        """The square of the relative error that quantizing the matrix as it is stored would make."""
        own, metric = self._as_stored
        assert self.simulation is not None
        size, fitted = self._squared_size, quantization.fitted(own.shape[1])
        return self.simulation.cost(own, fitted, metric, unit=self._scale) / size if size > 0 else 0.0

    @property
    def _as_stored(self) -> tuple[Tensor, Metric]:
        """The matrix in the metric of the simulation, or both transposed where a layer is stored so."""
        assert self.simulation is not None
        matrix, metric = in_float64(self.matrix), self.simulation.shared
        return (matrix.T, metric.transposed) if self.weight.kind in TURNED else (matrix, metric)

    @cached_property
    def _squared_size(self) -> float:
        return self._squared(in_float64(self.matrix))

    def _squared(self, change: Tensor) -> float:
        """The squared size of a change to the matrix, over that of a power of two near the matrix's own."""
        scaled = change / self._scale
        return float(scaled.square().sum()) if self.metric is None else self.metric.squared_size(scaled)

    @cached_property
    def _scale(self) -> float:
        return power_of_two(in_float64(self.matrix))

    def pair(self, form: PairForm, rank: int) -> MatrixPair:
        """The pair of a form at a rank, as `approximate` makes it."""
        # Forms without errors of their own have the truncated SVD in common, whose factors are as large as the matrix.
        known = self._pairs.setdefault(form.name if form.has_own_errors else "", {})
        if rank not in known:
            known[rank] = form.approximate(
                self.weight,
                self.matrix,
                rank,
                metric=self.metric,
                settings=self.settings,
                decomposition=None if form.has_own_errors else self.decomposition,
            )
        return known[rank]

    def errors(self, form: PairForm) -> Spectrum:
        """The errors of a form that has its own, as `errors_in` finds them."""
        if form.name not in self._errors:
            self._errors[form.name] = form.errors_in(self)
        return self._errors[form.name]


def decomposition_in(
    weight: DenseWeight, matrix: Tensor, metric: Metric | TiedMetric | None, *, settings: FactorizationSettings
) -> Decomposition:
    """The decomposition of a weight's `d_out x d_in` matrix in its metric, whichever kind that is."""
    if weight.groups > 1:
        assert metric is None or isinstance(metric, GroupedMetric)
        return decompose_grouped(matrix, weight.groups, metric)
    if isinstance(metric, TiedMetric):
        return decompose_tied(matrix, metric)
    return decompose(matrix, metric, Precision(loss=settings.float32_loss))
