"""The list of training hyperparameters on a Hugging Face model card."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from compressor.documents import parse_yaml, read_text
from compressor.errors import BadInput
from compressor.recipe.recipe import TrainingRecipe, whole_seed
from compressor.recipe.trainer import optimizer_named, warmup

_HEADING = re.compile(r"^#+[ \t]*training hyperparameters[ \t]*$", re.IGNORECASE | re.MULTILINE)
_NEXT_HEADING = re.compile(r"^#+[ \t]", re.MULTILINE)
_ITEM = re.compile(r"[-*][ \t]+[*`]*(\w+)[*`]*[ \t]*:[*`]*[ \t]*(.*)")
_OPTIMIZER = re.compile(
    r"(?:Use[ \t]+)?(?P<name>[\w.\-]+)(?:.*?(?:args are:|optimizer_args=)(?P<arguments>.*))?", re.DOTALL
)


def has_hyperparameters(text: str) -> bool:
    """Whether a text has the heading under which a Trainer lists hyperparameters."""
    return _HEADING.search(text) is not None


def read_model_card(path: str | Path) -> TrainingRecipe:
    """The recipe in the list that `transformers.Trainer` writes under "Training hyperparameters".

    The list may have further lines, named as the fields of `TrainingRecipe`, for what a Trainer leaves out:
    weight decay, momentum, dataset size, sequence length. The base model is that of the front matter. A card with
    neither tells nothing. Raises `BadInput` if a value in the list is not what its name says.
    """
    path = Path(path)
    text = read_text(path)
    items = _items(text)
    values: dict[str, Any] = _trainer_values(items)
    own = {entry.name for entry in fields(TrainingRecipe)} - {"sources", "optimizer"}
    values |= {name: value for name, value in items.items() if name in own}
    values["seed"] = whole_seed(items.get("seed"))
    values["base_model"] = values.get("base_model") or _base_model(text)
    return TrainingRecipe.from_dict(values, source=f"{path.name} (model card)")


def hyperparameter_lines(recipe: TrainingRecipe) -> list[str]:
    """A recipe as the list of a card, from which `read_model_card` reads the same recipe again.

    A value that would not be read as it is, such as a name with a comma in a list of names, is left out; so is one that
    HTML or Markdown would make something else of, because it may come from a card that anybody wrote.
    """
    lines = []
    for name, value in recipe.to_dict().items():
        if value is None or name == "sources":
            continue
        if isinstance(value, dict):
            text = ", ".join(f"{glob}: {decay!r}" for glob, decay in value.items()) or "{}"
        elif isinstance(value, list):
            text = ", ".join(map(str, value)) or "[]"
        else:
            text = str(value)
        try:
            same = getattr(TrainingRecipe.from_dict({name: text}), name) == getattr(recipe, name)
        except BadInput:
            same = False
        if same and text == " ".join(text.split()) and (not value or is_plain(text)):
            lines.append(f"- {name}: {text}")
    return lines


def is_plain(text: str) -> bool:
    """Whether a text contains no HTML, and no Markdown link or code."""
    return re.search(r"[<>&`\\\[\]]|://", text) is None


def front_matter(text: str) -> tuple[dict[str, Any], str]:
    """The metadata at the top of a card, and the text after it; {} and the whole text if there is none."""
    front = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    if front is None:
        return {}, text
    try:
        read = parse_yaml(front[1], where="front matter")
    except BadInput:
        return {}, text
    if not isinstance(read, dict):
        return {}, text
    return {key: value for key, value in read.items() if isinstance(key, str)}, text[front.end() :]


def _base_model(text: str) -> str | None:
    """The model that the front matter names as the one that training started from.

    The base of a quantized model, which a compressed one is called on the hub, is the same model in other numbers.
    """
    metadata, _ = front_matter(text)
    if metadata.get("base_model_relation") == "quantized":
        return None
    base = metadata.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    return base if isinstance(base, str) and base.strip() else None


def _items(text: str) -> dict[str, str]:
    heading = _HEADING.search(text)
    if heading is None:
        return {}
    section = text[heading.end() :]
    if (end := _NEXT_HEADING.search(section)) is not None:
        section = section[: end.start()]
    items: dict[str, str] = {}
    name = None
    for line in section.splitlines():
        if (item := _ITEM.match(line.strip())) is not None:
            name = item[1]
            items[name] = item[2].strip()
        elif not line.strip():
            name = None
        elif name is not None:
            # The arguments of an optimizer that is not Adam are on a line of their own.
            items[name] += f"\n{line.strip()}"
    return {key: value for key, value in items.items() if value}


def _trainer_values(items: dict[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if (optimizer := _OPTIMIZER.match(items.get("optimizer", ""))) is not None:
        # Trainers up to 4.46 wrote "Adam with betas=..." for what was AdamW.
        adamw = items["optimizer"].startswith("Adam with betas=")
        values = optimizer_named("adamw" if adamw else optimizer["name"], optimizer["arguments"])
        if optimizer["arguments"] is None and "momentum" in values:
            del values["momentum"]  # a name alone says nothing about momentum
    if (schedule := items.get("lr_scheduler_type")) is not None:
        values["schedule"] = schedule.removeprefix("SchedulerType.").lower()
        steps, ratio = items.get("lr_scheduler_warmup_steps"), items.get("lr_scheduler_warmup_ratio")
        # A Trainer lists a warm-up only if there was one.
        values["warmup_steps"] = warmup(values["schedule"], steps, ratio) or 0
    values["learning_rate"] = items.get("learning_rate")
    # The total is listed where it is not the batch size of one process.
    values["batch_size"] = items.get("total_train_batch_size", items.get("train_batch_size"))
    values["steps"] = items.get("training_steps")
    values["epochs"] = items.get("num_epochs")
    return values
