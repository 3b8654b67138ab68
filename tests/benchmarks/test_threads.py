"""The benchmark of threads measures both ways, and shows them."""

from __future__ import annotations

from benchmarks.threads import measured, table


def test_both_ways_are_measured_on_the_same_matrices() -> None:
    row = measured(8, 2, 1)
    assert row["size"] == row["matrices"] == 8
    assert min(row["inside_seconds"], row["across_seconds"]) > 0
    assert "| 8 | 8 | " in table({"sizes": [row]})
