"""Preprocessing of data for a model: tokenizer, image processor and classes of its folder, and how it reads text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal

from torch import nn

from compressor.documents import read_json
from compressor.errors import BadInput, first_line

# How a model reads text: as a stream of tokens, a document at a time, or one text that it turns into another.
Reading = Literal["tokens", "documents", "pairs"]

# The window of published perplexities of large language models (Frantar et al. 2023, GPTQ, section 4).
LONGEST_DEFAULT_WINDOW = 2048

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")


@dataclass(frozen=True)
class Preprocessing:
    """What turns data into a model's inputs.

    `tokenizer` and `image_processor` are called as those of transformers. `classes` are the numbers of classes by name
    (`label2id` of a configuration). `sequence_length` is the number of the model's positions, at most 2048. `reading`
    is how it reads text, and `inputs` are the names that its forward has. What is None is not known.
    """

    tokenizer: Callable[..., Any] | None = None
    image_processor: Callable[..., Any] | None = None
    classes: Mapping[str, int] | None = None
    sequence_length: int | None = None
    reading: Reading = "tokens"
    inputs: tuple[str, ...] = ()

    def with_objects(self, tokenizer: Any = None, processor: Any = None) -> Preprocessing:
        """The same with a tokenizer and an image processor, or a processor that has both, where they are given."""
        known = (tokenizer, getattr(processor, "tokenizer", None), self.tokenizer)
        texts = next((each for each in known if each is not None), None)
        images = self.image_processor if processor is None else getattr(processor, "image_processor", processor)
        return replace(self, tokenizer=texts, image_processor=images)


def load_preprocessing(folder: Path) -> Preprocessing:
    """Load the preprocessing of a transformers folder: tokenizer, image processor, classes, positions.

    A part that exists but cannot be loaded raises `BadInput` when it is used: arrays need none of them.
    """
    config = read_config(folder)
    tokenizer = image_processor = None
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = _from_folder("AutoTokenizer", folder)
    if (folder / "preprocessor_config.json").is_file():
        image_processor = _from_folder("AutoImageProcessor", folder)
    known = _configured(config, _architecture_inputs(config))
    return replace(known, tokenizer=tokenizer, image_processor=image_processor)


def preprocessing_of(module: nn.Module | None) -> Preprocessing:
    """The preprocessing that a module implies: from its forward's arguments, and a transformers configuration."""
    if module is None:
        return Preprocessing()
    config: Any = getattr(module, "config", None)
    own = config.to_dict() if hasattr(config, "to_dict") else {}
    return _configured({**own, "architectures": [type(module).__name__]}, forward_inputs(type(module)))


def _configured(config: Mapping[str, Any], inputs: tuple[str, ...]) -> Preprocessing:
    text_config = config.get("text_config") or config
    positions = next(
        (text_config[key] for key in ("max_position_embeddings", "n_positions") if key in text_config), None
    )
    return Preprocessing(
        classes=config.get("label2id"),
        sequence_length=min(positions, LONGEST_DEFAULT_WINDOW) if isinstance(positions, int) else None,
        reading=reading_of(config, inputs),
        inputs=inputs,
    )


def forward_inputs(model: type[nn.Module]) -> tuple[str, ...]:
    """The names of the inputs of a model's forward."""
    named = signature(model.forward).parameters.values()
    several = (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)
    return tuple(each.name for each in named if each.name != "self" and each.kind not in several)


def _architecture_inputs(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the inputs of a transformers model; none for an unknown model."""
    import transformers

    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    model = getattr(transformers, name, None) if isinstance(name, str) else None
    return forward_inputs(model) if isinstance(model, type) and issubclass(model, nn.Module) else ()


def reading_of(config: Mapping[str, Any], inputs: Sequence[str]) -> Reading:
    """How a model reads text, by its configuration and the inputs of its forward."""
    if "decoder_input_ids" in inputs:
        return "pairs"
    if "model_type" not in config:
        return "tokens"
    from transformers.models.auto import modeling_auto

    name = str((config.get("architectures") or [""])[0])
    if not inputs or config.get("is_decoder") or name.endswith(("ForCausalLM", "LMHeadModel")):
        return "tokens"
    masked, encoding, causal = (
        set(getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES"))
        for kind in ("MASKED_LM", "TEXT_ENCODING", "CAUSAL_LM")
    )
    return "documents" if config.get("model_type") in masked | (encoding - causal) else "tokens"


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise BadInput("there is no config.json", where=folder, remedy="pass a transformers folder, or use `factory`")
    return read_json(path, remedy="repair it")


def _from_folder(auto_class: str, folder: Path) -> Any:
    import transformers

    try:
        return getattr(transformers, auto_class).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        what, remedy = f"{auto_class} cannot load from it: {first_line(error)}", "repair the folder"
        return _Unloadable(BadInput(what, where=folder, remedy=remedy))


class _Unloadable:
    """Stands in for a tokenizer or an image processor that cannot be loaded; any use raises the reason."""

    def __init__(self, error: BadInput) -> None:
        self._error = error

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise self._error

    def __getattr__(self, _: str) -> Any:
        raise self._error
