"""What is measured of a model's matrices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compressor.api.requests import selection, stated
from compressor.arguments import as_number
from compressor.errors import BadInput
from compressor.measure import EPSILON
from compressor.model import Factory, ModelLike, inspect_layers, measured_layers, open_model, resolve_device
from compressor.planning import window_rule_advice
from compressor.progress import Progress
from compressor.recipe import TrainingRecipe
from compressor.results import Inspection
from compressor.torch_state import neutral_torch_state


@neutral_torch_state()
def inspect(
    model: ModelLike,
    *,
    revision: str | None = None,
    recipe: TrainingRecipe | str | Path | None = None,
    recipe_file: str | Path | None = None,
    factory: Factory | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    embeddings: bool = False,
    epsilon: float = EPSILON,
    device: str = "auto",
    progress: Progress | None = None,
) -> Inspection:
    """Measure every matrix of a model: effective ranks, memory window, surviving initialization.

    `model` is a weight file, a model folder, a module, or `org/name` of the Hugging Face hub at a `revision`. `recipe`
    says how it was trained where the files beside it do not, as a `TrainingRecipe` or the path of a file. `factory`
    builds the model's architecture, for weights that are not a transformers model's. `embeddings` has these measured
    too. `epsilon` is the share of a matrix that the memory window may leave out.

    Raises `BadInput` for a model, recipe or pattern that cannot be used.
    """
    relative = as_number(epsilon, "epsilon") or 0.0
    if not 0 < relative < 1:
        what = f"`epsilon` {relative:g} is out of range"
        raise BadInput(what, option="epsilon", remedy="give a number between 0 and 1")
    subject = open_model(
        model,
        recipe=stated(recipe, recipe_file),
        factory=factory,
        select=selection(include, exclude, embeddings=embeddings),
        revision=revision,
    )
    inspected = inspect_layers(subject, relative, resolve_device(device), progress)
    return Inspection(
        source=subject.name,
        recipe=subject.recipe,
        layers=inspected,
        parameters=sum(info.elements for info in subject.checkpoint.tensors.values()),
        weight_bytes=subject.checkpoint.weight_bytes,
        left_out=subject.checkpoint.left_out,
        weights_at=subject.checkpoint.weights_at,
        advice=window_rule_advice(measured_layers(subject, inspected), subject.recipe.family, "auto"),
    )
