"""Where a model started: what builds it untrained, and whether initial weights can be its own."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from compressor.errors import BadInput
from compressor.initial import InitialWeights, initial_name, initial_tensor
from compressor.model.build import built, load_factory, untrained_transformers
from compressor.model.opened import Model


def untrained_builder(subject: Model) -> Callable[[], nn.Module] | None:
    """What builds a model with fresh weights: its factory, or its transformers class; None where neither is known.

    A factory's file is imported here, so that nothing but the model is built when it is called.
    """
    factory = subject.factory
    if factory is not None:
        if isinstance(factory, str):
            return load_factory(factory)
        return partial(built, factory, getattr(factory, "__name__", "it"))
    if subject.in_memory:
        return _class_of(subject.module)
    checkpoint = subject.checkpoint
    if checkpoint.directory is None or checkpoint.config is None or subject.architecture is None:
        return None
    return untrained_transformers(checkpoint.directory)


def _class_of(module: nn.Module) -> Callable[[], nn.Module] | None:
    """The class of a transformers model with its configuration."""
    transformers: Any = sys.modules.get("transformers")
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return None
    kind: Any = type(module)
    return partial(kind, copy.deepcopy(module.config))


def require_of_model(initial: InitialWeights, subject: Model) -> None:
    """Refuse initial weights that no eligible layer of a model has any of, and those that are the trained ones."""
    eligible = [layer for layer in subject.layers if layer.eligible]
    fitting = ((layer, initial_tensor(layer, initial)) for layer in eligible)
    first = next(((layer, drawn) for layer, drawn in fitting if drawn is not None), None)
    if eligible and first is None:
        layer = eligible[0]
        name = initial_name(layer)
        there = initial.read(name)
        theirs = "none of this name" if there is None else f"one of shape {tuple(there.shape)}"
        raise BadInput(
            f"{initial.source} has no weight of any layer of {subject.name}: for {name} of shape {layer.tensor_shape} "
            f"it has {theirs}",
            option="initial",
            remedy="give the same model before it was trained, or early in the training",
        )
    if first is not None and _is_trained(subject, initial):
        raise BadInput(
            f"{initial.source} has the trained weights of {subject.name}",
            option="initial",
            remedy="keep a copy from before the training: `copy.deepcopy(model.state_dict())`",
        )


def _is_trained(subject: Model, initial: InitialWeights) -> bool:
    """Whether every layer is equal to what are said to be its initial weights."""
    for layer in (each for each in subject.layers if each.eligible):
        drawn = initial_tensor(layer, initial)
        if drawn is None or not torch.equal(drawn, subject.checkpoint.read(layer.tensor)):
            return False
    return True
