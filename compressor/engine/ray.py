"""Jobs on a Ray cluster of many machines."""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from compressor.engine.calls import carried_out, packed, unpacked
from compressor.errors import BadInput, CompressorError, first_line

T = TypeVar("T")
R = TypeVar("R")


class RayEngine:
    """Runs jobs on the nodes of a Ray cluster, which have this package and the files of the model at the same paths.

    Without an `address` it is the cluster that `RAY_ADDRESS` names or that runs on this machine, else one that starts
    here and ends with the engine. Jobs that are lost with a worker or a node are done again, up to `most_retries` times
    each. A job takes a processor, and `accelerators` of its node.
    """

    def __init__(self, address: str | None = None, *, accelerators: int = 0, most_retries: int = 3) -> None:
        self._ray = _ray()
        self._started = not self._ray.is_initialized()
        if self._started:
            try:
                _require_listener(address or "")
                self._ray.init(address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            except (OSError, ValueError, RuntimeError) as error:
                what = f"there is no Ray cluster to use{f' at {address}' if address else ''}: {first_line(error)}"
                raise BadInput(what, option="engine", remedy="start one, or leave the address out") from None
        self._call = self._ray.remote(carried_out).options(
            num_cpus=1, num_gpus=accelerators, max_retries=most_retries, name="compressor"
        )

    @property
    def here(self) -> int:
        """How many jobs run on this machine at a time, of which a cluster decides by itself: it is not counted on."""
        return 1

    def map(self, job: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """The result of the job for each item, in order.

        Raises:
            CompressorError: the cluster is lost, or a job with its retries.
        """
        pending = deque[Any]()
        try:
            for item in items:
                pending.append(self._call.remote(packed(job, item)))
                if len(pending) > self.workers:
                    yield unpacked(self._reply(pending.popleft()))
            while pending:
                yield unpacked(self._reply(pending.popleft()))
        finally:
            for each in pending:
                self._ray.cancel(each)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the cluster."""
        if self._started:
            self._ray.shutdown()

    @property
    def workers(self) -> int:
        """How many jobs run at a time, on the nodes that there are now."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def _reply(self, call: Any) -> bytes:
        try:
            reply: bytes = self._ray.get(call)
        except self._ray.exceptions.RayError as error:
            raise CompressorError(f"a job on the Ray cluster was lost: {first_line(error)}") from error
        return reply


def _require_listener(address: str) -> None:
    """Raise `OSError` where nothing listens at `HOST:PORT`, for which Ray itself waits for many minutes."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname is not None and parts.port is not None:
        socket.create_connection((parts.hostname, parts.port), timeout=10).close()


def _ray() -> Any:
    # Read when it is imported: it tells nobody how it is used.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError:
        remedy = "pip install 'compressor[ray]'"
        raise BadInput("`engine='ray'` needs Ray, which is not installed", option="engine", remedy=remedy) from None
    return ray
