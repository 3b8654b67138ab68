"""Progress of long commands: the steps ahead, and how far they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Called with the name of the step, how many parts of it are done, and how many there are.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Step:
    """A step that a command will go through, and what each of its parts is expected to cost, in one unit for all steps.

    One that is not `certain` may be left out; its cost is in the estimate until a later step begins. With a `number` it
    is one part of several of its name, and done when so many are: other steps may come between these.
    """

    name: str
    costs: tuple[float, ...]
    certain: bool = True
    number: int | None = None

    @property
    def cost(self) -> float:
        return sum(self.costs)

    def share(self, done: int, total: int) -> float:
        """How much of the cost is behind when `done` of `total` parts are; parts are alike where others were told."""
        if done >= total or self.number is not None:
            return 1.0
        if total == len(self.costs) and self.cost > 0:
            return sum(self.costs[:done]) / self.cost
        return done / total


def expect(progress: Progress | None, steps: Sequence[Step]) -> None:
    """Announce all steps, in their order, to a progress that estimates the whole; one step may come several times."""
    announce = getattr(progress, "expect", None)
    if announce is not None:
        announce(steps)


def takes_steps(progress: Progress | None) -> bool:
    """Whether a listener estimates the remaining time, so that it is worth estimating the cost of the steps."""
    return hasattr(progress, "expect")
