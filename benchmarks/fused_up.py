"""A Triton kernel that multiplies with `up` of a pivoted pair and puts all columns in order, for a few rows.

With PyTorch's product for `down` a pivoted pair is two kernels, where the package launches three. The package does not
use it: it has been compiled for GPUs and compared with PyTorch in Triton's interpreter
(`tests/benchmarks/test_module_variants.py`), and not been timed. `module_variants.py --device cuda` does that.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _up_in_order(  # noqa: PLR0913, PLR0917 - a kernel gets pointers and sizes
    rows, up, order, y, rank, width, columns_at_once: tl.constexpr, ranks_at_once: tl.constexpr
):
    """Each program computes a block of columns of one row of the outputs.

    Column c is row `order[c] - rank` of `up` times the row of `rows`, or where that is negative a number of `rows`.
    """
    row = tl.program_id(1)
    columns = tl.program_id(0) * columns_at_once + tl.arange(0, columns_at_once)
    inside = columns < width
    source = tl.load(order + columns, mask=inside, other=0)
    multiplied = inside & (source >= rank)
    total = tl.zeros([columns_at_once], dtype=tl.float32)
    for start in range(0, rank, ranks_at_once):
        inner = start + tl.arange(0, ranks_at_once)
        left = tl.load(rows + row * rank + inner, mask=inner < rank, other=0.0).to(tl.float32)
        places = (source - rank).to(tl.int64)[:, None] * rank + inner[None, :]
        weights = tl.load(up + places, mask=multiplied[:, None] & (inner < rank)[None, :], other=0.0)
        total += tl.sum(weights.to(tl.float32) * left[None, :], axis=1)
    given = tl.load(rows + row * rank + source, mask=inside & (source < rank), other=0.0).to(tl.float32)
    tl.store(y + row * width + columns, tl.where(multiplied, total, given).to(y.dtype.element_ty), mask=inside)


def up_in_order(rows: Tensor, up: Tensor, order: Tensor) -> Tensor:
    """What a pivoted pair without a bias gives for the `n x r` outputs of its `down`, all tensors contiguous."""
    y = rows.new_empty(len(rows), len(order))
    at_once = 16
    grid = (triton.cdiv(len(order), at_once), len(rows))
    inner = min(256, triton.next_power_of_2(rows.shape[1]))
    _up_in_order[grid](rows, up, order, y, rows.shape[1], len(order), at_once, inner)
    return y
