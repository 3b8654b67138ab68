"""Spatial pairs: a two-dimensional kernel as a vertical one to r channels, followed by a horizontal one.

`W[o, c, i, j] = sum_r up[o, r, j] down[r, c, i]` (Jaderberg, Vedaldi and Zisserman, "Speeding up convolutional neural
networks with low rank expansions", BMVC 2014, scheme 2). So it is the rank-r factorization of one arrangement of the
kernel, the `(d_out k_w) x (c k_h)` matrix with rows (o, j) and columns (c, i): without data its truncated SVD is the
best pair. The metric of the loss, `tr(S_g D S_x D^T)` of the `d_out x (c k_h k_w)` matrix, does not act on the rows
and columns of that arrangement one by one, unless `S_x` is a Kronecker product of a moment over (c, i) and one over j.
The pair is therefore found in the nearest such metric, and then improved in the true one by alternating least squares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from compressor.factorize.settings import DEFAULTS, FactorizationSettings
from compressor.factorize.truncated_svd import truncated_svd
from compressor.factorize.weighted_svd import Metric
from compressor.measure import Spectrum
from compressor.measure.scale import power_of_two
from compressor.torch_state import in_float64


@dataclass(frozen=True)
class SpatialPair:
    """`W[o, c, i, j] = sum_r up[o, r, j] down[r, c, i]`, with `up` of `d_out x r x k_w` and `down` of `r x c x k_h`."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def product(self) -> Tensor:
        """The `d_out x (c k_h k_w)` matrix that the pair stands for."""
        return torch.einsum("orj,rci->ocij", self.up, self.down).flatten(1)


@dataclass(frozen=True)
class Solution:
    """A pair as `up` of `d_out x r x k_w` and `down` of `r x (c k_h)`, and its cost `tr(S_g D S_x D^T)`."""

    up: Tensor
    down: Tensor
    cost: float


@dataclass(frozen=True)
class WhitenedKernel:
    """A kernel in the coordinates in which the nearest Kronecker product to its metric is the identity.

    `kernel` is `d_out x (c k_h) x k_w`, and `inputs` is what the moment of the inputs becomes there, arranged as
    `(c k_h) x k_w x k_w x (c k_h)` with the outer sides of the two vectors outermost; that of the gradients becomes the
    identity. `weighted` is the kernel times `inputs`, and `total` the cost of the zero kernel. The Cholesky factors
    `gradients_root`, `vertical_root` and `horizontal_root` lead back.
    """

    kernel: Tensor
    inputs: Tensor
    weighted: Tensor
    total: float
    gradients_root: Tensor
    vertical_root: Tensor
    horizontal_root: Tensor

    @cached_property
    def narrow_inputs(self) -> Tensor:
        """`inputs` in float32, `(c k_h) x (k_w k_w c k_h)`."""
        return self.inputs.flatten(1).float()


def spatial_matrix(kernel: Tensor) -> Tensor:
    """The `d_out x c x k_h x k_w` kernel as the `(d_out k_w) x (c k_h)` matrix that a spatial pair factorizes."""
    d_out, c, k_h, k_w = kernel.shape
    return kernel.permute(0, 3, 1, 2).reshape(d_out * k_w, c * k_h)


def spatial_pair(
    kernel: Tensor, rank: int, metric: Metric | None = None, *, settings: FactorizationSettings = DEFAULTS
) -> SpatialPair:
    """The spatial pair of a `d_out x c x k_h x k_w` kernel, in float64.

    Without a metric it is the truncated SVD of `spatial_matrix`, the best pair in the Frobenius norm (Eckart and Young,
    1936). With one it is a local minimum, or close to it: no worse than the truncated SVD in the nearest Kronecker
    product to the metric, from which it starts. `up` is orthonormal as a matrix `(d_out k_w) x r`, so that neither
    factor loses digits when it is rounded. ValueError for a rank that the matrix does not have.
    """
    d_out, c, k_h, k_w = kernel.shape
    if not 1 <= rank <= min(d_out * k_w, c * k_h):
        raise ValueError(
            f"rank {rank} is outside 1 .. {min(d_out * k_w, c * k_h)} of a spatial pair for a"
            f" {d_out} x {c} x {k_h} x {k_w} kernel"
        )
    if metric is None:
        pair = truncated_svd(spatial_matrix(kernel), rank)
        left, down = pair.up, pair.down
    else:
        scale = power_of_two(kernel)
        problem = whitened(in_float64(kernel) / scale, metric)
        best = _best(problem, truncated_svd(_rows(problem.kernel), rank).down, settings)
        up = best.up @ problem.horizontal_root.inverse()
        up = torch.linalg.solve_triangular(problem.gradients_root.T, up.flatten(1), upper=True).reshape(up.shape)
        left, triangular = torch.linalg.qr(_rows(up))
        down = triangular @ torch.linalg.solve_triangular(problem.vertical_root, best.down, upper=False, left=False)
        down *= scale
    return SpatialPair(up=_from_rows(left, k_w), down=down.reshape(rank, c, k_h))


