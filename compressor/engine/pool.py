"""Jobs in processes of this machine."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from threading import Thread
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from compressor.engine.calls import carried_out, packed, unpacked
from compressor.errors import CompressorError

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class _Call:
    content: bytes
    reply: Future[bytes]
    executor: ProcessPoolExecutor


class ProcessPool:
    """Runs jobs in worker processes of this machine, which start with the first job and end with the engine.

    When a worker dies, as it does where memory runs out, new ones do again what was under way, up to `most_deaths`
    times. Of several `accelerators` each worker takes the next.
    """

    def __init__(self, workers: int, *, accelerators: int = 0, most_deaths: int = 3) -> None:
        self._workers = workers
        self._accelerators, self._most_deaths, self._deaths = accelerators, most_deaths, 0
        self._executor: ProcessPoolExecutor | None = None

    @property
    def here(self) -> int:
        """How many jobs run on this machine at a time."""
        return self._workers

    @property
    def workers(self) -> int:
        """In how many processes jobs run."""
        return self._workers

    def map(self, job: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """The result of the job for each item, in order.

        Raises:
            CompressorError: too many workers died.
        """
        pending = deque[_Call]()
        try:
            for item in items:
                pending.append(self._called(packed(job, item)))
                if len(pending) > self._workers:
                    yield unpacked(self._next(pending))
            while pending:
                yield unpacked(self._next(pending))
        finally:
            for call in pending:
                call.reply.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers, after the jobs that they are at."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None

    def _next(self, pending: deque[_Call]) -> bytes:
        """The reply to the first call; calls that were lost with a worker are made again."""
        while isinstance(pending[0].reply.exception(), BrokenProcessPool):
            if self._executor is pending[0].executor:  # else it was replaced for other calls already
                self._deaths, self._executor = self._deaths + 1, None
            if self._deaths > self._most_deaths:
                raise CompressorError(
                    f"worker processes died {self._deaths} times, perhaps for lack of memory; use fewer of them, and in"
                    " a script of your own call this below `if __name__ == '__main__':`"
                )
            for place, call in enumerate(pending):
                if call.reply.exception() is not None:
                    pending[place] = self._called(call.content)
        return pending.popleft().reply.result()

    def _called(self, content: bytes) -> _Call:
        if self._executor is None:
            context = get_context("spawn")  # a forked process would share the threads' locks of this one
            arguments = (context.Value("i", 0), self._accelerators) if self._accelerators else ()
            self._executor = ProcessPoolExecutor(self._workers, context, _begin_worker, arguments)
        try:
            return _Call(content, self._executor.submit(carried_out, content), self._executor)
        except BrokenProcessPool as error:
            lost = Future[bytes]()
            lost.set_exception(error)
            return _Call(content, lost, self._executor)


def _begin_worker(started: Any = None, accelerators: int = 0) -> None:
    """Leave Ctrl-C to the parent, end when it does, and take the accelerator whose turn it is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    if accelerators:
        with started.get_lock():
            turn, started.value = started.value, started.value + 1
        torch.accelerator.set_device_index(turn % accelerators)


def _end_with_parent() -> None:
    """A killed parent closes no pipe that its workers wait at, as each of them holds the other end too."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
