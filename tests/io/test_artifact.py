"""What is known of a model before it is written: its size to the byte, and what does not go along."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressor.api.write import written
from compressor.io import Artifact, Target, TensorInfo, open_checkpoint

TENSORS = {"a": torch.ones(40, 3), "b": torch.zeros(7, dtype=torch.bfloat16), "c": torch.ones(40, 3)}
INFOS = [TensorInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()]


ARTIFACT = Artifact("folder", INFOS, lambda: iter(TENSORS.items()), {"k": "v"})


@pytest.mark.parametrize("shard_size", [None, 10**6, 500])
def test_its_bytes_are_those_of_the_weight_files(tmp_path: Path, shard_size: int | None) -> None:
    made = replace(ARTIFACT, shard_size=shard_size)
    with written(made, Target(tmp_path / "out", "folder", ())):
        pass
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == (2 if shard_size == 500 else 1) == len(made.shards)
    assert made.bytes == sum(file.stat().st_size for file in files)
    assert made.elements == 247
    assert open_checkpoint(tmp_path / "out").weight_bytes == made.bytes


def test_of_a_module_they_are_those_of_its_tensors() -> None:
    assert replace(ARTIFACT, form="module").bytes == 2 * 40 * 3 * 4 + 7 * 2


def test_only_a_folder_has_companions(model_folder: Path) -> None:
    folder = open_checkpoint(model_folder)
    assert "trainer_state.json" in {each.name for each in replace(ARTIFACT, companions_of=folder).not_copied}
    file = open_checkpoint(model_folder / "model.safetensors")
    assert replace(ARTIFACT, companions_of=file).not_copied == ARTIFACT.not_copied == ()
