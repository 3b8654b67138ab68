"""The theory's studies on a corner of their grids: what they train, measure and draw."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow

MODULES = ("theory", "theory_networks", "theory_momentum", "merging", "flow_sums", "gradient_flow")


@pytest.fixture(scope="module")
def theory() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    import theory  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    yield theory
    sys.path.remove(folder)
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def rows(theory: ModuleType) -> list[dict[str, Any]]:
    """One run of every network, measured twice, and one of AdamW."""
    found: list[dict[str, Any]] = []
    for network in theory.NETWORKS:
        recipe = theory.recipe_for("sgd", 16, learning_rate=0.1, weight_decay=network.weight_decays[-1])
        found += theory.run(network, recipe, {"epochs": 60, "K": 30}, seed=0)
    return found + theory.run(
        theory.NETWORKS[0], theory.recipe_for("adamw", 16, learning_rate=3e-3, weight_decay=1.0), {"epochs": 30}, seed=0
    )


def test_every_run_is_measured_at_both_lengths(rows: list[dict[str, Any]]) -> None:
    assert [(row["steps"], row["compared"]) for row in rows[:2]] == [(30, ["K"]), (60, ["epochs"])]
    for row in rows:
        retained = 1 - row["learning_rate"] * row["weight_decay"]
        assert math.exp(-row["K"]) == pytest.approx(retained ** row["steps"])
        assert all(0 < ranks["stable"] <= ranks["frobenius"] <= ranks["full"] for ranks in row["hidden"].values())
        assert row["train_accuracy"] > 0.1


def test_hidden_matrices_are_those_of_the_network(rows: list[dict[str, Any]], theory: ModuleType) -> None:
    for row, network in zip(rows[:6:2], theory.NETWORKS, strict=True):
        assert row["network"] == network.name
        assert row["hidden"].keys() == network.hidden.keys()
        # The window is longer than these few steps, so there is no bound.
        assert all(ranks["bound"] is None for ranks in row["hidden"].values())


def test_lengths_are_those_of_the_epochs_and_of_the_exponent(theory: ModuleType) -> None:
    network = theory.NETWORKS[0]
    lengths = theory.lengths_of(network, 64, learning_rate=0.1, weight_decay=1e-2)
    assert (1 - 1e-3) ** lengths["K"] == pytest.approx(math.exp(-theory.FIXED_EXPONENT), rel=1e-3)
    assert lengths["epochs"] == network.epochs * (1078 // 64)
    assert theory.lengths_of(network, 64, learning_rate=0.1, weight_decay=0.0).keys() == {"epochs"}
    assert theory.lengths_of(replace(network, most_steps=10), 64, learning_rate=0.1, weight_decay=1e-2).keys() == {
        "epochs"
    }


def test_gavish_and_donohos_threshold_tells_signal_from_noise(theory: ModuleType) -> None:
    """Of a square matrix it is 2.858 times the median."""
    generator = np.random.default_rng(0)
    for shape in ((60, 60), (40, 120)):
        noise = generator.standard_normal(shape)
        signal = sum(
            60 * np.outer(u, v) / np.linalg.norm(u) / np.linalg.norm(v)
            for u, v in ((generator.standard_normal(shape[0]), generator.standard_normal(shape[1])) for _ in range(3))
        )
        values = np.linalg.svd(noise + signal, compute_uv=False)
        assert theory.gavish_donoho_rank(values, shape) == 3
        assert theory.gavish_donoho_rank(np.linalg.svd(noise, compute_uv=False), shape) == 0
    spectrum = np.array([2.87, 2.84, 1.0, 1.0, 1.0])
    assert theory.gavish_donoho_rank(spectrum, (5, 5)) == 1


def test_rules_keep_what_they_are_defined_to_keep(theory: ModuleType) -> None:
    generator = np.random.default_rng(0)
    shapes = {"a": (30, 20), "b": (16, 40)}
    spectra = {
        name: np.linalg.svd(generator.standard_normal(shape) * np.linspace(0.01, 1, shape[1]), compute_uv=False)
        for name, shape in shapes.items()
    }
    ranks = theory.rule_ranks(spectra, shapes, {"a": 5, "b": None})
    assert ranks["window rule"]["a"] == 5
    assert ranks["window rule"]["b"] == ranks["energy 99 %"]["b"]

    def total(rule: str) -> int:
        return sum(theory.size(shapes[name], rank) for name, rank in ranks[rule].items())

    assert total("energy, same size") <= total("window rule")
    more = {name: rank + 1 for name, rank in ranks["energy, same size"].items()}
    assert sum(theory.size(shapes[name], rank) for name, rank in more.items()) > total("window rule")
    assert theory.size((30, 20), 20) == 30 * 20


def test_a_rule_that_keeps_all_loses_nothing(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert set(row["rules"]) == {"window rule", "energy, same size", "energy 99 %", "Gavish-Donoho", "stable rank"}
        for found in row["rules"].values():
            assert 0 < found["kept"] <= 1
            if found["kept"] == 1:
                assert found["accuracy"] == row["accuracy"]


def test_tables_and_plots_have_every_network(
    rows: list[dict[str, Any]], theory: ModuleType, tmp_path: Path, *, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(theory, "TRAINED", 0.0)
    document = {"rows": rows}
    tables = theory.ranks_table(document), theory.rules_table(document)
    for text, draw in zip(tables, (theory.plot_ranks, theory.plot_rules), strict=True):
        assert all(network.name in text for network in theory.NETWORKS)
        assert len({line.count("|") for line in text.splitlines()}) == 1
        draw(rows, tmp_path / "plot.svg")
        assert all(network.name in (tmp_path / "plot.svg").read_text() for network in theory.NETWORKS)
    theory.write(tmp_path / "rows.json", rows)
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == rows
    # What did not learn is left out, and said nothing about.
    monkeypatch.setattr(theory, "TRAINED", 1.1)
    assert theory.groups(rows) == {}


def test_merging_is_studied_over_depth_decay_and_overlap(
    theory: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = theory.merging.Grid((2,), (0.0, 0.01), (0,), (0, 64), steps=60)
    monkeypatch.setattr(theory.merging, "QUICK", small)
    tables = theory.merging.whole_study(tmp_path, quick=True)
    assert "100.0%" in tables
    found = json.loads((tmp_path / "merging.json").read_text())["rows"]
    assert len(found) == 2 * 3  # both overlaps with PyTorch's initialization, and the large one on disjoint inputs
    for row in found:
        assert (row["largest_input_cosine"] == 0) == (row["shared_inputs"] == 0)
    assert (tmp_path / "merging.svg").stat().st_size > 1000


def test_momentum_is_compared_where_as_much_is_forgotten(theory: ModuleType) -> None:
    momentum = theory.theory_momentum
    found = list(momentum.runs(momentum.WHOLE))
    assert len(found) == 4 * (3 + 3)
    for run in found:
        recipe = run.recipe
        exponent, _ = momentum.forgetting_exponent(recipe)
        if "equal K" in run.compared:
            # The formula is exact without momentum, and leaves out the buffer's start with it.
            assert exponent == pytest.approx(4.0, rel=1e-3 if recipe.momentum == 0 else 0.06)
        else:
            assert (recipe.learning_rate, recipe.steps) == (0.05, theory.steps_of(momentum.WHOLE.network, 16))
    by_rate = [run.recipe for run in found if run.compared == "equal K by learning rate"]
    assert len({(recipe.steps, recipe.weight_decay) for recipe in by_rate}) == 1


def test_what_training_wrote_under_momentum_is_of_the_rank_of_its_examples(theory: ModuleType, tmp_path: Path) -> None:
    momentum = theory.theory_momentum
    grid = replace(momentum.QUICK, batch=2, exponent=0.0005)
    run = momentum.Run("a few steps", replace(next(momentum.runs(grid)).recipe, momentum=0.9, steps=3))
    row = momentum.measured(grid, run, 0)
    for layer in row["layers"].values():
        assert layer["written_counted"] <= 2 * 3
        assert layer["counted"] > 60  # the start has the full rank
    rows = [row, row | {"momentum": 0.0}]
    lines = momentum.table({"rows": rows}).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 4
    momentum.plot(rows, tmp_path / "plot.svg")
    assert "a few steps" in (tmp_path / "plot.svg").read_text()
