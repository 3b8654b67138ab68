"""A model ready to run from whatever was given: a module, a folder or a file, dense or compressed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from compressor.errors import BadInput
from compressor.io import Checkpoint, open_checkpoint
from compressor.lowrank import TRANSPOSED, can_be_pair, join, let_script, put_factors, put_pair, stored_pairs, widened
from compressor.model.build import build_model, load_state, load_transformers


def require_architecture(checkpoint: Checkpoint, factory: str | Callable[[], nn.Module] | None) -> None:
    """Raise `BadInput` for weights that cannot be run, because nothing says what model they are of."""
    if factory is None and (checkpoint.folder is None or checkpoint.config is None):
        raise BadInput(
            "running it needs its architecture",
            where=checkpoint.source,
            remedy="pass `factory='file.py:function'` or package.module:function that builds it, or a model folder",
        )


def load_model(model: str | Path | nn.Module, factory: str | Callable[[], nn.Module] | None = None) -> nn.Module:
    """A module to run: `model` itself, or a checkpoint's weights in the architecture of its folder or of `factory`.

    For a file of concatenated networks the layers of `factory`'s architecture are made as wide as they are there.
    Raises `BadInput` when the checkpoint has no architecture that is known, or its weights do not fit.
    """
    if isinstance(model, nn.Module):
        return model
    checkpoint = open_checkpoint(model)
    require_architecture(checkpoint, factory)
    if factory is None:
        assert checkpoint.folder is not None
        return load_transformers(checkpoint.folder)
    module = widened(build_model(factory), checkpoint)
    names = {name: name for name in checkpoint.tensors}
    for pair in stored_pairs(checkpoint).values():
        place, _, parameter = pair.tensor.rpartition(".")
        owner = dict(module.named_modules(remove_duplicate=False)).get(place)
        if owner is None or not isinstance(dense := getattr(owner, parameter, None), Tensor):
            raise BadInput(
                f"the model that `factory` builds has no layer {pair.name}",
                where=checkpoint.source,
                remedy="use the function that builds the model that was compressed",
            )
        try:
            if can_be_pair(module, place, parameter, pair.kind):
                module = put_pair(module, place, pair.form, pair.rank)
                continue
            if pair.kind in TRANSPOSED or tuple(dense.shape) != pair.tensor_shape:
                raise ValueError(f"{type(owner).__name__} with a weight of {tuple(dense.shape)}")
            put_factors(owner, parameter, pair.form, pair.rank, dense, pair.tensor_shape)
            # A layer that no module told from an ordinary one: its bias stays where its own code has it.
            names[join(pair.name, "up.bias")] = join(pair.name, "bias")
        except ValueError as error:
            raise BadInput(
                f"{pair.name} is no layer that can be low-rank in the model that `factory` builds: {error}",
                where=checkpoint.source,
                remedy="compress again with `factory`, which tells such layers apart",
            ) from error
    let_script(module)
    load_state(module, {names[name]: checkpoint.read(name) for name in checkpoint.tensors})
    return module
