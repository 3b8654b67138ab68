"""The modules of a compressed model, each made of its factors on disk when its segment runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from weakref import WeakValueDictionary

from torch import Tensor, nn

from compressor.calibration.activation_cache import CachedFactors
from compressor.calibration.calibration import Calibration
from compressor.engine import Journal, Units
from compressor.forms import InitialLayer
from compressor.lowrank import carry_over, filled_layer, head_of, start_matrix
from compressor.planning import LayerPlan


@dataclass(frozen=True)
class SentReplacements:
    """What another process makes the same modules of: their plans, where their factors are, and moved statistics."""

    planned: Sequence[LayerPlan]
    factors: Units
    moved: Mapping[str, Mapping[str, Tensor]]

    def opened(self, calibration: Calibration) -> Replacements:
        """The modules in the model of a calibration of this process."""
        factors = CachedFactors(calibration.run.device, Journal().beside(self.factors))
        for name in self.factors.names:
            factors.take(name)
        moved = {
            place: with_statistics(calibration.model.get_submodule(place), each) for place, each in self.moved.items()
        }
        return Replacements(calibration, self.planned, factors, moved=moved)


class Replacements(Mapping[str, nn.Module]):
    """The modules that take the places of others in a model, by these places.

    A low-rank layer is made when it is asked for, and again when it is asked for after nobody held it any more; one in
    an initial form has its start only as long. Batch normalizations that `moved` have other statistics.
    """

    def __init__(
        self,
        calibration: Calibration,
        planned: Sequence[LayerPlan],
        factors: Mapping[str, Mapping[str, Tensor]],
        *,
        moved: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.factors, self.moved = factors, {} if moved is None else moved
        # Not the calibration itself, whose moments are on disk as long as somebody holds it.
        self._model, self._layers = calibration.model, calibration.layers
        self._start = partial(start_matrix, initial=calibration.initial, device=calibration.run.device)
        # Several parameters of one module are factorized in the same low-rank module.
        self._plans: dict[str, list[LayerPlan]] = {}
        self._modules: dict[str, str] = {}
        self._embeddings: dict[str, str] = {}
        for plan in planned:
            layer = self._layers[plan.name]
            self._plans.setdefault(layer.module, []).append(plan)
            self._modules |= dict.fromkeys((layer.module, *layer.places), layer.module)
            if layer.head is not None:
                self._embeddings[layer.head] = layer.module
        self._alive: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()

    def sent(self, journal: Journal) -> SentReplacements:
        """What another process makes them of, their factors kept in a journal that it sees."""
        for name, tensors in self.factors.items():
            journal.write(name, tensors)
        planned = [plan for plans in self._plans.values() for plan in plans]
        moved = {place: statistics_of(module) for place, module in self.moved.items()}
        # On the CPU: the accelerator of a worker is another one.
        on_cpu = {place: {name: each.cpu() for name, each in named.items()} for place, named in moved.items()}
        return SentReplacements(planned, journal.units(), on_cpu)

    def with_factors(self, factors: Mapping[str, Mapping[str, Tensor]]) -> Replacements:
        """The same with other factors."""
        other = copy.copy(self)
        other.factors, other._alive = factors, WeakValueDictionary()
        return other

    def __getitem__(self, place: str) -> nn.Module:
        if place in self.moved:
            return self.moved[place]
        name = place if place in self._embeddings else self._modules[place]
        found = self._alive.get(name)
        if found is None:
            found = self._head(name) if name in self._embeddings else self._low_rank(name)
            self._alive[name] = found
        return found

    def _low_rank(self, name: str) -> nn.Module:
        made = self._model.get_submodule(name)
        for plan in self._plans[name]:
            layer = self._layers[plan.name]
            start = self._start(layer, plan.share)
            made = filled_layer(layer, plan, made, tensors=self.factors[plan.name], start=start)
        return made

    def _head(self, name: str) -> nn.Module:
        embedding, head = self[self._embeddings[name]], self._model.get_submodule(name)
        bias = head.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        if isinstance(embedding, InitialLayer):
            tied: nn.Module = _HeadOfInitial(embedding, bias)
        else:
            tied = head_of(embedding, bias)
        carry_over(head, tied.train(head.training))
        return tied

    def __iter__(self) -> Iterator[str]:
        return iter({**self._modules, **self._embeddings, **self.moved})

    def __len__(self) -> int:
        return len({**self._modules, **self._embeddings, **self.moved})


@dataclass(frozen=True)
class Compensated:
    """The modules that replace others, by their place in the model; their factors are on disk.

    Among the modules are batch normalizations with changed statistics.
    """

    modules: Replacements

    @property
    def factors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The tensors of the low-rank layers, by layer."""
        return self.modules.factors

    @property
    def moved(self) -> dict[str, dict[str, Tensor]]:
        """The changed means and variances of batch normalizations, by place."""
        return {
            place: {name: getattr(module, name) for name in STATISTICS} for place, module in self.modules.moved.items()
        }

    @property
    def statistics(self) -> dict[str, Tensor]:
        """The same by their names in the model."""
        return {f"{place}.{name}": each for place, named in self.moved.items() for name, each in named.items()}


class _HeadOfInitial(nn.Module):
    """An output head that is tied to an embedding in an initial form."""

    def __init__(self, embedding: InitialLayer, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.embedding, self.bias = embedding, bias

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.embedding.formed_weight(), self.bias)


STATISTICS = ("running_mean", "running_var")


def statistics_of(module: nn.Module) -> dict[str, Tensor]:
    """The mean and variance of a batch normalization."""
    return {name: getattr(module, name) for name in STATISTICS}


def with_statistics(dense: nn.Module, statistics: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a batch normalization with other statistics, in evaluation mode."""
    moved = deepcopy(dense).eval()
    for name, value in statistics.items():
        getattr(moved, name).copy_(value)
    return moved
