"""The published methods that we compare with, each against what its paper states."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

SHAPES = {"a": (96, 64), "b": (64, 96), "c": (128, 128)}


@pytest.fixture
def baselines(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import baselines  # type: ignore[import-not-found]

    yield baselines
    sys.modules.pop("baselines", None)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 32), nn.Linear(32, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def chain() -> tuple[Chain, dict[str, nn.Module], list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    model = Chain()
    mixing = torch.randn(24, 24)
    return (
        model,
        {"first": model.first, "second": model.second},
        [{"x": torch.randn(50, 24) @ mixing} for _ in range(4)],
    )


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("keep", [0.8, 0.4, 0.2])
def test_sizes_are_met_to_within_one_rank_and_never_exceeded(baselines: ModuleType, keep: float, pivoted: bool) -> None:
    target = int(keep * sum(d_out * d_in for d_out, d_in in SHAPES.values()))
    ranks = baselines.equalised(SHAPES, target, pivoted=pivoted)
    stored = baselines.stored(SHAPES, ranks, pivoted=pivoted)
    assert target - min(sum(shape) for shape in SHAPES.values()) < stored <= target


def test_svd_llm_loses_exactly_the_singular_values_it_drops(baselines: ModuleType) -> None:
    # Wang et al., theorem 3.2: ||W X - W' X||_F is the root of the sum of squares of the truncated singular values of W
    # S.
    torch.manual_seed(0)
    weight, inputs = torch.randn(20, 30, dtype=torch.float64), torch.randn(200, 30, dtype=torch.float64)
    moment = inputs.T @ inputs
    [replaced] = baselines.svd_llm({"a": weight}, {"a": 7}, {"a": moment}).values()
    values = torch.linalg.svdvals(weight @ torch.linalg.cholesky(moment))
    torch.testing.assert_close(((weight - replaced) @ inputs.T).norm(), values[7:].norm())


def test_svd_llm_stands_dead_inputs(baselines: ModuleType) -> None:
    moment = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    [replaced] = baselines.svd_llm({"a": torch.eye(3, dtype=torch.float64)}, {"a": 2}, {"a": moment}).values()
    assert torch.isfinite(replaced).all()


def test_asvd_is_plain_where_all_activations_are_alike_and_exact_at_full_rank(baselines: ModuleType) -> None:
    torch.manual_seed(0)
    weights = {"a": torch.randn(12, 9, dtype=torch.float64)}
    alike = baselines.asvd(weights, {"a": 4}, {"a": torch.full((9,), 3.0)})["a"]
    torch.testing.assert_close(alike, baselines.plain_svd(weights, {"a": 4})["a"])
    scaled = baselines.asvd(weights, {"a": 9}, {"a": torch.rand(9) + 0.1})["a"]
    torch.testing.assert_close(scaled, weights["a"])


def test_the_sequential_update_is_nearer_to_the_dense_outputs_on_what_the_layer_really_gets(
    baselines: ModuleType,
) -> None:
    model, layers, batches = chain()
    ranks = {"first": 6, "second": 5}
    moments, _ = baselines.input_statistics(model, layers, batches)
    weights = baselines.matrices(layers)
    once = baselines.svd_llm(weights, ranks, moments)
    updated = baselines.svd_llm_sequential(model, layers, ranks, batches)
    first = model.first
    with torch.no_grad():
        first.weight.copy_(updated["first"])
        got = torch.cat([torch.tanh(first(batch["x"])) for batch in batches]).double()
    wanted = got @ weights["second"].T
    assert torch.linalg.matrix_rank(updated["second"]) == 5
    assert (got @ updated["second"].T - wanted).norm() < (got @ once["second"].T - wanted).norm()
