"""The benchmark of archives: a short run is archived, restored and compared, and fills the tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("zstandard")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    import archive  # type: ignore[import-not-found]

    yield archive
    sys.path.remove(folder)
    for name in ("archive", "initial_networks"):
        sys.modules.pop(name, None)


def test_a_short_run_is_archived_restored_and_compared(benchmark: ModuleType, tmp_path: Path) -> None:
    run = replace(benchmark.RUNS[2], every=2, count=2)
    found = benchmark.measure(run, tmp_path / "run")
    exact, *others = found["archives"]
    assert [each["tolerance"] for each in found["archives"]] == list(benchmark.TOLERANCES)
    assert exact["qualities"] == found["qualities"]
    sizes = [each["bytes"] for each in found["archives"]]
    assert sizes == sorted(sizes, reverse=True)
    assert all(each["checkpoints"][1]["rank_bound"] == 2 * 2 for each in others)
    table = benchmark.sizes_table({"runs": [found]})
    assert "| archive, tolerance 0.1 % |" in table
    assert f"{found['bytes']['safetensors'] / 1e6:.2f} MB, 100.0 %" in table
    assert benchmark.quality_table({"runs": [found]}).count("| perceptron, plain SGD, batch 2 |") == len(sizes)


def test_differences_are_taken_bit_by_bit_and_sorted_by_significance(benchmark: ModuleType) -> None:
    first, second = (np.array(each, dtype=np.float32).tobytes() for each in ([1.0, 2.0], [1.0, -2.0]))
    assert benchmark.exclusive_or(first, second) == bytes(7) + b"\x80"
    assert benchmark.by_significance(bytes(range(8))) == bytes([0, 4, 1, 5, 2, 6, 3, 7])
