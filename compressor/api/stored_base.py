"""A stored difference and the base that it is added to."""

from __future__ import annotations

from pathlib import Path

from compressor.errors import BadInput
from compressor.fine_tuning import is_difference, opened_fine_tune
from compressor.io import refuse_adapter
from compressor.model import Factory, Model, open_model


def with_base(opened: Model, base: str | Path | None, factory: Factory | None = None) -> Model:
    """A model as it is, or of a stored difference the fine-tune that it and its base make.

    Raises `BadInput` for a difference without a base, a base of something else, and one that the difference is not of.
    """
    checkpoint = opened.checkpoint
    if not is_difference(checkpoint):
        if base is not None:
            what = "holds no difference to a base model"
            raise BadInput(what, where=checkpoint.source or opened.name, option="base", remedy="leave out `base`")
        return opened
    refuse_adapter(checkpoint)
    if base is None:
        remedy = "name the base with `base=ORIGINAL`"
        raise BadInput("holds what a fine-tune adds to its base", where=checkpoint.source, remedy=remedy)
    return opened_fine_tune(checkpoint, open_model(base, factory=factory))
