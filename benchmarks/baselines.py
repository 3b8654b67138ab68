"""Published low-rank compressors in a few lines each, to be compared with at the same number of stored parameters.

Own implementations from the papers: plain truncated SVD; ASVD (Yuan et al. 2023, arXiv 2312.05821: columns scaled by
the mean absolute activation to the power 1/2); SVD-LLM (Wang et al., ICLR 2025, arXiv 2403.07378: whitening by the
Cholesky factor of the inputs' second moment), also with its sequential update (the left factor refitted, in forward
order, to what the dense layer makes of the inputs that it will really get) and in the pivoted storage of PIFA; MPIFA
(Zhao et al., "Pivoting Factorization", ICML 2025: both factors refitted in forward order to a mixture of the dense
layer's outputs on its own inputs and on those it will really get, stored pivoted). Every layer keeps the same fraction
of its parameters (ASVD's search for ranks is left out). A convolution, which none of the papers treats, is the matrix
`out channels x patch`. tests/benchmarks checks each against what its paper states.
"""

from __future__ import annotations

import bisect
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import scipy.linalg
import torch
from torch import Tensor, nn

from compressor.model import logits_of

Batches = Sequence[Mapping[str, Tensor]]
Weights = dict[str, Tensor]

# Zhao et al.: the share of the dense layer's own outputs in the target, and what pulls the right factor to the weights.
MPIFA_MIXTURE, MPIFA_RIDGE = 0.25, 1e-3


# From the shape of a matrix and a rank to how many numbers are stored.
Size = Callable[[tuple[int, int], int], int]


def plain_size(shape: tuple[int, int], rank: int) -> int:
    """Of two factors."""
    return rank * sum(shape)


def pivoted_size(shape: tuple[int, int], rank: int) -> int:
    """Of r rows, the coefficients of the others and r indices (Zhao et al., ICML 2025: `r (m + n) - r^2 + r`)."""
    return rank * sum(shape) - rank**2 + rank


def uniform_ranks(shapes: Mapping[str, tuple[int, int]], keep: float, size: Size) -> dict[str, int]:
    """The rank of every layer at which it stores at most `keep` of its parameters, at least 1."""
    ranks = {}
    for name, shape in shapes.items():
        fitting = bisect.bisect_right(range(1, min(shape) + 1), keep * math.prod(shape), key=partial(size, shape))
        ranks[name] = max(1, fitting)
    return ranks


def stored(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], size: Size) -> int:
    """Numbers that all layers store."""
    return sum(size(shapes[name], rank) for name, rank in ranks.items())


def equalized(shapes: Mapping[str, tuple[int, int]], target: int, size: Size) -> dict[str, int]:
    """Uniform ranks that store as many numbers as fit into `target`.

    What bisection leaves is spread by rank, round after round until nothing fits.
    """
    low, high = 0.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        fits = stored(shapes, uniform_ranks(shapes, middle, size), size) <= target
        low, high = (middle, high) if fits else (low, middle)
    ranks = uniform_ranks(shapes, low, size)
    before: dict[str, int] = {}
    while ranks != before:
        before = ranks
        for name in sorted(shapes, key=lambda name: -sum(shapes[name])):
            more = ranks | {name: ranks[name] + 1}
            if ranks[name] < min(shapes[name]) and stored(shapes, more, size) <= target:
                ranks = more
    return ranks


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """Eckart and Young, by LAPACK."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A matrix of at most this rank as it is stored: `up` of `d_out x r` and `down` of `r x d_in`, in float32."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).float(), (root[:, None] * right[:rank]).float()


def pivoted_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same as PIFA stores it: indices of r of its rows, those rows, and the other rows' coefficients in them.

    The rows are the pivots of a QR decomposition of the transposed matrix (Zhao et al., ICML 2025).
    """
    triangular, pivots = scipy.linalg.qr(matrix.T.numpy(), mode="r", pivoting=True)
    top = torch.from_numpy(triangular)[:rank]
    # Of a matrix of lower rank than r the last pivots are nothing, and the pseudo-inverse leaves them out.
    coefficients = (torch.linalg.pinv(top[:, :rank]) @ top[:, rank:]).T
    order = torch.from_numpy(pivots).long()
    rest = torch.ones(len(matrix), dtype=torch.bool)
    rest[order[:rank]] = False
    by_row = torch.empty_like(matrix[:, :rank])
    by_row[order[rank:]] = coefficients
    return order[:rank].int(), matrix[order[:rank]].float(), by_row[rest].float()


def product(stored_tensors: tuple[Tensor, ...]) -> Tensor:
    """The matrix that `factors` or `pivoted_factors` stand for."""
    if len(stored_tensors) == 2:
        return stored_tensors[0] @ stored_tensors[1]
    pivots, rows, coefficients = stored_tensors
    matrix = torch.empty(len(rows) + len(coefficients), rows.shape[1])
    rest = torch.ones(len(matrix), dtype=torch.bool)
    rest[pivots.long()] = False
    matrix[pivots.long()], matrix[rest] = rows, coefficients @ rows
    return matrix


