from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

torch.set_num_threads(1)


def low_rank(d_out: int, d_in: int, rank: int, *, generator: torch.Generator) -> torch.Tensor:
    left, right = (torch.randn(*shape, generator=generator) for shape in ((d_out, rank), (rank, d_in)))
    return left @ right / (rank * d_in) ** 0.5 + 1e-4 * torch.randn(d_out, d_in, generator=generator)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint whose matrices are almost of rank 4, with a name that would clear a terminal."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"encoder.layers.{block}.a_rather_long_block_name.{name}.weight": low_rank(48, 32, 4, generator=generator)
        for block in range(3)
        for name in ("projector.first", "feed_forward.up")
    }
    tensors["\x1b[2Jhead.weight"] = low_rank(32, 48, 4, generator=generator)
    tensors["embed_tokens.weight"] = torch.randn(20, 32, generator=generator)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path


@pytest.fixture
def incompressible(tmp_path: Path) -> Path:
    """A checkpoint of orthogonal matrices: every direction counts the same."""
    generator = torch.Generator().manual_seed(0)
    square, _ = torch.linalg.qr(torch.randn(32, 32, generator=generator))
    path = tmp_path / "orthogonal.safetensors"
    save_file({"layer.weight": square.contiguous()}, path, metadata={"format": "pt"})
    return path


@pytest.fixture(scope="session", autouse=True)
def signals_that_stop() -> None:
    """Signals that a shell silences for what it runs in the background; the commands under test would inherit that."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
