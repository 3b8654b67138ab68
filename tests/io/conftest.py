"""A model folder with all that lies in such folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.ones(4)}, folder / "model.safetensors")
    for name in (
        "config.json",
        "tokenizer.json",
        "README.md",
        "merges.txt",
        "training_args.bin",
        "trainer_state.json",
    ):
        (folder / name).write_text("{}")
    for name in (
        *("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "scaler.pt", "optimizer.bin"),
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.json"),
        *("tf_model.h5", "flax_model.msgpack", "model.gguf", "model.onnx", "other.safetensors"),
    ):
        (folder / name).write_text("x")
    parts = ("1_Pooling", "1_Pooling/.cache", "1_Pooling/words", "2_Dense", "3_Dense")
    for name in ("checkpoint-500", ".git", *parts, "onnx"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(f'{{"of": "{name}"}}')
    save_file({"w": torch.ones(4)}, folder / "2_Dense" / "model.safetensors")
    for part in ("2_Dense", "3_Dense"):
        (folder / part / "pytorch_model.bin").write_text("x")
    (folder / "onnx" / "model.onnx").write_text("x")
    (folder / "again").symlink_to(folder, target_is_directory=True)
    (folder / "gone.json").symlink_to("nowhere")
    (folder / "latest.json").symlink_to("config.json")
    (folder / "secret.json").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("secret")
    return folder
