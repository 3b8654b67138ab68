"""A stored difference and the base that it is added to."""

from __future__ import annotations

from pathlib import Path

from compressor.errors import BadInput
from compressor.fine_tuning import is_difference, opened_fine_tune, require_no_more_tokens
from compressor.io import refuse_adapter
from compressor.model import Factory, Model, open_model


def with_base(opened: Model, base: str | Path | None, factory: Factory | None = None, *, runs: bool = False) -> Model:
    """A model as it is, or of a stored difference the fine-tune that it and its base make.

    Raises `BadInput` for a difference without a base, a base of something else, one that the difference is not of, and
    where it `runs`, which it does in the architecture of the base, for one with fewer tokens.
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
    start = open_model(base, factory=factory)
    tuned = opened_fine_tune(checkpoint, start)
    if runs:
        require_no_more_tokens(tuned.checkpoint, start.checkpoint, stored=checkpoint)
    return tuned
