"""Jobs in worker processes, some of which die."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from compressor.engine import ProcessPool
from compressor.errors import CompressorError
from tests.engine.jobs import die, die_once, name_after, own_number
from tests.engine.runs import calibrated, without_data
from tests.engine.test_engine import passes_errors_on, same_as_a_loop

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(2, most_deaths=2) as pool:
        yield pool


def test_jobs_in_processes_give_what_a_loop_does(pool: ProcessPool) -> None:
    same_as_a_loop(pool)
    passes_errors_on(pool)
    assert os.getpid() not in set(pool.map(own_number, range(4)))


def test_what_a_dead_worker_was_at_is_done_again(pool: ProcessPool, tmp_path: Path) -> None:
    names = [f"{number}" for number in range(5)]
    for name in names:
        if name != "2":
            (tmp_path / name).touch()
    assert list(pool.map(die_once, (tmp_path / name for name in names))) == names


def test_a_death_that_jobs_inside_others_notice_first_counts_once(tmp_path: Path) -> None:
    with ProcessPool(2, most_deaths=1) as pool:

        def marks() -> Iterator[Path]:
            yield tmp_path / "before"
            assert list(pool.map(die_once, [tmp_path / "inside"])) == ["inside"]
            yield tmp_path / "after"

        assert list(pool.map(name_after, marks())) == ["before", "after"]


def test_a_run_in_processes_writes_the_bytes_of_one_in_process(tmp_path: Path) -> None:
    expected = without_data(tmp_path)
    assert without_data(tmp_path, "processes:2") == expected


def test_a_calibrated_run_in_processes_writes_the_bytes_of_one_in_process(tmp_path: Path) -> None:
    expected = calibrated(tmp_path)
    assert calibrated(tmp_path, "processes:1") == expected


def test_workers_that_die_again_and_again_are_an_error_of_one_line() -> None:
    with ProcessPool(1, most_deaths=1) as pool, pytest.raises(CompressorError, match="worker processes died 2 times"):
        list(pool.map(die, range(3)))


def test_workers_end_with_a_parent_that_is_killed() -> None:
    program = (
        "from compressor.engine import ProcessPool\n"
        "from tests.engine.jobs import own_number\n"
        "import time\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPool(1)\n"
        "    print(*pool.map(own_number, [0]), flush=True)\n"
        "    time.sleep(100)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    with parent:
        worker = int(parent.stdout.readline())
        os.kill(worker, 0)
        parent.kill()
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived its parent")
