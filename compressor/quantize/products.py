"""Products with a weight of integers, by the kernels that PyTorch has for them on a device.

It imports torch and the standard library alone: its source is copied into exported folders, as that of the layers that
use it.

There is a kernel for 8 bits, with a scale for each output, and one for 4, with a scale for each group of inputs. Other
widths below 8 are run by that of 4: fewer bits are widened to 4 when they are multiplied, and of more the lower four
bits and those above them are multiplied apart. So no weight takes more memory than its bits but the one that runs.

The kernels sum in float32, as a product with the dequantized weight does, and those of a CPU do not round the weight to
16 bits before: in bfloat16 outputs differ by 2^-8 of the largest, as those of two orders of a sum do. Before the first
product on a device each kernel has to show that on a small weight; where it does not, weights are dequantized.
"""

import functools
import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Rows of inputs up to which a kernel takes less time than to dequantize the weight, measured on a CPU with AVX-512.
MOST_ROWS_OF_8_BITS = 16
MOST_ROWS_OF_4_BITS = 128
# On an accelerator the kernel of 8 bits reads the weight once for each row.
MOST_ROWS_OF_8_BITS_ON_ACCELERATORS = 4
# What the kernel of 8 bits takes: of other inputs that of a CPU reads beyond the end.
INPUTS_OF_8_BITS = 16
# Bytes of which the address of inputs is a multiple: from others the kernel of 8 bits of a CPU crashes.
ALIGNMENT = 64
# What the kernel of 4 bits takes: outputs in multiples, and inputs in groups of these sizes.
OUTPUTS_OF_4_BITS = 16
GROUPS_OF_4_BITS = (256, 128, 64, 32)


def kernel_group(outputs: int, inputs: int, group_size: int | None) -> int:
    """The group size by which the kernel of 4 bits takes a weight, a divisor of its own; 0 where it does not."""
    own = inputs if group_size is None else group_size
    fitting = [size for size in GROUPS_OF_4_BITS if own % size == 0]
    return fitting[0] if fitting and outputs % OUTPUTS_OF_4_BITS == 0 else 0


def most_rows(bits: int) -> int:
    """The rows of inputs up to which a weight of so many bits, fewer than 8, is multiplied by a kernel."""
    return MOST_ROWS_OF_4_BITS if bits <= 4 else MOST_ROWS_OF_4_BITS // 2


def product_of_8_bits(input: Tensor, integers: Tensor, scales: Tensor, *, kernel: bool) -> Tensor:
    """`m x k` inputs in bfloat16 or float32 times `n x k` integers in int8 with a scale for each of n outputs.

    `kernel` is whether the device has one.
    """
    if kernel and _is_for_kernel_of_8_bits(input):
        return torch._weight_int8pack_mm(_laid_out(input), integers, scales)
    # Integers below 256 are exact in bfloat16.
    return torch.nn.functional.linear(input, integers.to(input.dtype)) * scales


def _is_for_kernel_of_8_bits(input: Tensor) -> bool:
    rows = MOST_ROWS_OF_8_BITS if input.is_cpu else MOST_ROWS_OF_8_BITS_ON_ACCELERATORS
    return len(input) <= rows and input.dtype == torch.bfloat16 and input.shape[1] % INPUTS_OF_8_BITS == 0


