"""How often a forward pass uses each layer per example: the R of the memory window's rank bound."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.documents import read_json
from compressor.errors import BadInput
from compressor.network import Architecture, Layer


def uses_per_example(
    layers: tuple[Layer, ...], architecture: Architecture | None, folder: Path | None, *, sequence_length: int | None
) -> dict[str, int | None]:
    """Positions per example at which each layer's matrix is applied, by layer name; None if unknown.

    For an image model whose folder states the image size, they are counted in a forward pass on the meta device (output
    positions of a convolution, patches of a projection). Otherwise a linear layer is used once per position of the
    training sequence: `sequence_length`, which is 1 for vector inputs.
    """
    counted = _count_positions(architecture.module, folder) if architecture is not None and folder is not None else {}
    return {
        layer.name: counted.get(layer.module, sequence_length if "linear" in layer.kind else None) for layer in layers
    }


@contextmanager
def counted_positions(module: nn.Module) -> Iterator[dict[str, int]]:
    """Count the positions at which every layer with a matrix is applied inside the context, by module name.

    Positions are summed over the examples. An expert's are the tokens routed to it.
    """
    positions: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(layer: nn.Module, _: Any, output: Any) -> None:
            weight = getattr(layer, "weight", None)
            if isinstance(output, Tensor) and isinstance(weight, Tensor) and weight.dim() >= 2:
                outputs = output.shape[1] if weight.dim() > 2 else output.shape[-1]
                positions[name] = positions.get(name, 0) + output.numel() // outputs

        return hook

    hooks = [layer.register_forward_hook(count(name)) for name, layer in module.named_modules() if name]
    try:
        yield positions
    finally:
        for hook in hooks:
            hook.remove()


def _count_positions(module: nn.Module, folder: Path) -> dict[str, int]:
    config: Any = getattr(module, "config", None)
    size = image_size(config, folder)
    if size is None:
        return {}
    training = module.training
    try:
        with torch.no_grad(), counted_positions(module) as positions:
            module.eval()(pixel_values=torch.empty(1, config.num_channels, *size, device="meta"))
    except Exception:  # the architecture does not run on the meta device: its uses stay unknown
        return {}
    finally:
        module.train(training)
    return positions


def image_size(config: Any, folder: Path | None) -> tuple[int, int] | None:
    """Height and width of the images, from the model's configuration or its preprocessor's in the folder."""
    if not isinstance(getattr(config, "num_channels", None), int):
        return None
    size = getattr(config, "image_size", None)
    if size is None and folder is not None:
        try:
            size = read_json(folder / "preprocessor_config.json").get("size")
        except BadInput:
            return None
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if {"height", "width"} <= size.keys() else size.get("shortest_edge")
    height, width = size if isinstance(size, tuple | list) and len(size) == 2 else (size, size)
    if not (isinstance(height, int) and isinstance(width, int) and min(height, width) > 0):
        return None
    return height, width
