"""Writes a reference model's card and its figures; the four training scripts share it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Result:
    """One figure of the card: the metric under its Hugging Face type, measured on every split."""

    metric: str
    name: str
    train: float
    validation: float
    test: float
    digits: int

    def row(self) -> str:
        figures = (f"{value:.{self.digits}f}" for value in (self.train, self.validation, self.test))
        return f"| {self.name} | {' | '.join(figures)} |"


@dataclass(frozen=True)
class Card:
    """What a card says about a model, apart from what is the same in all of them."""

    name: str
    summary: str
    intended_use: str
    data: str
    task: str
    dataset: tuple[str, str]  # Hugging Face type, readable name
    libraries: tuple[str, ...]  # the first one loads the model
    tags: tuple[str, ...]
    hyperparameters: Mapping[str, object]
    results: tuple[Result, ...]
    parameters: int
    notes: str = ""


TEMPLATE = """\
---
{front_matter}---

# {name}

{summary}

## Intended use

{intended_use}

## Training and evaluation data

{data}

## Results

| metric | train | validation | test |
|---|---|---|---|
{rows}

The model has {parameters:,} parameters. Hyperparameters were chosen on the validation split; the test split
only gave figures for this card. `metrics.json` holds the same figures unrounded.
{notes}
## Training procedure

```
python model_cards/{name}/train.py
```

trains the model from nothing on two cores and writes the weights, `metrics.json` and this card. It is
seeded: the same machine and the same library versions give the same weights.

### Training hyperparameters

The following hyperparameters were used during training:
{hyperparameters}

### Framework versions

{versions}
"""


def write_card(folder: Path, card: Card, extra_figures: Mapping[str, object]) -> None:
    """Write `metrics.json` (figures of the results, and `extra_figures`) and `README.md` into `folder`."""
    figures = {
        "parameters": card.parameters,
        "metrics": {
            result.metric: {"train": result.train, "validation": result.validation, "test": result.test}
            for result in card.results
        },
        **extra_figures,
    }
    (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    text = TEMPLATE.format(
        front_matter=yaml.safe_dump(_front_matter(card), sort_keys=False, allow_unicode=True),
        name=card.name,
        summary=card.summary.strip(),
        intended_use=card.intended_use.strip(),
        data=card.data.strip(),
        rows="\n".join(result.row() for result in card.results),
        parameters=card.parameters,
        notes=f"\n{card.notes.strip()}\n" if card.notes else "",
        hyperparameters="\n".join(f"- {name}: {value}" for name, value in card.hyperparameters.items()),
        versions="\n".join(
            (
                f"- Python {platform.python_version()}",
                *(f"- {name} {version(name)}" for name in card.libraries),
            )
        ),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _front_matter(card: Card) -> dict[str, object]:
    kind, dataset = card.dataset
    return {
        "license": "apache-2.0",
        "library_name": {"torch": "pytorch"}.get(card.libraries[0], card.libraries[0]),
        "pipeline_tag": card.task,
        "tags": list(card.tags),
        "metrics": [result.metric for result in card.results],
        "model-index": [
            {
                "name": card.name,
                "results": [
                    {
                        "task": {"type": card.task},
                        "dataset": {"type": kind, "name": dataset, "split": "test"},
                        "metrics": [
                            {
                                "type": result.metric,
                                "name": result.name,
                                "value": round(result.test, result.digits),
                            }
                            for result in card.results
                        ],
                    }
                ],
            }
        ],
    }