def plain_svd(weights: Weights, ranks: Mapping[str, int]) -> Weights:
    return {name: truncated(weight, ranks[name]) for name, weight in weights.items()}


def asvd(weights: Weights, ranks: Mapping[str, int], magnitudes: Mapping[str, Tensor]) -> Weights:
    """`[W D]_r D^-1` with `D = diag(E|x|)^(1/2)`."""
    result = {}
    for name, weight in weights.items():
        scale = magnitudes[name].double().clamp_min(1e-12).sqrt()
        result[name] = truncated(weight * scale, ranks[name]) / scale
    return result


def svd_llm(weights: Weights, ranks: Mapping[str, int], moments: Mapping[str, Tensor]) -> Weights:
    """`[W L]_r L^-1` with `L L^T = E[x x^T]`; a relative jitter where that is not positive definite."""
    result = {}
    for name, weight in weights.items():
        factor = cholesky(moments[name])
        kept = truncated(weight @ factor, ranks[name])
        result[name] = torch.linalg.solve_triangular(factor, kept, upper=False, left=False)
    return result


def cholesky(moment: Tensor) -> Tensor:
    """Of a moment with as little added to its diagonal as it takes."""
    identity = torch.eye(len(moment), dtype=moment.dtype) * moment.diagonal().mean()
    for jitter in (0.0, 1e-10, 1e-8, 1e-6, 1e-4):
        factor, failed = torch.linalg.cholesky_ex(moment + jitter * identity)
        if not failed:
            return factor
    raise RuntimeError("the moment is not positive semi-definite")


def svd_llm_sequential(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    ranks: Mapping[str, int],
    *,
    batches: Batches,
    moments: Mapping[str, Tensor],
) -> Weights:
    """SVD-LLM, then in forward order `U = argmin E||W x' - U V x'||^2` on the inputs x' of the compressed prefix."""

    def refit(name: str, weight: Tensor, inputs: Products) -> Tensor:
        right = row_space(svd_llm({name: weight}, ranks, moments)[name], ranks[name])
        return left_factor(weight @ inputs.compressed, right, inputs.compressed) @ right

    return in_forward_order(model, layers, batches, refit=refit, with_dense_inputs=False)


def mpifa(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    ranks: Mapping[str, int],
    *,
    batches: Batches,
    moments: Mapping[str, Tensor],
) -> Weights:
    """SVD-LLM, then in forward order both factors refitted to `Y = (1 - l) W X' + l W X`, `l` = 0.25.

    With X' the inputs of the compressed prefix and X the dense model's, one position a column, first
    `U = Y X'^T V^T (V X' X'^T V^T)^-1`, then `V = U^+ (Y X'^T + e W) (X' X'^T + e I)^-1`, e = 0.001.
    """

    def refit(name: str, weight: Tensor, inputs: Products) -> Tensor:
        assert inputs.both is not None
        right = row_space(svd_llm({name: weight}, ranks, moments)[name], ranks[name])
        target = weight @ torch.lerp(inputs.compressed, inputs.both, MPIFA_MIXTURE)
        left = left_factor(target, right, inputs.compressed)
        ridge = MPIFA_RIDGE * torch.eye(weight.shape[1], dtype=weight.dtype)
        wanted = torch.linalg.solve(inputs.compressed + ridge, (target + MPIFA_RIDGE * weight).T).T
        return left @ (torch.linalg.pinv(left) @ wanted)

    return in_forward_order(model, layers, batches, refit=refit, with_dense_inputs=True)


def row_space(matrix: Tensor, rank: int) -> Tensor:
    """An orthonormal basis of the leading right singular vectors, `r x d_in`: V, but for what U makes good."""
    return torch.linalg.svd(matrix, full_matrices=False).Vh[:rank]


def left_factor(target: Tensor, right: Tensor, inputs: Tensor) -> Tensor:
    """`U = Y X^T V^T (V X X^T V^T)^-1` from `target = Y X^T`, V and `inputs = X X^T`.

    Of all that fit equally well where the inputs span fewer directions than the rank, the smallest.
    """
    return torch.linalg.lstsq(right @ inputs @ right.T, right @ target.T, driver="gelsd").solution.T


@dataclass(frozen=True)
class Products:
    """X' X'^T of a layer's inputs X' behind the compressed layers, and X X'^T with the dense model's X if asked for."""

    compressed: Tensor
    both: Tensor | None

    def __add__(self, other: Products) -> Products:
        both = None if self.both is None or other.both is None else self.both + other.both
        return Products(self.compressed + other.compressed, both)


# A layer's name, its matrix W and the products of its inputs, to what the matrix becomes.
Refit = Callable[[str, Tensor, Products], Tensor]


