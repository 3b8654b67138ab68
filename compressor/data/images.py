"""Image files as pixels, and pixels as the tensors that a model was trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.errors import BadInput

Pixels = np.ndarray[Any, np.dtype[Any]]


def read_images(images: Sequence[Any], channels: int) -> list[Pixels]:
    """Files, or PIL images, as uint8 arrays `(height, width, channels)`: gray for one channel, RGB for three."""
    opened = (_opened(each).convert("L" if channels == 1 else "RGB") for each in images)
    return [np.array(image).reshape(image.height, image.width, channels) for image in opened]


def channels_of(image_processor: Any, image: Any) -> int:
    """The number of channels that the processor wants, or else that a file or PIL image has."""
    wanted = channels_wanted(image_processor)
    if wanted is not None:
        return wanted
    return 1 if _opened(image).mode in {"1", "L", "LA"} else 3


def channels_wanted(image_processor: Any) -> int | None:
    """The number of channels that a transformers image processor normalizes; None if it does not normalize."""
    mean = getattr(image_processor, "image_mean", None)
    normalizes = getattr(image_processor, "do_normalize", False)
    return len(mean) if normalizes and isinstance(mean, list | tuple) else None


def wants_size(image_processor: Any, height: int, width: int) -> bool:
    """Whether a transformers image processor resizes images to exactly this size."""
    size = getattr(image_processor, "size", None)
    if isinstance(size, Mapping):
        return (size.get("height"), size.get("width")) == (height, width)
    return (getattr(size, "height", None), getattr(size, "width", None)) == (height, width)


def preprocess(image_processor: Callable[..., Any], images: Sequence[Pixels], where: str, **options: bool) -> Tensor:
    """Preprocess `(height, width, channels)` arrays by a transformers image processor."""
    try:
        pixel_values = image_processor(
            images=list(images), return_tensors="pt", input_data_format="channels_last", **options
        )["pixel_values"]
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(
            f"the model's image processor does not take these images: {error}",
            where=where,
            remedy="check the model's preprocessor_config.json",
        ) from error
    return torch.as_tensor(pixel_values, dtype=torch.float32)


def scale(images: Sequence[Pixels], places: Sequence[str | Path]) -> Tensor:
    """Return uint8 `(height, width, channels)` arrays of one size as float32 `(B, C, H, W)` in [0, 1]."""
    for image, place in zip(images, places, strict=True):
        if image.shape != images[0].shape:
            sizes = [f"{width} x {height}" for height, width, _ in (image.shape, images[0].shape)]
            raise BadInput(
                f"the image is of {sizes[0]} pixels, others are of {sizes[1]}",
                where=place,
                remedy="make them one size, or add a preprocessor_config.json to the model",
            )
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(torch.float32) / 255


def _opened(image: Any) -> Any:
    """A file as a PIL image, or a PIL image as it is."""
    path = image if isinstance(image, Path) else None
    if path is not None:
        image = _read(path)
    if image.mode[0] in "IF":
        what, remedy = f"the image has pixels of mode {image.mode}", "convert it to 8 bits per channel"
        raise BadInput(what, where=path, remedy=remedy)
    return image


def _read(path: Path) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise BadInput(
            "images are read by Pillow, which is not installed",
            where=path,
            remedy="pip install 'compressor[data]'",
        ) from None
    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"the image is unreadable: {error}", where=path, remedy="repair or remove it") from None
    return image
