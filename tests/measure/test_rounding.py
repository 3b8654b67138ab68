"""A difference of stored weights is what training wrote and what rounding added, and the second is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.measure.rounding import rounding

torch.set_num_threads(1)


def merged(shape: tuple[int, int], size: float, dtype: torch.dtype, *, rank: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """A start in a dtype, a change of low rank and a size relative to it, and the sum as it is stored."""
    generator = torch.Generator().manual_seed(sum(shape))
    rows, columns = shape
    start = (0.04 * torch.randn(shape, generator=generator)).to(dtype)
    left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    change = (left @ right).double()
    change *= size * start.double().norm() / change.norm()
    return start, change, (start.double() + change).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(48, 96), (256, 64), (256, 256)])
@pytest.mark.parametrize("size", [0.005, 0.02, 0.2])
def test_what_rounding_added_is_known_without_the_true_change(
    shape: tuple[int, int], size: float, dtype: torch.dtype
) -> None:
    start, change, stored = merged(shape, size, dtype)
    difference = stored.double() - start.double()
    found = rounding(stored, difference)
    noise = difference - change
    assert found.share == pytest.approx(float(noise.norm() / difference.norm()), rel=0.1)
    values = torch.linalg.svdvals(difference)
    assert int((values > found.edge).sum()) == 4
    if size > 0.01:  # a change below the spacing is rounded in a way that follows it
        assert float(torch.linalg.svdvals(noise)[0]) < found.edge
    # The dtype of a file says nothing where the numbers were rounded before.
    assert rounding(stored.float(), difference) == found


def test_rows_of_very_different_sizes() -> None:
    """The spacing follows the weights, so that large rows are rounded most."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-3, 0, 128)[:, None]
    start = (sizes * torch.randn(128, 128, generator=generator)).to(torch.bfloat16)
    true = start.double() + 0.05 * sizes.double() * torch.randn(128, 128, generator=generator).double()
    stored = true.to(torch.bfloat16)
    found = rounding(stored, stored.double() - start.double())
    noise = torch.linalg.svdvals(stored.double() - true)
    assert noise[0] < found.edge < 3 * noise[0]


def test_nothing_is_rounding_that_did_not_move() -> None:
    """A change far below the spacing moves few numbers; rounding explains no more than all of it."""
    start, _, stored = merged((128, 128), 1e-4, torch.bfloat16)
    difference = stored.double() - start.double()
    assert rounding(stored, difference).share == pytest.approx(1, abs=0.3)
    assert rounding(stored, difference).share <= 1
    assert rounding(stored, torch.zeros_like(difference)).share == 0


def test_the_smallest_numbers_of_a_dtype_have_one_spacing() -> None:
    generator = torch.Generator().manual_seed(0)
    true = 2e-7 * torch.randn(64, 64, generator=generator, dtype=torch.float64)
    stored = true.to(torch.float16)
    found = rounding(stored, stored.double())
    assert found.share == pytest.approx(float((stored.double() - true).norm() / stored.double().norm()), rel=0.2)


def test_a_weight_of_zero_is_rounded_least() -> None:
    """Numbers that were pruned away, or that float16 cannot tell from zero, are no rounding of all that they were."""
    start, _, stored = merged((64, 64), 0.2, torch.bfloat16)
    pruned = stored.masked_fill(torch.arange(64 * 64).view(64, 64) % 2 == 0, 0.0)
    assert rounding(pruned, pruned.double() - start.double()).share < 0.01
    tiny = (1e-6 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).to(torch.float16)
    change = 5e-7 * torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).double()
    moved = (tiny.double() + change).to(torch.float16)
    difference = moved.double() - tiny.double()
    assert rounding(moved, difference).share == pytest.approx(
        float((difference - change).norm() / difference.norm()), rel=0.1
    )


def test_float32_is_hardly_rounded() -> None:
    start, _, stored = merged((64, 64), 0.02, torch.float32)
    assert rounding(stored, stored.double() - start.double()).share < 1e-4
