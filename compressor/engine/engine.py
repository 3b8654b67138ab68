"""What runs independent jobs, and the one that runs them here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Engine(Protocol):
    """Runs independent jobs, and gives their results in the order of the items.

    A job is a function of a module that takes one item; both may be pickled and go to another process. Items are taken
    from their iterator as workers come free, so that few are held at a time. Leaving the context of the engine ends its
    workers. `here` is how many jobs at most run on this machine at a time, and `workers` in how many processes.
    """

    @property
    def here(self) -> int: ...

    @property
    def workers(self) -> int: ...

    def map(self, job: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """The result of the job for each item, in order; what a job raises is raised here."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class InProcess:
    """Runs jobs in this process, `threads` of them at a time.

    Jobs beside each other have one thread of PyTorch each, as in the workers of the other engines. Those whose items
    have `nbytes`, what the job takes in memory, are beside each other only while they take at most `memory` together.
    """

    threads: int = 1
    memory: int | None = None

    @property
    def here(self) -> int:
        return self.threads

    @property
    def workers(self) -> int:
        """This process alone."""
        return 1

    def map(self, job: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """The result of the job for each item, in order."""
        return map(job, items) if self.threads == 1 else self._in_threads(job, items)

    def _in_threads(self, job: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        before = torch.get_num_threads()
        pending = deque[tuple[Future[R], int]]()
        try:
            with ThreadPoolExecutor(self.threads, initializer=_have_one_thread) as executor:
                try:
                    for item in items:
                        size = int(getattr(item, "nbytes", 0))
                        while pending and not self._fits(size + sum(held for _, held in pending)):
                            yield pending.popleft()[0].result()
                        pending.append((executor.submit(job, item), size))
                        if len(pending) > self.threads:
                            yield pending.popleft()[0].result()
                    while pending:
                        yield pending.popleft()[0].result()
                finally:
                    for future, _ in pending:
                        future.cancel()
        finally:
            torch.set_num_threads(before)  # what a thread sets, those that begin after it have too

    def _fits(self, size: int) -> bool:
        return self.memory is None or size <= self.memory

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing was opened."""


def _have_one_thread() -> None:
    """Give this thread one of PyTorch's; asked first, because the first question sets the number of all."""
    torch.get_num_threads()
    torch.set_num_threads(1)