def spatial_errors(kernel: Tensor, metric: Metric, *, settings: FactorizationSettings = DEFAULTS) -> Spectrum:
    """Relative error in the metric of the loss of the spatial pair of rank 0, 1, .. of a kernel.

    It is that of `spatial_pair` at up to `settings.spatial_ranks` ranks, geometrically spaced, the last of them the
    largest at which a pair is no larger than the kernel. Between them it is interpolated linearly, which overstates it
    where the errors are convex in the rank, as they mostly are.
    """
    problem = whitened(in_float64(kernel) / power_of_two(kernel), metric)
    rows, columns = _rows(problem.kernel).shape
    full = min(rows, columns)
    if problem.total <= 0:
        return np.zeros(full + 1)
    largest = max(1, kernel.numel() // (rows + columns))
    if largest > settings.spatial_ranks:
        ranks = np.unique(np.geomspace(1, largest, settings.spatial_ranks).round().astype(int))
    else:
        ranks = np.arange(1, largest + 1)
    start = truncated_svd(_rows(problem.kernel), largest).down
    costs = [_best(problem, start[: int(rank)], settings).cost for rank in ranks]
    # A pair of lower rank is also one of a higher rank, so what the search missed there is known to be possible.
    errors = np.sqrt(np.minimum.accumulate(costs) / problem.total)
    return np.asarray(np.interp(np.arange(full + 1), [0, *ranks, full], [1.0, *errors, 0.0]), dtype=np.float64)


def nearest_kronecker(inputs: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Positive definite `S_v` and `S_h` (`width x width`) with `S_v (x) S_h` nearest to `inputs` in the Frobenius norm.

    They are the leading singular vectors of a rearrangement of `inputs` (Van Loan and Pitsianis, "Approximation with
    Kronecker products", 1993), here by power iteration from the partial trace: every step of it contracts a positive
    definite matrix with another, so that its result is positive definite whatever the rounding.
    """
    height = inputs.shape[0] // width
    blocks = inputs.reshape(height, width, height, width).permute(1, 3, 0, 2).reshape(width**2, height**2)
    gram = blocks @ blocks.T
    horizontal = torch.eye(width, dtype=inputs.dtype, device=inputs.device).flatten()
    for _ in range(20):
        horizontal = gram @ horizontal
        horizontal /= horizontal.norm()
    return (horizontal @ blocks).reshape(height, height), horizontal.reshape(width, width)


def whitened(kernel: Tensor, metric: Metric) -> WhitenedKernel:
    """A `d_out x c x k_h x k_w` kernel and its metric in the coordinates of `WhitenedKernel`."""
    d_out, c, k_h, k_w = kernel.shape
    vertical, horizontal = nearest_kronecker(metric.inputs, k_w)
    gradients_root = torch.linalg.cholesky(metric.gradients)
    vertical_root, horizontal_root = torch.linalg.cholesky(vertical), torch.linalg.cholesky(horizontal)
    wide = gradients_root.T @ in_float64(kernel).reshape(d_out, -1)
    wide = vertical_root.T @ wide.reshape(d_out, c * k_h, k_w) @ horizontal_root
    inputs = _divided(_divided(metric.inputs, vertical_root, horizontal_root).T, vertical_root, horizontal_root)
    weighted = (wide.flatten(1) @ inputs).reshape(wide.shape)
    return WhitenedKernel(
        kernel=wide,
        inputs=inputs.reshape(c * k_h, k_w, c * k_h, k_w).transpose(2, 3).contiguous(),
        weighted=weighted,
        total=float((weighted * wide).sum()),
        gradients_root=gradients_root,
        vertical_root=vertical_root,
        horizontal_root=horizontal_root,
    )


def alternating_least_squares(
    problem: WhitenedKernel, down: Tensor, settings: FactorizationSettings = DEFAULTS
) -> Iterator[Solution]:
    """Pairs of a cost that never rises, in whitened coordinates, from vertical kernels `down` of `r x (c k_h)`.

    Every pair's `up` is the best one for its `down`. So the first costs at most what any pair with the given `down`
    does.
    """
    while True:
        # A change of basis of the r channels costs nothing; an orthonormal one makes the equations well conditioned.
        down = torch.linalg.qr(down.T).Q.T
        up, cost = _best_up(problem, down)
        yield Solution(up, down, cost)
        left, triangular = torch.linalg.qr(_rows(up))
        down = _better_down(problem, _from_rows(left, up.shape[2]), triangular @ down, settings=settings)


def _best(problem: WhitenedKernel, down: Tensor, settings: FactorizationSettings) -> Solution:
    """The last solution of alternating least squares whose sweep gained enough."""
    solutions = islice(alternating_least_squares(problem, down, settings), settings.spatial_sweeps)
    best = next(solutions)
    for solution in solutions:
        gain = best.cost - solution.cost
        if gain > 0:
            best = solution
        if gain <= settings.spatial_gain * best.cost:
            break
    return best


def _best_up(problem: WhitenedKernel, down: Tensor) -> tuple[Tensor, float]:
    """The horizontal kernels that cost least with vertical kernels `down`, by their normal equations, and the cost."""
    rank, (height, width) = down.shape[0], problem.inputs.shape[:2]
    half = (down @ problem.inputs.flatten(1)).reshape(rank * width**2, height)
    normal = (half @ down.T).reshape(rank, width, width, rank).transpose(2, 3).reshape(rank * width, rank * width)
    right_side = torch.einsum("oaj,ra->orj", problem.weighted, down)
    factor = torch.linalg.cholesky((normal + normal.T) / 2)
    up = torch.cholesky_solve(right_side.flatten(1).T, factor).T.reshape(right_side.shape)
    return up, max(0.0, problem.total - float((up * right_side).sum()))


def _better_down(problem: WhitenedKernel, up: Tensor, down: Tensor, *, settings: FactorizationSettings) -> Tensor:
    """Vertical kernels that cost less than `down` with orthonormal `up`, by conjugate gradients from `down`.

    Their normal equations have `r c k_h` unknowns and are too large to be solved by elimination. The gradient of half
    the cost is `sum_jk U_k^T U_j down S_jk - sum_j U_j^T (W S)_j`, with U_j the `d_out x r` slice of `up` at column j
    and S_jk that of the moment.
    """
    height = down.shape[1]
    # They stop at a rough residual, to which float32 is exact; what a sweep gained is known in float64.
    products = torch.einsum("ork,osj->rsjk", up, up).flatten(1).float()

    def normal(rows: Tensor) -> Tensor:
        scale = power_of_two(rows)
        half = (rows / scale).float() @ problem.narrow_inputs
        return scale * in_float64(products @ half.reshape(-1, height))

    right_side = torch.einsum("orj,oaj->ra", up, problem.weighted)
    residual = right_side - normal(down)
    direction, squares = residual, float(residual.square().sum())
    enough = squares * settings.spatial_residual**2
    for _ in range(settings.spatial_steps):
        if squares <= enough:
            break
        image = normal(direction)
        step = squares / float((direction * image).sum())
        down = down + step * direction
        residual = residual - step * image
        before, squares = squares, float(residual.square().sum())
        direction = residual + squares / before * direction
    return down


def _rows(kernel: Tensor) -> Tensor:
    """`d_out x n x k_w` as the matrix `(d_out k_w) x n`."""
    return kernel.transpose(1, 2).flatten(0, 1)


def _from_rows(matrix: Tensor, width: int) -> Tensor:
    """The inverse of `_rows`."""
    return matrix.reshape(-1, width, matrix.shape[1]).transpose(1, 2).contiguous()


def _divided(matrix: Tensor, vertical_root: Tensor, horizontal_root: Tensor) -> Tensor:
    """`(L_v (x) L_h)^-1 A` for lower triangular roots, without the Kronecker product itself."""
    height, width = vertical_root.shape[0], horizontal_root.shape[0]
    identity = torch.eye(height, dtype=matrix.dtype, device=matrix.device)
    inverse = torch.linalg.solve_triangular(vertical_root, identity, upper=False)
    half = (inverse @ matrix.reshape(height, -1)).reshape(height, width, -1)
    divided: Tensor = torch.linalg.solve_triangular(horizontal_root, half, upper=False)
    return divided.reshape(matrix.shape)
