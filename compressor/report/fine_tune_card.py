"""Cards of fine-tunes: of an adapter for a base model, and of the dense weights that both make."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from compressor.documents import read_text
from compressor.fine_tuning.adapter import vllm_obstacles, vllm_rank
from compressor.formatting import format_percent, format_shape, format_size
from compressor.io import CARD_FILE
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
from compressor.report.wording import base_share_words, error_words, rounding_words

if TYPE_CHECKING:
    from compressor.fine_tuning.adapter import Adapter
    from compressor.fine_tuning.difference import Difference

# The metadata that hold for a fine-tune's adapter as well, and for a fine-tune of a base.
_CARRIED = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")


def adapter_card(
    adapter: Adapter, *, name: str, weight_bytes: int, errors: Mapping[str, float], verified_with: str | None
) -> str:
    """The card of an adapter folder as text.

    `name` is what the folder is loaded by, `weight_bytes` the size of its weights, `errors` are those of its pairs by
    layer, and `verified_with` is the version of PEFT that loaded it. Of the fine-tune's own card license, language and
    data are carried over.
    """
    adaptation, obstacles = adapter.adaptation, vllm_obstacles(adapter)
    difference = adaptation.difference
    tuned, base, config = (adaptation.stored or difference.tuned).name, difference.base.name, difference.base.config
    layers = [replace(plan, error=errors.get(layer.name, plan.error)) for layer, plan in adaptation.paired]
    vllm = (
        f"vLLM refuses {' and '.join(obstacles)}."
        if obstacles
        else f"vLLM takes it with `--enable-lora --max-lora-rank {vllm_rank(adapter)}`."
    )
    carried = _carried(_own_card(difference))
    if (config or {}).get("architectures") and architecture_of(config).endswith("ForCausalLM"):
        carried.setdefault("pipeline_tag", "text-generation")
    data = ModelCardData(
        library_name="peft",
        base_model=repository_name(base),
        base_model_relation="adapter",
        tags=["lora", *TAGS],
        **carried,
    )
    revision, fine_tune_bytes = adapter.config["revision"], difference.tuned.weight_bytes
    at = "" if revision is None else f", revision={json.dumps(revision)}"
    rows = (
        (
            code(layer.name),
            format_shape(layer.shape),
            str(layer.rank),
            "-" if math.isnan(layer.error) else error_words(layer.error, 4),
        )
        for layer in layers
    )
    tokens = difference.vocabulary
    resized = () if tokens is None else (f"base.resize_token_embeddings({tokens.after})",)
    parts = [
        f"# {plain_text(name)}",
        f"What {code(tuned)} adds to {code(base)}, as a LoRA adapter: low-rank pairs for {len(layers)} of its"
        f" matrices, each with the least error of its rank. Made by {TAG}.",
        LOADING,
        python_block(
            "import peft, transformers",
            f"base = transformers.{architecture_of(config)}.from_pretrained({json.dumps(base)}{at})",
            *resized,
            f"model = peft.PeftModel.from_pretrained(base, {json.dumps(name)})",
        ),
        f"{_peft_words(adapter, verified_with)} {vllm}",
        "## Sizes",
        markdown_table(
            ("", "weight files", "of the fine-tune"),
            [
                ("fine-tune", format_size(fine_tune_bytes), ""),
                ("adapter", format_size(weight_bytes), format_percent(weight_bytes, fine_tune_bytes)),
                ("base, needed beside it", format_size(difference.base.weight_bytes), ""),
            ],
        ),
        "## Ranks",
        markdown_table(("layer", "shape", "rank", "relative Frobenius error"), rows),
        "Shape is outputs x inputs; error is that of the pair relative to what the fine-tuning added, in the Frobenius"
        " norm.",
    ]
    if words := base_share_words(adaptation.shares, in_adapter=True):
        parts.append(f"Share: {words}.")
    rounding_share = difference.rounding_share(layer.tensor for layer, _ in adaptation.paired)
    if words := rounding_words(rounding_share):
        parts.append(f"Rounding {words}.")
    if adapter.saved.modules:
        parts.append(f"Saved whole: {', '.join(map(code, adapter.saved.modules))}.")
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _own_card(difference: Difference) -> str:
    """The card of a fine-tune; put together from pairs it has none, and its other files are the base's."""
    folder = difference.tuned.folder
    own = None if folder is None or folder == difference.base.folder else folder / CARD_FILE
    return read_text(own) if own is not None and own.is_file() else ""


def _peft_words(adapter: Adapter, verified_with: str | None) -> str:
    """Whether PEFT was tried with the adapter, and what of its warnings is to be known."""
    if verified_with is None:
        words = "It was written without being loaded by PEFT, which was not installed."
    else:
        words = f"PEFT {verified_with} loaded it before it was written, and made each of these changes of the base."
    if adapter.config["target_parameters"] and adapter.config["rank_pattern"]:
        words += " PEFT may warn that rank patterns match no module: they match parameters, and it follows them."
    return words


def applied_card(original: str, *, name: str, base: str, difference: str, config: Mapping[str, Any] | None) -> str:
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
    """The metadata of a card that carry over, if they are text or lists of text."""
    metadata = front_matter(card)[0]
    return {key: metadata[key] for key in _CARRIED if _is_text_or_texts(metadata.get(key))}


def _is_text_or_texts(value: object) -> bool:
    """Whether a value is text, or a list of texts, without HTML."""
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and "<" not in text for text in texts)
