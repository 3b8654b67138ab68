"""How an opened model was trained: what the user states, its checkpoint, and the files beside it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from compressor.errors import BadInput
from compressor.io import Checkpoint
from compressor.io.torch_file import read_state_file
from compressor.recipe import TrainingRecipe, find_recipe, recipes_inside, stated_recipe
from compressor.recipe.training_files import OPTIMIZER_STATES

logger = logging.getLogger(__name__)


def training_recipe(checkpoint: Checkpoint, stated: Sequence[TrainingRecipe | Path]) -> TrainingRecipe:
    """All that is known of the training; what is `stated` is trusted most.

    Raises `BadInput` if what is stated cannot be read, or contradicts itself.
    """
    if checkpoint.source is None:
        known = stated_recipe(stated)
    else:
        known = find_recipe(checkpoint.source, stated, _recipes_inside(checkpoint))
    if known.optimizer is not None and known.family is None:
        logger.warning("nothing is known about what the optimizer %r forgets", known.optimizer)
    return known


def _recipes_inside(checkpoint: Checkpoint) -> list[TrainingRecipe]:
    """The recipes inside a checkpoint, and in the optimizer states beside it."""
    assert checkpoint.directory is not None
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    found = recipes_inside(checkpoint.training, shapes, checkpoint.files[0].name)
    document: dict[str, object] = {}
    names = []
    for path in (checkpoint.directory / name for name in OPTIMIZER_STATES):
        if path.is_file():
            try:
                document[path.stem] = read_state_file(path)
                names.append(path.name)
            except BadInput as error:
                logger.warning("left out of the training recipe: %s", error)
    return found + recipes_inside(document, shapes, " and ".join(names))
