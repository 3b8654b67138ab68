"""Truncated SVD in the metric of the loss: the second-order cost of changing a layer, and the pair that costs least.

To second order a change D of a layer's `d_out x d_in` matrix costs `1/2 tr(S_g D S_x D^T)` of loss, where `S_x = E[x
x^T]` of the layer's inputs and `S_g = E[g g^T]` of the loss gradient at its outputs (Martens and Grosse, "Optimizing
neural networks with Kronecker-factored approximate curvature", ICML 2015). The best matrix of rank r is the truncated
SVD of `S_g^(1/2) W S_x^(1/2)` mapped back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compressor.factorize.truncated_svd import FactorPair
from compressor.measure import Spectrum
from compressor.measure.eigen import eigh, eigvalsh
from compressor.measure.scale import power_of_two


@dataclass(frozen=True)
class Metric:
    """Two positive definite matrices in float64: `inputs` of `d_in x d_in` and `gradients` of `d_out x d_out`.

    For a layer with a bias `inputs` is the covariance and `mean` the mean of the inputs (`d_in`): the bias compensates
    for the change of the mean output. Without a bias `mean` is None.

    `inputs` may be a vector of d_in, which stands for the diagonal matrix: the inputs of an embedding are its tokens,
    of which there is one at a time, and `E[x x^T]` has their frequencies on its diagonal and nothing else.
    """

    inputs: Tensor
    gradients: Tensor
    mean: Tensor | None = None

    def squared_size(self, matrix: Tensor) -> float:
        """`tr(S_g D S_x D^T)` of a `d_out x d_in` matrix D: twice the loss that changing a layer by it costs."""
        return max(0.0, float((self.gradients @ _times(matrix, self.inputs) * matrix).sum()))


def weighted_singular_values(matrix: Tensor, metric: Metric) -> Spectrum:
    """Singular values of `S_g^(1/2) W S_x^(1/2)`, descending; the sum of the dropped ones squared is twice the loss."""
    scale = power_of_two(matrix)
    gram, _ = _weighted_gram(matrix.to(torch.float64) / scale, metric)
    eigenvalues = eigvalsh(gram).clamp_min_(0).sqrt_().flip(0)
    return scale * np.asarray(eigenvalues.cpu().numpy(), dtype=np.float64)


def weighted_truncated_svd(matrix: Tensor, rank: int, metric: Metric) -> FactorPair:
    """The rank-`rank` matrix W' that minimizes `tr(S_g (W - W') S_x (W - W')^T)`, in float64.

    With the Cholesky factor L of one side's moment it is a projection of W: `L^-T U_r U_r^T L^T W` for `S_g = L L^T`
    and U the eigenvectors of `L^T W S_x W^T L`, or its mirror image from the side of the inputs; the smaller side is
    taken. The rows of `down` carry the size of W', `up` is orthonormal, so that neither loses digits when it is
    rounded.
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(
            f"rank {rank} is outside 1 .. {min(matrix.shape)} of a {matrix.shape[0]} x {matrix.shape[1]} matrix"
        )
    components = weighted_components(matrix, metric)
    orthonormal, triangular = torch.linalg.qr(components.up[:, :rank])
    return FactorPair(up=orthonormal, down=triangular @ components.down[:rank])


def weighted_components(matrix: Tensor, metric: Metric) -> FactorPair:
    """The pair of full rank of which the first r columns of `up` and rows of `down` are the best matrix of rank r."""
    wide = matrix.to(torch.float64)
    gram, factor = _weighted_gram(wide / power_of_two(wide), metric)
    basis = eigh(gram)[1].flip(1)
    inverse = torch.linalg.solve_triangular(factor.T, basis, upper=True)
    if matrix.shape[0] <= matrix.shape[1]:
        return FactorPair(up=inverse, down=(factor @ basis).T @ wide)
    return FactorPair(up=wide @ (factor @ basis), down=inverse.T)


def _weighted_gram(wide: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """`A A^T` or `A^T A` of `A = S_g^(1/2) W S_x^(1/2)`, whichever is smaller, and the Cholesky factor of its side."""
    if wide.shape[0] <= wide.shape[1]:
        factor = torch.linalg.cholesky(metric.gradients)
        half = factor.T @ wide
        return _times(half, metric.inputs) @ half.T, factor
    diagonal = metric.inputs.dim() == 1
    factor = torch.diag(metric.inputs.sqrt()) if diagonal else torch.linalg.cholesky(metric.inputs)
    half = wide @ factor
    return half.T @ metric.gradients @ half, factor


def _times(matrix: Tensor, inputs: Tensor) -> Tensor:
    """The product of a matrix with the moment of the inputs, which may be given as its diagonal alone."""
    return matrix * inputs if inputs.dim() == 1 else matrix @ inputs
