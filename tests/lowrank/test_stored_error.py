"""The error of what is stored, computed from the stored tensors, is that of the truncation by the singular values."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compressor import compress

KINDS: dict[str, nn.Module] = {
    "linear": nn.Linear(24, 16),
    "transposed linear": Conv1D(16, 24),
    "convolution": nn.Conv2d(12, 16, 3),
    "transposed convolution": nn.ConvTranspose2d(12, 16, 3),
    "embedding": nn.Embedding(40, 12),
    "recurrent": nn.LSTM(12, 16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_of_every_kind(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(KINDS[kind]).to(dtype)
    planned = compress(model, keep=0.6, calibration="none", embeddings=True, dry_run=True, prefer="size").plan.layers
    written = compress(model, keep=0.6, calibration="none", embeddings=True, prefer="size").plan.layers
    assert any(layer.rank is not None for layer in written)
    for before, after in zip(planned, written, strict=True):
        rounding = 3 * torch.finfo(dtype).eps
        assert after.error == pytest.approx(before.error, abs=rounding)
        assert (after.error > 0) == (after.rank is not None)
