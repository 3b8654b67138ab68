"""A run without data and a calibrated one, whose files must not depend on where their jobs ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import compressor
from compressor.progress import Progress
from tests.test_frozen_outputs import LLAMA, examples, factory, model_folder, network, weight_file


def files_of(folder: Path) -> dict[str, bytes]:
    """All that was written but for the card, which states times."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"}


def without_data(folder: Path, engine: str | None = None, progress: Progress | None = None) -> dict[str, bytes]:
    """What is written of a transformers folder of fifteen layers."""
    source = folder / "llama" if (folder / "llama").is_dir() else model_folder(folder / "llama", LLAMA)
    options: dict[str, Any] = {"keep": 0.6, "calibration": "none", "prefer": "size", "engine": engine}
    compressor.compress(source, output=folder / "small", overwrite=True, progress=progress, **options)
    return files_of(folder / "small")


def calibrated(folder: Path, engine: str | None = None, progress: Progress | None = None) -> dict[str, bytes]:
    """What is written of convolutions, some of which become spatial pairs."""
    source, build = weight_file(folder, "convolutions"), factory(folder, "convolutions")
    data = examples(folder, network("convolutions"), 48, 3, 8, 8)
    options: dict[str, Any] = {"keep": 0.4, "factory": build, "calibration": data, "effort": "balanced", "bits": 16}
    (folder / "small").mkdir(exist_ok=True)
    output = folder / "small" / "a.safetensors"
    compressor.compress(source, output=output, overwrite=True, engine=engine, progress=progress, **options)
    return files_of(folder / "small")


def sliced(folder: Path, engine: str | None = None, progress: Progress | None = None) -> dict[str, bytes]:
    """What is written of a transformers folder that is calibrated on eleven batches, in eight slices."""
    source = folder / "llama" if (folder / "llama").is_dir() else model_folder(folder / "llama", LLAMA)
    ids = torch.randint(0, 40, (11, 3, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": each} for each in ids]
    options: dict[str, Any] = {
        "keep": 0.6,
        "calibration": data,
        "effort": "fast",
        "prefer": "size",
        "bits": 16,
        "engine": engine,
    }
    compressor.compress(source, output=folder / "small", overwrite=True, progress=progress, **options)
    return files_of(folder / "small")
