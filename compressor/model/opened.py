"""A model that was opened, from a file, a folder or memory, with what is known about it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from compressor.arguments import require_kind
from compressor.data import EvaluationData, halves, has_splits, load_preprocessing, open_data
from compressor.data.builtin_data import Split
from compressor.data.preprocessing import forward_inputs, reading_of
from compressor.documents import text_mapping
from compressor.errors import BadInput
from compressor.io import Checkpoint, hub_model, open_checkpoint, refuse_adapter, refuse_fp8
from compressor.io.torch_file import read_state_file
from compressor.lowrank import METADATA_KEY, merge_record, stored_pairs, widened
from compressor.model.build import build_model
from compressor.network import (
    Architecture,
    Layer,
    architecture_mismatch,
    find_layers,
    module_architecture,
    transformers_architecture,
    with_separate_experts,
)
from compressor.recipe import TrainingRecipe, find_recipe, merge_recipes, read_recipe, recipes_inside

logger = logging.getLogger(__name__)

# What a Trainer and accelerate save beside the model.
_STATE_FILES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scheduler.bin")

# Of a transformer's config.json the number of its attention heads, under one of its names.
ATTENTION_SETTINGS = frozenset({"num_attention_heads", "encoder_attention_heads", "num_heads", "n_heads", "n_head"})

# What projects to queries is called so in the attention layers of PyTorch, transformers, timm, diffusers and llama.
QUERIES = frozenset(
    {"q_proj", "query", "qkv", "Wqkv", "qkv_proj", "c_attn", "query_key_value", "in_proj_weight", "to_q", "wq", "q_lin"}
)

ModelLike = str | Path | nn.Module
Factory = str | Callable[[], nn.Module]


@dataclass(frozen=True)
class Model:
    """An opened model with what is known about it."""

    name: str
    checkpoint: Checkpoint
    architecture: Architecture | None
    layers: tuple[Layer, ...]
    recipe: TrainingRecipe

    @property
    def modules(self) -> nn.Module | None:
        """The model's module tree, if it is known."""
        return None if self.architecture is None else self.architecture.module

    @cached_property
    def has_attention(self) -> bool:
        """Whether it has attention layers, by its configuration or the usual names of their weights."""
        if set(self.checkpoint.config or {}) & ATTENTION_SETTINGS:
            return True
        parts = (name.split(".") for name in self.checkpoint.tensors)
        return any(
            part in QUERIES or (part == "q" and "attention" in owner.lower())
            for name in parts
            for owner, part in pairwise(["", *name])
        )

    @cached_property
    def digest(self) -> str | None:
        """The sha256 of the checkpoint, which reads all of it; None of a module in memory."""
        return self.checkpoint.digest() if self.checkpoint.source is not None else None


def open_model(
    model: ModelLike,
    recipe: TrainingRecipe | str | Path | None,
    recipe_file: str | Path | None,
    factory: Factory | None,
    include: str | Sequence[str],
    exclude: str | Sequence[str],
    *,
    embeddings: bool = False,
) -> Model:
    """Open a model, find out how it was trained, and list its matrices.

    Raises `BadInput` for a model that cannot be read, is quantized or compressed already, or does not fit its
    architecture, and for a recipe or a pattern that cannot be used.
    """
    if isinstance(model, nn.Module):
        model = with_separate_experts(model)
    checkpoint = open_checkpoint(model)
    refuse_adapter(checkpoint)
    refuse_fp8(checkpoint)
    require_kind(
        recipe, "recipe", (TrainingRecipe, str, Path), remedy="give a TrainingRecipe, or the path of a file with one"
    )
    require_kind(factory, "factory", (str, Callable), remedy="give a function that builds the model, or its name")
    if isinstance(recipe, str | Path):
        recipe, recipe_file = None, recipe
    if checkpoint.source is not None:
        inside = training_of(checkpoint)
        known = find_recipe(checkpoint.source, flags=recipe, recipe_file=recipe_file, inside=inside)
    else:
        known = merge_recipes(*filter(None, (recipe, read_recipe(recipe_file) if recipe_file is not None else None)))
    architecture = (
        module_architecture(model) if isinstance(model, nn.Module) else known_architecture(checkpoint, factory)
    )
    quantized = (checkpoint.config or {}).get("quantization_config")
    if quantized is not None and text_mapping(quantized).get("quant_method") != METADATA_KEY:
        raise BadInput(
            f"is quantized already ({text_mapping(quantized).get('quant_method', 'by an unknown method')})",
            where=checkpoint.source,
            remedy="compress the original, and quantize the result",
        )
    if stored_pairs(checkpoint):
        raise BadInput(
            "is compressed already",
            where=checkpoint.source,
            remedy="give the original, or bring it back with 'compress restore MODEL'",
        )
    architecture = _fitting(checkpoint, architecture, factory)
    layers = find_layers(checkpoint, architecture, include=include, exclude=exclude, embeddings=embeddings)
    if known.optimizer is not None and known.family is None:
        logger.warning("nothing is known about what the optimizer %r forgets", known.optimizer)
    name = type(model).__name__ if isinstance(model, nn.Module) else str(model)
    if checkpoint.source is not None and hub_model(checkpoint.source) is not None:
        name = checkpoint.name
    return Model(name, checkpoint, architecture, layers, known)


