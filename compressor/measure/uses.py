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
    positions of a convolution, patches of a projection). Otherwise a linear layer is used at every position of the
    training sequence, `sequence_length`, which is 1 for vector inputs: once, or as often as a language model calls it.
    """
    if architecture is None:
        counted, calls = {}, {}
    else:
        counted = _positions_in_image(architecture.module, folder)
        calls = {} if counted or sequence_length is None else _calls_per_token(architecture.module)

    def uses(layer: Layer) -> int | None:
        if layer.module in counted:
            return counted[layer.module]
        if sequence_length is None or "linear" not in layer.kind:
            return None
        return sequence_length * calls.get(layer.module, 1)

    return {layer.name: uses(layer) for layer in layers}


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


def _positions_in_image(module: nn.Module, folder: Path | None) -> dict[str, int]:
    """Positions at which an image model uses its layers; empty where the size of the images is unknown."""
    config: Any = getattr(module, "config", None)
    size = None if folder is None else image_size(config, folder)
    if size is None:
        return {}
    return _counted_on_meta(module, pixel_values=torch.empty(1, config.num_channels, *size, device="meta"))


def _calls_per_token(module: nn.Module) -> dict[str, int]:
    """How often a language model calls its layers: several times those that its blocks share."""
    if getattr(getattr(module, "config", None), "vocab_size", None) is None:
        return {}
    return _counted_on_meta(module, input_ids=torch.zeros(1, 1, dtype=torch.long, device="meta"))


def _counted_on_meta(module: nn.Module, **inputs: Tensor) -> dict[str, int]:
    """Positions in one forward pass on the meta device; empty where the architecture does not run there."""
    training = module.training
    try:
        with torch.no_grad(), counted_positions(module) as positions:
            module.eval()(**inputs)
    except Exception:  # whatever its code raises where tensors have no values
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