def product_of_few_bits(input: Tensor, held: Tensor, scales: Tensor, *, bits: int, group: int) -> Tensor:
    """`m x k` inputs in bfloat16 times `n x k` integers as `held_for_kernel` has them, less `2**(bits - 1)`.

    `scales` are `groups x n x 2` in bfloat16: each group's scale, and what is added to its weights. `group` is the
    group size that the kernel is told, a divisor of the weight's own.
    """
    input, repeats = _laid_out(input), input.shape[1] // (group * len(scales))
    scales = scales if repeats == 1 else scales.repeat_interleave(repeats, dim=0)
    if bits <= 4:
        return _multiplied(input, nibbles_of(held, bits, centered=True), scales, group=group)
    # w = 16 h + l - 2**(bits - 1) = (l - 8) + 8 (2 h + 1 - 2**(bits - 4)), and both fit into four bits less 8.
    low, high = _lower_and_upper(held.flatten(), 4, bits)
    upper = (nibbles_of(high, bits - 4, centered=False) << 1) + 0x11 * (9 - 2 ** (bits - 4))
    # Eight times a number has the same digits.
    return _multiplied(input, low, scales, group=group) + _multiplied(8 * input, upper, scales, group=group)


def _laid_out(input: Tensor) -> Tensor:
    """The inputs as kernels read them: row by row, from an address that they may be read from."""
    hidden = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(input)
    if hidden or input.data_ptr() % ALIGNMENT:  # an address that is hidden may be any
        return input.clone(memory_format=torch.contiguous_format)
    return input.contiguous()


def held_for_kernel(integers: Tensor, bits: int) -> Tensor:
    """`n x k` integers of 2 to 7 bits, in uint8, in the order of the kernel: `n x (k * bits / 8)` bytes."""
    if bits <= 4:
        held = _planes_of(_ordered(integers), bits)
    else:
        held = torch.cat([_ordered(integers & 15), _planes_of(_ordered(integers >> 4), bits - 4)])
    return held.view(len(integers), -1)


