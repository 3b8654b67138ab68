"""Numbers, sizes and recipes in words: the same in tables and in the report."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from compressor.planning import Budget
    from compressor.recipe import TrainingRecipe


def one_line(text: str) -> str:
    """The text on one line, with whatever could move a terminal's cursor written out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))


def shortened(name: str, width: int) -> str:
    """The name in at most `width` characters: its first number (which block) and its end say most, so those stay."""
    if len(name) <= width:
        return name
    block = re.search(r"(?<=\.)\d+\.", name)
    if block is not None and len(name) - block.start() < width:
        return "…" + name[block.start() :]
    head = "…" + block[0][:-1] if block is not None else name[: width // 3]
    tail = width - len(head) - 1
    return head + "…" + name[len(name) - tail :] if tail > 0 else name[:width]


def in_bytes(size: float) -> str:
    """A size in the decimal units that `--max-size 40MB` is written in."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


def thousands(number: int) -> str:
    """An exact count."""
    return f"{number:,}"


def compact(number: int) -> str:
    """A count in at most five characters, exact below a thousand."""
    size = float(number)
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(size) < 999.5:
            return f"{number:d}" if unit == "" else f"{size:.3g}{unit}"
        size /= 1000
    return f"{number:.0e}"


def percent(part: float, whole: float = 1) -> str:
    """A share in per cent, with one decimal; a dash where there is no whole."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def in_seconds(seconds: float) -> str:
    """A time in the unit that leaves it readable."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def shape_of(shape: tuple[int, ...]) -> str:
    return " x ".join(str(side) for side in shape)


def recipe_words(recipe: TrainingRecipe) -> str:
    """The hyperparameters that are known, in one sentence."""
    known = [
        ("learning rate ", recipe.learning_rate),
        ("weight decay ", recipe.weight_decay),
        ("batch ", recipe.batch_size),
    ]
    optimizer = {None: "optimizer unknown", "sgd": "SGD", "adamw": "AdamW", "adam": "Adam"}
    words = [optimizer.get(recipe.optimizer, str(recipe.optimizer))]
    if recipe.momentum:
        words.append(f"{'Nesterov ' if recipe.nesterov else ''}momentum {recipe.momentum:g}")
    words += [f"{label}{value:g}" for label, value in known if value is not None]
    if recipe.schedule is not None:
        words.append(f"{recipe.schedule} schedule")
    if recipe.total_steps is not None:
        words.append(f"{recipe.total_steps:,} steps")
    elif recipe.epochs is not None:
        words.append(f"{recipe.epochs:g} epochs")
    return "unknown" if words == ["optimizer unknown"] else ", ".join(words)


def recipe_sources(recipe: TrainingRecipe) -> str:
    """Where the hyperparameters were read, every place once."""
    places = list(dict.fromkeys(recipe.sources.values()))
    flags = [place.removeprefix("flag ") for place in places if place.startswith("flag ")]
    files = [place for place in places if not place.startswith("flag ")]
    return ", ".join([*flags, *files])


def budget_words(budget: Budget) -> str:
    """What was asked for, or what stands in for it."""
    value = math.nan if budget.value is None else budget.value
    return {
        "keep": f"keep {value:.4g} of the eligible parameters",
        "max-size": f"weight files of at most {in_bytes(value)}",
        "tolerance": f"relative error of at most {value:g} in every layer",
        "window-rule": "window rule: what training wrote above its initialisation",
        "plan": "the ranks of a given plan",
    }[budget.kind]


def quality_words(metric: Literal["accuracy", "perplexity"], value: float) -> str:
    """A score in the unit of its metric."""
    return percent(value) if metric == "accuracy" else f"{value:.4g}"


def change_words(metric: Literal["accuracy", "perplexity"], drop: float) -> str:
    """A change in quality: a minus is worse for accuracy, a plus for perplexity."""
    if metric == "accuracy":
        return f"{-100 * drop + 0.0:+.2f} points"
    return f"{drop:+.4g}"
