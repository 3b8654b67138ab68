"""How a pair is split over the ranks of tensor parallelism, as functions of tensors.

`y = up(down(x))`. In a column-parallel layer each rank has the whole input and makes its own rows of the output: it
holds all of `down` and its rows of `up`, and the outputs are put one after the other. In a row-parallel layer each rank
has its own columns of the input: it holds its columns of `down` and all of `up`, and the outputs are added up. Layers
that are fused in the engine (query, key and value; gate and up) are one column-parallel layer of several parts, each of
its own rank, or dense; the `down` of all parts is one product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

# Rows of a matrix, from the first to the one after the last.
Rows = tuple[int, int]


@dataclass(frozen=True)
class ShardedPart:
    """One part of a layer on one rank: `down` of `r x d_in`, none where the part is dense, and `up`.

    `up` is `rows x r`, or the rows of the dense weight.
    """

    down: Tensor | None
    up: Tensor


def plain_factors(stored: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor]:
    """`down` and `up` of `d_out` rows from stored tensors by role; `(None, weight)` for a dense layer.

    A pivoted pair is spread out, `up = concatenate(identity, up)[order]`: rows of a shard are then rows of `up`.
    """
    if "down" not in stored:
        return None, stored["weight"]
    down, up = stored["down"], stored["up"]
    if "order" in stored:
        identity = torch.eye(down.shape[0], dtype=up.dtype, device=up.device)
        up = torch.cat([identity, up])[stored["order"].long()]
    return down, up


def shard_rows(d_out: int, size: int, tp_rank: int, *, replicas: int = 1) -> Rows:
    """The rows of a rank in a part of `d_out` rows of which each rank holds `size`.

    `replicas` ranks in a row hold the same ones: keys and values, where there are fewer heads than ranks. ValueError
    where the part does not have these rows.
    """
    start = tp_rank // replicas * size
    if start + size > d_out:
        raise ValueError(f"rank {tp_rank} would hold rows {start} to {start + size} of {d_out}")
    return start, start + size


def column_shard(stored: Mapping[str, Tensor], rows: Sequence[Rows]) -> ShardedPart:
    """A rank's share of a part of a column-parallel layer: its rows, of one range or of several."""
    down, up = plain_factors(stored)
    mine = torch.cat([up[start:stop] for start, stop in rows])
    return ShardedPart(down, mine.contiguous())


def row_shard(stored: Mapping[str, Tensor], tp_rank: int, tp_size: int) -> ShardedPart:
    """A rank's share of a row-parallel layer: its columns of `down`, or of the dense weight."""
    down, up = plain_factors(stored)
    columns = (up if down is None else down).shape[1]
    if columns % tp_size:
        raise ValueError(f"{columns} inputs cannot be shared by {tp_size} ranks")
    size = columns // tp_size
    mine = slice(tp_rank * size, (tp_rank + 1) * size)
    if down is None:
        return ShardedPart(None, up[:, mine].contiguous())
    return ShardedPart(down[:, mine].contiguous(), up.contiguous())


def stacked_down(parts: Sequence[ShardedPart]) -> Tensor | None:
    """The `down` of all parts as one matrix, in their order; None where all are dense."""
    downs = [part.down for part in parts if part.down is not None]
    return torch.cat(downs) if downs else None


def fused_product(x: Tensor, down: Tensor | None, *, ups: Sequence[Tensor], ranks: Sequence[int | None]) -> Tensor:
    """The outputs of all parts one after the other; `ranks` says how much of `down` is each one's, None if dense."""
    hidden = None if down is None else linear(x, down)
    outputs, start = [], 0
    for up, rank in zip(ups, ranks, strict=True):
        if rank is None or hidden is None:
            outputs.append(linear(x, up))
        else:
            outputs.append(linear(hidden[..., start : start + rank], up))
            start += rank
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
