"""The files that accompany the weights of a model folder: known parts of a model, by name, and never code."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from compressor.documents import read_json, read_regular_file, reading
from compressor.errors import BadInput
from compressor.io.checkpoint import ADAPTER_CONFIG, WEIGHT_SUFFIXES, portable_name
from compressor.io.writer import write_json
from compressor.recipe.training_files import DESCRIPTIONS, TRAINING_ARGUMENTS

logger = logging.getLogger(__name__)

PLAN_FILE = "compression.json"
"""What a compressed folder carries besides its weights: the plan, the recipe, and the names of its files."""

OPTIONS_FILE = "options.yaml"
"""The options by which a folder was made, in a file that can be given instead of them."""

CARD_FILE = "README.md"
"""The model card of a folder."""

CODE_FILE = "modeling_lowrank.py"
"""The code of the low-rank layers, in a folder that brings it along."""

_CONFIGURATIONS = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "audio_tokenizer_config.json"),
    *("*preprocessor_config.json", "*processor_config.json"),
    *("config_sentence_transformers.json", "sentence_*_config.json"),
)
_SENTENCE_MODULES = "modules.json"
_KINDS = (
    *_CONFIGURATIONS,
    *(_SENTENCE_MODULES, PLAN_FILE, OPTIONS_FILE),
    # tokenizers
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "tekken.json", "normalizer.json"),
    *("vocab*.json", "*_vocab.json", "vocab*.txt", "merges*.txt", "dict*.txt", "bpe.codes", "byte_maps.json"),
    *("word_shape.json", "word_pronunciation.json", "emoji.json"),
    *("*.model", "*.model.v*", "*.spm", "*.tiktoken", "*.jinja", "chat_template.json"),
    # names of classes
    *("id2label.json", "label2id.json", "labels.txt", "labels.json", "label_map*.json", "label_map*.txt"),
    *("classes.txt", "class_names.txt"),
)
# Texts for readers, in either case.
_TEXTS = ("README*", "LICEN[CS]E*", "COPYING*", "NOTICE*", "*USE_POLICY*", "CITATION*")
# Parts of sentence-transformers such as 1_Pooling, and what processors and tokenizers have apart.
_SUBFOLDERS = re.compile(
    r"\d+_\w+|additional_chat_templates|(\w+_)?tokenizer(_\w+)?|(pre|image_)?processor|feature_extractor", re.ASCII
)

# Models of these kinds keep parts in folders of their own, with weights.
_SAFE_WEIGHTS = (".safetensors", ".safetensors.index.json")

# The same weights in other frameworks' formats: dense, and so stale beside compressed ones.
_OTHER_WEIGHT_SUFFIXES = (".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".tflite")
_PICKLES = (".bin", ".pkl", ".pickle", ".joblib", ".dill", ".npy")
_CODE = (".py", ".pyc", ".pyx", ".so", ".sh", ".dll", ".dylib", ".exe", ".js", ".ipynb")
_RESULTS = ("metrics.json", "all_results.json", "*_results.json")

# Keys under which a configuration names classes in Python files, of the folder or of any repository.
_CODE_KEYS = ("auto_map", "custom_pipelines")
# Keys under which transformers before 5 stores paths on the machine that saved the folder.
_PATH_KEYS = ("_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file", "merges_file")


class NotCopied(NamedTuple):
    """A file of a model folder that is not copied, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Companions:
    """The files of a model folder to copy along with new weights, relative to it, and those that are left out."""

    files: tuple[Path, ...]
    not_copied: tuple[NotCopied, ...]


def companions(source: Path) -> Companions:
    """What of a model folder goes along with new weights.

    Weights and the state of optimizers are replaced, and our own code and the configuration of an adapter are written
    anew: they neither go along nor are listed. The weights of a part in a folder of its own, such as 2_Dense of
    sentence-transformers, stay as they are. A link to a file is followed only inside the folder, or inside the Hugging
    Face cache that it is part of.

    Raises:
        BadInput: the folder or one of its files cannot be read.
    """
    inside = source.resolve()
    # huggingface_hub keeps snapshots/REVISION/NAME as links to blobs/HASH of the same repository.
    if inside.parent.name == "snapshots":
        inside = inside.parent.parent
    files: list[Path] = []
    not_copied: list[NotCopied] = []

    def visit(folder: Path) -> None:
        for entry in _entries(folder):
            name = str(entry.relative_to(source))
            if entry.is_dir():
                reason = _why_no_subfolder(entry, nested=folder != source)
                if reason is None:
                    visit(entry)
            elif (_holds_weights(entry) and folder == source) or entry.name in (CODE_FILE, ADAPTER_CONFIG):
                continue
            else:
                reason = _why_no_companion(entry, inside)
                if reason is None:
                    files.append(entry.relative_to(source))
                    not_copied.extend(NotCopied(f"{key} in {name}", "names code") for key in _code_keys_of(entry))
            if reason is not None:
                not_copied.append(NotCopied(name, reason))

    with reading(source):
        visit(source)
    return Companions(tuple(files), tuple(not_copied))


def copy_companions(source: Path, target: Path, *, left_out: Sequence[str] = ()) -> None:
    """Copy the companions of a model folder into another, and log what is left out.

    Raises:
        BadInput: a file of the source cannot be read.
    """
    found = companions(source)
    if found.not_copied:
        logger.warning("not copied from %s: %s", source, not_copied_words(found.not_copied))
    for file in found.files:
        if str(file) in left_out:
            continue
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        if (config := _configuration_to_change(source / file)) is not None:
            write_json(target / file, _cleaned(config))
            continue
        # Only the contents are copied: the new file gets the permissions of the umask.
        with reading(source / file):
            contents = (source / file).open("rb")
        with contents, (target / file).open("wb") as copy:
            # Only a failure to read is the input's fault.
            while chunk := _read_chunk(contents, source / file):
                copy.write(chunk)