def unheld(held: Tensor, bits: int, *, order: str | None = None) -> Tensor:
    """The integers, in uint8, that `held_for_kernel` has put in the order of a type of device, by default their own."""
    order = held.device.type if order is None else order
    shape, flat = (len(held), held.shape[1] * 8 // bits), held.flatten()
    if bits <= 4:
        nibbles = nibbles_of(flat, bits, centered=False)
        return _unordered(nibbles & 15, nibbles >> 4, shape, order=order)
    low, high = _lower_and_upper(flat, 4, bits)
    upper = nibbles_of(high, bits - 4, centered=False)
    return _unordered(low & 15 | (upper & 15) << 4, low >> 4 | upper & 0xF0, shape, order=order)


# Two integers of 4 bits are a byte, and of fewer bits there is room for several such bytes in one: bytes of the first
# half have the bits 0 and 1 of both, those of the second half the bits 2 and 3; of one bit it is quarters.


def _lower_and_upper(held: Tensor, lower: int, bits: int) -> tuple[Tensor, Tensor]:
    size = held.numel() * lower // bits
    return held[:size], held[size:]


def _planes_of(nibbles: Tensor, bits: int) -> Tensor:
    if bits == 4:
        return nibbles
    if bits == 3:
        return torch.cat([_planes_of(nibbles & 0x33, 2), _planes_of(nibbles >> 2 & 0x11, 1)])
    parts = nibbles.chunk(4 // bits)
    joined = parts[0]
    for place, part in enumerate(parts[1:], 1):
        joined = joined | part << place * bits
    return joined


def nibbles_of(held: Tensor, bits: int, *, centered: bool) -> Tensor:
    """Integers of 1 to 4 bits widened to 4, two a byte; 8 is their middle where they are to be centered."""
    held = held.flatten()
    if bits == 4:
        return held
    if bits == 3:
        low, high = _lower_and_upper(held, 2, 3)
        nibbles = nibbles_of(low, 2, centered=False)
        for place, part in enumerate(nibbles.chunk(4)):
            part.bitwise_or_((high << 2 - place if place < 2 else high >> place - 2) & 0x44)
    else:
        count, mask = 4 // bits, 0x11 * (2**bits - 1)
        nibbles = held.new_empty(count * held.numel())
        for place, part in enumerate(nibbles.chunk(count)):
            torch.bitwise_and(held >> place * bits, mask, out=part)
    return nibbles.add_(0x11 * (8 - 2 ** (bits - 1))) if centered else nibbles


# What differs from device to device: the kernel of 4 bits, and the order in which it takes integers.


def _multiplied(input: Tensor, nibbles: Tensor, scales: Tensor, *, group: int) -> Tensor:
    product: Tensor
    outputs, inputs = scales.shape[1], input.shape[1]
    if input.is_cpu:
        packed = nibbles.view(outputs, inputs // 2)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(input, packed, group, scales)
        return product
    tiles = _inner_tiles(inputs)
    packed = nibbles.view(torch.int32).view(outputs // 8, inputs // (16 * tiles), 32, tiles // 2)
    product = torch.ops.aten._weight_int4pack_mm(input, packed, group, scales)
    return product


def _ordered(integers: Tensor) -> Tensor:
    """`n x k` integers below 16, two a byte, in the order of the kernel."""
    if integers.is_cpu:
        packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers.to(torch.int32), 2)
        return packed.flatten()
    pairs = integers[:, ::2] << 4 | integers[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, _inner_tiles(integers.shape[1]))
    return packed.view(torch.uint8).flatten()


def _unordered(lower: Tensor, upper: Tensor, shape: tuple[int, int], *, order: str) -> Tensor:
    """The `n x k` integers, in uint8, whose lower and upper halves of bytes came into a device's order so."""
    return (_from_blocks_of_rows if order == "cpu" else from_tiles)(lower, upper, shape)


def _inner_tiles(inputs: int) -> int:
    """How many tiles of 16 inputs lie beside each other in the order of an accelerator: what a thread reads at once."""
    return 8 if inputs % 128 == 0 else 4 if inputs % 64 == 0 else 2


def from_tiles(lower: Tensor, upper: Tensor, shape: tuple[int, int]) -> Tensor:
    """The integers in the order of tensor cores: for 8 outputs and 16 inputs at a time what each of 32 threads takes.

    Source: `matrix_to_m16n8k16_Bint4_layout` in aten/src/ATen/native/cuda/int4mm.cu. Thread t has output t / 4, and of
    two tiles one after the other the inputs 2 (t % 4) + (0, 1, 8, 9), the even ones in the lower half of 32 bits.
    """
    outputs, inputs = shape
    tiles = _inner_tiles(inputs)
    # Outputs by 8, inputs by tiles; output, thread of four; pairs of tiles; even or odd; tile of the pair; its half.
    numbers = torch.stack([lower, upper], dim=-1)
    numbers = numbers.view(outputs // 8, inputs // (16 * tiles), 8, 4, tiles // 2, 2, 2, 2)
    # As inputs come: tiles, pair of tiles, tile of the pair, half of the tile, thread, even or odd.
    return numbers.permute(0, 2, 1, 4, 6, 7, 3, 5).reshape(shape)


def _from_blocks_of_rows(lower: Tensor, upper: Tensor, shape: tuple[int, int]) -> Tensor:
    """The integers in the order of a CPU: blocks of rows, in a block one column after the other, two rows a byte."""
    rows, columns = shape
    integers, done = torch.empty(rows, columns, dtype=torch.uint8, device="cpu"), 0
    of_bytes = lower.cpu(), upper.cpu()
    for count, size, of_lower, of_upper in _blocks_of_rows(rows):
        ends = done + count * size * columns
        for places, half in zip((of_lower, of_upper), of_bytes, strict=True):
            integers[places] = half[done:ends].view(count, columns, size).transpose(1, 2).reshape(-1, columns)
        done = ends
    return integers.to(lower.device)


@functools.cache
def _blocks_of_rows(rows: int) -> list[tuple[int, int, Tensor, Tensor]]:
    """Blocks that are alike: how many, of how many bytes a column, and the rows of the halves of these bytes.

    They differ from CPU to CPU, so they are seen from what becomes of the numbers of the rows, a digit of 4 bits at a
    time.
    """
    numbers = torch.arange(rows, dtype=torch.int32, device="cpu")[:, None].expand(-1, 2)
    lower, upper = torch.zeros(2, rows, dtype=torch.int64, device="cpu")
    for shift in range(0, max(4, rows.bit_length()), 4):
        digits = _ordered((numbers >> shift & 15).contiguous()).long()
        lower += (digits & 15) << shift
        upper += (digits >> 4) << shift
    blocks, done = [], 0
    while done < rows:
        # Of two columns the second repeats the rows of the first.
        size = int((lower[done + 1 :] == lower[done]).nonzero()[0]) + 1
        firsts, repeated = lower[done : rows - size : 2 * size], lower[done + size :: 2 * size]
        count = int((firsts == repeated).int().cumprod(0).sum())
        of_lower, of_upper = (
            half[done : done + 2 * size * count].view(count, 2, size)[:, 0].flatten() for half in (lower, upper)
        )
        blocks.append((count, size, of_lower, of_upper))
        done += 2 * size * count
    return blocks


@functools.cache
def has_kernel(bits: int, device: torch.device) -> bool:
    """Whether PyTorch has a kernel for weights of 8 or of 4 bits on a device that multiplies as it should.

    It is tried once, on a small weight: of a device that was never tried nothing is taken on trust. A mode that watches
    the first product, such as one that counts operations, does not see the trial.
    """
    names = ["_weight_int8pack_mm"] if bits == 8 else ["_weight_int4pack_mm", "_convert_weight_to_int4pack"]
    ending = "_for_cpu" if bits == 4 and device.type == "cpu" else ""
    if device.type == "meta":
        return False
    try:
        key = torch._C._dispatch_key_for_device(device.type)
        if not all(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}{ending}", key) for name in names):
            return False
        with torch.utils._python_dispatch._disable_current_modes():
            (_try_8_bits if bits == 8 else _try_4_bits)(device)
    except Exception as error:
        logger.warning("weights of %d bits are dequantized on %s: its kernel for them fails: %s", bits, device, error)
        return False
    return True


def _try_8_bits(device: torch.device) -> None:
    numbers = torch.Generator().manual_seed(0)
    integers = torch.randint(-128, 128, (48, 112), generator=numbers, dtype=torch.int8, device="cpu")
    scales = torch.rand(48, generator=numbers, device="cpu").to(torch.bfloat16)
    input = torch.randn(7, 112, generator=numbers, device="cpu").to(torch.bfloat16)
    found = torch._weight_int8pack_mm(*(each.to(device) for each in (input, integers, scales)))
    _compare(found, input.double() @ (integers.double() * scales.double()[:, None]).T)


def _try_4_bits(device: torch.device) -> None:
    numbers = torch.Generator().manual_seed(0)
    for inputs, group in ((256, 256), (256, 64), (192, 64), (160, 32)):
        integers = torch.randint(16, (48, inputs), generator=numbers, dtype=torch.uint8, device="cpu")
        scales = torch.rand(inputs // group, 48, generator=numbers, device="cpu").to(torch.bfloat16)
        input = torch.randn(20, inputs, generator=numbers, device="cpu").to(torch.bfloat16)
        ordered = _ordered(integers.to(device))
        if not torch.equal(_unordered(ordered & 15, ordered >> 4, (48, inputs), order=device.type).cpu(), integers):
            raise ValueError("it takes integers in another order")
        both = torch.stack([scales, torch.zeros_like(scales)], dim=-1).to(device)
        found = _multiplied(input.to(device), ordered, both, group=group)
        weight = (integers.double() - 8) * scales.double().T.repeat_interleave(group, dim=1)
        _compare(found, input.double() @ weight.T)


def _compare(found: Tensor, expected: Tensor) -> None:
    difference = float((found.cpu().double() - expected).norm() / expected.norm())
    if not difference <= 2**-7:
        raise ValueError(f"its outputs differ by {difference:.1%}")
