"""What prepares data for a model: its folder's tokenizer, image processor and classes, and how it reads text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from torch import nn

from compressor.choices import Split
from compressor.data.data import LONGEST_DEFAULT_WINDOW, EvaluationData, Reading, halves, has_splits, open_data
from compressor.documents import read_json
from compressor.errors import BadInput, first_line

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")


@dataclass(frozen=True)
class Preprocessing:
    """What turns data into a transformers model's inputs, each None where its folder has none.

    The fields are the parameters of the same names of `open_data`; `sequence_length` is the number of the
    model's positions, at most 2048.
    """

    tokenizer: Callable[..., Any] | None = None
    image_processor: Callable[..., Any] | None = None
    classes: Mapping[str, int] | None = None
    sequence_length: int | None = None
    reading: Reading = "tokens"
    inputs: tuple[str, ...] = ()


def load_preprocessing(folder: Path) -> Preprocessing:
    """Load what a transformers folder prepares data with: tokenizer, image processor, classes, positions.

    One that is there but cannot be loaded raises `BadInput` where it is used: data of arrays need none of them.
    """
    config = read_config(folder)
    text_config = config.get("text_config", config)
    positions = next(
        (text_config[key] for key in ("max_position_embeddings", "n_positions") if key in text_config), None
    )
    tokenizer = image_processor = None
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = _from_folder("AutoTokenizer", folder)
    if (folder / "preprocessor_config.json").is_file():
        image_processor = _from_folder("AutoImageProcessor", folder)
    return Preprocessing(
        tokenizer=tokenizer,
        image_processor=image_processor,
        classes=config.get("label2id"),
        sequence_length=min(positions, LONGEST_DEFAULT_WINDOW) if isinstance(positions, int) else None,
        reading=reading_of(config, inputs := _architecture_inputs(config)),
        inputs=inputs,
    )


def preprocessing_of(module: nn.Module | None) -> Preprocessing:
    """What is known of a model without a folder: its inputs, and how it reads tokens."""
    if module is None:
        return Preprocessing()
    config: Any = getattr(module, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    inputs = forward_inputs(type(module))
    reading = reading_of(settings | {"architectures": [type(module).__name__]}, inputs)
    return Preprocessing(reading=reading, inputs=inputs)


def open_data_for(
    spec: str | Path,
    preprocessing: Preprocessing,
    *,
    split: Split = "test",
    limit: int | None = None,
    least_windows: int | None = None,
) -> EvaluationData:
    """The data that `spec` names, prepared for a model; the other parameters are those of `open_data`."""
    return open_data(
        spec,
        split=split,
        tokenizer=preprocessing.tokenizer,
        image_processor=preprocessing.image_processor,
        classes=preprocessing.classes,
        sequence_length=preprocessing.sequence_length,
        reading=preprocessing.reading,
        inputs=preprocessing.inputs,
        limit=limit,
        least_windows=least_windows,
    )


def open_search_data(
    spec: str | Path, preprocessing: Preprocessing, limit: int | None
) -> tuple[EvaluationData, EvaluationData]:
    """Data to choose a size by, and other data to report the drop on.

    The validation and the test split of built-in data, at most `limit` examples of each; of other data two halves of at
    most `limit` examples together.
    """
    if has_splits(spec):
        search, report = (
            open_data_for(spec, preprocessing, split=split, limit=limit) for split in ("validation", "test")
        )
        return search, report
    return halves(open_data_for(spec, preprocessing, limit=limit))


def forward_inputs(model: type[nn.Module]) -> tuple[str, ...]:
    """The names that the forward of a model has for its inputs."""
    named = signature(model.forward).parameters.values()
    several = (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)
    return tuple(each.name for each in named if each.name != "self" and each.kind not in several)


def _architecture_inputs(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the inputs of a transformers model; none where the model is not known."""
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
    """In place of a tokenizer or an image processor that cannot be loaded: any use says why."""

    def __init__(self, error: BadInput) -> None:
        self._error = error

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise self._error

    def __getattr__(self, _: str) -> Any:
        raise self._error
