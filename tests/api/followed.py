"""A progress that notes what is announced, and which announced step each event belongs to."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.cli.pace import Pace
from compressor.progress import Step


class Followed:
    """Takes what is announced and told, and which announced step each event belongs to."""

    def __init__(self) -> None:
        self.steps: Sequence[Step] = ()
        self.seen: list[int | None] = []
        self._pace = Pace(lambda: 0.0)

    def expect(self, steps: Sequence[Step]) -> None:
        assert not self.steps, "announced once"
        self.steps = steps
        self._pace.expect(steps)

    def __call__(self, name: str, done: int, total: int) -> None:
        assert self.steps, "announced before the first step"
        self.seen.append(self._pace.note(name, done, total))

    @property
    def left_out(self) -> list[Step]:
        return [step for at, step in enumerate(self.steps) if at not in self.seen]

    def require_all_announced(self) -> None:
        """Every event was of an announced step; those that are certain came, with a cost, and the last of all came."""
        assert None not in self.seen
        assert not [step for step in self.left_out if step.certain]
        assert self.seen[-1] == len(self.steps) - 1 or not self.steps[-1].certain
        assert all(cost >= 0 for step in self.steps for cost in step.costs)
        assert all(step.cost > 0 for step in self.steps if step.name != "factorize")
