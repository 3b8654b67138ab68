"""The benchmark of initial weights: what a round to few bits costs, what a layer says of its start, and the tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    import initial  # type: ignore[import-not-found]

    yield initial
    sys.path.remove(folder)
    for name in ("initial", "initial_networks", "quality", "baselines"):
        sys.modules.pop(name, None)


def test_layers_sizes_and_bits_of_a_network_that_hardly_trained_fill_the_tables(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    optimizer = benchmark.OPTIMIZERS["AdamW"]
    model = benchmark.trained("convolutions", optimizer, seed=5, epochs=1)
    subject = benchmark.Subject(
        "convolutions",
        "AdamW",
        5,
        benchmark.EPOCHS,
        model,
        benchmark.BUILDERS["convolutions"],
        optimizer.recipe(model, 1),
        benchmark.quality,
        benchmark.calibration_batches,
    )
    source = benchmark.Source(subject.about, lambda: subject)
    results = benchmark.Results(tmp_path / "initial.json")
    benchmark.measure_layers(results, source)
    benchmark.measure_rounding(results, source)
    benchmark.measure_sizes(results, source)
    benchmark.measure_search(results, source)
    layers = [row for row in results.rows if row["kind"] == "layer"]
    assert len(layers) == 5
    for row in layers:
        assert row["z"] > 8
        assert row["predicted"] == pytest.approx(1 - 0.05 * 1e-3 * 34 / 2, abs=1e-4)
    shares = [row["share"] for row in results.rows if row["kind"] == "rounding"]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(4.5 / 16, abs=0.01)
    [found] = [row for row in results.rows if row["kind"] == "search"]
    assert (found["found"], found["tried"]) == (5, 6)
    assert found["z"] > 8 > found["next_best"]
    loss = {
        (row["initial"], row["share"]): row["loss"]
        for row in results.rows
        if row["kind"] == "size" and "refused" not in row
    }
    assert loss[True, 0.1] < loss[False, 0.1]
    again = benchmark.Results(tmp_path / "initial.json")
    benchmark.measure_rounding(again, source)
    assert again.rows == results.rows
    assert benchmark.layers_table(results.document).count("| convolutions |") == 1
    assert benchmark.without_data_table(results.document).count("| from the seed |") == 1
    assert "| convolutions | 1 | 1 |" in benchmark.search_table(results.document)
