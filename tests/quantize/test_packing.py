"""Packed integers are those of the package whose layout they follow, bit for bit."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st

from compressor.quantize import pack, packed_width, unpack


@given(bits=st.integers(1, 8), rows=st.integers(1, 5), numbers=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_integers_are_packed_as_compressed_tensors_packs_them(*, bits: int, rows: int, numbers: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(2**bits, (rows, numbers), generator=generator, dtype=torch.uint8)

    packed = pack(integers, bits)

    signed = (integers.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert packed.shape == (rows, packed_width(numbers, bits))
    assert torch.equal(packed, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(packed, bits, integers.shape), signed)
    assert torch.equal(unpack(packed, bits, numbers), integers)


@pytest.mark.parametrize("bits", range(1, 9))
def test_all_ones_and_all_zeros_survive(bits: int) -> None:
    for value in (0, 2**bits - 1):
        integers = torch.full((2, 33), value, dtype=torch.uint8)
        assert torch.equal(unpack(pack(integers, bits), bits, 33), integers)


def test_bits_lie_in_the_order_of_the_numbers() -> None:
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x321]]
    # The eleventh number of three bits has two in the first word and one in the second.
    numbers = torch.zeros(1, 11, dtype=torch.uint8)
    numbers[0, 10] = 0b111
    assert pack(numbers, 3).tolist() == [[-(1 << 30), 1]]


def test_a_column_of_one_word_is_unpacked_in_whichever_strides_it_lies() -> None:
    integers = torch.arange(24, dtype=torch.uint8).view(24, 1).expand(24, 9) % 8
    turned = pack(integers, 3).as_strided((24, 1), (1, 24))
    assert torch.equal(unpack(turned, 3, 9), integers)
