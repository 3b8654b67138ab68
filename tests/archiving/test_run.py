"""The memory window bounds the rank of a matrix that is used alone, and of no other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressor.archiving import TrainingRun
from compressor.model import open_model
from tests.measure.test_window_between import SGD, rank_of


class Twice(nn.Module):
    """Two layers, which may be one, or have one weight."""

    def __init__(self, shared: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(40, 40), nn.Linear(40, 40)
        if shared == "weight":
            self.second.weight = self.first.weight
        elif shared == "module":
            self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize(("shared", "bound", "rank"), [("nothing", 6, 6), ("weight", None, 12), ("module", None, 12)])
def test_a_matrix_in_two_places_has_no_bound(shared: str, bound: int | None, rank: int) -> None:
    torch.manual_seed(0)
    model = Twice(shared).double()
    opened, before = open_model(model), model.first.weight.detach().clone()
    layers = {layer.tensor: layer for layer in opened.layers}
    uses: dict[str, int | None] = {layer.name: 1 for layer in opened.layers}
    window = TrainingRun([opened.checkpoint], [3], "step", layers, uses, SGD).window("first.weight", 0, None)
    assert window.share is not None
    assert window.rank_bound == bound
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 40, dtype=torch.float64)).square().sum(1).mean().backward()
        optimizer.step()
    assert rank_of(model.first.weight.detach() - window.share * before) == rank


def test_the_rows_of_a_convolution_with_groups_are_no_one_matrix() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(40, 40, 1, groups=4), nn.Tanh(), nn.Flatten(), nn.Linear(40, 40)).double()
    opened, before = open_model(model), model[0].weight.detach().clone()
    layers = {layer.tensor: layer for layer in opened.layers}
    uses: dict[str, int | None] = {layer.name: 1 for layer in opened.layers}
    run = TrainingRun([opened.checkpoint], [3], "step", layers, uses, SGD)
    window = run.window("0.weight", 0, None)
    assert (window.rank_bound, run.window("3.weight", 0, None).rank_bound) == (None, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 40, 1, dtype=torch.float64)).square().sum(1).mean().backward()
        optimizer.step()
    assert window.share is not None
    change = (model[0].weight.detach() - window.share * before).flatten(1)
    assert rank_of(change) == 10
    assert {rank_of(block) for block in change.chunk(4)} == {6}
