"""How a workload uses a layer: how often, and at how many rows or on inputs of which size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """One forward of a model that latency is stated for, such as `decode, batch 1`, with `batch` examples."""

    name: str
    batch: int


@dataclass(frozen=True, kw_only=True)
class LayerUse:
    """How one forward uses one layer.

    Attributes:
        calls: How often the layer is called.
        rows: Rows that a linear layer or an embedding gets in one call: batch x positions.
        head_rows: Rows that the head tied to an embedding gets in one forward; 0 where there is none.
        batch: Examples that a convolution gets in one call.
        in_size: Spatial sizes of a convolution's inputs.
        out_size: Those of its outputs.
        bias: Whether the layer adds a bias.
    """

    calls: int = 1
    rows: int = 0
    head_rows: int = 0
    batch: int = 0
    in_size: tuple[int, ...] = ()
    out_size: tuple[int, ...] = ()
    bias: bool = False
