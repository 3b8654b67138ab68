"""A calibration that other processes go on with: they read what it found from the folder of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import nn

from compressor.calibration.activation_cache import ActivationCache
from compressor.calibration.calibration import Calibration, frozen
from compressor.calibration.examples import CalibrationData
from compressor.calibration.prepare import prepared
from compressor.calibration.settings import CalibrationSettings
from compressor.data import Batch
from compressor.engine import Journal, Run, Units
from compressor.initial import InitialWeights
from compressor.model import evaluation_mode
from compressor.network import Layer


@dataclass(frozen=True)
class SharedCalibration:
    """What another process makes the same calibration of, with the model's files.

    `outputs` are those of the segments of the dense model, and in `moments` are metrics and decompositions.
    """

    layers: tuple[Layer, ...]
    data: CalibrationData
    first: Batch
    settings: CalibrationSettings
    device: torch.device
    seed: int
    uses: Mapping[str, float]
    outputs: Units
    moments: Units
    initial: InitialWeights | None

    @classmethod
    def of(cls, calibration: Calibration) -> Self:
        """That of the dense model, as far as it has come."""
        outputs, moments = calibration.cache.journal, calibration.cache.moments
        return cls(
            layers=tuple(calibration.layers.values()),
            data=calibration.data.bare(),
            first=calibration.first.bare(),
            settings=calibration.settings,
            device=calibration.run.job_device,
            seed=calibration.run.seed,
            uses=dict(calibration.uses),
            outputs=outputs.units(),
            moments=moments.units(),
            initial=calibration.initial,
        )

    @property
    def is_seen(self) -> bool:
        """Whether this process sees the files of the run."""
        return self.outputs.are_seen and self.moments.are_seen

    def opened(self, model: nn.Module, journal: Journal) -> Calibration:
        """The calibration in this process, which keeps in a journal what follows from it."""
        run = Run(self.device, self.seed, journal=journal)
        with evaluation_mode(run.device, model), frozen(model):
            bare = prepared(model, self.layers, self.data, first=self.first, run=run, settings=self.settings)
        outputs, moments = (journal.part(kind).beside(getattr(self, kind)) for kind in ("outputs", "moments"))
        cache = ActivationCache(run.device, outputs, moments)
        metrics = cache.metrics()
        for name in self.uses:
            metrics.take(name)
        return replace(
            bare,
            cache=cache,
            decompositions=cache.decompositions(),
            metrics=metrics,
            uses=self.uses,
            initial=self.initial,
        )
