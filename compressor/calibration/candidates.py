"""Allocations of a budget that are compared on the holdout: the search for the one that loses least."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import nn

from compressor.calibration.calibrate import recalibrate
from compressor.calibration.calibration import Calibration
from compressor.calibration.compensation import (
    Compensated,
    compensate,
    only_compared,
    uncompensated,
)
from compressor.calibration.holdout import holdout_loss
from compressor.calibration.refinement import refine
from compressor.calibration.weighted_layers import weighted_layers
from compressor.errors import BadInput
from compressor.forms import from_initial
from compressor.measure import Spectrum
from compressor.planning import (
    Budget,
    LayerPlan,
    MeasuredLayer,
    predicted_loss,
)

logger = logging.getLogger(__name__)

# Chooses a rank and a form for every layer within a budget, by an exponent; raises `BadInput` if it cannot be met.
Allocate = Callable[[Sequence[MeasuredLayer], Budget, float], tuple[LayerPlan, ...]]

# The loss of a calibrated model with other modules in their places, by which candidates are compared.
Judge = Callable[[Calibration, Mapping[str, nn.Module]], float]


@dataclass(frozen=True)
class Candidate:
    """Ranks, the layers that they give, and their loss: predicted to second order, and on the holdout.

    The solution of an allocation that is only compared is not kept: on disk it is as large as the compressed model.
    `name` is that of the solution in the journal.
    """

    calibration: Calibration
    layers: tuple[LayerPlan, ...]
    exponent: float | None
    predicted: float
    loss: float
    solution: Compensated | None = None
    capped: bool = False
    refined: bool = False
    name: str = ""

    @property
    def solved(self) -> Compensated:
        """The solution, of a candidate that is not only compared."""
        assert self.solution is not None
        return self.solution

    @property
    def kept(self) -> float:
        """Share of the parameters that are kept."""
        return sum(p.parameters for p in self.layers) / sum(p.dense_parameters for p in self.layers)

    @property
    def as_predicted(self) -> bool:
        """Whether the second-order estimate can be trusted."""
        factor = self.calibration.settings.trust_factor
        return self.predicted / factor <= self.loss <= self.predicted * factor


@dataclass(frozen=True)
class Search:
    """A search for the ranks and factors with the least holdout loss within a budget.

    `weighted` are the layers in the metric of the loss. `caps` are the ranks that the window rule allows, by layer;
    `judge` computes the loss of a candidate.
    """

    calibration: Calibration
    weighted: Sequence[MeasuredLayer]
    allocate: Allocate
    exponents: Sequence[float]
    caps: Mapping[str, int] = field(default_factory=dict)
    rounds: int = 0
    judge: Judge = holdout_loss

    def find(self, budget: Budget) -> Candidate:
        """Find the best candidate, compensated where that lowers its loss.

        Where the second-order estimate of what truncation alone costs cannot be trusted, there are rounds of
        recalibration before: the moments are taken again at a model that is compressed half as far.
        """
        if not self._compares:
            return self._only(budget)
        best = self.best(budget)
        for _ in range(0 if best.as_predicted else self.rounds):
            try:
                best = min(best, self._halfway(best).best(budget), key=_loss)
            except BadInput as error:  # the candidate so far remains the best
                logger.info("no recalibration: %s", error)
        best = replace(self, calibration=best.calibration)._compensated(best)
        # What follows needs none of the moments that were taken again, and they go with their calibration.
        return replace(best, calibration=replace(self.calibration, name=best.calibration.name))

    def _halfway(self, found: Candidate) -> Search:
        """The search by the moments at a model that is compressed half as far: by the square root of the share kept."""
        assert found.exponent is not None
        layers = self.allocate(self.weighted, Budget("keep", math.sqrt(found.kept)), found.exponent)
        again = recalibrate(self.calibration, only_compared(self.calibration, layers), _name(layers))
        return replace(self, weighted=weighted_layers(self.weighted, again), calibration=again)

    def refined(self, found: Candidate) -> Candidate:
        """The candidate with refined factors, if the settings say so and the loss falls."""
        if not self.calibration.settings.refine:
            return found
        name = f"{found.calibration.name}/refined/{_name(found.layers)}"
        refined = self._solved(found, refine(found.calibration, found.solved, name), name)
        return min(found, replace(refined, refined=True), key=_loss)

    def best(self, budget: Budget) -> Candidate:
        """The allocation with the least loss, its layers truncated as they are.

        Besides those by each exponent, the best of them is tried under the window rule's caps, and without initial
        weights, where that changes it.
        """
        candidates = []
        for exponent in self.exponents:
            candidates.append(self._measured(self.allocate(self.weighted, budget, exponent), exponent))
            self.calibration.run.report("allocate", len(candidates), len(self.exponents))
        found = min(candidates, key=_loss)
        if self.caps:
            capped = [replace(m, rank_cap=self.caps.get(m.layer.name)) for m in self.weighted]
            found = min(found, self._tried(capped, found, budget, capped=True), key=_loss)
        if any(m.start is not None for m in self.weighted):
            found = min(found, self._tried(_without_starts(self.weighted), found, budget), key=_loss)
        return found

    def _only(self, budget: Budget) -> Candidate:
        """The only candidate there is."""
        [exponent] = self.exponents
        found = self._candidate(self.allocate(self.weighted, budget, exponent), exponent, math.inf)
        self.calibration.run.report("allocate", 1, 1)
        return self._solved(found, uncompensated(self.calibration, found.layers), self._truncated_name(found))

    def _compensated(self, found: Candidate) -> Candidate:
        """The candidate with its layers refitted, if the settings say so and the loss falls."""
        if self.calibration.settings.compensate:
            name = f"{self.calibration.name}/compensated/{_name(found.layers)}"
            compensated = self._solved(found, compensate(self.calibration, found.layers, name), name)
            allocation = f"{found.exponent}, capped" if found.capped else f"{found.exponent}"
            logger.info("allocation exponent %s: %.5f, compensated %.5f", allocation, found.loss, compensated.loss)
            if compensated.loss < found.loss:
                return compensated
        solution = uncompensated(self.calibration, found.layers)
        return replace(found, solution=solution, name=self._truncated_name(found))

    @property
    def _compares(self) -> bool:
        """Whether there is more than one candidate: else the only one is made once, as it will be stored."""
        more = len(self.exponents) > 1 or bool(self.caps) or any(m.start is not None for m in self.weighted)
        return more or self.calibration.settings.compensate

    def _truncated_name(self, found: Candidate) -> str:
        return f"{self.calibration.name}/truncated/{_name(found.layers)}"

    def _solved(self, found: Candidate, solution: Compensated, name: str) -> Candidate:
        judged = partial(self.judge, found.calibration, solution.modules)
        loss = found.calibration.cache.journal.value(f"{name}/loss", judged)
        return replace(found, solution=solution, loss=loss, name=name)

    def _tried(
        self, measured: Sequence[MeasuredLayer], found: Candidate, budget: Budget, *, capped: bool = False
    ) -> Candidate:
        """The allocation by the same exponent with fewer choices; `found` itself where they change nothing."""
        assert found.exponent is not None
        try:
            layers = self.allocate(measured, budget, found.exponent)
        except BadInput:
            # Whether ranks are found for a size in bytes depends on the file's header, and so a little on the ranks.
            return found
        if layers == found.layers:
            return found
        return replace(self._measured(layers, found.exponent), capped=capped)

    def _measured(self, layers: tuple[LayerPlan, ...], exponent: float) -> Candidate:
        def judged() -> float:
            return self.judge(self.calibration, only_compared(self.calibration, layers))

        name = f"{self.calibration.name}/loss/{_name(layers)}"
        loss = self.calibration.cache.journal.value(name, judged)
        return self._candidate(layers, exponent, loss)

    def _candidate(self, layers: tuple[LayerPlan, ...], exponent: float, loss: float) -> Candidate:
        return Candidate(self.calibration, layers, exponent, predicted_loss(self.weighted, layers), loss)


def _without_starts(weighted: Sequence[MeasuredLayer]) -> list[MeasuredLayer]:
    """The layers without the forms that begin at initial weights."""

    def of_matrix(values: Mapping[str, Spectrum]) -> dict[str, Spectrum]:
        return {form: each for form, each in values.items() if not from_initial(form)}

    return [
        replace(m, start=None, own_values=of_matrix(m.own_values), own_errors=of_matrix(m.own_errors)) for m in weighted
    ]


def _name(layers: Sequence[LayerPlan]) -> str:
    """The name of a plan in the journal: a digest of its ranks, forms, and shares of the initial weights."""
    chosen = json.dumps([[layer.name, layer.form, layer.rank, layer.share] for layer in layers])
    return hashlib.sha256(chosen.encode()).hexdigest()[:16]


def _loss(candidate: Candidate) -> float:
    return candidate.loss
