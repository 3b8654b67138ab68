"""Weights of several networks as one: added or put side by side, factor pairs without being multiplied out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from compressor.factorize import FactorPair, PivotedPair, SpatialPair

# A dense weight is `d_out x d_in x kernel`, a bias `d_out`; the factors of a convolution have its kernel in `down`.
Weight = Tensor | FactorPair | PivotedPair


def joined(weights: Sequence[Weight], *, shared_inputs: bool, shared_outputs: bool) -> Weight:
    """One weight that does what several do, on inputs and outputs that they share or have each to itself.

    With both shared it is the sum; with shared inputs alone the weights are stacked, with shared outputs alone they
    stand side by side, and with neither shared they are the blocks of a diagonal. Pairs of rank r1, r2, ... become a
    pair of rank r1 + r2 + ..., of the same matrix, unless that stores more numbers than the matrix has. Pivoted pairs
    stay pivoted unless their outputs are shared. Among dense weights a pair is multiplied out.
    """
    if all(isinstance(weight, PivotedPair) for weight in weights) and not shared_outputs:
        return _joined_pivoted([w for w in weights if isinstance(w, PivotedPair)], shared_inputs=shared_inputs)
    plain = [as_pair(weight) if isinstance(weight, PivotedPair) else weight for weight in weights]
    pairs = [weight for weight in plain if isinstance(weight, FactorPair)]
    if len(pairs) == len(plain) and len({_is_spatial(pair) for pair in pairs}) == 1:
        pair = FactorPair(
            up=_placed([p.up for p in pairs], shared_inputs=False, shared_outputs=shared_outputs),
            down=_placed([p.down for p in pairs], shared_inputs=shared_inputs, shared_outputs=False),
        )
        if pair.up.numel() + pair.down.numel() < math.prod(
            (pair.up.shape[0], *pair.down.shape[1:], *pair.up.shape[2:])
        ):
            return pair
    return _placed([dense(w) for w in plain], shared_inputs=shared_inputs, shared_outputs=shared_outputs)


def as_pair(pivoted: PivotedPair) -> FactorPair:
    """The plain pair of the same matrix: `up` gets the rows of the identity back, in the order of the rows."""
    identity = torch.eye(pivoted.rank, dtype=pivoted.up.dtype, device=pivoted.up.device)
    return FactorPair(up=torch.cat([identity, pivoted.up])[pivoted.order.long()], down=pivoted.down)


def dense(weight: Weight) -> Tensor:
    """The weight itself, or the one that a pair stands for: `d_out x d_in x kernel`."""
    if isinstance(weight, Tensor):
        return weight
    pair = as_pair(weight) if isinstance(weight, PivotedPair) else weight
    if _is_spatial(pair):
        matrix = SpatialPair(up=pair.up.squeeze(2), down=pair.down.squeeze(3)).product()
        return matrix.reshape(pair.up.shape[0], *pair.down.shape[1:3], pair.up.shape[3])
    return (pair.up.flatten(1) @ pair.down.flatten(1)).reshape(pair.up.shape[0], *pair.down.shape[1:])


def _is_spatial(pair: FactorPair) -> bool:
    """Whether a pair of convolutions works on the columns of an image and then on its rows."""
    return pair.up.ndim == 4 and pair.up.shape[3] > 1


def scaled(weight: Weight, factor: float) -> Weight:
    """The weight times a number."""
    if isinstance(weight, Tensor):
        return weight * factor
    return replace(weight, down=weight.down * factor)


def turned(weight: Weight) -> Weight:
    """The transpose of a matrix."""
    if isinstance(weight, Tensor):
        return weight.T
    pair = as_pair(weight) if isinstance(weight, PivotedPair) else weight
    return FactorPair(up=pair.down.T, down=pair.up.T)


def _placed(parts: Sequence[Tensor], *, shared_inputs: bool, shared_outputs: bool) -> Tensor:
    """Tensors of `outputs x inputs x ...` in one, each at its own outputs and inputs where these are not shared."""
    if parts[0].ndim == 0:  # a single number, which only sums have
        return torch.stack(list(parts)).sum(0)
    outputs, inputs = [p.shape[0] for p in parts], [p.shape[1] if p.ndim > 1 else 1 for p in parts]
    sides = (max(outputs) if shared_outputs else sum(outputs), max(inputs) if shared_inputs else sum(inputs))
    whole = parts[0].new_zeros(sides[: parts[0].ndim] + tuple(parts[0].shape[2:]))
    row = column = 0
    for part, height, width in zip(parts, outputs, inputs, strict=True):
        block = whole[row : row + height]
        (block if part.ndim == 1 else block[:, column : column + width]).add_(part)
        row += 0 if shared_outputs else height
        column += 0 if shared_inputs else width
    return whole


def _joined_pivoted(pairs: Sequence[PivotedPair], *, shared_inputs: bool) -> PivotedPair:
    """Rows that were pivots come first in all of them together, so each order is shifted by what comes before."""
    rank = sum(pair.rank for pair in pairs)
    pivots = others = 0
    orders = []
    for pair in pairs:
        is_pivot = pair.order < pair.rank
        orders.append(torch.where(is_pivot, pair.order + pivots, pair.order - pair.rank + rank + others))
        pivots += pair.rank
        others += pair.up.shape[0]
    return PivotedPair(
        up=_placed([pair.up for pair in pairs], shared_inputs=False, shared_outputs=False),
        down=_placed([pair.down for pair in pairs], shared_inputs=shared_inputs, shared_outputs=False),
        order=torch.cat(orders),
    )
