"""The standard deviation of a layer's weights before training, measured by initialising the layer once more."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.layers import Layer
from compressor.checkpoint.skeleton import Skeleton


def initial_standard_deviation(layer: Layer, skeleton: Skeleton | None, *, seed: int = 0) -> float | None:
    """Root mean square of the layer's weight as its own library initialises it.

    A fresh copy of the one layer is initialised by its transformers model, or by its own `reset_parameters`. Without a
    module to ask, PyTorch's default for linear layers and convolutions: uniform with variance 1 / (3 * fan_in). None
    for a layer that cannot be initialised on its own.
    """
    if skeleton is None:
        fan_in = layer.shape[1]
        return 1 / math.sqrt(3 * fan_in)
    owner = skeleton.module.get_submodule(layer.module)
    hooks_free = copy.deepcopy(owner) if _on_meta(owner) else copy.deepcopy(owner).to("meta")
    fresh: Any = hooks_free.to_empty(device="cpu")
    initialise = getattr(skeleton.module, "_init_weights", None)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        if initialise is not None:
            initialise(fresh)
        elif hasattr(fresh, "reset_parameters"):
            fresh.reset_parameters()
        else:
            return None
    weight: Tensor = fresh.weight.detach()
    return float(weight.to(torch.float64).square().mean().sqrt())


def _on_meta(module: torch.nn.Module) -> bool:
    return all(parameter.device.type == "meta" for parameter in module.parameters())
