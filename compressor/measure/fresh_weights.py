"""The standard deviation of a layer's weights before training, measured by initializing the layer once more."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from compressor.network import Architecture, Layer
from compressor.network.architecture import root_mean_square


def initial_standard_deviation(layer: Layer, architecture: Architecture | None, *, seed: int = 0) -> float | None:
    """Root mean square of the layer's weight as its own code initializes it.

    The architecture of a new model knows it. Otherwise a fresh copy of the layer is initialized by its transformers
    model, or by its own `reset_parameters`. Without a module, PyTorch's default for linear layers and convolutions:
    uniform with variance 1 / (3 * fan_in). None for a layer that cannot be initialized on its own.
    """
    if architecture is None:
        if layer.kind == "parameter":
            return None
        # PyTorch takes the second dimension of a transposed convolution's weight for the inputs.
        fan_in = layer.shape[0 if layer.kind == "transposed convolution" else 1]
        return 1 / math.sqrt(3 * fan_in)
    if architecture.initial_sizes is not None:
        return architecture.initial_sizes[f"{layer.module}.{layer.parameter}".removeprefix(".")]
    owner = architecture.module.get_submodule(layer.module)
    # The memo replaces trained values by empty tensors, so that they are not copied.
    unfilled = {
        id(values): torch.empty_like(values, device="cpu") for values in owner.state_dict(keep_vars=True).values()
    }
    memo = {key: nn.Parameter(values) if values.is_floating_point() else values for key, values in unfilled.items()}
    fresh: Any = copy.deepcopy(owner, memo)
    initialize = getattr(architecture.module, "_init_weights", None)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        if initialize is not None:
            initialize(fresh)
        elif hasattr(fresh, "reset_parameters"):
            fresh.reset_parameters()
        else:
            return None
    return root_mean_square(getattr(fresh, layer.parameter))
