"""What training wrote, as a pair of another form that is added to the share of its initial weights a layer still has.

`W = share * W_0 + D`: `W_0` is drawn again from its seed, or read from a checkpoint, when a model is loaded, and the
factors stand for D alone. They have the names and shapes of the other form, the bias stays `X.bias`, and at rank 0
there are none. The zero-size `X.weight` has the dense shape after its 0, so that nothing takes such a layer for a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from compressor.factorize import Decomposition, FactorizationSettings, FactorPair, Metric, PivotedPair, TiedMetric
from compressor.forms.channel import CHANNEL
from compressor.forms.kernels import dense_kernels
from compressor.forms.pair_form import Approximations, MatrixPair, PairForm, StoredPairShape, Values
from compressor.forms.pivoted import PIVOTED
from compressor.forms.plain import PLAIN
from compressor.forms.spatial import SPATIAL
from compressor.forms.weights import TRANSPOSED, Count, DenseWeight, StoredWeight, kind_of
from compressor.io import TensorInfo
from compressor.latency import Kernel, LayerUse, Size
from compressor.measure import Spectrum, singular_values
from compressor.network import Kind


class InitialLayer(nn.Module):
    """A dense layer whose weight is `start + product of its factors`, with the factors as its parameters.

    It computes what the dense layer computes with that weight, once it has been given the start. The dense weight
    itself is not kept. A model is loaded and fitted with such layers; to run, they become dense ones (`formed`).
    """

    weight: Tensor
    start: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, dense: nn.Module, rank: int, form: InitialForm) -> None:
        super().__init__()
        weight, bias = dense.weight, getattr(dense, "bias", None)
        assert isinstance(weight, Tensor)
        self.stands_for = StoredWeight(kind_of(dense), tuple(weight.shape))
        self.form, self.rank, self.trained = form, rank, weight.requires_grad
        self._shell = (_without_weight(dense),)  # in a tuple, so that it is no part of this module
        self.register_parameter("bias", bias if isinstance(bias, nn.Parameter) else None)
        self.register_buffer("weight", weight.new_empty((0, *weight.shape)))
        self.register_buffer("start", None, persistent=False)
        for info in form.infos(self.stands_for, rank, weight.dtype):
            owner, _, name = info.name.rpartition(".")
            tensor = torch.empty(info.shape, dtype=info.dtype, device=weight.device)
            if owner and owner not in self._modules:
                self.add_module(owner, nn.Module())
            holder = self.get_submodule(owner)
            if info.dtype.is_floating_point:
                holder.register_parameter(name, nn.Parameter(tensor, weight.requires_grad))
            else:
                holder.register_buffer(name, tensor)

    def fill_start(self, start: Tensor) -> None:
        """Give it `share * W_0`, as a `d_out x d_in` matrix."""
        self.start = start.to(self.weight.device, formed_in(self.weight.dtype))

    @property
    def factors(self) -> dict[str, Tensor]:
        """Its factors, by the names that they have in the form."""
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        return {name: own[name] for name in self.form.names_at(self.rank)}

    def formed_weight(self) -> Tensor:
        """The dense weight in its dtype, differentiable in the factors."""
        if self.start is None:
            raise RuntimeError("its initial weights are not known yet")
        return self.form.formed(self.stands_for, self.factors, self.start).to(self.weight.dtype)

    def formed(self) -> nn.Module:
        """The dense layer, with its hooks left to the caller."""
        dense = _without_weight(self._shell[0])
        dense.register_parameter("weight", nn.Parameter(self.formed_weight().detach(), self.trained))
        if self.bias is not None:
            dense.register_parameter("bias", self.bias)
        return dense.train(self.training)

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        own = {"weight": self.formed_weight()} | ({} if self.bias is None else {"bias": self.bias})
        return functional_call(self._shell[0], own, inputs, keywords)

    def extra_repr(self) -> str:
        return f"{self._shell[0].extra_repr()}, form={self.form.name}, rank={self.rank}"


def _without_weight(dense: nn.Module) -> nn.Module:
    """A copy of a layer without values, submodules, or hooks."""
    copied = dense.__new__(type(dense))
    for name, value in vars(dense).items():
        copied.__dict__[name] = type(value)() if "_hooks" in name else value
    copied.__dict__["_buffers"] = dict(dense._buffers)
    copied.__dict__["_parameters"] = {
        name: None if each is None else nn.Parameter(each.new_empty(each.shape, device="meta"), requires_grad=False)
        for name, each in dense._parameters.items()
    }
    return copied


def formed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a dense weight is computed from its start and its factors before it is rounded to its own."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, kw_only=True)
class InitialForm(PairForm):
    """The form of `pair` for what training wrote; at rank 0 nothing is stored."""

    pair: PairForm
    has_own_errors: bool = True
    from_initial: bool = True
    least_rank: int = 0
    bias: str = "bias"
    build: Callable[..., nn.Module] = InitialLayer
    classes: tuple[type[nn.Module], ...] = (InitialLayer,)

    @classmethod
    def of(cls, pair: PairForm) -> InitialForm:
        """The form whose factors are stored as those of a pair."""
        return cls(name=f"initial+{pair.name}", names=pair.names, pair=pair, truncates=pair.truncates)

    def layer(self, dense: nn.Module, rank: int) -> nn.Module:
        self.pair.layer(_without_weight(dense), max(rank, 1))  # refuses what it is not for
        return InitialLayer(dense, rank, self)

    @property
    def compared(self) -> PairForm:
        return InitialForm.of(self.pair.compared)

    def names_at(self, rank: int) -> tuple[str, ...]:
        return self.pair.names_at(rank) if rank >= self.pair.least_rank else ()

    def marker(self, weight: DenseWeight) -> tuple[int, ...]:
        return (0, *weight.tensor_shape)

    def takes(self, weight: DenseWeight) -> bool:
        return self.pair.takes(weight)

    def sides(self, weight: DenseWeight) -> tuple[int, int]:
        return self.pair.sides(weight)

    def parameters(self, weight: DenseWeight, rank: Count) -> Count:
        return self._counted(partial(self.pair.parameters, weight), rank)

    def numbers(self, weight: DenseWeight, rank: int) -> int:
        return self._counted(partial(self.pair.numbers, weight), rank)

    def nbytes(self, weight: DenseWeight, rank: Count, itemsize: int) -> Count:
        return self._counted(lambda rank: self.pair.nbytes(weight, rank, itemsize), rank)

    def _counted(self, stored: Callable[[Count], Count], rank: Count) -> Count:
        """What is stored from the smallest rank of the pair on; nothing below it."""
        least = self.pair.least_rank
        if isinstance(rank, int):
            return stored(rank) if rank >= least else 0
        return np.where(rank >= least, stored(np.maximum(rank, least)), 0)

    def kernels(self, weight: DenseWeight, rank: Size, use: LayerUse, *, itemsize: int) -> list[Kernel]:
        return dense_kernels(weight, use, itemsize=itemsize)

    def infos(self, weight: DenseWeight, rank: int, dtype: torch.dtype) -> list[TensorInfo]:
        return self.pair.infos(weight, rank, dtype) if rank >= self.pair.least_rank else []

    def known_tensors(self, weight: DenseWeight, rank: int) -> dict[str, Tensor]:
        return self.pair.known_tensors(weight, rank) if rank >= self.pair.least_rank else {}

    def recognizes(self, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return False  # a file says it, because it needs more than tensors

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
        if rank < self.pair.least_rank:
            return FactorPair(up=matrix.new_zeros(len(matrix), 0), down=matrix.new_zeros(0, matrix.shape[1]))
        return self.pair.approximate(
            weight, matrix, rank, metric=metric, settings=settings, decomposition=decomposition
        )

    def stored(self, weight: DenseWeight, pair: MatrixPair, dtype: torch.dtype) -> dict[str, Tensor]:
        empty = isinstance(pair, FactorPair) and pair.rank == 0
        return {} if empty else self.pair.stored(weight, pair, dtype)

    def product(self, weight: DenseWeight, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.pair.product(weight, tensors) if tensors else torch.zeros(weight.shape)

    def formed(self, weight: DenseWeight, tensors: Mapping[str, Tensor], start: Tensor) -> Tensor:
        """The dense weight in its shape, from stored tensors and a start, `d_out x d_in`, in whose dtype it is."""
        matrix = start
        if tensors:
            wide = {name: each.to(start.dtype) if each.is_floating_point() else each for name, each in tensors.items()}
            matrix = start + self.pair.product(weight, wide)
        return (matrix.T if weight.kind in TRANSPOSED else matrix).reshape(weight.tensor_shape)

    def defect(self, rank: int, read: Values) -> str | None:
        return self.pair.defect(rank, read)

    def merged(self, kind: Kind, tensors: Mapping[str, Tensor]) -> FactorPair | PivotedPair:
        return self.pair.merged(kind, tensors)

    def own_values(self, weight: Tensor) -> Spectrum:
        if self.pair.has_own_errors:
            return self.pair.own_values(weight)
        return singular_values(weight.flatten(1))

    def errors_in(self, approximations: Approximations) -> Spectrum:
        return approximations.errors(self.pair)


INITIAL = tuple(InitialForm.of(pair) for pair in (PLAIN, PIVOTED, CHANNEL, SPATIAL))
