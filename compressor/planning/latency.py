"""How long layers take in each workload, dense and in each form, and what they may take together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from compressor.forms import DENSE, factorized_shape, from_initial, least_rank, predicted_seconds
from compressor.latency import DeviceProfile, LayerUse, Workload
from compressor.network import Kind, Layer

# Seconds in each workload, or in each workload at each of many ranks.
Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Times:
    """Seconds of a layer in one forward, as it was and as it was chosen."""

    dense: float
    chosen: float

    @property
    def ratio(self) -> float:
        """The chosen form's seconds over those of the dense layer; 1 where the layer is not used."""
        return self.chosen / self.dense if self.dense > 0 else 1.0


@dataclass(frozen=True)
class WorkloadLatency:
    """What a layer takes in one forward of a workload, such as `decode, batch 1`.

    `predicted` are the seconds by the constants of the device, and `measured` those of the layer run by itself; None
    where it was not.
    """

    workload: str
    predicted: Times
    measured: Times | None = None


@dataclass(frozen=True, eq=False)
class LayerLatency:
    """How long a layer takes on a device: what is known of the device, and how each workload uses the layer.

    A workload that does not use the layer has None in `uses`. `measured` has factors for the predictions of forms that
    were measured to be slower than predicted, in each workload.
    """

    profile: DeviceProfile
    dtype: torch.dtype
    workloads: tuple[Workload, ...]
    uses: tuple[LayerUse | None, ...]
    measured: Mapping[str, Seconds] = field(default_factory=dict)
    # What was predicted, without factors, at every rank from the least on: plans ask for it again and again.
    _known: dict[tuple[Kind, tuple[int, ...], int, str], Seconds] = field(init=False, repr=False, default_factory=dict)

    def seconds(self, layer: Layer, form: str, ranks: npt.NDArray[np.int64]) -> Seconds:
        """Predicted seconds in each workload (rows) of a pair of each rank (columns), or of the dense layer."""
        as_dense = form == DENSE or from_initial(form)
        ranks, least = (np.ones_like(ranks), 1) if as_dense else (ranks, least_rank(form))
        key, largest = (layer.kind, layer.tensor_shape, layer.groups, form), int(ranks.max(initial=1))
        known = self._known.get(key)
        if known is None or least + known.shape[1] <= largest:
            most = 1 if form == DENSE else max(largest, min(factorized_shape(layer, form)))
            known = self._known[key] = self._predicted(layer, form, np.arange(least, most + 1))
        seconds = known[:, ranks - least]
        return seconds * self.measured[form][:, None] if form in self.measured else seconds

    def _predicted(self, layer: Layer, form: str, ranks: npt.NDArray[np.int64]) -> Seconds:
        return np.stack(
            [
                np.zeros(len(ranks))
                if use is None
                else np.broadcast_to(
                    predicted_seconds(self.profile, layer, form, rank=ranks, use=use, dtype=self.dtype), ranks.shape
                )
                for use in self.uses
            ]
        )

    def dense(self, layer: Layer) -> Seconds:
        """Predicted seconds of the dense layer in each workload."""
        dense: Seconds = self.seconds(layer, DENSE, np.zeros(1, dtype=np.int64))[:, 0]
        return dense

    def ratios(self, layer: Layer, form: str, ranks: npt.NDArray[np.int64]) -> Seconds:
        """The same as `seconds` of a pair, as ratios to the dense layer; 1 where a workload does not use it."""
        dense = self.dense(layer)[:, None]
        return np.divide(
            self.seconds(layer, form, ranks), dense, out=np.ones((len(dense), len(ranks))), where=dense > 0
        )

    def corrected(self, form: str, known: Sequence[WorkloadLatency]) -> LayerLatency:
        """The same with the ratio to dense that was measured of a form, in the workloads in which it was.

        What was predicted contains earlier corrections of the form, so that factors multiply.
        """
        factors = [
            1.0
            if each.measured is None or min(each.measured.dense, each.predicted.chosen, each.predicted.dense) <= 0
            else (each.measured.chosen / each.measured.dense) / (each.predicted.chosen / each.predicted.dense)
            for each in known
        ]
        return replace(self, measured={**self.measured, form: np.array(factors) * self.measured.get(form, 1.0)})

    def of(self, layer: Layer, form: str, rank: int) -> tuple[WorkloadLatency, ...]:
        """What is predicted of the form and rank that were chosen."""
        chosen = self.seconds(layer, form, np.array([rank]))[:, 0]
        return tuple(
            WorkloadLatency(workload.name, Times(float(before), float(after)))
            for workload, before, after in zip(self.workloads, self.dense(layer), chosen, strict=True)
        )


@dataclass(frozen=True)
class TimeLimit:
    """The seconds that a model may take in each workload, and what of them its measured layers do not take.

    Attributes:
        ratio: Seconds of the whole model, as a ratio to the dense one, that are allowed.
        rest: Seconds in each workload of all but the measured layers; zeros where only these count.
    """

    ratio: float
    rest: tuple[float, ...]

    def allowed(self, dense: Seconds) -> Seconds:
        """Seconds that the layers may take, by those of all dense layers."""
        rest = np.array(self.rest)
        return np.asarray(self.ratio * (rest + dense) - rest)

    def ratios(self, dense: Seconds, chosen: Seconds) -> Seconds:
        """Predicted seconds of the whole model in each workload, as ratios to the dense one."""
        rest = np.array(self.rest)
        return np.asarray((rest + chosen) / np.maximum(rest + dense, np.finfo(np.float64).tiny))

    def least_ratio(self, dense: Seconds, least: Seconds) -> float:
        """The smallest ratio that could be asked for, by the least seconds of all layers in each workload."""
        return float(self.ratios(dense, least).max())
