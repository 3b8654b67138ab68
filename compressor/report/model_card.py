"""The card of a compressed model folder: `README.md`, with the front matter that the Hugging Face hub reads.

Nothing in it names a path of the machine, and nothing but what was measured of memory and time changes from run to run.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from compressor.formatting import format_percent, format_shape, format_size, one_line
from compressor.io import CARD_FILE, hub_model
from compressor.recipe.card import front_matter, hyperparameter_lines
from compressor.report.card_parts import (
    LOADING,
    TAG,
    TAGS,
    architecture_of,
    code,
    markdown_table,
    plain_text,
    python_block,
    repository_name,
)
from compressor.report.comparison import compression_rows
from compressor.report.initial_words import initial_facts, needed_initial, started_layers
from compressor.report.wording import (
    BITS_NOTE,
    SEARCH_HEADERS,
    above_one_words,
    bits_words,
    budget_words,
    calibration_words,
    count_words,
    error_words,
    form_words,
    left_out_words,
    quantizes,
    rank_words,
    recipe_sources,
    search_rows,
    search_words,
    squeezed_words,
    timed_on,
    widths_words,
)
from compressor.version import VERSION

if TYPE_CHECKING:
    from compressor.evaluation import Evaluation
    from compressor.io import Checkpoint
    from compressor.report.comparison import Comparison
    from compressor.results import Compression

logger = logging.getLogger(__name__)

_LIBRARIES = ("torch", "transformers", "safetensors")
# What a card says of the dense weights alone, and is not true of others.
_OF_THE_ORIGINAL = ("base_model", "base_model_relation", "model-index", "eval_results", "model_name", "quantized_by")
_KEPT_TEXTS = ("library_name", "pipeline_tag", "license_name", "license_link", "thumbnail", "author")
# A token such as <mask>, and the form by which one asks for access, where the hub takes HTML.
_KEPT_AS_THEY_ARE = (
    "mask_token",
    *("extra_gated_heading", "extra_gated_prompt", "extra_gated_description", "extra_gated_button_content"),
)
_KEPT_LISTS = ("language", "license", "datasets", "metrics", "arxiv")
_PIPELINE_TAGS = {"image-classification": "image-classification", "text-classification": "text-classification"}


def compressed_card(
    original: str, compression: Compression, source: Checkpoint, *, name: str, config: Mapping[str, Any] | None
) -> str:
    """The card of a compressed folder, which includes the card of the dense model.

    `source` is the dense checkpoint, `name` the name to load the folder by, and `config` its `config.json`.
    """
    if original.lstrip().startswith("---") and not front_matter(original)[0]:
        logger.warning("the metadata of %s of %s cannot be read, and only its text is kept", CARD_FILE, source.name)
    fetched = None if source.folder is None else hub_model(source.folder)
    return model_card(
        compression,
        name=name,
        base_model=source.name,
        commit=None if fetched is None else fetched.commit,
        config=config,
        original=original,
    )


def model_card(
    compression: Compression,
    *,
    name: str,
    base_model: str,
    config: Mapping[str, Any] | None,
    original: str,
    commit: str | None = None,
) -> str:
    """The card of a compressed folder as text.

    `name` is the name to load the folder by, `base_model` that of the dense model, `commit` its commit on the hub,
    `config` its `config.json`, and `original` its card: its metadata carry over, except evaluation results, which are
    not those of these weights, and its text is appended.
    """
    metadata, text = front_matter(original)
    data = _metadata(metadata, compression.evaluation, name, base_model=base_model, config=config)
    parts = [
        f"# {plain_text(name.rpartition('/')[2])}",
        _verdict(compression),
        _summary(compression, base_model),
        LOADING,
        _loading(name, config, needed=needed_initial(compression.plan)),
        "## Before and after",
        _sizes(compression),
        "## Plan",
        _plan(compression),
        "## How it was made",
        _making(compression, commit),
    ]
    lines = hyperparameter_lines(compression.recipe)
    if lines:
        sources = recipe_sources(compression.recipe)
        said = f"What is known of how {code(base_model)} was trained" + (f", from {sources}" if sources else "")
        parts += ["### Training hyperparameters", said + ":", "\n".join(lines)]
    if text.strip():
        of = "low-rank model that it was made of" if compression.plan.squeezed else "dense model"
        parts += [f"## Card of {code(base_model)}", f"What follows is about the {of}.", text.strip()]
    front = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n\n".join(parts) + "\n"


def restored_card(card: str) -> str:
    """Adapt the card of a compressed folder to the dense folder restored from it; other cards stay as they are."""
    said = (
        "## Dense again\n\n`compress restore` multiplied the factors back: these weights are dense, any tool loads them"
        " without compressor, and what they predict is what the compressed model predicts. It is described below.\n\n"
    )
    changed = _otherwise_loaded(card, said)
    # The verdict is about the factors.
    return card if changed == card else re.sub(r"^(# .*\n\n)\*\*.*\n\n", r"\1", changed, count=1, flags=re.MULTILINE)


def remote_card(card: str, *, auto_class: str, name: str) -> str:
    """Adapt the card of a compressed folder to one that includes the code of its layers; others stay as they are."""
    load = python_block(
        "import transformers  # the code of the low-rank layers is in this folder",
        f"model = transformers.{auto_class}.from_pretrained({json.dumps(name)}, trust_remote_code=True)",
    )
    return _otherwise_loaded(card, f"{LOADING}\n\n{load}\n\n")


def _otherwise_loaded(card: str, said: str) -> str:
    """A card of ours with another section on loading."""
    tags = front_matter(card)[0].get("tags")
    if not isinstance(tags, list) or TAG not in tags:
        return card
    return re.sub(rf"^{LOADING}\n.*?(?=^## )", lambda _: said, card, count=1, flags=re.DOTALL | re.MULTILINE)


def _metadata(
    carried: Mapping[str, Any],
    evaluation: Evaluation | None,
    name: str,
    *,
    base_model: str,
    config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The front matter: the compressed model's, and those fields of the dense model's that hold for it too."""
    kept = _kept(carried)
    results: dict[str, Any] = {}
    if evaluation is not None:
        if (task := _PIPELINE_TAGS.get(evaluation.task)) is not None:
            kept.setdefault("pipeline_tag", task)
        if math.isfinite(evaluation.compressed):
            results = {"model_name": one_line(name.rpartition("/")[2]), "eval_results": [_result(evaluation)]}
    kept.setdefault("library_name", "pytorch" if config is None else "transformers")
    own = ModelCardData(
        base_model=repository_name(base_model),
        base_model_relation="quantized",
        tags=list(dict.fromkeys([*(tag for tag in _texts(carried.get("tags")) if "<" not in tag), *TAGS])),
        **results,
    )
    described: dict[str, Any] = own.to_dict()  # type: ignore[no-untyped-call]
    return kept | described


