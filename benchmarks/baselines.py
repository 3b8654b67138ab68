"""Published low-rank compressors in a few lines each, to be compared with at the same number of stored parameters.

Own implementations from the papers: plain truncated SVD; ASVD (Yuan et al. 2023, arXiv 2312.05821: columns scaled by
the mean absolute activation to the power 1/2); SVD-LLM (Wang et al., ICLR 2025, arXiv 2403.07378: whitening by the
Cholesky factor of the inputs' second moment), also with its sequential update (the left factor refitted, in forward
order, to what the dense layer makes of the inputs that it will really get) and in the pivoted storage of PIFA (Zhao et
al., ICML 2025). Every layer keeps the same fraction of its parameters (ASVD's search for ranks is left out).
tests/benchmarks checks each against what its paper states.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

Batches = Sequence[Mapping[str, Tensor]]
Weights = dict[str, Tensor]


def uniform_ranks(shapes: Mapping[str, tuple[int, int]], keep: float, *, pivoted: bool = False) -> dict[str, int]:
    """The rank of every layer at which it stores `keep` of its parameters, at least 1."""
    ranks = {}
    for name, (d_out, d_in) in shapes.items():
        numbers = keep * d_out * d_in
        if pivoted:  # r (d_out + d_in - r) + d_out = numbers
            half = (d_out + d_in) / 2
            rank = half - math.sqrt(max(0.0, half**2 - (numbers - d_out)))
        else:
            rank = numbers / (d_out + d_in)
        ranks[name] = max(1, min(int(rank), d_out, d_in))
    return ranks


def stored(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], *, pivoted: bool = False) -> int:
    """Parameters that the pairs store, the order of a pivoted pair included."""
    total = 0
    for name, rank in ranks.items():
        d_out, d_in = shapes[name]
        total += rank * (d_out + d_in - rank) + d_out if pivoted else rank * (d_out + d_in)
    return total


def equalised(shapes: Mapping[str, tuple[int, int]], target: int, *, pivoted: bool = False) -> dict[str, int]:
    """Uniform ranks that store as many parameters as fit into `target`; what bisection leaves is spread by rank."""
    low, high = 0.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        fits = stored(shapes, uniform_ranks(shapes, middle, pivoted=pivoted), pivoted=pivoted) <= target
        low, high = (middle, high) if fits else (low, middle)
    ranks = uniform_ranks(shapes, low, pivoted=pivoted)
    for name in sorted(shapes, key=lambda name: -sum(shapes[name])):
        more = ranks | {name: ranks[name] + 1}
        if ranks[name] < min(shapes[name]) and stored(shapes, more, pivoted=pivoted) <= target:
            ranks = more
    return ranks


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """Eckart and Young, by LAPACK."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


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
    model: nn.Module, layers: Mapping[str, nn.Module], ranks: Mapping[str, int], batches: Batches
) -> Weights:
    """SVD-LLM, then in forward order `U = argmin E||W x' - U V x'||^2` on the inputs x' of the compressed prefix."""
    weights = matrices(layers)
    moments, _ = input_statistics(model, layers, batches)
    names = {layer: name for name, layer in layers.items()}
    compressed = copy.deepcopy(model)
    places = dict(compressed.named_modules())
    targets = {name: places[place] for place, module in model.named_modules() if (name := names.get(module))}
    result: Weights = {}
    for name in weights:
        whitened = svd_llm({name: weights[name]}, ranks, moments)[name]
        _, _, right = torch.linalg.svd(whitened, full_matrices=False)
        right = right[: ranks[name]]
        seen, _ = input_statistics(compressed, {name: targets[name]}, batches)
        normal = right @ seen[name] @ right.T
        left = torch.linalg.solve(normal, right @ seen[name] @ weights[name].T).T
        result[name] = left @ right
        set_matrix(targets[name], result[name])
    return result


def matrices(layers: Mapping[str, nn.Module]) -> Weights:
    """The layers' weights as float64 matrices `d_out x d_in`."""
    return {name: layer.weight.detach().double() for name, layer in layers.items()}  # type: ignore[union-attr, operator]


@torch.no_grad()
def set_matrix(layer: nn.Module, matrix: Tensor) -> None:
    layer.weight.copy_(matrix)  # type: ignore[union-attr, operator]


@torch.no_grad()
def input_statistics(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """E[x x^T] and E|x| of every linear layer's inputs, in float64."""
    sums: dict[str, Tensor] = {}
    magnitudes: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def collect(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].flatten(0, -2).double()
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + x.T @ x
            magnitudes[name] = magnitudes.get(name, torch.zeros((), dtype=torch.float64)) + x.abs().sum(0)
            counts[name] = counts.get(name, 0) + len(x)

        return collect

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        for batch in batches:
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return (
        {name: total / counts[name] for name, total in sums.items()},
        {name: total / counts[name] for name, total in magnitudes.items()},
    )
