"""Integers are multiplied by the kernels that an accelerator has, and only where they multiply as they should.

The stand-in is given the kernels that CUDA has, by what their source says of sizes, dtypes, and the order of integers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.quantize.products import has_kernel
from tests.forms.test_quantized_layers import copied, filled
from tests.quantize.test_products import tiled, tiles_of


@dataclass
class Kernels:
    """The kernels of the stand-in: what their outputs are multiplied by, and whether they raise."""

    factor: float = 1.0
    error: str = ""
    calls: int = 0

    def ordered(self, pairs: Tensor, tiles: int) -> Tensor:
        assert pairs.dtype == torch.uint8
        assert pairs.is_contiguous()
        assert pairs.shape[1] * 2 % (16 * tiles) == 0
        numbers = torch.stack([pairs.cpu() >> 4, pairs.cpu() & 15], dim=-1).flatten(1)
        return tiled(numbers, tiles).to(pairs.device)

    def of_4_bits(self, *operands: Any) -> Tensor:
        input, packed, group, scales = operands
        blocks, outer, threads, half = packed.shape
        outputs, inputs = 8 * blocks, outer * 32 * half
        assert (packed.dtype, threads, input.dtype, scales.dtype) == (torch.int32, 32, torch.bfloat16, torch.bfloat16)
        assert packed.is_contiguous()
        assert scales.is_contiguous()
        assert input.is_contiguous()
        assert input.shape[1] == inputs
        assert scales.shape == (inputs // group, outputs, 2)
        assert group in (32, 64, 128, 256)
        weight, words = torch.empty(outputs, inputs), packed.cpu().tolist()
        for (a, b, c, d), shift, row, column in tiles_of(outputs, inputs, 2 * half):
            weight[row, column] = (words[a][b][c][d] >> shift & 15) - 8
        scale, added = (each.T.repeat_interleave(group, dim=1) for each in scales.cpu().float().unbind(-1))
        return self._product(input, (weight * scale + added).bfloat16().float())

    def of_8_bits(self, input: Tensor, integers: Tensor, scales: Tensor) -> Tensor:
        assert integers.dtype == torch.int8
        return self._product(input, integers.cpu().float() * scales.cpu().float()[:, None])

    def _product(self, input: Tensor, weight: Tensor) -> Tensor:
        if self.error:
            raise RuntimeError(self.error)
        self.calls += 1
        return (self.factor * input.cpu().float() @ weight.T).to(input.dtype).to(input.device)


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    found, library = Kernels(), torch.library.Library("aten", "IMPL")
    library.impl("_convert_weight_to_int4pack", found.ordered, "PrivateUse1")
    library.impl("_weight_int4pack_mm", found.of_4_bits, "PrivateUse1")
    library.impl("_weight_int8pack_mm", found.of_8_bits, "PrivateUse1")
    has_kernel.cache_clear()
    yield found
    library._destroy()
    has_kernel.cache_clear()


FORMS = ("dense@8", "dense@4g32", "dense@3g64", "dense@6")


def layer_and_inputs(form: str) -> tuple[nn.Module, Tensor, Tensor]:
    layer, x = filled(nn.Linear(128, 16, dtype=torch.bfloat16), form), torch.randn(2, 128).bfloat16()
    return layer, x, nn.functional.linear(x.double(), layer.dequantized().double(), layer.bias.double())


@pytest.mark.parametrize("form", FORMS)
def test_integers_are_multiplied_by_kernels(form: str, device: torch.device, kernels: Kernels) -> None:
    layer, x, expected = layer_and_inputs(form)
    stored = copied(layer.state_dict())
    there = copy.deepcopy(layer).to(device)
    with torch.no_grad():
        there(x.to(device))
        kernels.calls = 0
        found = there(x.to(device))
    assert kernels.calls == (2 if form == "dense@6" else 1)
    assert (found.cpu().double() - expected).norm() <= 2**-6 * expected.norm()
    back = there.to("cpu").state_dict()
    assert all(torch.equal(back[name], each) for name, each in stored.items())


@pytest.mark.parametrize("form", ["dense@4g32", "dense@3g64", "dense@6"])
@pytest.mark.parametrize("back", [False, True])
def test_buffers_that_are_moved_without_the_layer_keep_their_order(
    *, form: str, back: bool, device: torch.device, kernels: Kernels
) -> None:
    layer, x, expected = layer_and_inputs(form)
    stored = copied(layer.state_dict())
    start, end = (device, torch.device("cpu")) if back else (torch.device("cpu"), device)
    layer = layer.to(start)
    with torch.no_grad():
        layer(x.to(start))
        for tensors in (layer._buffers, layer._parameters):
            for name, each in tensors.items():
                tensors[name] = None if each is None else each.to(end)  # type: ignore[assignment]
        assert layer.weight_packed.dtype == torch.uint8
        assert torch.equal(copy.deepcopy(layer).integers().cpu(), integers_of(stored, form))
        saved = copy.deepcopy(layer).state_dict()
        assert all(torch.equal(saved[name].cpu(), each) for name, each in stored.items())
        kernels.calls = 0
        found = layer(x.to(end))
    assert (found.cpu().double() - expected).norm() <= 2**-6 * expected.norm()
    assert (kernels.calls > 0) == (end == device)


def integers_of(stored: dict[str, Tensor], form: str) -> Tensor:
    twin = filled(nn.Linear(128, 16, dtype=torch.bfloat16), form)
    twin.load_state_dict(stored)
    found: Tensor = twin.integers()
    return found


@pytest.mark.parametrize(
    "fault", [{"factor": 1.02}, {"error": "no kernel image is available"}], ids=["wrong", "raising"]
)
@pytest.mark.parametrize("form", FORMS)
def test_kernels_that_do_not_multiply_so_are_not_used(
    *, form: str, fault: dict[str, Any], device: torch.device, kernels: Kernels, caplog: pytest.LogCaptureFixture
) -> None:
    vars(kernels).update(fault)
    layer, x, expected = layer_and_inputs(form)
    there = layer.to(device)
    with torch.no_grad():
        found = [there(x.to(device)) for _ in range(2)]
    assert all((each.cpu().double() - expected).norm() <= 2**-6 * expected.norm() for each in found)
    [line] = [record.getMessage() for record in caplog.records]
    assert "are dequantized on standin:0" in line


def test_without_kernels_nothing_is_said(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    has_kernel.cache_clear()
    assert not has_kernel(4, device)
    assert not has_kernel(8, device)
    assert not caplog.records
