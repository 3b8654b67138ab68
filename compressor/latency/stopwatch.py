"""Kernels run and timed on the device at hand."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.latency.kernels import Convolution, IntegerProduct, Kernel, MatrixProduct, ModuleCall, Movement
from compressor.quantize.packing import packed_width, unpack
from compressor.quantize.products import has_kernel, held_for_kernel, product_of_8_bits, product_of_few_bits

# What a kernel is run as, once for each of the weights that it takes in turn.
Operation = Callable[[], object]


@dataclass(frozen=True)
class StopwatchSettings:
    """How kernels are timed.

    Attributes:
        layers: Layers of a model; their weights are taken in turn, so that few of them are in the cache.
        memory: Bytes of these weights at most.
        flops: Operations of a round over them at most, on a CPU: what computes longer does not wait for weights.
        seconds: A round over all weights that takes less is repeated as often as fills so many.
        rounds: How often such a one is timed.
    """

    layers: int = 24
    memory: int = 2**26
    flops: float = 5e8
    seconds: float = 0.001
    rounds: int = 2


@dataclass(frozen=True)
class Stopwatch:
    """Times kernels on a device, by a clock that counts seconds."""

    device: torch.device
    clock: Callable[[], float]
    settings: StopwatchSettings = StopwatchSettings()
    _memory: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.device.type == "cpu":
            keep_freed_memory()

    def seconds(self, kernel: Kernel, dtype: torch.dtype) -> float:
        """Seconds of one run, the fastest of some rounds: what else the machine does only adds to it."""
        with torch.no_grad():
            return self._fastest(self._operations(kernel, dtype))

    def _fastest(self, operations: list[Operation]) -> float:
        operations[0]()
        best = self._round(operations, 1)
        if best < self.settings.seconds:
            # A clock has its grain, and to wait for an accelerator takes as long as a few kernels.
            repeats = math.ceil(self.settings.seconds / max(best, 1e-9))
            best = min(self._round(operations, repeats) / repeats for _ in range(self.settings.rounds))
        return best / len(operations)

    def _round(self, operations: list[Operation], repeats: int) -> float:
        self._wait()
        start = self.clock()
        for _ in range(repeats):
            for operation in operations:
                operation()
        self._wait()
        return self.clock() - start

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _operations(self, kernel: Kernel, dtype: torch.dtype) -> list[Operation]:
        if isinstance(kernel, IntegerProduct):
            return self._integer_products(kernel, dtype)
        if isinstance(kernel, MatrixProduct):
            return self._products(int(kernel.rows), int(kernel.inner), int(kernel.columns), dtype=dtype)
        if isinstance(kernel, Convolution):
            return self._convolutions(kernel, dtype)
        if isinstance(kernel, Movement):
            return self._moves(kernel, dtype)
        assert isinstance(kernel, ModuleCall)
        # Each layer of a model is a module of its own, whose attributes have left the cache when its turn comes.
        x = self._numbers((1,), dtype)
        return [partial(_Reads(), x) for _ in range(self.settings.layers)]

    def _products(self, rows: int, inner: int, columns: int, *, dtype: torch.dtype) -> list[Operation]:
        x = self._numbers((rows, inner), dtype)
        square = max(inner, columns) ** 2
        weights = self._weights((columns, inner), dtype, layer=square, flops=2.0 * rows * inner * columns)
        return [partial(functional.linear, x, weight) for weight in weights]

    def _integer_products(self, kernel: IntegerProduct, dtype: torch.dtype) -> list[Operation]:
        rows, inner, columns = int(kernel.rows), int(kernel.inner), int(kernel.columns)
        x = self._numbers((rows, inner), dtype)
        square = max(inner, columns) ** 2
        count = len(self._weights((columns, inner), torch.int8, layer=square, flops=float(kernel.flops)))
        numbers = torch.Generator().manual_seed(0)
        if kernel.bits == 8:
            scales = self._numbers((columns,), dtype)
            weight = torch.randint(-128, 128, (columns, inner), generator=numbers, dtype=torch.int8).to(self.device)
            product = partial(product_of_8_bits, x, kernel=has_kernel(8, self.device))
            return [partial(product, weight.clone(), scales) for _ in range(count)]
        group = min(128, inner)
        scales = self._numbers((inner // group, columns, 2), dtype)
        integers = torch.randint(2**kernel.bits, (columns, inner), generator=numbers, dtype=torch.uint8)
        held = held_for_kernel(integers.to(self.device), kernel.bits)
        return [
            partial(product_of_few_bits, x, held.clone(), scales, bits=kernel.bits, group=group) for _ in range(count)
        ]

    def _convolutions(self, kernel: Convolution, dtype: torch.dtype) -> list[Operation]:
        x = self._numbers((kernel.batch, int(kernel.in_channels), *kernel.in_size), dtype)
        shape = (int(kernel.out_channels), int(kernel.in_channels), *kernel.kernel)
        strides = [round(before / after) for before, after in zip(kernel.in_size, kernel.out_size, strict=True)]
        padding = [side // 2 for side in kernel.kernel]
        square = max(shape[:2]) ** 2 * math.prod(kernel.kernel)
        weights = self._weights(shape, dtype, layer=square, flops=float(kernel.flops))
        return [partial(functional.conv2d, x, weight, None, strides, padding) for weight in weights]

    def _moves(self, kernel: Movement, dtype: torch.dtype) -> list[Operation]:
        rows, columns = int(kernel.rows), int(kernel.columns)
        x = self._numbers((rows, columns), dtype)
        if kernel.how == "copy":
            parts = [x[:, : columns // 2], x[:, columns // 2 :]]
            return [lambda: torch.cat(parts, dim=-1)]
        if kernel.how == "add":
            bias = self._numbers((columns,), dtype)
            return [lambda: x + bias]
        if kernel.how == "lookup":
            table = self._numbers((4096, columns), dtype)
            tokens = torch.randint(4096, (rows,), generator=torch.Generator().manual_seed(0)).to(self.device)
            return [lambda: functional.embedding(tokens, table)]
        if kernel.how == "dequantize":
            groups = self._numbers((rows, max(1, columns // 32), 1), dtype)
            packed = torch.zeros(rows, packed_width(columns, 3), dtype=torch.int32, device=self.device)
            return [
                lambda: unpack(packed, 3, columns).to(dtype).view(*groups.shape[:2], -1).sub_(4).mul_(groups).flatten(1)
            ]
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(0)).to(torch.int32).to(self.device)
        if dtype == torch.float32 or x.numel() < 4096 or self.device.type != "cpu":
            return [lambda: x.index_select(-1, order)]
        # What pivoted pairs do where PyTorch has no vector instructions for it.
        return [lambda: x.gather(-1, order.long().expand_as(x))]

    def _weights(self, shape: tuple[int, ...], dtype: torch.dtype, *, layer: int, flops: float) -> list[Tensor]:
        """Weights to be taken in turn, of as many bytes together as a model of such layers of `layer` numbers.

        A factor is no smaller a part of its model than its layer: when its turn comes the others were in the cache.
        """
        numbers = math.prod(shape)
        together = min(self.settings.memory, self.settings.layers * layer * dtype.itemsize)
        most = self.settings.flops / flops if self.device.type == "cpu" else math.inf
        count = int(max(2, min(together // (numbers * dtype.itemsize), most)))
        # Each in memory of its own, as a model's are.
        return [self._numbers(shape, dtype).clone() for _ in range(count)]

    def _numbers(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Random numbers, small so that no product overflows, and not so small that they are denormal."""
        count = math.prod(shape)
        if dtype not in self._memory or self._memory[dtype].numel() < count:
            block = torch.rand(2**16, generator=torch.Generator().manual_seed(0)).sub_(0.5).mul_(0.1).to(dtype)
            repeated = block.repeat(-(-max(count, self.settings.memory // dtype.itemsize) // len(block)))
            self._memory[dtype] = repeated.to(self.device)
        return self._memory[dtype][:count].view(shape)


class _Reads(nn.Module):
    """A module that looks up what a linear layer does, and computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return input, self.weight, self.bias


def keep_freed_memory() -> None:
    """Make the C library keep what is freed, as it does from the first forward of a model with large activations on.

    Before that it gives back what is freed, and each page that is asked for again costs as much as thousands of
    operations. glibc keeps blocks up to the size of the largest that was freed, 32 MiB at most.
    """
    torch.empty(2**25 - 2**20, dtype=torch.uint8).fill_(1)


def default_clock(device: torch.device) -> Callable[[], float]:
    """Seconds of this thread where it computes alone, so that other programs do not count; else those on the wall."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
