"""The interactive explorer: one page that plays the simulated training, offline, and can open with a real recipe.

The page implements `compressor.measure.simulation` number by number, and computes what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compressor.formatting import format_count, one_line
from compressor.measure import EPSILON, MemoryWindow, Spectrum, effective_ranks
from compressor.measure.simulation import SimulatedTraining
from compressor.recipe import TrainingRecipe
from compressor.report.script_text import script_text
from compressor.report.wording import recipe_sources, recipe_words

TEMPLATE = Path(__file__).with_name("explorer.html")
_PLACE_OF_THE_CONTENT = "/* content */"

# Singular values that a figure can show.
POINTS = 200

# The range of every slider. A weight decay of 0 is a stop too.
LIMITS: dict[str, tuple[float, float]] = {
    "batch_size": (1, 64),
    "uses": (1, 64),
    "learning_rate": (1e-4, 1.0),
    "weight_decay": (1e-4, 1.0),
    "width": (8, 64),
    "anisotropy": (0.0, 3.0),
    "surviving_initialization": (0.0, 1.0),
}


@dataclass(frozen=True)
class Preset:
    """A run to start from, what to look for in it, and after how many windows it is shown."""

    name: str
    note: str
    training: SimulatedTraining
    windows: float = 2.0


PRESETS = (
    Preset(
        "Window shorter than the width",
        "Strong decay and single examples: the window holds fewer strokes than W has directions. The bound binds, and "
        "the effective rank stays far below a Gaussian matrix's for good.",
        SimulatedTraining(32, 1, 1, learning_rate=0.3, weight_decay=0.6),
    ),
    Preset(
        "The same, batch 8",
        "The same window with eight strokes per step: enough of them for full rank. This is the batch-size effect of "
        "the theory, at hyperparameters where it exists.",
        SimulatedTraining(32, 8, 1, learning_rate=0.3, weight_decay=0.6),
    ),
    Preset(
        "A few strokes",
        "Half of W is forgotten at every step: what is left is hardly more than the last strokes.",
        SimulatedTraining(32, 1, 1, learning_rate=0.5, weight_decay=1.0),
    ),
    Preset(
        "Source: B = 1, μ = λ = 0.10",
        "The source calls this extremely low rank. It is, for the first eight steps; then W has full rank, and in the "
        "steady state its effective rank is that of a Gaussian matrix within a few per cent.",
        SimulatedTraining(8, 1, 1, learning_rate=0.10, weight_decay=0.20),
    ),
    Preset(
        "Source: B = 8, μ = 0.02, λ = 0.01",
        "The source calls this higher rank. A stroke has full rank here, and the steady state is hardly different from "
        "that of B = 1.",
        SimulatedTraining(8, 8, 1, learning_rate=0.02, weight_decay=0.02),
    ),
    Preset(
        "Anisotropic gradients",
        "The window is long and the bound vacuous, yet the effective rank is low: gradients that favor few directions "
        "are enough, without any forgetting.",
        SimulatedTraining(32, 8, 1, learning_rate=0.1, weight_decay=0.1, anisotropy=1.5),
    ),
    Preset(
        "Surviving initialization",
        "A fresh network: its random start has full rank and fades by 1 − lr wd per step. Singular values below the "
        "edge may be nothing but what is left of it.",
        SimulatedTraining(32, 8, 1, learning_rate=0.05, weight_decay=0.1, anisotropy=1.5, surviving_initialization=1.0),
        windows=0.8,
    ),
)


@dataclass(frozen=True)
class WrittenSpectrum:
    """The singular values of a layer, and those of what training wrote on the share that is left of its start.

    `source` is what its initial weights are called.
    """

    name: str
    source: str
    share: float
    values: Spectrum
    written: Spectrum


@dataclass(frozen=True)
class ExploredLayers:
    """Layers of one model with the same shape, uses per example and memory window.

    `shape` is (d_out, d_in), None if only a recipe is known; `entropy_ranks` is the range of their entropy effective
    ranks, None if none was measured; `written` are spectra of the first of them whose initial weights are known.
    """

    names: tuple[str, ...]
    shape: tuple[int, int] | None
    uses: int | None
    window: MemoryWindow
    entropy_ranks: tuple[float, float] | None
    written: WrittenSpectrum | None = None


def explorer_page(recipe: TrainingRecipe | None = None, layers: Sequence[ExploredLayers] = ()) -> str:
    """The page as text; it opens with the first of `layers`, trained by `recipe`, or with the first preset."""
    content = {
        "epsilon": EPSILON,
        "limits": LIMITS,
        "presets": [asdict(preset) for preset in PRESETS],
        "recipe": None if recipe is None else _recipe_content(recipe, layers),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    assert template.count(_PLACE_OF_THE_CONTENT) == 1
    return template.replace(_PLACE_OF_THE_CONTENT, script_text(content))


def _recipe_content(recipe: TrainingRecipe, layers: Sequence[ExploredLayers]) -> dict[str, Any]:
    return {
        "words": one_line(recipe_words(recipe)),
        "sources": one_line(recipe_sources(recipe)),
        "steps": recipe.total_steps,
        "layers": [_layers_content(recipe, each) for each in layers],
    }


def _layers_content(recipe: TrainingRecipe, layers: ExploredLayers) -> dict[str, Any]:
    training, remarks = pictured(recipe, layers)
    window, exponent = layers.window, layers.window.forgetting_exponent
    return {
        "name": one_line(layers.names[0]) if layers.names else "",
        "alike": max(len(layers.names) - 1, 0),
        "shape": layers.shape,
        "uses": layers.uses,
        "window": window.steps,
        "bound": window.rank_bound,
        "vacuous": window.vacuous,
        "reason": one_line(window.reason),
        # JSON has no infinity; the share says it as 0.
        "exponent": None if exponent is None or math.isinf(exponent) else exponent,
        "share": None if exponent is None else math.exp(-exponent),
        "entropyRanks": layers.entropy_ranks,
        "training": training.to_dict(),
        "remarks": remarks,
        "written": None if layers.written is None else _written_content(layers.written),
    }


def _written_content(written: WrittenSpectrum) -> dict[str, Any]:
    shown = np.unique(np.linspace(0, len(written.values) - 1, min(len(written.values), POINTS)).round().astype(int))
    return {
        "name": one_line(written.name),
        "source": one_line(written.source),
        "share": written.share,
        "count": len(written.values),
        "places": shown.tolist(),
        "spectra": [np.asarray(each)[shown].tolist() for each in (written.values, written.written)],
        "ranks": [effective_ranks(each).energy for each in (written.values, written.written)],
    }


def _weight_decay_of_the_window(recipe: TrainingRecipe, window: MemoryWindow, learning_rate: float) -> float | None:
    """The weight decay with which plain SGD at a constant learning rate has the recipe's window.

    None if the recipe's own has it, or if there is none in the range of the simulation.
    """
    if window.steps is None or not learning_rate or (recipe.schedule == "constant" and not recipe.momentum):
        return None
    # Half a step inside the window, so that rounding cannot make it one longer.
    decay = -math.expm1(math.log(window.epsilon) / (window.steps - 0.5)) / learning_rate
    least, most = LIMITS["weight_decay"]
    return decay if least <= decay <= most else None


def pictured(recipe: TrainingRecipe, layers: ExploredLayers) -> tuple[SimulatedTraining, list[str]]:
    """The simulated run nearest to a recipe, and a remark on everything about it that the simulation leaves out."""
    default = PRESETS[0].training
    remarks: list[str] = []

    def shown(name: str, words: str, value: float | None, *, otherwise: float) -> float:
        if value is None:
            remarks.append(f"the {words} is unknown; the simulation uses {otherwise:g}")
            return otherwise
        least, most = LIMITS[name]
        if least <= value <= most or (name == "weight_decay" and value == 0):
            return value
        nearest = min(max(value, least), most)
        number = format_count(value) if isinstance(value, int) else f"{value:g}"
        remarks.append(f"the {words}, {number}, is out of range; the simulation uses {nearest:g}")
        return nearest

    batch_size = shown("batch_size", "batch size", recipe.batch_size, otherwise=default.batch_size)
    uses = shown("uses", "number of uses per example", layers.uses, otherwise=default.uses)
    learning_rate = shown("learning_rate", "learning rate", recipe.learning_rate, otherwise=default.learning_rate)
    weight_decay = shown("weight_decay", "weight decay", recipe.weight_decay, otherwise=default.weight_decay)
    paced = _weight_decay_of_the_window(recipe, layers.window, learning_rate)
    if paced is not None:
        weight_decay = paced
        remarks.append(
            f"the weight decay is {weight_decay:.3g} in the simulation, which at its constant learning rate gives the "
            f"recipe's window of {format_count(layers.window.steps or 0)} steps"
        )
    narrow = None if layers.shape is None else min(layers.shape)
    width = int(shown("width", "width of the layer", narrow, otherwise=default.width))
    if width % 2:
        width -= 1
        remarks.append(f"the width of the layer is odd; the simulation uses {width}")
    exponent = layers.window.forgetting_exponent
    share = 0.0 if exponent is None else math.exp(-exponent)
    if exponent is None:
        remarks.append("how much of the start survives is unknown; the simulation starts from zero")
    if recipe.momentum:
        remarks.append("momentum is not simulated; it is included in the window and in K")
    if recipe.family == "adaptive":
        remarks.append(
            f"the simulation is of plain SGD; {one_line(str(recipe.optimizer))} rescales every entry of an update"
        )
    if recipe.schedule not in (None, "constant"):
        remarks.append(
            "the simulation stays at the peak learning rate; the schedule is included in the window and in K"
        )
    training = SimulatedTraining(
        width, int(batch_size), int(uses), learning_rate, weight_decay, 0.0, min(share, 1.0), default.seed
    )
    return training, remarks
