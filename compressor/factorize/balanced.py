"""Factor pairs scaled to fit the range of the dtype that stores them."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch

from compressor.factorize.spatial import SpatialPair
from compressor.factorize.truncated_svd import FactorPair

AnyPair = TypeVar("AnyPair", FactorPair, SpatialPair)


def balanced(pair: AnyPair, dtype: torch.dtype) -> AnyPair:
    """The same pair with each column of `up` and row of `down` scaled to similar size, where `dtype` needs it.

    float16 does: what the factors of a matrix span is wider than its range. The other types only near their limits, and
    elsewhere a power of two changes no digit.
    """
    sizes = [factor.transpose(0, side).flatten(1).abs().amax(1) for factor, side in ((pair.up, 1), (pair.down, 0))]
    if dtype != torch.float16 and max(float(size.max()) for size in sizes) <= torch.finfo(dtype).max:
        return pair
    above, below = (np.frexp(size.cpu().numpy())[1] for size in sizes)
    powers = torch.from_numpy(np.ldexp(1.0, (below - above) // 2)).to(pair.up)
    powers[(sizes[0] == 0) | (sizes[1] == 0)] = 1
    up = (pair.up.transpose(0, 1) * powers.view(-1, *[1] * (pair.up.dim() - 1))).transpose(0, 1)
    return replace(pair, up=up, down=pair.down / powers.view(-1, *[1] * (pair.down.dim() - 1)))
