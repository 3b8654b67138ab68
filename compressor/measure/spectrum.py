"""Singular values of a weight matrix from the eigenvalues of the smaller of its two Gram matrices."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compressor.measure.effective_rank import Spectrum
from compressor.measure.eigen import eigvalsh
from compressor.measure.scale import power_of_two
from compressor.torch_state import float64_device, in_float64


def smaller_gram(matrix: Tensor, scale: float = 1.0) -> Tensor:
    """`W W^T` or `W^T W`, whichever is smaller, of `matrix / scale`, accumulated in float64.

    The weight is converted a few rows at a time, so that there is never a float64 copy of it.
    """
    d_out, d_in = matrix.shape
    tall = matrix.T if d_out <= d_in else matrix  # n x d with n >= d, and the Gram matrix is d x d
    d = tall.shape[1]
    gram = torch.zeros(d, d, dtype=torch.float64, device=float64_device(matrix.device))
    rows = max(1, 2**22 // d)
    for block in torch.split(tall, rows):
        wide = in_float64(block) / scale
        gram.addmm_(wide.T, wide)
    return gram


def singular_values(matrix: Tensor) -> Spectrum:
    """Singular values of a `d_out x d_in` matrix of any floating dtype, descending, in float64.

    Accurate to about 1e-7 of the largest (the square root of float64's precision, since the Gram matrix squares the
    spectrum; smaller values are returned as zero): finer than the rounding of float32 weights, at a fraction of the
    cost of a singular value decomposition. A matrix times a power of two has the same singular values times it, in
    every digit.
    """
    scale = power_of_two(matrix)
    eigenvalues = eigvalsh(smaller_gram(matrix, scale)).flip(0)
    # What is left of a zero eigenvalue is rounding, not rank.
    noise = len(eigenvalues) * torch.finfo(torch.float64).eps * float(eigenvalues[0])
    eigenvalues[eigenvalues < noise] = 0
    return scale * np.asarray(eigenvalues.sqrt_().cpu().numpy(), dtype=np.float64)
