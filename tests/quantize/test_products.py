"""Integers come back from the orders of kernels, and a kernel that does not multiply as it should is not used."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from compressor.quantize.products import from_tiles, has_kernel, held_for_kernel, kernel_group, unheld

CPU = torch.device("cpu")


@given(bits=st.integers(2, 7), rows=st.integers(1, 13), columns=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_integers_come_back_from_the_order_of_a_kernel(*, bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(2**bits, (16 * rows, 32 * columns), generator=generator, dtype=torch.uint8)
    held = held_for_kernel(integers, bits)
    assert held.nbytes == integers.numel() * bits // 8
    assert torch.equal(unheld(held, bits), integers)


def tiles_of(outputs: int, inputs: int, tiles: int) -> Iterator[tuple[tuple[int, ...], int, int, int]]:
    """Where `_convert_weight_to_int4pack` puts each number on CUDA: a word, a shift in it, and its output and input."""
    shape = (outputs // 8, inputs // (16 * tiles), 32, tiles // 2)
    for block, outer, thread, inner in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        start, row = (outer * tiles + 2 * inner) * 16, block * 8 + thread // 4
        pairs = [start + 16 * tile + half + 2 * (thread % 4) for tile in (0, 1) for half in (0, 8)]
        for number, column in enumerate(pairs):
            # v7 | v5 | v3 | v1 | v6 | v4 | v2 | v0, of the highest four bits first
            yield (block, outer, thread, inner), 4 * number, row, column
            yield (block, outer, thread, inner), 4 * number + 16, row, column + 1


def tiled(integers: Tensor, tiles: int) -> Tensor:
    """Integers below 16 in that order, in int32."""
    outputs, inputs = integers.shape
    words = torch.zeros(outputs // 8, inputs // (16 * tiles), 32, tiles // 2, dtype=torch.int64)
    for word, shift, row, column in tiles_of(outputs, inputs, tiles):
        words[word] |= int(integers[row, column]) << shift
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


@pytest.mark.parametrize(("inputs", "tiles"), [(256, 8), (192, 4), (96, 2)])
def test_integers_come_back_from_the_order_of_tensor_cores(inputs: int, tiles: int) -> None:
    integers = torch.randint(16, (16, inputs), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    words = tiled(integers, tiles)
    meta = torch.ops.aten._convert_weight_to_int4pack(
        torch.empty(16, inputs // 2, dtype=torch.uint8, device="meta"), tiles
    )
    assert words.shape == meta.shape
    pairs = words.view(torch.uint8).flatten()
    assert torch.equal(from_tiles(pairs & 15, pairs >> 4, (16, inputs)), integers)


def test_which_weights_the_kernel_of_four_bits_takes() -> None:
    assert [kernel_group(16, 512, size) for size in (512, 256, 128, 96, 64, 32, 48, 16)] == [
        256,
        256,
        128,
        32,
        64,
        32,
        0,
        0,
    ]
    assert [kernel_group(16, inputs, None) for inputs in (1024, 192, 160, 144)] == [256, 64, 32, 0]
    assert kernel_group(24, 1024, 128) == 0


def test_this_cpu_has_kernels_that_multiply_as_they_should() -> None:
    assert has_kernel(4, CPU)
    assert has_kernel(8, CPU)
    assert not has_kernel(4, torch.device("meta"))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_trial_of_a_kernel_is_no_operation_of_the_model(bits: int) -> None:
    has_kernel.cache_clear()
    with FlopCounterMode(display=False) as counter:
        assert has_kernel(bits, CPU)
    assert counter.get_total_flops() == 0
