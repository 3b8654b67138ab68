"""MXFP4 is read as transformers reads it, number by number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from compressor import BadInput
from compressor.encodings import decoded
from compressor.io import open_checkpoint, require_finite

SAID = {"quant_method": "mxfp4"}


def random(experts: int, outputs: int, groups: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(experts)
    blocks = torch.randint(0, 256, (experts, outputs, groups, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(110, 131, (experts, outputs, groups), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 40, 2), (4, 6, 5)])
def test_it_is_what_transformers_makes_of_it(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    blocks, scales = random(*sizes)
    stored = {"a.up_blocks": blocks, "a.up_scales": scales, "a.up_bias": torch.ones(3, dtype=torch.bfloat16)}
    save_file(stored, tmp_path / "model.safetensors")
    checkpoint = decoded(open_checkpoint(tmp_path / "model.safetensors"), SAID)
    assert set(checkpoint.tensors) == {"a.up", "a.up_bias"}
    read = checkpoint.read("a.up")
    assert checkpoint.tensors["a.up"].shape == tuple(read.shape)
    assert torch.equal(read, convert_moe_packed_tensors(blocks, scales))


def test_every_number_of_four_bits_is_itself(tmp_path: Path) -> None:
    blocks = torch.arange(16, dtype=torch.uint8).view(1, 1, 1, 16)  # each the lower half, the upper is 0
    stored = {"a_blocks": blocks, "a_scales": torch.full((1, 1, 1), 128, dtype=torch.uint8), "b": torch.ones(1)}
    save_file(stored, tmp_path / "model.safetensors")
    read = decoded(open_checkpoint(tmp_path / "model.safetensors"), SAID).read("a").flatten()
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert read[::2].tolist() == [2 * each for each in (*positive, *(-each for each in positive))]
    assert not read[1::2].any()


def test_the_largest_exponent_is_no_number(tmp_path: Path) -> None:
    blocks = torch.zeros(1, 2, 1, 16, dtype=torch.uint8)
    scales = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1)
    save_file({"a_blocks": blocks, "a_scales": scales}, tmp_path / "model.safetensors")
    read = decoded(open_checkpoint(tmp_path / "model.safetensors"), SAID).read("a")
    assert not read[..., 0].any()
    assert read[..., 1].isnan().all()
    with pytest.raises(BadInput, match="tensor a: holds 32 NaN and 0 infinite values"):
        require_finite("a", read)


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    blocks, scales = random(2, 8, 3)
    for broken in ({"a_blocks": blocks}, {"a_blocks": blocks, "a_scales": scales[:, :, :2].contiguous()}):
        save_file(broken, tmp_path / "model.safetensors")
        with pytest.raises(BadInput, match=r"do not fit together|is missing"):
            decoded(open_checkpoint(tmp_path / "model.safetensors"), SAID)


def test_other_tensors_of_such_a_name_are_left(tmp_path: Path) -> None:
    mask = torch.ones(8, 8, dtype=torch.uint8)
    save_file({"mask_blocks": mask, "a.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    assert torch.equal(decoded(open_checkpoint(tmp_path / "model.safetensors"), {}).read("mask_blocks"), mask)