def in_forward_order(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches, *, refit: Refit, with_dense_inputs: bool
) -> Weights:
    """Replace the layers in the order in which data pass through them, those that share an input together."""
    weights = matrices(layers)
    names = {layer: name for name, layer in layers.items()}
    compressed = copy.deepcopy(model)
    places = {name: place for place, layer in model.named_modules() if (name := names.get(layer)) is not None}
    result: Weights = {}
    for group in sharing_an_input(model, layers, batches[0]):
        targets = {name: compressed.get_submodule(places[name]) for name in group}
        dense = {name: layers[name] for name in group} if with_dense_inputs else None
        products = joint_products(model, dense, compressed, targets=targets, batches=batches)
        for name, inputs in products.items():
            result[name] = refit(name, weights[name], inputs)
            set_matrix(targets[name], result[name])
    return result


@torch.no_grad()
def sharing_an_input(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Mapping[str, Tensor]
) -> list[tuple[str, ...]]:
    """The layers that are given one tensor, such as q, k and v, in the order of a forward pass."""
    groups: list[tuple[Tensor, list[str]]] = []

    def seen(name: str, x: Tensor) -> None:
        if not groups or groups[-1][0] is not x:
            groups.append((x, []))
        groups[-1][1].append(name)

    with inputs_seen(layers, seen):
        logits_of(model, batch)
    return [tuple(names) for _, names in groups]


class _AllSeen(Exception):  # noqa: N818 - nothing is wrong
    """Ends a forward pass behind the last layer that is of interest."""


def layer_inputs(model: nn.Module, layers: Mapping[str, nn.Module], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each layer is given in a forward pass, which is run no further than it takes."""
    found: dict[str, Tensor] = {}

    def seen(name: str, x: Tensor) -> None:
        found[name] = x
        if len(found) == len(layers):
            raise _AllSeen

    try:
        with inputs_seen(layers, seen):
            logits_of(model, batch)
    except _AllSeen:
        pass
    return found


@contextmanager
def inputs_seen(layers: Mapping[str, nn.Module], seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `seen` with a layer's name and input whenever one of the layers is run."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, arguments: seen(name, arguments[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def joint_products(
    model: nn.Module,
    dense: Mapping[str, nn.Module] | None,
    compressed: nn.Module,
    *,
    targets: Mapping[str, nn.Module],
    batches: Batches,
) -> dict[str, Products]:
    """`X' X'^T` of the targets' inputs, and `X X'^T` with those of the dense layers where these are given."""
    sums: dict[str, Products] = {}
    for batch in batches:
        after = layer_inputs(compressed, targets, batch)
        before = layer_inputs(model, dense, batch) if dense is not None else None
        # One product for all layers that make the same vectors of one input.
        found: dict[tuple[int, str], Products] = {}
        for name, target in targets.items():
            key = (id(after[name]), patches(target))
            if key not in found:
                x = input_vectors(target, after[name])
                both = None if before is None else input_vectors(target, before[name]).T @ x
                found[key] = Products(x.T @ x, both)
            sums[name] = found[key] if name not in sums else sums[name] + found[key]
    return sums


def matrices(layers: Mapping[str, nn.Module]) -> Weights:
    """The layers' weights as float64 matrices `d_out x d_in`, a convolution's with its patches as `d_in`."""
    return {name: layer.weight.detach().double().flatten(1) for name, layer in layers.items()}  # type: ignore[union-attr, operator]


@torch.no_grad()
def set_matrix(layer: nn.Module, matrix: Tensor) -> None:
    layer.weight.copy_(matrix.reshape(layer.weight.shape))  # type: ignore[union-attr, operator, arg-type]


def patches(layer: nn.Module) -> str:
    """What two layers must have in common to make the same vectors of one input."""
    if not isinstance(layer, nn.Conv2d):
        return ""
    return f"{layer.kernel_size} {layer.stride} {layer.padding} {layer.dilation}"


def input_vectors(layer: nn.Module, x: Tensor) -> Tensor:
    """What the layer's matrix is applied to, in float64, one vector a row."""
    if not isinstance(layer, nn.Conv2d):
        return x.flatten(0, -2).double()
    assert not isinstance(layer.padding, str)
    unfolded = nn.functional.unfold(
        x.double(), layer.kernel_size, dilation=layer.dilation, padding=layer.padding, stride=layer.stride
    )
    return unfolded.transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def input_statistics(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """E[x x^T] and E|x| of every layer's inputs, in float64."""
    sums: dict[str, Tensor] = {}
    magnitudes: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def seen(name: str, x: Tensor) -> None:
        vectors = input_vectors(layers[name], x)
        sums[name] = sums.get(name, torch.zeros(())) + vectors.T @ vectors
        magnitudes[name] = magnitudes.get(name, torch.zeros(())) + vectors.abs().sum(0)
        counts[name] = counts.get(name, 0) + len(vectors)

    with inputs_seen(layers, seen):
        for batch in batches:
            logits_of(model, batch)
    return (
        {name: total / counts[name] for name, total in sums.items()},
        {name: total / counts[name] for name, total in magnitudes.items()},
    )
