"""Singular values of a weight matrix from the eigenvalues of the smaller of its two Gram matrices."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compressor.measure.effective_rank import Spectrum


def smaller_gram(matrix: Tensor) -> Tensor:
    """`W W^T` or `W^T W`, whichever is smaller, accumulated in float64.

    The weight is converted a few rows at a time, so that no float64 copy of it is ever held.
    """
    d_out, d_in = matrix.shape
    tall = matrix.T if d_out <= d_in else matrix  # n x d with n >= d, and the Gram matrix is d x d
    d = tall.shape[1]
    gram = torch.zeros(d, d, dtype=torch.float64, device=matrix.device)
    rows = max(1, 2**22 // d)
    for block in torch.split(tall, rows):
        wide = block.to(torch.float64)
        gram.addmm_(wide.T, wide)
    return gram


def singular_values(matrix: Tensor) -> Spectrum:
    """Singular values of a `d_out x d_in` matrix of any floating dtype, descending, in float64.

    Accurate to about 1.5e-8 of the largest (the square root of float64's precision, since the Gram matrix squares the
    spectrum): finer than the rounding of float32 weights, at a fraction of the cost of a singular value decomposition.
    """
    eigenvalues = torch.linalg.eigvalsh(smaller_gram(matrix)).clamp_min_(0).sqrt_().flip(0)
    return np.asarray(eigenvalues.cpu().numpy(), dtype=np.float64)
