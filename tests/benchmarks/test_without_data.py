"""The comparison of rules without data on one network that hardly trained: every rule, each within its size."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    import without_data  # type: ignore[import-not-found]

    yield without_data
    sys.path.remove(folder)
    for name in ("without_data", "without_data_networks"):
        sys.modules.pop(name, None)


def test_every_rule_meets_every_size_and_the_table_shows_it(benchmark: ModuleType) -> None:
    network = replace(next(each for each in benchmark.NETWORKS if each.name == "VGG"), steps=30)
    [seed, *_] = benchmark.REPORTED
    task = network.task(seed)
    task = replace(task, tested=tuple(each[:50] for each in task.tested))
    rows = benchmark.rows_of(network, benchmark.trained(network, task, seed), task, seed=seed)
    compressed = [row for row in rows if row["rule"] != "dense"]
    assert len(rows) - len(compressed) == 1
    assert {(row["rule"], row["keep"]) for row in compressed} == {
        (rule, keep) for rule in benchmark.RULES for keep in benchmark.KEEPS
    }
    for row in compressed:
        assert 0.9 * row["keep"] * row["eligible"] < row["parameters"] <= row["keep"] * row["eligible"]
        assert row["left"] <= 2
    assert benchmark.table(rows).count("| VGG |") == 1
