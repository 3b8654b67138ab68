"""Jobs on a Ray cluster of several nodes on this machine, of which some are killed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from compressor.engine import RayEngine
from compressor.errors import BadInput
from tests.calibration.test_drop import TwoAtATime, assert_same_plan, search_calibrated, search_digits
from tests.engine.jobs import Lost, number_elsewhere
from tests.engine.runs import calibrated, sliced
from tests.engine.test_engine import passes_errors_on, same_as_a_loop

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")
pytestmark = pytest.mark.slow


# A node that is killed refuses connections: it is noticed after three of them, instead of after fifteen seconds.
NOTICED = {"health_check_period_ms": 300, "health_check_failure_threshold": 3}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of one node with one processor, to which nodes can be added."""
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": NOTICED}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def connected(cluster: Any) -> Iterator[Any]:
    """The cluster, with this process connected to its first node, which is killed in no test."""
    ray.init(cluster.address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()


def kill_when_marked(cluster: Any, node: Any, mark: Path) -> None:
    while not mark.exists():
        time.sleep(0.05)
    cluster.remove_node(node, allow_graceful=False)


def test_jobs_on_a_cluster_give_what_a_loop_does(cluster: Any) -> None:
    with RayEngine(cluster.address) as engine:
        same_as_a_loop(engine)
        passes_errors_on(engine)


def test_a_calibrated_run_on_a_cluster_writes_the_bytes_of_one_in_process(cluster: Any, tmp_path: Path) -> None:
    expected = calibrated(tmp_path)
    assert calibrated(tmp_path, f"ray:{cluster.address}") == expected


def test_an_address_without_a_cluster_is_bad_input() -> None:
    with pytest.raises(BadInput, match=r"there is no Ray cluster to use at localhost:1: .*refused") as caught:
        RayEngine("localhost:1")
    assert caught.value.option == "engine"


def test_what_a_killed_node_was_at_is_done_again_elsewhere(connected: Any, tmp_path: Path) -> None:
    node, mark = connected.add_node(num_cpus=2), tmp_path / "begun"
    connected.wait_for_nodes()
    with RayEngine() as engine, ThreadPoolExecutor(1) as killer:
        killed = killer.submit(kill_when_marked, connected, node, mark)
        asked = [Lost(number, node.node_id, mark) for number in range(6)]
        assert list(engine.map(number_elsewhere, asked)) == list(range(6))
        killed.result()
    connected.wait_for_nodes()  # until it is noticed that one is gone


def test_a_search_by_drop_tries_a_size_on_each_node_at_a_time(connected: Any) -> None:
    node = connected.add_node(num_cpus=1)
    connected.wait_for_nodes()
    with RayEngine() as engine:
        assert engine.workers == 2
        found = search_digits(engine)
    connected.remove_node(node)
    assert found == search_digits(TwoAtATime())


def test_a_calibrated_search_plans_a_size_on_each_node_at_a_time(connected: Any, tmp_path: Path) -> None:
    node = connected.add_node(num_cpus=1)
    connected.wait_for_nodes()
    with RayEngine() as engine:
        found = search_calibrated(tmp_path, engine)
    connected.remove_node(node)
    assert_same_plan(found, search_calibrated(tmp_path, TwoAtATime()))


def test_a_run_of_which_a_node_is_killed_writes_the_bytes_of_one_in_process(connected: Any, tmp_path: Path) -> None:
    expected = sliced(tmp_path)
    node = connected.add_node(num_cpus=1)
    connected.wait_for_nodes()
    told: list[str] = []

    def kill_at_the_second_slice(step: str, _done: int, _total: int) -> None:
        told.append(step)
        if told.count("run") == 2 and step == "run":
            connected.remove_node(node, allow_graceful=False)

    assert sliced(tmp_path, "ray", kill_at_the_second_slice) == expected
    connected.wait_for_nodes()
    assert told.count("run") == 8 + 3  # slices, and then blocks
    assert told.count("measure") == told.count("factorize") == 15
