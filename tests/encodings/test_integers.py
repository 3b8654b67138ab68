"""Integers with scales are read as what those who store them say that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from compressor import BadInput
from compressor.encodings import decoded, encoded_in
from compressor.io import Checkpoint, open_checkpoint
from tests.encodings import stored
from tests.encodings.stored import Quantize


def opened(folder: Path, tensors: dict[str, Tensor], said: dict[str, Any]) -> Checkpoint:
    save_file({name: each.contiguous() for name, each in tensors.items()}, folder / "model.safetensors")
    return decoded(open_checkpoint(folder / "model.safetensors"), said)


ASYMMETRIC = stored.FOUR_BITS | {"symmetric": False}
BYTES = stored.FOUR_BITS | {"num_bits": 8, "symmetric": False}
KINDS: dict[str, tuple[Quantize, dict[str, Any]]] = {
    **{f"gptq-{bits}": (stored.gptq(bits), stored.gptq_config(bits)) for bits in (2, 3, 4, 8)},
    "gptq-v2": (stored.gptq(version=2), stored.gptq_config(version=2)),
    "gptq-ordered": (stored.gptq(ordered=True), stored.gptq_config()),
    "gptq-3-ordered": (stored.gptq(3, ordered=True), stored.gptq_config(3)),
    "gptq-one-group": (stored.gptq(size=96), stored.gptq_config(size=-1)),
    "awq": (stored.awq(), stored.AWQ),
    "awq-one-group": (stored.awq(96), stored.AWQ | {"group_size": -1}),
    "packed": (stored.compressed_tensors(stored.FOUR_BITS), stored.compressed_tensors_config(stored.FOUR_BITS)),
    "packed-zeros": (stored.compressed_tensors(ASYMMETRIC), stored.compressed_tensors_config(ASYMMETRIC)),
    "packed-8": (stored.compressed_tensors(stored.EIGHT_BITS), stored.compressed_tensors_config(stored.EIGHT_BITS)),
    "int8": (
        stored.compressed_tensors(stored.EIGHT_BITS, "int-quantized"),
        stored.compressed_tensors_config(stored.EIGHT_BITS, "int-quantized"),
    ),
    "naive": (
        stored.compressed_tensors(BYTES, "naive-quantized"),
        stored.compressed_tensors_config(BYTES, "naive-quantized"),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_is_what_its_integers_stand_for(kind: str, tmp_path: Path) -> None:
    quantize, said = KINDS[kind]
    parts, means = quantize(torch.randn(64, 96, generator=torch.Generator().manual_seed(4)))
    tensors = {f"a.{end}": part for end, part in parts.items()} | {"a.bias": torch.ones(64)}
    checkpoint = opened(tmp_path, tensors, said)
    assert set(checkpoint.tensors) == {"a.weight", "a.bias"}
    read = checkpoint.read("a.weight")
    assert read.dtype == torch.float32
    torch.testing.assert_close(read, means, rtol=1e-6, atol=1e-7)
    encoded = encoded_in(checkpoint, "a.weight")
    assert encoded is not None
    assert {part.name for part in encoded.stored} == set(tensors) - {"a.bias"}


@pytest.mark.parametrize("kind", ["gptq-4", "awq", "packed", "packed-zeros", "int8"])
@pytest.mark.parametrize("damage", ["shorter", "fewer groups", "missing"])
def test_parts_that_do_not_fit_are_refused(kind: str, damage: str, tmp_path: Path) -> None:
    quantize, said = KINDS[kind]
    parts, _ = quantize(torch.randn(64, 96))
    first, scales = (
        next(iter(end for end in parts if end in ends))
        for ends in (("qweight", "weight_packed", "weight"), ("scales", "weight_scale"))
    )
    if damage == "shorter":
        parts[first] = parts[first][:-1]
    elif damage == "fewer groups":
        parts[scales] = parts[scales][:2]
    else:
        del parts[scales]
    if damage == "missing" and kind == "int8":
        return  # an int8 without a scale is no weight of compressed-tensors
    with pytest.raises(BadInput, match=r"do not fit together|is missing"):
        opened(tmp_path, {f"a.{end}": part for end, part in parts.items()}, said)


@pytest.mark.parametrize(("part", "dtype"), [("weight_zero_point", torch.float32), ("weight_g_idx", torch.complex64)])
def test_packed_parts_of_other_numbers_are_refused(part: str, dtype: torch.dtype, tmp_path: Path) -> None:
    quantize, said = KINDS["packed-zeros"]
    parts, _ = quantize(torch.randn(64, 96))
    parts[part] = parts.get(part, torch.zeros(96)).to(dtype)
    with pytest.raises(BadInput, match="do not fit together"):
        opened(tmp_path, {f"a.{end}": each for end, each in parts.items()}, said)


def test_inputs_in_groups_that_are_not_there_are_refused_when_they_are_read(tmp_path: Path) -> None:
    parts, _ = stored.gptq()(torch.randn(64, 96))
    for strange in (3, -1):
        parts["g_idx"][5] = strange
        checkpoint = opened(tmp_path, {f"a.{end}": part for end, part in parts.items()}, stored.gptq_config())
        with pytest.raises(BadInput, match=r"^a\.weight: its inputs are in groups that have no scales"):
            checkpoint.read("a.weight")


@pytest.mark.parametrize(
    ("quantize", "said", "words"),
    [
        (stored.gptq(), {}, "`quantization_config` of config.json"),
        (stored.gptq(), stored.gptq_config() | {"checkpoint_format": "marlin"}, "format 'marlin' of GPTQ"),
        (stored.awq(), stored.AWQ | {"version": "gemv"}, "version 'gemv' of AWQ"),
    ],
)
def test_what_could_mean_other_numbers_is_not_guessed(
    quantize: Quantize, said: dict[str, Any], *, words: str, tmp_path: Path
) -> None:
    parts, _ = quantize(torch.randn(64, 96))
    with pytest.raises(BadInput, match=words):
        opened(tmp_path, {f"a.{end}": part for end, part in parts.items()}, said)


def test_nothing_is_read_but_shapes_until_a_weight_is_asked_for(tmp_path: Path) -> None:
    parts, _ = stored.gptq()(torch.randn(64, 96))
    save_file({f"a.{end}": part.contiguous() for end, part in parts.items()}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    checkpoint = decoded(checkpoint, stored.gptq_config())
    assert checkpoint.tensors["a.weight"].shape == (64, 96)
    with pytest.raises(BadInput, match=r"model\.safetensors"):
        checkpoint.read("a.weight")
