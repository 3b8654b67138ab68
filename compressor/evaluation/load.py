"""A model ready to run from whatever was given: a module, a folder or a file, dense or compressed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from compressor.checkpoint import module_skeleton, open_checkpoint
from compressor.errors import BadInput
from compressor.evaluation.models import load_factory, load_state, load_transformers
from compressor.rewrite import low_rank_layer, put_layer, stored_pairs


def build_model(factory: str | Callable[[], nn.Module]) -> nn.Module:
    """The architecture that the user's own code builds: `package.module:name`, `file.py:name` or a callable."""
    return load_factory(factory)() if isinstance(factory, str) else factory()


def load_model(model: str | Path | nn.Module, factory: str | Callable[[], nn.Module] | None = None) -> nn.Module:
    """A module to run: `model` itself, or a checkpoint's weights in the architecture of its folder or of `factory`.

    Raises `BadInput` when the checkpoint has no architecture that is known, or its weights do not fit.
    """
    if isinstance(model, nn.Module):
        return model
    checkpoint = open_checkpoint(model)
    if factory is None:
        if checkpoint.folder is None or checkpoint.config is None:
            raise BadInput(
                "running it needs its architecture",
                where=checkpoint.source,
                remedy="pass --model file.py:function or package.module:function that builds it, or a model folder",
            )
        return load_transformers(checkpoint.folder)
    module = build_model(factory)
    modules = dict(module.named_modules())
    for pair in stored_pairs(checkpoint, module_skeleton(module)).values():
        if pair.name not in modules:
            raise BadInput(
                f"the model that --model builds has no layer {pair.name}",
                where=checkpoint.source,
                remedy="use the function that builds the model that was compressed",
            )
        module = put_layer(module, pair.name, low_rank_layer(modules[pair.name], pair.form, pair.rank))
    load_state(module, {name: checkpoint.read(name) for name in checkpoint.tensors})
    return module
