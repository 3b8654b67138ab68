"""Gradient flow to stationary points, and the sums of what it ends at: the mathematics of the study of sums."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

MODULES = ("gradient_flow", "flow_sums")


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[Path]:
    folder = Path(__file__).parents[2] / "benchmarks"
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def flows(benchmarks: Path) -> ModuleType:
    import gradient_flow  # type: ignore[import-not-found]

    return gradient_flow


@pytest.fixture(scope="module")
def sums(benchmarks: Path) -> ModuleType:
    import flow_sums  # type: ignore[import-not-found]

    return flow_sums


def problem_of(flows: ModuleType, sizes: tuple[int, ...], *, corner: float, weight_decay: float = 0.05) -> Any:
    generator = np.random.default_rng(3)
    labels = generator.integers(max(2, sizes[-1]), size=12)
    return flows.Problem(generator.standard_normal((12, sizes[0])), labels, sizes, weight_decay, corner)


@pytest.mark.parametrize("corner", [0.0, 0.3])
@pytest.mark.parametrize("classes", [1, 3])
def test_the_gradient_is_that_of_autograd(flows: ModuleType, classes: int, corner: float) -> None:
    problem = problem_of(flows, (5, 7, 6, classes), corner=corner)
    weights = flows.start(problem.sizes, seed=0)
    loss, gradient = flows.loss_and_gradient(weights, problem)

    vector = torch.from_numpy(weights.copy()).requires_grad_()
    hidden, place = torch.from_numpy(problem.inputs), 0
    for d_in, d_out in pairwise(problem.sizes):
        if place:
            curved = (hidden + corner).clamp(0, 2 * corner) ** 2 / (4 * corner) if corner else hidden.relu()
            hidden = torch.where(hidden > corner, hidden, curved)
        hidden = hidden @ vector[place : place + d_in * d_out].view(d_out, d_in).T
        place += d_in * d_out
    labels = torch.from_numpy(problem.labels)
    expected = (
        torch.nn.functional.binary_cross_entropy_with_logits(hidden[:, 0], labels.double())
        if classes == 1
        else torch.nn.functional.cross_entropy(hidden, labels)
    ) + problem.weight_decay / 2 * vector.square().sum()
    expected.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert vector.grad is not None
    np.testing.assert_allclose(gradient, vector.grad.numpy(), rtol=1e-10, atol=1e-14)


def test_a_rounded_corner_is_smooth_and_a_relu_outside(flows: ModuleType) -> None:
    values = np.linspace(-1, 1, 2001)
    rounded, slope = flows.rounded_relu(values, 0.1)
    outside = np.abs(values) >= 0.1
    np.testing.assert_allclose(rounded[outside], np.maximum(values, 0)[outside], atol=1e-15)
    assert np.abs(rounded - np.maximum(values, 0)).max() == pytest.approx(0.1 / 4)
    np.testing.assert_allclose(np.gradient(rounded, values)[1:-1], slope[1:-1], atol=3e-3)


def test_the_flow_follows_an_equation_with_a_known_solution(flows: ModuleType) -> None:
    """Without inputs there is only decay: W = exp(-wd t) W_0, for the implicit steps to first order in their length."""
    problem = problem_of(flows, (4, 3), corner=0.0, weight_decay=0.1)
    problem = flows.Problem(0 * problem.inputs, problem.labels, problem.sizes, problem.weight_decay, problem.corner)
    begin = flows.start(problem.sizes, seed=1)
    steps = flows.Steps(explicit=0.5, explicit_until=10.0, growth=0.01, longest=10.0)
    found = flows.flow(problem, begin, steps)
    np.testing.assert_allclose(found.weights, np.exp(-0.1 * found.time) * begin, rtol=1e-6)
    errors = []
    for each in (steps, steps.halved()):
        found = flows.flow(problem, begin, flows.Steps(each.explicit, 10.0, each.growth, longest=30.0))
        errors.append(np.abs(found.weights / begin / np.exp(-0.1 * found.time) - 1).max())
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.2)


def test_the_flow_of_a_convex_loss_ends_at_its_minimum(flows: ModuleType) -> None:
    problem = problem_of(flows, (5, 1), corner=0.0)
    found = flows.flow(problem, flows.start(problem.sizes, seed=0), flows.Steps(residual=1e-6))
    assert found.residual < 1e-6
    loss = flows.loss_and_gradient(found.weights, problem)[0]
    generator = np.random.default_rng(0)
    for _ in range(20):
        aside = found.weights + 0.01 * generator.standard_normal(5)
        assert flows.loss_and_gradient(aside, problem)[0] > loss


@pytest.mark.slow
def test_the_flow_of_a_deep_network_ends_at_a_stationary_point(flows: ModuleType) -> None:
    """There all layers have one norm, and halving all steps ends at the same point."""
    problem = problem_of(flows, (6, 8, 8, 1), corner=1e-2, weight_decay=0.02)
    begin = flows.start(problem.sizes, seed=0)
    steps = flows.Steps(explicit=0.2)
    ends = [flows.flow(problem, begin, each) for each in (steps, steps.halved())]
    norms = [np.linalg.norm(layer) for layer in problem.layers(ends[0].weights)]
    assert min(norms) > 0.5
    assert max(norms) / min(norms) < 1.01
    assert ends[0].residual < 1e-3
    assert np.linalg.norm(ends[0].weights - ends[1].weights) < 0.02 * np.linalg.norm(ends[0].weights)


@pytest.mark.parametrize("overlap", [0.0, 0.2])
def test_a_sum_in_coordinates_is_the_sum_in_the_space_of_all_inputs(sums: ModuleType, overlap: float) -> None:
    generator = np.random.default_rng(0)
    sizes = (5, 7, 6, 3)
    networks = [[generator.standard_normal((d_out, d_in)) for d_in, d_out in pairwise(sizes)] for _ in range(3)]
    # A block of its own for each task, and a shared one.
    blocks = np.eye(4 * 5).reshape(20, 4, 5)
    bases = [np.sqrt(1 - overlap) * blocks[:, task] + np.sqrt(overlap) * blocks[:, 3] for task in range(3)]
    np.testing.assert_allclose(bases[0].T @ bases[1], overlap * np.eye(5), atol=1e-15)
    np.testing.assert_allclose(bases[1].T @ bases[1], np.eye(5), atol=1e-15)
    whole = [np.sum([layers[0] @ basis.T for layers, basis in zip(networks, bases, strict=True)], axis=0)]
    whole += [np.sum([layers[place] for layers in networks], axis=0) for place in (1, 2)]
    inputs = generator.standard_normal((4, 5))
    for task, basis in enumerate(bases):
        expected = sums.outputs(whole, inputs @ basis.T)
        np.testing.assert_allclose(sums.outputs(sums.summed(networks, task, overlap), inputs), expected, rtol=1e-12)


def test_interference_is_what_the_other_adds(sums: ModuleType) -> None:
    own, other = [np.eye(2), np.eye(2)], [2 * np.eye(2), np.array([[0.0, 3.0], [0.0, 0.0]])]
    inputs = np.array([[1.0, 1.0]])
    assert sums.interference(own, other, inputs, overlap=0.25) == pytest.approx([0.5, 3 / np.sqrt(2)])
    assert sums.interference(own, other, inputs, overlap=0.0)[0] == 0


@pytest.mark.slow
def test_sums_are_studied_by_kind_depth_and_overlap(sums: ModuleType, tmp_path: Path) -> None:
    tasks = {"two classes": ((0, 1), (2, 3), (4, 5))}
    steps = sums.Steps(explicit=0.2, growth=0.1, residual=1e-2)
    rows = sums.study(sums.Sums(tasks, (2,), (0,), (0.0, 0.2), width=12, examples=5, weight_decay=0.03, steps=steps))
    networks = [row for row in rows if row["row"] == "network"]
    assert len(networks) == 3
    assert all(row["residual"] < 1e-2 and row["halving"] < 0.05 and row["accuracy"] == 1 for row in networks)
    added = [row for row in rows if row["row"] == "sum"]
    assert [(row["merged"], row["overlap"]) for row in added] == [(2, 0.0), (2, 0.2)] * 3 + [(3, 0.0), (3, 0.2)]
    assert all((task["interference"][0] == 0) == (row["overlap"] == 0) for row in added for task in row["tasks"])
    for table in (sums.stationary_table, sums.sums_table):
        lines = table({"rows": rows}).splitlines()
        assert "two classes" in lines[-1]
        assert len({line.count("|") for line in lines}) == 1
    sums.plot(rows, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000
