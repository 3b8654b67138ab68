"""Plans that are made in another process, with their factors in a journal that both processes see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from compressor.calibration.activation_cache import CachedFactors
from compressor.calibration.calibration import Calibration
from compressor.calibration.candidates import Candidate, Menu, Search
from compressor.calibration.holdout import holdout_loss
from compressor.calibration.replacements import Compensated, Replacements, with_statistics
from compressor.calibration.search import Allocation, ChosenFactors, PlannedModel, PlanRequest, Searched
from compressor.engine import Journal
from compressor.model import Model
from compressor.planning import (
    MeasuredLayer,
    Plan,
)


@dataclass(frozen=True)
class SentPlan:
    """A plan without refinement from another process, whose factors are in a journal that both processes see.

    `calibrated` is what the calibration is called whose factors they are, `errors` are those of the layers, and `moved`
    are the statistics of batch normalizations by place.
    """

    plan: Plan
    solution: str
    calibrated: str
    errors: Mapping[str, float]
    statistics: Mapping[str, tuple[str, Tensor]]
    moved: Mapping[str, Mapping[str, Tensor]]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class CalibratedRequest:
    """A request for a plan of a calibrated model, which may be planned for in another process."""

    subject: Model
    measured: Sequence[MeasuredLayer]
    request: PlanRequest
    calibration: Calibration
    weighted: Sequence[MeasuredLayer]

    def sent(self, journal: Journal) -> SentPlan:
        """The plan without refinement, its factors kept in the journal.

        Raises `BadInput` as `plan_unrefined`.
        """
        searched = self._allocation.searched(self.calibration, self.weighted, holdout_loss)
        found, planned = searched.found, searched.planned(searched.found)
        kept = self._factors(journal)
        for name, tensors in found.solved.factors.items():
            kept.put(name, tensors)
        assert found.exponent is not None
        # On the CPU: the accelerator of a worker is another one.
        return SentPlan(
            plan=planned.plan,
            solution=planned.solution,
            calibrated=found.calibration.name,
            errors={plan.name: plan.error for plan in planned.plan.layers if plan.rank is not None},
            statistics={name: (place, each.cpu()) for name, (place, each) in planned.statistics.items()},
            moved={
                place: {name: each.cpu() for name, each in named.items()} for place, named in found.solved.moved.items()
            },
            warnings=planned.warnings,
        )

    def keep_factors_alone(self, journal: Journal) -> None:
        """Remove what the factors were found by, which nobody goes on from."""
        journal.keep_only(_FOUND)

    def received(self, sent: SentPlan, journal: Journal) -> PlannedModel | None:
        """The plan as one of this process, its factors read from the journal; None where they are not there."""
        if not all(journal.part(_FOUND).holds(name) for name in sent.errors):
            return None
        calibration, result = replace(self.calibration, name=sent.calibrated), sent.plan.calibration
        assert result is not None
        factors, model = self._factors(journal), calibration.model
        for name in sent.errors:
            factors.take(name)
        moved = {place: with_statistics(model.get_submodule(place), each) for place, each in sent.moved.items()}
        low_rank = [plan for plan in sent.plan.layers if plan.rank is not None]
        found = Candidate(
            calibration,
            sent.plan.layers,
            result.exponent,
            result.predicted_loss,
            result.holdout_loss,
            Compensated(Replacements(calibration, low_rank, factors, moved=moved)),
            Menu(capped=result.capped),
            name=sent.solution,
        )
        allocation, settings = self._allocation, calibration.settings
        search = Search(self.calibration, self.weighted, allocation.layers, settings.exponents)
        return PlannedModel(
            sent.plan,
            ChosenFactors(self.subject.checkpoint, calibration.layers, factors, sent.errors),
            sent.statistics,
            self.weighted,
            sent.warnings,
            sent.solution,
            refine=Searched(allocation, search, found).refined if settings.refine else None,
        )

    @property
    def _allocation(self) -> Allocation:
        return Allocation.of(self.subject, self.measured, self.request, calibrated=True)

    def _factors(self, journal: Journal) -> CachedFactors:
        return CachedFactors(self.calibration.run.device, journal.part(_FOUND))


# The part of a journal that the factors of a sent plan are in.
_FOUND = "found"