def not_copied_words(not_copied: Iterable[NotCopied]) -> str:
    """The files that were not copied, by reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in not_copied:
        reasons.setdefault(reason, []).append(name)
    words = []
    for reason, names in reasons.items():
        more = f" and {len(names) - 12} more" if len(names) > 12 else ""
        words.append(f"{', '.join(names[:12])}{more} ({reason})")
    return "; ".join(words)


def portable_config(config: Mapping[str, Any], code: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A `config.json` for a folder of ours; the only code that it may name is our own, an `auto_map`, and no path.

    `transformers_weights` is left out: it names a weight file of the original.
    """
    own: dict[str, Any] = {} if code is None else {"auto_map": dict(code)}
    others = {key: value for key, value in config.items() if key != "transformers_weights"}
    cleaned: dict[str, Any] = _cleaned(others)
    return cleaned | own


def _cleaned(value: Any) -> Any:
    """A part of a configuration without keys that name code, and without paths of the machine that saved it."""
    if isinstance(value, Mapping):
        return {key: _without_path(key, _cleaned(each)) for key, each in value.items() if key not in _CODE_KEYS}
    return [_cleaned(each) for each in value] if isinstance(value, list) else value


def _without_path(key: str, value: Any) -> Any:
    return portable_name(value) if key in _PATH_KEYS and isinstance(value, str) else value


def _names_paths(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_without_path(key, each) != each or _names_paths(each) for key, each in value.items())
    return isinstance(value, list) and any(map(_names_paths, value))


def _configuration_to_change(file: Path) -> dict[str, Any] | None:
    """A configuration that names code or paths; None for any other file."""
    if not _is_any_of(file.name, _CONFIGURATIONS) or (config := _configuration(file)) is None:
        return None
    return config if _code_keys_of(file) or _names_paths(config) else None


def _code_keys_of(file: Path) -> list[str]:
    """The keys of a configuration file that name code, at any depth."""
    found: list[str] = []

    def visit(value: Any) -> None:
        if isinstance(value, Mapping):
            found.extend(key for key in value if key in _CODE_KEYS and not _is_our_own(value[key]) and key not in found)
        for each in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
            visit(each)

    if _is_any_of(file.name, _CONFIGURATIONS):
        visit(_configuration(file))
    return found


def _is_our_own(auto_map: Any) -> bool:
    module = CODE_FILE.removesuffix(".py")
    return isinstance(auto_map, Mapping) and all(str(name).startswith(f"{module}.") for name in auto_map.values())


def _configuration(file: Path) -> dict[str, Any] | None:
    """A JSON object; None if the file does not hold one."""
    try:
        return read_json(file)
    except BadInput:
        return None


def _read_chunk(contents: BinaryIO, path: Path) -> bytes:
    with reading(path):
        return contents.read(2**20)


def _entries(folder: Path) -> list[Path]:
    with reading(folder):
        return sorted(folder.iterdir())


def _is_any_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _holds_weights(file: Path) -> bool:
    if file.name == TRAINING_ARGUMENTS or file.name.startswith("."):
        return False
    indices = tuple(suffix + ".index.json" for suffix in WEIGHT_SUFFIXES)
    return file.name.endswith((*WEIGHT_SUFFIXES, *_OTHER_WEIGHT_SUFFIXES, *indices))


def _why_no_companion(file: Path, inside: Path) -> str | None:
    if file.name.startswith("."):
        return "hidden"
    if not file.is_file():
        return "a broken link or no regular file"
    if not file.resolve().is_relative_to(inside):
        return "a link out of the model folder"
    if file.name.lower().endswith(_CODE):
        return "code; copy it yourself if you trust it"
    if file.name.lower().endswith(_PICKLES):
        return "pickles, which run code when they are loaded"
    if _holds_weights(file):
        return None if file.name.endswith(_SAFE_WEIGHTS) else "weights that are no safetensors"
    if _is_any_of(file.name, _KINDS):
        return _why_no_configuration(file)
    if _is_any_of(file.name.upper(), _TEXTS):
        return None
    if _is_any_of(file.name, _RESULTS):
        return "measured on the dense weights"
    if _is_any_of(file.name, DESCRIPTIONS):
        return "of the training; the card has its contents"
    return "not known as part of a model"


def _why_no_configuration(file: Path) -> str | None:
    if _is_any_of(file.name, _CONFIGURATIONS) and _configuration(file) is None:
        return "not readable as JSON"
    if file.name == _SENTENCE_MODULES and not _is_list_of_known_modules(file):
        return "names code"
    return None


def _is_list_of_known_modules(file: Path) -> bool:
    """Whether a list of the modules of sentence-transformers has only those that this library has."""
    try:
        modules = json.loads(read_regular_file(file, 2**20))
        return all(each["type"].startswith("sentence_transformers.") for each in modules)
    except (BadInput, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return False


def _why_no_subfolder(folder: Path, *, nested: bool) -> str | None:
    if folder.is_symlink():
        return "a link to a folder"
    if folder.name.startswith("."):
        return "hidden"
    if folder.name.startswith("checkpoint-"):
        return "checkpoints of the training"
    weights = [entry for entry in _entries(folder) if not entry.is_dir() and _holds_weights(entry)]
    if weights and not any(entry.name.endswith(_SAFE_WEIGHTS) for entry in weights):
        return "with weights of its own that are no safetensors"
    if not nested and _SUBFOLDERS.fullmatch(folder.name) is None:
        return "not known as part of a model"
    return None
