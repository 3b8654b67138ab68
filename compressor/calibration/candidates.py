"""Allocations of a budget that are compared on the holdout: the search for the one that loses least."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

from torch import nn

from compressor.calibration.calibrate import recalibrate
from compressor.calibration.calibration import Calibration
from compressor.calibration.compensation import compensate
from compressor.calibration.end_to_end import fits_end_to_end, refine_end_to_end
from compressor.calibration.holdout import holdout_loss
from compressor.calibration.refinement import refine
from compressor.calibration.replacements import Compensated
from compressor.calibration.truncation import only_compared, uncompensated
from compressor.calibration.weighted_layers import weighted_layers
from compressor.errors import BadInput
from compressor.forms import from_initial, quantization_of
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
class Menu:
    """The choices that an allocation is made of: whether some are quantized, and whether some begin at initial weights.

    The predicted loss of truncation is multiplied by the `penalty`; an infinite one leaves no choice that truncates.
    Where `bits` are given, these are the only ones in which a layer may be quantized. `capped` are ranks by the window
    rule.
    """

    penalty: float = 1.0
    quantized: bool = True
    bits: int | None = None
    started: bool = True
    capped: bool = False

    def layers(self, weighted: Sequence[MeasuredLayer], caps: Mapping[str, int]) -> list[MeasuredLayer]:
        """The layers with these choices alone."""
        return [
            replace(
                m,
                own_values={form: each for form, each in m.own_values.items() if self._has(form)},
                own_errors={form: each for form, each in m.own_errors.items() if self._has(form)},
                start=m.start if self.started else None,
                rank_cap=caps.get(m.layer.name) if self.capped else m.rank_cap,
                truncation_penalty=self.penalty,
            )
            for m in weighted
        ]

    def _has(self, form: str) -> bool:
        quantization = quantization_of(form)
        allowed = quantization is None or (self.quantized and self.bits in (None, quantization.bits))
        return allowed and (self.started or not from_initial(form))


ALL = Menu()


@dataclass(frozen=True)
class Candidate:
    """Ranks, the layers that they give, and their loss: predicted to second order, and on the holdout.

    The solution of an allocation that is only compared is not kept: on disk it is as large as the compressed model.
    `name` is that of the solution in the journal. `close` are solved ones whose loss is hardly larger.
    """

    calibration: Calibration
    layers: tuple[LayerPlan, ...]
    exponent: float | None
    predicted: float
    loss: float
    solution: Compensated | None = None
    menu: Menu = ALL
    refined: bool = False
    name: str = ""
    close: tuple[Candidate, ...] = ()

    @property
    def quantizes(self) -> bool:
        """Whether some layer is quantized."""
        return any(plan.bits < 16 for plan in self.layers)

    @property
    def truncates(self) -> bool:
        """Whether some layer is truncated."""
        return any(plan.truncated_to is not None for plan in self.layers)

    def is_like(self, other: Candidate) -> bool:
        """Whether both are mixtures of bits and ranks, bits alone, one width alone, or ranks alone."""
        same = (self.quantizes, self.truncates) == (other.quantizes, other.truncates)
        return same and (self.menu.bits is None) == (other.menu.bits is None)

    @property
    def solved(self) -> Compensated:
        """The solution, of a candidate that is not only compared."""
        assert self.solution is not None
        return self.solution

    @property
    def kept(self) -> float:
        """Share of the parameters that are kept."""
        return sum(p.parameters for p in self.layers) / sum(p.parameters_before for p in self.layers)

    @property
    def as_predicted(self) -> bool:
        """Whether the second-order estimate can be trusted."""
        factor = self.calibration.settings.trust_factor
        return self.predicted / factor <= self.loss <= self.predicted * factor


@dataclass(frozen=True)
class Search:
    """A search for the ranks and factors with the least holdout loss within a budget.

    `weighted` are the layers in the metric of the loss. `caps` are the ranks that the window rule allows, by layer;
    `judge` computes the loss of a candidate. With quantized choices there are, beside the allocation of all, those by
    `penalties` of truncation, bits alone, one width alone, and ranks alone, than which the one that is found is never
    worse, as they would be stored. Without penalties all choices are tried as they are.
    """

    calibration: Calibration
    weighted: Sequence[MeasuredLayer]
    allocate: Allocate
    exponents: Sequence[float]
    penalties: Sequence[float] = ()
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
        tried = self.tried(budget)
        for _ in range(0 if tried[0].as_predicted else self.rounds):
            try:
                tried = sorted([*tried, *self._halfway(tried[0]).tried(budget)], key=_loss)
            except BadInput as error:  # the candidates so far remain the best
                logger.debug("no recalibration: %s", error)
        settings = self.calibration.settings
        solved = [
            replace(self, calibration=each.calibration)._compensated(each)
            for each in _of_each_kind(tried, settings.compensated_within)
        ]
        # What follows needs none of the moments that were taken again, and they go with their calibration.
        solved = [replace(each, calibration=replace(self.calibration, name=each.calibration.name)) for each in solved]
        best = min(solved, key=_loss)
        close = (each for each in solved if each is not best and each.loss <= settings.refined_within * best.loss)
        return replace(best, close=tuple(close))

    def _halfway(self, found: Candidate) -> Search:
        """The search by the moments at a model that is compressed half as far: by the square root of the share kept."""
        layers = self._allocated(found.menu, Budget("keep", math.sqrt(found.kept)), _exponent(found))
        again = recalibrate(self.calibration, only_compared(self.calibration, layers), _name(layers))
        return replace(self, weighted=weighted_layers(self.weighted, again), calibration=again)

    def refined(self, found: Candidate) -> Candidate:
        """The candidate or one that is close to it, with refined factors, if the settings say so and the loss falls."""
        if not self.calibration.settings.refine:
            return found
        candidates = [found, *found.close]
        end_to_end = fits_end_to_end(self.calibration)
        if end_to_end:
            # Which takes longer: the best of the quantized ones, and the closest of their rivals.
            quantized = sorted((each for each in candidates if each.quantizes), key=_loss)
            candidates = [each for each in candidates if each not in quantized[2:]]
        best = min((self._refined(each, end_to_end=end_to_end) for each in candidates), key=_loss)
        return replace(best, close=())

    def _refined(self, found: Candidate, *, end_to_end: bool) -> Candidate:
        if end_to_end and found.quantizes:
            name = f"{found.calibration.name}/refined end to end/{_name(found.layers)}"
            fitted = self._solved(found, refine_end_to_end(found.calibration, found.solved, name), name)
            logger.debug("refined end to end: %.5f instead of %.5f", fitted.loss, found.loss)
            if fitted.loss < found.loss:
                return replace(fitted, refined=True)
        name = f"{found.calibration.name}/refined/{_name(found.layers)}"
        refined = self._solved(found, refine(found.calibration, found.solved, name), name)
        logger.debug("refined: %.5f instead of %.5f", refined.loss, found.loss)
        return min(found, replace(refined, refined=True), key=_loss)

    def tried(self, budget: Budget) -> list[Candidate]:
        """Allocations, their layers truncated and quantized as they are, from the least loss on.

        Beside those by each exponent are tried, where they are others, those of its rivals by the best of them; and the
        best of all under the window rule's caps, and without initial weights.
        """
        candidates: list[Candidate] = []
        total = len(self.exponents) * (2 if self._quantizes else 1)

        def add(menu: Menu, exponent: float) -> None:
            layers = self._allocated(menu, budget, exponent)
            same = next((each for each in candidates if each.layers == layers), None)
            candidates.append(same or self._measured(menu, layers, exponent))
            self.calibration.run.report("allocate", min(len(candidates), total), total)

        def add_fewer(menu: Menu, exponent: float) -> None:
            # Fewer choices do not meet every budget. And whether ranks are found for a size in bytes depends on the
            # file's header, and so a little on the ranks.
            with suppress(BadInput):
                add(menu, exponent)

        for exponent in self.exponents:
            add(self._menu, exponent)
        found = min(candidates, key=_loss)
        for menu, exponent in self._rivals(found, budget):
            add_fewer(menu, exponent)
        found = min(candidates, key=_loss)
        if self.caps and math.isfinite(found.menu.penalty):
            add_fewer(replace(found.menu, capped=True), _exponent(found))
        found = min(candidates, key=_loss)
        if any(m.start is not None and not m.only_written for m in self.weighted):
            add_fewer(replace(found.menu, started=False, capped=False), _exponent(found))
        return sorted(candidates, key=_loss)

    @property
    def _menu(self) -> Menu:
        return Menu(self.penalties[0] if self._quantizes else 1.0)

    @property
    def _quantizes(self) -> bool:
        return bool(self.penalties) and any(quantization_of(form) for m in self.weighted for form in m.own_errors)

    def _rivals(self, found: Candidate, budget: Budget) -> list[tuple[Menu, float]]:
        """What the best allocation of all choices is to be compared with: each a menu and an exponent.

        Other penalties, bits alone, one width alone, and ranks alone by every exponent, as where nothing is quantized.
        Where the width or the error of every layer is asked for there is none: without bits these would be larger.
        """
        if not self._quantizes or budget.kind in ("bits", "tolerance") or math.isinf(self.penalties[0]):
            return []
        exponent = _exponent(found)
        menus = [Menu(penalty) for penalty in (*self.penalties[1:], math.inf)]
        rivals = [(menu, exponent) for menu in (*menus, *self._one_width(budget, exponent))]
        return rivals + [(Menu(quantized=False), each) for each in self.exponents]

    def _one_width(self, budget: Budget, exponent: float) -> list[Menu]:
        """Bits alone in the most that all layers may have; what a budget leaves goes to some of them."""
        known = {quantization_of(form) for m in self.weighted for form in m.own_errors}
        for bits in sorted({each.bits for each in known if each is not None}, reverse=True):
            menu = Menu(math.inf, bits=bits)
            with suppress(BadInput):
                self._allocated(menu, budget, exponent)
                return [menu]
        return []

    def _only(self, budget: Budget) -> Candidate:
        """The only candidate there is."""
        [exponent] = self.exponents
        found = self._candidate(ALL, self.allocate(self.weighted, budget, exponent), exponent, loss=math.inf)
        self.calibration.run.report("allocate", 1, 1)
        return self._solved(found, uncompensated(self.calibration, found.layers), self._truncated_name(found))

    def _compensated(self, found: Candidate) -> Candidate:
        """The candidate with its layers refitted, if the settings say so and the loss falls."""
        if any(quantization_of(plan.form) for plan in found.layers):
            # It was compared as quantized in one pass, and loses less.
            alone = uncompensated(self.calibration, found.layers)
            found = self._solved(found, alone, self._truncated_name(found))
        if self.calibration.settings.compensate:
            name = f"{self.calibration.name}/compensated/{_name(found.layers)}"
            compensated = self._solved(found, compensate(self.calibration, found.layers, name), name)
            allocation = f"{found.exponent}, capped" if found.menu.capped else f"{found.exponent}"
            logger.debug("allocation exponent %s: %.5f, compensated %.5f", allocation, found.loss, compensated.loss)
            if compensated.loss < found.loss:
                return compensated
        solution = found.solution or uncompensated(self.calibration, found.layers)
        return replace(found, solution=solution, name=self._truncated_name(found))

    @property
    def _compares(self) -> bool:
        """Whether there is more than one candidate: else the only one is made once, as it will be stored."""
        more = len(self.exponents) > 1 or bool(self.caps) or any(m.start is not None for m in self.weighted)
        return more or self._quantizes or self.calibration.settings.compensate

    def _truncated_name(self, found: Candidate) -> str:
        return f"{self.calibration.name}/truncated/{_name(found.layers)}"

    def _solved(self, found: Candidate, solution: Compensated, name: str) -> Candidate:
        judged = partial(self.judge, found.calibration, solution.modules)
        loss = found.calibration.cache.journal.value(f"{name}/loss", judged)
        return replace(found, solution=solution, loss=loss, name=name)

    def _allocated(self, menu: Menu, budget: Budget, exponent: float) -> tuple[LayerPlan, ...]:
        return self.allocate(menu.layers(self.weighted, self.caps), budget, exponent)

    def _measured(self, menu: Menu, layers: tuple[LayerPlan, ...], exponent: float) -> Candidate:
        def judged() -> float:
            return self.judge(self.calibration, only_compared(self.calibration, layers))

        name = f"{self.calibration.name}/loss/{_name(layers)}"
        loss = self.calibration.cache.journal.value(name, judged)
        return self._candidate(menu, layers, exponent, loss=loss)

    def _candidate(self, menu: Menu, layers: tuple[LayerPlan, ...], exponent: float, *, loss: float) -> Candidate:
        predicted = predicted_loss(self.weighted, layers)
        logger.debug("%s, exponent %s: predicted %.5f, %.5f", menu, exponent, predicted, loss)
        return Candidate(self.calibration, layers, exponent, predicted, loss, menu=menu)


def _name(layers: Sequence[LayerPlan]) -> str:
    """The name of a plan in the journal: a digest of its ranks, forms, and shares of the initial weights."""
    chosen = json.dumps([[layer.name, layer.form, layer.rank, layer.share] for layer in layers])
    return hashlib.sha256(chosen.encode()).hexdigest()[:16]


def _loss(candidate: Candidate) -> float:
    return candidate.loss


def _exponent(candidate: Candidate) -> float:
    assert candidate.exponent is not None, "only a given plan has none"
    return candidate.exponent


def _of_each_kind(tried: Sequence[Candidate], within: float) -> list[Candidate]:
    """Of candidates, from the least loss on, the first, and the first of each other kind that loses so many times as
    much at most."""
    best, *others = tried
    found = [best]
    for each in others:
        if each.loss <= within * best.loss and not any(each.is_like(other) for other in found):
            found.append(each)
    return found
