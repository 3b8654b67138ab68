"""A model to measure and to run: opened with what is known about it, built, loaded, run."""

from __future__ import annotations

from compressor.model.build import build_model, load_factory, load_state, load_transformers
from compressor.model.inference import dtype_of, evaluation_mode, logits_of, on_device, resolve_device
from compressor.model.initial import require_of_model, untrained_builder
from compressor.model.layer_uses import layer_uses, scaled
from compressor.model.measurements import Decomposing, InspectedLayer, inspect_layers, measured_layers
from compressor.model.opened import (
    Factory,
    InitialSource,
    LayerSelection,
    Model,
    ModelFiles,
    ModelLike,
    SentModel,
    given_initial,
    load_model,
    open_model,
    open_runnable,
)

__all__ = [
    "Decomposing",
    "Factory",
    "InitialSource",
    "InspectedLayer",
    "LayerSelection",
    "Model",
    "ModelFiles",
    "ModelLike",
    "SentModel",
    "build_model",
    "dtype_of",
    "evaluation_mode",
    "given_initial",
    "inspect_layers",
    "layer_uses",
    "load_factory",
    "load_model",
    "load_state",
    "load_transformers",
    "logits_of",
    "measured_layers",
    "on_device",
    "open_model",
    "open_runnable",
    "require_of_model",
    "resolve_device",
    "scaled",
    "untrained_builder",
]
