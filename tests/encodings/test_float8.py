"""Eight-bit floats with scales are read as their product, whatever shares a scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from compressor import BadInput, compress
from compressor.encodings import decoded, encoded_in
from compressor.io import Checkpoint, open_checkpoint
from tests.encodings.stored import Quantize, float8_blocks, float8_rows, float8_tensor


def opened(folder: Path, tensors: dict[str, Tensor], block: tuple[int, int] | None = None) -> Checkpoint:
    save_file({name: each.contiguous() for name, each in tensors.items()}, folder / "model.safetensors")
    said = {} if block is None else {"quant_method": "fp8", "weight_block_size": list(block)}
    return decoded(open_checkpoint(folder / "model.safetensors"), said)


@pytest.mark.parametrize("sides", [(64, 96), (70, 33), (1, 40), (40, 1), (32, 32)])
@pytest.mark.parametrize("quantize", [float8_blocks, float8_rows, float8_tensor])
def test_it_is_the_product_of_floats_and_scales(quantize: Quantize, sides: tuple[int, int], tmp_path: Path) -> None:
    parts, means = quantize(torch.randn(sides, generator=torch.Generator().manual_seed(3)))
    stored = {f"a.{end}": part for end, part in parts.items()} | {"a.bias": torch.ones(sides[0])}
    checkpoint = opened(tmp_path, stored, (32, 32))
    assert set(checkpoint.tensors) == {"a.weight", "a.bias"}
    assert checkpoint.tensors["a.weight"].shape == sides
    assert torch.equal(checkpoint.read("a.weight"), means)  # in float32, as the bias is
    encoded = encoded_in(checkpoint, "a.weight")
    assert encoded is not None
    assert {part.name for part in encoded.stored} == {f"a.{end}" for end in parts}
    assert encoded.nbytes == sum(part.nbytes for part in parts.values())


def test_it_is_rounded_once_to_the_dtype_of_the_model(tmp_path: Path) -> None:
    parts, means = float8_blocks(torch.randn(128, 64))
    stored = {f"a.{end}": part for end, part in parts.items()} | {"a.bias": torch.ones(128, dtype=torch.bfloat16)}
    read = opened(tmp_path, stored, (32, 32)).read("a.weight")
    assert read.dtype == torch.bfloat16
    assert torch.equal(read, means.to(torch.bfloat16))


def test_experts_in_one_tensor_have_scales_of_their_own(tmp_path: Path) -> None:
    each = [float8_blocks(torch.randn(40, 64), side=32) for _ in range(3)]
    stored = {
        "experts.gate_up_proj": torch.stack([parts["weight"] for parts, _ in each]),
        "experts.gate_up_proj_scale_inv": torch.stack([parts["weight_scale_inv"] for parts, _ in each]),
        "bias": torch.ones(2),
    }
    read = opened(tmp_path, stored, (32, 32)).read("experts.gate_up_proj")
    assert torch.equal(read, torch.stack([means for _, means in each]))


def test_scales_may_be_powers_of_two_in_a_byte(tmp_path: Path) -> None:
    values = torch.randn(64, 64).to(torch.float8_e4m3fn)
    exponents = torch.randint(120, 130, (2, 2), dtype=torch.uint8)
    means = values.float() * torch.exp2(exponents.float() - 127).repeat_interleave(32, 0).repeat_interleave(32, 1)
    for scales in (exponents, exponents.view(torch.float8_e8m0fnu)):
        stored = {"a.weight": values, "a.weight_scale_inv": scales, "a.bias": torch.ones(64)}
        assert torch.equal(opened(tmp_path, stored, (32, 32)).read("a.weight"), means)


def test_a_matrix_without_rows_is_refused_as_one_that_was_never_compressed(tmp_path: Path) -> None:
    stored = {"a.weight": torch.zeros(0, 5).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(1)}
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=r"the stored parts of a\.weight do not fit .* or give the original"):
        compress(tmp_path / "model.safetensors", output=tmp_path / "small.safetensors", keep=0.5)


def test_the_largest_byte_of_powers_of_two_is_no_number(tmp_path: Path) -> None:
    scales = torch.tensor([[127, 255]], dtype=torch.uint8)
    for each in (scales, scales.view(torch.float8_e8m0fnu)):
        stored = {"a.weight": torch.ones(128, 256).to(torch.float8_e4m3fn), "a.weight_scale_inv": each}
        read = opened(tmp_path, stored).read("a.weight")
        assert torch.equal(read[:, :128], torch.ones(128, 128, dtype=read.dtype))
        assert read[:, 128:].isnan().all()
        with pytest.raises(BadInput, match=r"tensor a\.weight: holds 16384 NaN and 0 infinite values"):
            compress(tmp_path / "model.safetensors", output=tmp_path / "small.safetensors", keep=0.5)


def test_blocks_are_of_128_where_nothing_says_another_size(tmp_path: Path) -> None:
    parts, means = float8_blocks(torch.randn(200, 130), side=128)
    stored = {f"a.{end}": part for end, part in parts.items()} | {"a.bias": torch.ones(200)}
    assert torch.equal(opened(tmp_path, stored).read("a.weight"), means)


@pytest.mark.parametrize("scales", [torch.ones(3, 2), torch.ones(2, 2, 1), torch.ones(5), torch.ones(2, 2).int()])
def test_scales_that_do_not_fit_are_refused_before_anything_is_read(scales: Tensor, tmp_path: Path) -> None:
    stored = {"a.weight": torch.zeros(64, 64).to(torch.float8_e4m3fn), "a.weight_scale_inv": scales}
    with pytest.raises(BadInput, match=r"the stored parts of a\.weight do not fit together \(a\.weight 64 x 64, "):
        opened(tmp_path, stored, (32, 32))
