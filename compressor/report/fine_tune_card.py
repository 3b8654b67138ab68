"""Cards of fine-tunes: of the adapter that one is beside its base, and of the dense weights that both make again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from compressor.recipe.card import front_matter
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
from compressor.report.wording import error_words, format_size, percent, rounding_words, shape_of

if TYPE_CHECKING:
    from compressor.planning import LayerPlan
    from compressor.results import BeforeAfter

# What is as true of a fine-tune's adapter as of itself, and of a fine-tune as of its base.
_CARRIED = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")


def adapter_card(
    *,
    name: str,
    base: str,
    revision: str | None,
    tuned: str,
    config: Mapping[str, Any] | None,
    original: str,
    sizes: BeforeAfter,
    base_bytes: int,
    rounding_share: float,
    layers: Sequence[LayerPlan],
    saved: Sequence[str],
    peft: str,
    vllm: str,
) -> str:
    """The card of an adapter folder as text.

    `name` is what the folder is loaded by, `base` and `tuned` are the models' names, `revision` the base's commit on
    the hub, `config` the base's `config.json`, and `original` the fine-tune's own card, whose license, language and
    data are carried over. `sizes` are the bytes of the fine-tune's and the adapter's weight files, `rounding_share` is
    how much of the difference rounding explains, `layers` are the plans of the pairs, `saved` the modules that are
    saved whole, and `peft` and `vllm` say what those make of it.
    """
    carried = _carried(original)
    if (config or {}).get("architectures") and architecture_of(config).endswith("ForCausalLM"):
        carried.setdefault("pipeline_tag", "text-generation")
    data = ModelCardData(
        library_name="peft",
        base_model=repository_name(base),
        base_model_relation="adapter",
        tags=["lora", *TAGS],
        **carried,
    )
    at = "" if revision is None else f", revision={json.dumps(revision)}"
    rows = (
        (
            code(layer.name),
            shape_of(layer.shape),
            str(layer.rank),
            "-" if math.isnan(layer.error) else error_words(layer.error, 4),
        )
        for layer in layers
    )
    parts = [
        f"# {plain_text(name)}",
        f"What {code(tuned)} adds to {code(base)}, as a LoRA adapter: low-rank pairs for {len(layers)} of its"
        f" matrices, each with the least error of its rank. Made by {TAG}.",
        LOADING,
        python_block(
            "import peft, transformers",
            f"base = transformers.{architecture_of(config)}.from_pretrained({json.dumps(base)}{at})",
            f"model = peft.PeftModel.from_pretrained(base, {json.dumps(name)})",
        ),
        f"{peft} {vllm}",
        "## Sizes",
        markdown_table(
            ("", "weight files", "of the fine-tune"),
            [
                ("fine-tune", format_size(sizes.before), ""),
                ("adapter", format_size(sizes.after), percent(sizes.after, sizes.before)),
                ("base, needed beside it", format_size(base_bytes), ""),
            ],
        ),
        "## Ranks",
        markdown_table(("layer", "shape", "rank", "relative Frobenius error"), rows),
        "Shape is outputs x inputs; error is that of the pair relative to what the fine-tuning added, in the Frobenius"
        " norm.",
    ]
    if words := rounding_words(rounding_share):
        parts.append(f"Rounding {words}.")
    if saved:
        parts.append(f"Saved whole: {', '.join(map(code, saved))}.")
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def applied_card(*, name: str, base: str, difference: str, config: Mapping[str, Any] | None, original: str) -> str:
    """The card of the dense fine-tune that a base and a file of pairs make; `original` is the card of the base.

    Its results and its training are those of other weights, so of its card only license, language, data and task stay.
    """
    data = ModelCardData(
        library_name="transformers",
        base_model=repository_name(base),
        base_model_relation="finetune",
        tags=[TAG],
        **_carried(original),
    )
    parts = [
        f"# {plain_text(name)}",
        f"A fine-tune of {code(base)}, put together from it and from the low-rank pairs of {code(difference)} by"
        f" {TAG}. Its weights are dense, and load as those of the base do.",
        LOADING,
        python_block(
            "import transformers", f"model = transformers.{architecture_of(config)}.from_pretrained({json.dumps(name)})"
        ),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _carried(card: str) -> dict[str, Any]:
    """What stays of a card's metadata, where it is text or a list of texts."""
    metadata = front_matter(card)[0]
    return {key: metadata[key] for key in _CARRIED if _is_text_or_texts(metadata.get(key))}


def _is_text_or_texts(value: object) -> bool:
    """Whether a value is text, or a list of texts, and no HTML."""
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and "<" not in text for text in texts)
