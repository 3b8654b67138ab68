"""Images for a model that nobody gave images for: noise, matched to what the model remembers of its training images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.calibration.settings import SelfGeneratedSettings

Told = Callable[[int, int], None]


def spectral_noise(shape: tuple[int, ...], generator: torch.Generator, *, power: float = 1.0) -> Tensor:
    """Gaussian noise of unit variance, `(images, channels, height, width)`, with amplitudes that fall as 1/f^power.

    With a power of 1 neighboring pixels are correlated as in natural images (Field, "Relations between the statistics
    of natural images and the response properties of cortical cells", 1987).
    """
    height, width = shape[-2:]
    frequency = (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.fftfreq(width)[None] ** 2).sqrt()
    frequency[0, 0] = 1 / max(height, width)  # the mean of an image varies as its longest wave does
    white = torch.fft.fft2(torch.randn(shape, generator=generator))
    images: Tensor = torch.fft.ifft2(white / frequency**power).real
    return images / images.std()


def batch_normalizations(model: nn.Module) -> list[_BatchNorm]:
    """The layers that remember mean and variance of their inputs in training."""
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None
    ]


def statistics_distance(model: nn.Module, run: Callable[[], object]) -> Tensor:
    """How far means and standard deviations of the inputs of all batch normalizations are from those of training.

    The sum over the layers of the mean squared distance over the channels, in standard deviations of training, when
    `run` runs the model.
    """
    distances: list[Tensor] = []

    def compare(layer: Any, arguments: tuple[Tensor, ...], _: object) -> None:
        inputs = arguments[0].float()
        others = [dimension for dimension in range(inputs.dim()) if dimension != 1]
        variance = layer.running_var.float() + layer.eps
        shift = (inputs.mean(others) - layer.running_mean.float()) / variance.sqrt()
        scale = (inputs.var(others, unbiased=False) / variance).clamp_min(layer.eps).sqrt() - 1
        distances.append(shift.square().mean() + scale.square().mean())

    with ExitStack() as stack:
        for layer in batch_normalizations(model):
            stack.callback(layer.register_forward_hook(compare).remove)
        run()
    return torch.stack(distances).sum() if distances else torch.zeros(())


def matched(
    model: nn.Module, images: Tensor, *, run: Callable[[Tensor], object], settings: SelfGeneratedSettings, told: Told
) -> Tensor:
    """The images after steps of Adam by which the statistics at all batch normalizations approach those of training.

    As in Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework", CVPR 2020, equation 1. `run` runs the model on
    images; its parameters need no gradients.
    """
    optimized = images.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([optimized], settings.image_learning_rate)
    for step in range(1, settings.image_steps + 1):
        optimizer.zero_grad()
        with torch.enable_grad():
            torch.autograd.backward(statistics_distance(model, partial(run, optimized)))
        optimizer.step()
        told(step, settings.image_steps)
    return optimized.detach()
