"""What `restore` does with the state dict of a module that was compressed in memory, and so says nothing of itself."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from compressor import compress, restore


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.words(x)))


class Generator(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.ConvTranspose2d(12, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 3))


def test_names_of_one_tensor_all_return(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied()
    small = compress(model, keep=0.5).model
    assert small is not None
    torch.save(small.state_dict(), tmp_path / "small.pt")
    restore(tmp_path / "small.pt", output=tmp_path / "dense.pt")
    again = Tied()
    again.load_state_dict(torch.load(tmp_path / "dense.pt", weights_only=True), strict=True)
    x = torch.randint(0, 40, (3, 5))
    torch.testing.assert_close(again(x), small(x), rtol=1e-4, atol=1e-5)


def test_the_users_code_says_what_the_layers_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = compress(Generator(), keep=0.5).model
    assert small is not None
    torch.save(small.state_dict(), tmp_path / "small.pt")
    restore(tmp_path / "small.pt", output=tmp_path / "dense.pt", factory=Generator)
    again = Generator()
    again.load_state_dict(torch.load(tmp_path / "dense.pt", weights_only=True), strict=True)
    x = torch.randn(2, 12, 6, 6)
    torch.testing.assert_close(again(x), small(x), rtol=1e-4, atol=1e-5)
