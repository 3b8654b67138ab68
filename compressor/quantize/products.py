"""Products with a weight of integers, by the kernels that PyTorch has for them.

It imports torch alone: its source is copied into exported folders, as that of the layers that use it.

The kernels sum in float32, as a product with the dequantized weight does, and do not round the weight to 16 bits
before: in bfloat16 outputs differ by 2^-8 of the largest, as those of two orders of a sum do.
"""

import torch
from torch import Tensor

# Inputs up to which the kernels are faster than to dequantize the weight, measured on a CPU with AVX-512.
MOST_ROWS_OF_8_BITS = 16
MOST_ROWS_OF_4_BITS = 384
# The groups of inputs that share a scale which the kernel of 4 bits takes.
GROUPS_OF_4_BITS = (32, 64, 128, 256)


def product_of_8_bits(input: Tensor, integers: Tensor, scales: Tensor) -> Tensor:
    """`m x k` inputs times `n x k` integers in int8 with a scale for each of n outputs."""
    if input.dtype == torch.bfloat16 and len(input) <= MOST_ROWS_OF_8_BITS:
        return torch._weight_int8pack_mm(input, integers, scales)
    # Integers below 256 are exact in bfloat16.
    return torch.nn.functional.linear(input, integers.to(input.dtype)) * scales


def packed_of_4_bits(integers: Tensor) -> Tensor:
    """`n x k` integers below 16 in int32, in the order that the kernel takes: `n x k / 2` bytes."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 2)
    return packed


def product_of_4_bits(input: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """`m x k` inputs in bfloat16 times packed integers, less 8.

    `scales` are `groups x n x 2`: each group's scale, and what is added to its weights.
    """
    group = input.shape[1] // scales.shape[0]
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(input, packed, group, scales)
    return product


def unpacked_of_4_bits(packed: Tensor) -> Tensor:
    """The integers, in uint8, of which PyTorch made the `n x k / 2` bytes that its kernel takes.

    Rows lie in blocks, and in a block one column after the other, two rows a byte. In which order differs from CPU to
    CPU, so it is seen from what becomes of the numbers of the rows, a digit of 4 bits at a time.
    """
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    numbers = torch.arange(rows, dtype=torch.int32)[:, None].expand(-1, 2)
    low, high = torch.zeros(2, rows, dtype=torch.int64)
    for shift in range(0, max(4, rows.bit_length()), 4):
        digits = packed_of_4_bits((numbers >> shift & 15).contiguous()).flatten().long()
        low += (digits & 15) << shift
        high += (digits >> 4) << shift
    integers = torch.empty(rows, columns, dtype=torch.uint8)
    done = 0
    while done < rows:
        # Of two columns the second repeats the rows of the first.
        size = int((low[done + 1 :] == low[done]).nonzero()[0]) + 1
        block = packed.flatten()[done * columns // 2 : (done + 2 * size) * columns // 2].view(columns, size)
        integers[low[done : done + size]] = (block & 15).T
        integers[high[done : done + size]] = (block >> 4).T
        done += 2 * size
    return integers