def training_of(checkpoint: Checkpoint) -> list[TrainingRecipe]:
    """What a checkpoint tells about its training: inside, and in the states that lie beside the model."""
    if checkpoint.source is None:
        return []
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    found = recipes_inside(checkpoint.training, shapes, checkpoint.files[0].name)
    document: dict[str, object] = {}
    names = []
    for path in (folder_of(checkpoint) / name for name in _STATE_FILES):
        if path.is_file():
            try:
                document[path.stem] = read_state_file(path)
                names.append(path.name)
            except BadInput as error:
                logger.warning("left out of the training recipe: %s", error)
    return found + recipes_inside(document, shapes, " and ".join(names))


def known_architecture(checkpoint: Checkpoint, factory: Factory | None) -> Architecture | None:
    """The module tree behind a checkpoint, from the user's own code or from transformers, if there is one."""
    if factory is not None:
        # Layers that networks side by side make wider than the architecture's were not initialized by it.
        merged = merge_record(checkpoint) != {}
        return module_architecture(widened(build_model(factory), checkpoint), untrained=not merged)
    if checkpoint.config is None or checkpoint.source is None:
        return None
    return transformers_architecture(folder_of(checkpoint))


def _fitting(checkpoint: Checkpoint, architecture: Architecture | None, factory: Factory | None) -> Architecture | None:
    """The architecture, if it is that of the checkpoint; BadInput where it ought to be."""
    if architecture is None or (mismatch := architecture_mismatch(checkpoint, architecture)) is None:
        return architecture
    if factory is not None:
        raise BadInput(
            f"the model that `factory` builds does not fit: {mismatch}",
            where=checkpoint.source,
            remedy="use the function that builds the model that was trained",
        )
    if checkpoint.folder is not None:
        raise BadInput(
            f"config.json does not belong to these weights: {mismatch}",
            where=checkpoint.source,
            remedy="put the model's own config.json there",
        )
    logger.warning("the config.json beside %s belongs to another model and is not used", checkpoint.source)
    return None


def folder_of(checkpoint: Checkpoint) -> Path:
    """The folder that a checkpoint's files are in."""
    assert checkpoint.source is not None
    return checkpoint.folder or checkpoint.source.parent


def open_data_for(
    data: str | Path,
    checkpoint: Checkpoint,
    split: Split,
    limit: int | None = None,
    *,
    module: nn.Module | None = None,
    sequence_length: int | None = None,
    least_windows: int | None = None,
) -> EvaluationData:
    """The data prepared as the model's folder says, or as it is where the folder says nothing.

    `module` is the model, or one that only has its architecture, where there is no such folder. The other parameters
    are those of `open_data`.
    """
    if checkpoint.source is None or checkpoint.config is None:
        inputs = () if module is None else forward_inputs(type(module))
        config: Any = getattr(module, "config", None)
        own = config.to_dict() if hasattr(config, "to_dict") else {}
        reading = reading_of(own | {"architectures": [type(module).__name__]}, inputs)
        return open_data(data, split=split, limit=limit, inputs=inputs, reading=reading)
    prepared = load_preprocessing(folder_of(checkpoint))
    return open_data(
        data,
        split=split,
        tokenizer=prepared.tokenizer,
        image_processor=prepared.image_processor,
        classes=prepared.classes,
        sequence_length=sequence_length or prepared.sequence_length,
        reading=prepared.reading,
        inputs=prepared.inputs,
        limit=limit,
        least_windows=least_windows,
    )


def open_search_data(
    data: str | Path, checkpoint: Checkpoint, limit: int | None, module: nn.Module | None = None
) -> tuple[EvaluationData, EvaluationData]:
    """Data to choose a size by, and other data to report the drop on.

    The validation and the test split of built-in data, at most `limit` examples of each; of other data two halves of at
    most `limit` examples together.
    """
    if has_splits(data):
        return open_data_for(data, checkpoint, "validation", limit), open_data_for(data, checkpoint, "test", limit)
    return halves(open_data_for(data, checkpoint, "test", limit, module=module))