def _kept(carried: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of the dense model's card that the hub knows and whose values have the right type."""
    known: dict[str, Callable[[Any], bool]] = {
        **dict.fromkeys(_KEPT_TEXTS, lambda value: isinstance(value, str) and "<" not in value),
        **dict.fromkeys(_KEPT_AS_THEY_ARE, lambda value: isinstance(value, str)),
        **dict.fromkeys(_KEPT_LISTS, _are_names),
        "inference": lambda value: isinstance(value, bool),
        "extra_gated_eu_disallowed": lambda value: isinstance(value, bool),
        "extra_gated_fields": _is_form,
    }
    carried = {key: value for key, value in carried.items() if key not in ("tags", *_OF_THE_ORIGINAL)}
    if "language" in carried:
        carried["language"] = _norwegian(carried["language"])
    kept = {key: value for key, value in carried.items() if key in known and known[key](value)}
    dropped = [key for key, value in carried.items() if key not in kept and value is not None]
    if dropped:
        logger.warning("metadata of the dense model's card that are not kept: %s", ", ".join(map(one_line, dropped)))
    return kept


def _norwegian(language: object) -> object:
    """Languages as they were written: YAML reads the code `no` as false."""
    if isinstance(language, list):
        return ["no" if each is False else each for each in language]
    return "no" if language is False else language


def _is_form(fields: object) -> bool:
    """Whether these are fields of a form for gated access: by name a type, or a type and its options."""

    def is_field(field: object) -> bool:
        if not isinstance(field, Mapping):
            return isinstance(field, str)
        return all(isinstance(key, str) and _texts(value) in (value, [value]) for key, value in field.items())

    return isinstance(fields, Mapping) and all(
        isinstance(name, str) and is_field(field) for name, field in fields.items()
    )


def _result(evaluation: Evaluation) -> EvalResult:
    data = without_folders(evaluation.data)
    return EvalResult(
        task_type="text-generation" if evaluation.task == "language-modeling" else evaluation.task,
        dataset_type=data.partition(",")[0],
        dataset_name=data,
        metric_type=evaluation.metric,
        metric_name=evaluation.metric,
        metric_value=round(evaluation.compressed, 6),
    )


def _are_names(value: object) -> bool:
    """Whether a value is a text or a list of texts, without HTML and without paths of the machine."""
    texts = _texts(value)
    return texts in (value, [value]) and not any("<" in text or Path(text).is_absolute() for text in texts)


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def without_folders(data: str) -> str:
    """The name of data, without the folders of its file."""
    return Path(data).name


def _verdict(compression: Compression) -> str:
    """What became of the model, and what of that is worse, since Markdown has no colors."""
    verdict = compression.verdict
    worse = f" Worse than the dense model: {plain_text(', '.join(verdict.worse))}." if verdict.worse else ""
    return f"**{plain_text(str(verdict)).replace('-&gt;', '->')}.**{worse}"


def _summary(compression: Compression, base_model: str) -> str:
    plan, sizes = compression.plan, compression.bytes
    started = len(started_layers(plan.layers))
    low_rank = sum(layer.truncated_to is not None for layer in plan.layers if layer.share is None)
    quantized = sum(layer.quantization is not None for layer in plan.layers)
    of = f"of its {len(plan.layers)} eligible matrices"
    ways = [f"{started} {of} as what training wrote on their initial weights"] if started else []
    if low_rank or not (started or quantized):
        ways.append(f"{low_rank}{'' if ways else f' {of}'} as products of low-rank factors")
    if quantized:
        widths = sorted({layer.bits for layer in plan.layers if layer.quantization is not None})
        few = f"{widths[0]}" if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
        ways.append(f"{quantized}{'' if ways else f' {of}'} in {few} bits")
    kept = "the bytes that their parameters take in 16 bits" if quantized else "their parameters"
    return (
        f"{code(base_model)} with {' and '.join(ways)}:"
        f" {format_percent(plan.eligible_after, plan.eligible_before)} of {kept} are kept, and"
        f" weight files of {format_size(sizes.before)} become {format_size(sizes.after)}.{_left_out(compression)}"
        " Made by compressor."
    )


def _left_out(compression: Compression) -> str:
    if not compression.left_out:
        return ""
    words = left_out_words(compression.left_out, compression.weights_at, code, remedy=False)
    return f" Left out of the source: {words}."


def _loading(name: str, config: Mapping[str, Any] | None, *, needed: str | None) -> str:
    quoted = json.dumps(name, ensure_ascii=False)  # a string of JSON is one of Python
    build = "" if config is not None else ", build_model"
    if needed is not None:
        initial = json.dumps(needed, ensure_ascii=False)
        said = "The weights that training started from are needed to load it: what training wrote is added to them."
        return f"{said}\n\n" + python_block(
            "import compressor", f"model = compressor.load_model({quoted}{build}, initial={initial})"
        )
    if config is None:
        return python_block(
            "from compressor.model import load_model",
            f"model = load_model({quoted}, build_model)  # the function that builds the architecture",
        )
    needs = "import compressor, transformers  # pip install compressor; transformers learns of the format"
    if config.get("quantization_config", {}).get("quant_method") == "compressed-tensors":
        needs = "import transformers  # pip install compressed-tensors, whose format this is"
    return python_block(needs, f"model = transformers.{architecture_of(config)}.from_pretrained({quoted})")


def _sizes(compression: Compression) -> str:
    evaluation = compression.evaluation
    rows = ((row.label, row.before, row.after, _marked(row)) for row in compression_rows(compression))
    table = markdown_table(("", "before", "after", "compared"), rows)
    if evaluation is None:
        measured = "Quality was not measured."
    else:
        measured = f"Measured on {code(without_folders(evaluation.data))}: {count_words(evaluation)}."
    if (device := timed_on(compression)) is not None:
        what = "Latency was" if evaluation is None else "Memory and latency were"
        measured += f" {what} measured on {plain_text(device)}; devices differ."
    return "\n\n".join([table, measured, *(f"**Warning:** {words}." for words in _warnings(compression))])


def _marked(row: Comparison) -> str:
    """How a quantity compares; bold where it is worse."""
    return f"**{row.compared}**" if row.change == "worse" else row.compared


def _warnings(compression: Compression) -> list[str]:
    """The warnings of a result, with data named by the last part of the path."""
    data = None if compression.evaluation is None else compression.evaluation.data
    return [words if data is None else words.replace(data, without_folders(data)) for words in compression.warnings]


def _plan(compression: Compression) -> str:
    plan = compression.plan
    said = [f"Budget: {budget_words(plan.budget)}."]
    if (squeezed := squeezed_words(plan)) is not None:
        said.append(f"Already: {squeezed}.")
    if (widths := widths_words(compression)) is not None:
        said.append(f"Bits: {widths}.")
    if initial := [plain_text(words) for _, words in initial_facts(plan)]:
        said.append(f"Start: {'. '.join(initial)}.")
    if plan.calibration is not None:
        said.append(f"Calibration: {calibration_words(plan.calibration)}.")
    if plan.search is not None:
        said.append(f"Search: {search_words(replace(plan.search, data=without_folders(plan.search.data)))}.")
        said.append(markdown_table(SEARCH_HEADERS, search_rows(plan.search)))
    bits = quantizes(plan.layers)
    rows = (
        (
            code(layer.name),
            format_shape(layer.shape),
            rank_words(layer),
            form_words(layer),
            *((bits_words(layer),) if bits else ()),
            format_percent(layer.parameters, layer.parameters_before),
            error_words(layer.error, 4),
            plain_text(layer.reason),
        )
        for layer in plan.layers
    )
    headers = ("layer", "shape", "rank", "form", *(("bits",) if bits else ()), "kept", plan.error_name, "why")
    said.append(markdown_table(headers, rows))
    metric = "metric of the loss at the dense model" if plan.calibration is not None else "Frobenius norm"
    said.append(f"Shape is outputs x inputs; the error is that of the numbers as they are stored, in the {metric}.")
    if bits:
        said.append(f"Bits: {BITS_NOTE}.")
    if (above_one := above_one_words(plan.layers)) is not None:
        said.append(f"Note: {above_one}.")
    return "\n\n".join(said)


def _making(compression: Compression, commit: str | None) -> str:
    known = {"commit": commit, "sha256": compression.plan.digest}
    facts = ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)
    of = f" ({facts})" if facts else ""
    used = [f"- compressor {VERSION}", *(f"- {library} {version(library)}" for library in _LIBRARIES)]
    return "\n\n".join(
        (
            f"From the {'low-rank' if compression.plan.squeezed else 'dense'} weights{of} by",
            f"```\n{compression.command}\n```",
            "with",
            "\n".join([*used, f"- Python {platform.python_version()}"]),
        )
    )
