"""A model that is spread over two accelerators stays where it is, and is compressed as on one device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressor import compress
from tests.standin.test_verbs import EFFORTS

pytestmark = pytest.mark.slow


class Spread(nn.Module):
    """A perceptron whose layers take what the one before computes to their own device."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x.to(next(layer.parameters()).device)))
        return x


@pytest.mark.parametrize("effort", [effort for effort in EFFORTS if effort != "self"])
def test_it_is_compressed_where_it_lies(effort, device, other_device):
    model = Spread().to(device)
    model.layers[2].to(other_device)
    asked = {"keep": 0.6, "prefer": "size", **EFFORTS[effort]}
    if effort != "none":
        asked["calibration"] = list(torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(1)))
    found = compress(model, device="standin", **asked).model
    expected = compress(Spread(), device="cpu", **asked).model
    assert {each.device for each in found.layers[:2].parameters()} == {device}
    assert {each.device for each in found.layers[2].parameters()} == {other_device}
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=5e-3)
