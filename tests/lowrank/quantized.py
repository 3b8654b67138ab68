"""Models whose layers are quantized as a test wants them, without a planner."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor.api.write import written
from compressor.engine import Run
from compressor.forms import FORMS, stored_parameters
from compressor.io import Target
from compressor.lowrank import compressed_artifact
from compressor.model import LayerSelection, open_model
from compressor.planning import Budget, LayerPlan, Plan

# The form and the rank of the layers whose names fit a pattern; of several patterns the first.
Forms = Mapping[str, tuple[str, int]]


def quantized(
    model: Any, forms: Forms, output: Path | None = None, *, factory: Any = None, shard_size: int = 2**30
) -> nn.Module:
    """The module of a model in these forms; it is written too, where there is an output."""
    opened = open_model(model, factory=factory, select=LayerSelection(embeddings=True))
    layers = []
    for layer in opened.layers:
        form, rank = next((forms[each] for each in forms if fnmatch.fnmatch(layer.name, each)), ("dense", None))
        if rank is not None:
            assert FORMS[form].takes(layer), f"{layer} is not for {form}"
            parameters = stored_parameters(layer, form, rank)
            layers.append(LayerPlan(layer.name, layer.shape, layer.kind, rank, form, parameters, 0.0, "asked for"))
    plan = Plan(opened.name, None, Budget("plan"), tuple(layers))
    artifact = compressed_artifact(
        opened.rewriting(plan), shard_size, run=Run(torch.device("cpu")), module=opened.with_separate_experts
    )
    if output is not None:
        target = Target(output, "folder" if opened.checkpoint.folder is not None else "file", ())
        with written(artifact, target):
            pass
    assert artifact.module is not None
    return artifact.module()
