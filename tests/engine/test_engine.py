"""Independent jobs: whatever runs them gives what a loop would, in order."""

from __future__ import annotations

import time
from _thread import LockType
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import pytest
import torch

from compressor.engine import Engine, InProcess
from compressor.errors import BadInput
from tests.engine.jobs import Gram, eigenvalues, root
from tests.engine.runs import without_data


def threads(_: int) -> int:
    return torch.get_num_threads()


def same_as_a_loop(engine: Engine) -> None:
    """Check that an engine gives the bytes of a loop, in order, for no, one, and many items."""
    for count in (0, 1, 7):
        asked = [Gram(seed) for seed in range(count)]
        found = list(engine.map(eigenvalues, asked))
        assert all(map(torch.equal, found, map(eigenvalues, asked)))
        assert len(found) == count


def passes_errors_on(engine: Engine) -> None:
    """Check that results before an error arrive, and then the error as it was raised."""
    results = engine.map(root, [4.0, 9.0, -1.0, 16.0])
    assert [next(results), next(results)] == [2.0, 3.0]
    with pytest.raises(BadInput, match="has no root; give") as caught:
        next(results)
    assert caught.value.option == "number"


@pytest.mark.parametrize("count", [1, 3])
def test_jobs_in_process_give_what_a_loop_does(count: int) -> None:
    same_as_a_loop(InProcess(count))
    passes_errors_on(InProcess(count))


def test_few_items_are_taken_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    results = InProcess(2).map(abs, items())
    assert next(results) == 0
    assert len(taken) <= 3
    assert list(results) == list(range(1, 20))


@dataclass(frozen=True)
class Sized:
    """An item whose job takes memory, and the bytes of all jobs under way."""

    nbytes: int
    taken: list[int]
    lock: LockType


def bytes_beside(asked: Sized) -> int:
    with asked.lock:
        asked.taken.append(asked.nbytes)
        together = sum(asked.taken)
    time.sleep(0.01)
    with asked.lock:
        asked.taken.remove(asked.nbytes)
    return together


def test_jobs_in_threads_stay_within_the_memory_they_may_have() -> None:
    taken, lock = list[int](), Lock()
    together = list(InProcess(4, memory=100).map(bytes_beside, [Sized(n, taken, lock) for n in (40, 60, 90, 30, 150)]))
    assert max(together[:4]) <= 100
    assert together[4] == 150


def test_jobs_in_threads_round_as_one_thread_does() -> None:
    asked = [Gram(seed, size=200) for seed in range(4)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = list(map(eigenvalues, asked))
    torch.set_num_threads(2)
    try:
        assert all(map(torch.equal, InProcess(2).map(eigenvalues, asked), expected))
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_a_run_writes_the_same_bytes_for_every_number_of_threads(tmp_path: Path) -> None:
    expected, before = without_data(tmp_path), torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert without_data(tmp_path) == expected
    finally:
        torch.set_num_threads(before)


def test_jobs_beside_each_other_have_a_thread_each_and_the_caller_keeps_its_own() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert all(set(InProcess(2).map(threads, range(4))) == {1} for _ in range(50))
        assert torch.get_num_threads() == 2
        assert set(InProcess(1).map(threads, range(4))) == {2}
    finally:
        torch.set_num_threads(before)
