"""The weights of a checkpoint, dense or low-rank, put into a module that was built for them."""

from __future__ import annotations

from torch import Tensor, nn

from compressor.errors import BadInput
from compressor.forms import FORMS, TRANSPOSED
from compressor.io import Checkpoint
from compressor.lowrank import can_be_pair, join, let_script, put_factors, put_pair, stored_pairs
from compressor.model.build import load_state


def fill(module: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """The module, changed in place, with the weights of a checkpoint; low-rank where they are.

    Raises `BadInput` when the weights do not fit.
    """
    names = {name: name for name in checkpoint.tensors}
    for pair in stored_pairs(checkpoint).values():
        place, _, parameter = pair.tensor.rpartition(".")
        owner = dict(module.named_modules(remove_duplicate=False)).get(place)
        if owner is None or not isinstance(dense := getattr(owner, parameter, None), Tensor):
            raise BadInput(
                f"the model that `factory` builds has no layer {pair.name}",
                where=checkpoint.source,
                option="factory",
                remedy="use the function that builds the model that was compressed",
            )
        try:
            if can_be_pair(module, place, parameter, kind=pair.kind):
                module = put_pair(module, place, pair.form, rank=pair.rank)
                continue
            if pair.kind in TRANSPOSED or tuple(dense.shape) != pair.tensor_shape:
                raise ValueError(f"{type(owner).__name__} with a weight of {tuple(dense.shape)}")
            put_factors(owner, parameter, pair.form, rank=pair.rank, like=dense, weight=pair)
            # A layer that no module told from an ordinary one: its bias stays where its own code has it.
            names[join(pair.name, FORMS[pair.form].bias)] = join(pair.name, "bias")
        except ValueError as error:
            raise BadInput(
                f"{pair.name} is no layer that can be low-rank in the model that `factory` builds: {error}",
                where=checkpoint.source,
                remedy="compress again with `factory`, which tells such layers apart",
            ) from error
    let_script(module)
    stored = {names[name]: name for name in checkpoint.tensors}
    shapes = {own: checkpoint.tensors[name].shape for own, name in stored.items()}
    load_state(module, shapes, lambda own: checkpoint.read(stored[own]))
    return module
